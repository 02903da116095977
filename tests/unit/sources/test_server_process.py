"""Which process listens on a server's port, and what its flags and environment decide."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from kvscope.observed.model import ContextSettings
from kvscope.observed.server import ServerProcess
from kvscope.settings import ServerSettings
from kvscope.sources import server_process
from kvscope.sources.server_process import (
    NotReadableError,
    arguments_of,
    find_server_process,
    is_alive,
    is_llama_server,
    sleep_idle_seconds,
)

LISTEN = """
import socket, sys
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
sys.stdin.read()
"""

Start = Callable[..., tuple[int, int]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a program that listens, by name and flags: start("llama-server", "-np", "2") -> pid, port."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(name: str, *flags: str, **environment: str) -> tuple[int, int]:
        program = tmp_path / name
        program.write_text(LISTEN)
        process = subprocess.Popen(
            [sys.executable, str(program), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        processes.append(process)
        assert process.stdout
        return process.pid, int(process.stdout.readline())

    yield start_one
    for process in processes:
        process.communicate("")


def at(port: int, host: str = "127.0.0.1") -> ServerSettings:
    return ServerSettings("main", f"http://{host}:{port}")


# --- the process ------------------------------------------------------------------------------------


def test_the_process_that_listens_is_found_with_its_start_and_flags(start: Start) -> None:
    pid, port = start("llama-server", "--sleep-idle-seconds", "7", "-np", "2")
    found = find_server_process(at(port))
    assert found == ServerProcess(
        pid,
        psutil.Process(pid).create_time(),
        sleep_idle_seconds=7.0,
        settings=ContextSettings(slots=2, sleep_idle_seconds=7.0),
        working_directory=str(Path.cwd()),
    )
    assert is_alive(found)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_its_environment_counts_like_its_flags(start: Start, host: str) -> None:
    _, port = start("llama-server", LLAMA_ARG_N_PARALLEL="2", LLAMA_ARG_KV_UNIFIED="on")
    assert find_server_process(at(port, host)).settings == ContextSettings(slots=2, unified=True)


def test_a_file_of_settings_that_it_also_reads_is_named_and_leaves_nothing_to_defaults(
    start: Start, tmp_path: Path
) -> None:
    configuration = tmp_path / "llama.cpp" / "config.ini"
    configuration.parent.mkdir()
    configuration.write_text("ctx-size = 777\n")
    _, port = start("llama-server", "-np", "2", XDG_CONFIG_HOME=str(tmp_path))
    settings = find_server_process(at(port)).settings
    assert settings.notes == ("its user's llama.cpp/config.ini: settings in this file are left out",)
    assert "context_tokens" in settings.unreadable
    assert (settings.slots, "slots" in settings.unreadable) == (2, False)


def test_no_value_of_another_flag_is_kept(start: Start) -> None:
    _, port = start(
        "llama-server", "--api-key", "sk-1", "--api-kye", "-sk-2", "-sk-3=4", LLAMA_API_KEY="sk-5"
    )
    assert "sk-" not in str(find_server_process(at(port)))


def test_a_process_that_ended_is_not_alive_although_nobody_has_buried_it_yet(start: Start) -> None:
    pid, port = start("llama-server")
    found = find_server_process(at(port))
    psutil.Process(pid).kill()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    assert not is_alive(found)


def test_a_process_that_only_has_the_same_pid_is_another_one(start: Start) -> None:
    _, port = start("llama-server")
    found = find_server_process(at(port))
    assert not is_alive(ServerProcess(found.pid, found.started_at - 60))
    assert not is_alive(ServerProcess(2**31 - 1, found.started_at))


def test_another_program_on_the_port_is_named_and_not_read(start: Start) -> None:
    _, port = start("llama-swap", "--sleep-idle-seconds", "7")
    with pytest.raises(NotReadableError, match="is no llama-server"):
        find_server_process(at(port))


def test_a_listening_socket_of_this_very_process_is_found_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "is_llama_server", lambda _: True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert find_server_process(at(listening.getsockname()[1])).pid == os.getpid()


def test_of_two_programs_on_one_port_number_the_one_on_the_servers_address_is_read() -> None:
    listening = [
        _connection("0.0.0.0", 8080, 1),
        _connection("127.0.0.1", 8080, os.getpid()),
        _connection("127.0.0.2", 8080, 2),
    ]
    assert _pid_read(listening, at(8080)) == os.getpid()
    assert _pid_read(listening[:1], at(8080)) == 1


@pytest.mark.parametrize(
    "settings",
    [
        ServerSettings("main", "http://192.0.2.1:8080"),
        ServerSettings("main", "http://nowhere.invalid:8080"),
        ServerSettings("main", "http://a..b:8080"),
        ServerSettings("main", "http://localhost", unix_socket="/run/llama.sock"),
    ],
    ids=["another machine", "a name that does not resolve", "no name at all", "a unix socket"],
)
def test_what_is_not_behind_a_port_of_this_machine_has_no_process(settings: ServerSettings) -> None:
    with pytest.raises(NotReadableError, match="not reached over a port of this machine"):
        find_server_process(settings)


def test_a_port_that_nobody_listens_on_has_no_process() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(NotReadableError, match="no process of this machine"):
            find_server_process(at(unused.getsockname()[1]))


def test_a_process_of_another_user_or_container_is_told_as_such() -> None:
    with pytest.raises(NotReadableError, match="another user"):
        _pid_read([_connection("127.0.0.1", 8080, None)], at(8080))


@pytest.mark.parametrize("error", [psutil.AccessDenied(), PermissionError(1, "no"), psutil.NoSuchProcess(1)])
@pytest.mark.parametrize("call", ["net_connections", "Process"])
def test_a_system_that_lets_nobody_look_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, call: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setattr(psutil, call, refuse)
        with pytest.raises(NotReadableError) as refused:
            find_server_process(at(listening.getsockname()[1]))
    assert "\n" not in str(refused.value)


def _connection(host: str, port: int, pid: int | None) -> Any:
    return SimpleNamespace(status=psutil.CONN_LISTEN, laddr=SimpleNamespace(ip=host, port=port), pid=pid)


def _pid_read(connections: list[Any], settings: ServerSettings) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "net_connections", lambda kind: connections)
        patch.setattr(server_process, "_read", lambda pid: ServerProcess(pid, 0.0))
        return find_server_process(settings).pid


# --- the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        (["/opt/llama.cpp/build/bin/llama-server", "-m", "x.gguf"], True),
        ([r"llama-server.exe"], True),
        (["python3", "-m", "kvscope.demo.llama_server", "-m", "x"], True),
        (["/usr/bin/python3.12", "-u", "-X", "dev", "/usr/local/bin/llama-server", "--metrics"], True),
        (["./model.llamafile", "--server"], True),
        (["/opt/llama-server-b11549", "--port", "8080"], True),
        (["llama", "serve", "-m", "x.gguf"], True),
        (["kubectl", "port-forward", "svc/llama-server", "8080:8080"], False),
        (["ssh", "-NL", "8080:localhost:8080", "llama-box"], False),
        (["ssh", "-N", "llama-server"], False),
        (["sshd: llama-server@notty"], False),
        (["caddy", "reverse-proxy", "--from", ":8080", "--to", "llama:8080"], False),
        (["caddy", "run", "/etc/llama-server"], False),
        (["socat", "TCP-LISTEN:8080,fork", "TCP:llama.lan:8080"], False),
        (["/usr/bin/docker-proxy", "-container-ip", "llama-server", "-host-port", "8080"], False),
        (["python3", "-m", "http.server", "llama-server"], False),
        (["python3", "proxy.py", "llama-server"], False),
        (["python3", "-m", "llama_cpp.server"], False),
        (["python3", "-c", "import socket", "llama-server"], False),
        (["python3"], False),
        (["python3", "-m"], False),
        (["/usr/bin/docker-proxy", "-proto", "tcp"], False),
        (["ollama", "serve"], False),
        (["/usr/local/bin/llama-swap", "--config", "x"], False),
        (["nginx: master process"], False),
        ([], False),
    ],
)
def test_a_llama_server_is_known_by_the_name_of_its_program(command_line: list[str], expected: bool) -> None:
    assert is_llama_server(command_line) is expected


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        (["/opt/llama-server", "-c", "1"], ["-c", "1"]),
        (["llama", "serve", "-c", "1"], ["-c", "1"]),
        (["llama", "-c", "1"], ["-c", "1"]),
        (["python3", "-u", "-X", "dev", "-m", "kvscope.demo.llama_server", "-m", "x"], ["-m", "x"]),
        (["python3", "/usr/bin/llama-server", "-c", "1"], ["-c", "1"]),
        (["llama-server"], []),
    ],
)
def test_its_arguments_begin_behind_the_program(command_line: list[str], expected: list[str]) -> None:
    assert list(arguments_of(command_line)) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (ContextSettings(), None),
        (ContextSettings(sleep_idle_seconds=300.0), 300.0),
        (ContextSettings(sleep_idle_seconds=-1.0), None),
    ],
)
def test_it_sleeps_only_after_more_than_no_seconds(settings: ContextSettings, expected: float | None) -> None:
    assert sleep_idle_seconds(settings) == expected


@pytest.mark.parametrize("name", ["llama-server-proxy", "/opt/llama-server-tunnel", "llama-server-exporter"])
def test_what_stands_before_a_llama_server_is_none(name: str) -> None:
    assert not is_llama_server([name, "--port", "8080"])
