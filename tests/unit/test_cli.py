"""The command line: what holds when the same thing is said twice, and one line for what cannot be."""

from __future__ import annotations

import builtins
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from kvscope import cli
from kvscope.commands.serve import serve

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBhTCCASugAwIBAgIUJZZPBf0qhz/A7C1xjkPWp0QDpr0wCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMa3ZzY29wZSB0ZXN0MCAXDTI2MTEyMjE3NDA1NFoYDzIxMjYx
MDI5MTc0MDU0WjAXMRUwEwYDVQQDDAxrdnNjb3BlIHRlc3QwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAASvFG6lpOD8loC8iTPvUW00TmI8B7uCMpKEq61NRuze0iGj
TYjK9K2x8Jqaj44bX51Pi1X47SGU9vyNWH+0TULWo1MwUTAdBgNVHQ4EFgQUN6ve
3HLLNEBdqDSSn3DD8hkflIowHwYDVR0jBBgwFoAUN6ve3HLLNEBdqDSSn3DD8hkf
lIowDwYDVR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiBZIk+9xndayuea
efz6BsPjcL0hFCJ1m3hppQyWeTLlQwIhAI1H1L8oIM16weMWw0FrnLKbLh5n4MbT
Ekso0+Z3Xacg
-----END CERTIFICATE-----
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run kvscope in an environment without settings; returns exit code, stdout and stderr."""
    for variable in list(os.environ):
        if variable.startswith("KVSCOPE_"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)

    def run(*arguments: str, env: Mapping[str, str] = {}) -> tuple[int, str, str]:
        for variable, value in env.items():
            monkeypatch.setenv(variable, value)
        code = cli.run(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def check(run: Run) -> Callable[..., str]:
    """Return what --check-config prints for settings that are right."""

    def check(*arguments: str, env: Mapping[str, str] = {}) -> str:
        code, out, err = run("serve", "--check-config", *arguments, env=env)
        assert (code, err) == (0, "")
        return out

    return check


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Return the one line that a wrong setting gets."""

    def refused(*arguments: str, env: Mapping[str, str] = {}) -> str:
        code, out, err = run("serve", "--check-config", *arguments, env=env)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err

    return refused


def settings_file(folder: Path, text: str) -> str:
    path = folder / "kvscope.toml"
    path.write_text(text)
    return str(path)


def key_file(folder: Path, text: str = "CANARY\n", mode: int = 0o600) -> str:
    path = folder / "main.key"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_without_settings_the_usual_server_is_watched(check: Callable[..., str]) -> None:
    out = check()
    assert "server main: http://127.0.0.1:8080 " in out
    assert "http://127.0.0.1:10188/metrics" in out
    assert "0.5 s while busy, 2 s while idle" in out


def test_a_bare_url_is_the_server_main(check: Callable[..., str]) -> None:
    assert "server main: http://h:1 " in check("--server", "http://h:1")


def test_a_unix_socket_is_shown_as_it_was_written(check: Callable[..., str]) -> None:
    assert "server main: unix:/run/llama.sock:/v/w " in check("--server", "unix:/run/llama.sock:/v/w")


def test_a_flag_goes_before_its_variable_and_a_variable_before_the_file(
    check: Callable[..., str], tmp_path: Path
) -> None:
    file = settings_file(tmp_path, 'listen = "127.0.0.1:1"\nbusy_interval = 0.1\nidle_interval = 0.3\n')
    env = {"KVSCOPE_LISTEN": "127.0.0.1:2", "KVSCOPE_BUSY_INTERVAL": "0.2"}
    assert "127.0.0.1:1/metrics" in check("--config", file)
    out = check("--config", file, env=env)
    assert "127.0.0.1:2/metrics" in out
    assert "0.2 s while busy, 0.3 s while idle" in out
    out = check("--config", file, "--listen", "127.0.0.1:3", "--busy-interval", "0.25", env=env)
    assert "127.0.0.1:3/metrics" in out
    assert "0.25 s while busy" in out


def test_servers_named_by_a_variable_take_the_place_of_the_files(run: Run, tmp_path: Path) -> None:
    """So that a key from the file is never sent to an address that the file does not name."""
    key = key_file(tmp_path)
    file = settings_file(tmp_path, f'[servers.main]\nurl = "http://a:1"\napi_key_file = "{key}"\n')
    code, out, err = run(
        "serve", "--check-config", "--config", file, env={"KVSCOPE_SERVER": "main=http://b:1 x=http://c:1"}
    )
    assert code == 0
    assert "server main: http://b:1 (API key: none" in out
    assert "server x: http://c:1 " in out
    assert "http://a:1" not in out
    assert "set aside" in err


def test_everything_of_a_server_can_stand_in_the_file(check: Callable[..., str], tmp_path: Path) -> None:
    """Paths there count from the file's folder."""
    key_file(tmp_path)
    file = settings_file(
        tmp_path,
        """
        server_metrics = false
        log_level = "warning"
        log_format = "json"
        sleep_idle = "off"
        [servers.main]
        url = "http://a:1/prefix"
        api_key_file = "main.key"
        headers = { X-Team = "blue" }
        sleep_idle = 300
        [servers.other]
        url = "unix:/run/llama.sock"
        """,
    )
    out = check("--config", file)
    assert (
        "server main: http://a:1/prefix (API key: from ~/main.key; headers: X-Team; sleep idle: 300 s)" in out
    )
    assert "server other: unix:/run/llama.sock (API key: none; sleep idle: off)" in out
    assert "server metrics: off" in out


@pytest.mark.parametrize(
    ("arguments", "env", "shown"),
    [
        ((), {}, "GPUs: auto; they and the host: every 2 s"),
        (("--gpu", "pretend:game"), {"KVSCOPE_GPU": "none"}, "GPUs: pretend:game;"),
        (
            (),
            {"KVSCOPE_GPU": "none", "KVSCOPE_GPU_INTERVAL": "1"},
            "GPUs: none; they and the host: every 1 s",
        ),
        (("--gpu", "pretend:~/card.toml"), {}, "GPUs: pretend:card.toml;"),
    ],
)
def test_which_gpus_are_read(
    check: Callable[..., str], tmp_path: Path, arguments: tuple[str, ...], env: Mapping[str, str], shown: str
) -> None:
    (tmp_path / "card.toml").write_text("[[cards]]\nmemory_total_mib = 8192\n")
    assert shown in check(*arguments, env=env)


def test_a_settings_file_names_a_gpu_script_as_seen_from_its_own_folder(
    check: Callable[..., str], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "card.toml").write_text("[[cards]]\nmemory_total_mib = 8192\n")
    file = settings_file(tmp_path, 'gpu = "pretend:card.toml"\ngpu_interval = 5\ngpu_pcie = true\n')
    assert "GPUs: pretend:card.toml; they and the host: every 5 s" in check("--config", file)
    code, out, _ = run("serve", "--once", "--config", file, "--server", "http://127.0.0.1:1")
    assert code == 0
    assert 'kvscope_gpu_memory_total_bytes{gpu="pretend0"} 8.589934592e+09' in out


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ("nvidia", "'nvidia' is no kind of GPU: write auto, nvml, amdgpu, none, pretend or pretend:FILE"),
        ("nvml:x", "'nvml:x' is no kind of GPU"),
        ("pretend:", "'pretend:' is no kind of GPU"),
        ("pretend:gmae", "'gmae' cannot be read (No such file or directory): give one of default, game, "),
        ("pretend:bad.toml", "'bad.toml': cards[0].memory_total_mib is 'much', no number"),
    ],
)
def test_gpus_that_cannot_be_read_are_refused_at_the_start(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text('[[cards]]\nmemory_total_mib = "much"\n')
    assert reason in refused("--gpu", gpu)
    assert reason in refused("--config", settings_file(tmp_path, f'gpu = "{gpu}"\n'))
    assert reason in refused(env={"KVSCOPE_GPU": gpu})


def test_options_add_to_what_the_file_says_of_the_same_server(
    check: Callable[..., str], tmp_path: Path
) -> None:
    file = settings_file(
        tmp_path, '[servers.a]\nurl = "http://a:1"\nheaders = { x-team = "1", X-Room = "2" }\n'
    )
    out = check("--config", file, "--header", "a=X-Team: 3", "--sleep-idle", "a=60")
    assert "headers: X-Room, X-Team; sleep idle: 60 s" in out


def test_the_users_own_file_is_found(check: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "kvscope"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('[servers.own]\nurl = "http://a:1"\n')
    out = check()
    assert "server own: http://a:1 " in out
    assert "settings file: ~/.config/kvscope/config.toml" in out
    assert str(tmp_path) not in out


def test_the_file_may_be_named_by_a_variable(check: Callable[..., str], tmp_path: Path) -> None:
    file = settings_file(tmp_path, '[servers.own]\nurl = "http://a:1"\n')
    assert "server own: http://a:1 " in check(env={"KVSCOPE_CONFIG": file})


def test_no_path_is_shown_with_the_home_folders_name(check: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text(CERTIFICATE)
    out = check("--server", f"unix:{tmp_path}/llama.sock", "--ca-file", f"main={tmp_path}/ca.pem")
    assert "unix:~/llama.sock " in out
    assert "CA file: ~/ca.pem" in out
    assert str(tmp_path) not in out


def test_a_home_that_is_the_root_hides_no_path(check: Callable[..., str], tmp_path: Path) -> None:
    key = key_file(tmp_path)
    assert f"API key: from {key};" in check("--api-key-file", f"main={key}", env={"HOME": "/"})


def test_a_key_comes_from_its_variable_or_a_file_and_is_not_printed(
    check: Callable[..., str], tmp_path: Path
) -> None:
    servers = ("--server", "gpu-1=http://a:1", "--server", "main=http://b:1")
    out = check(
        *servers, "--api-key-file", f"main={key_file(tmp_path)}", env={"KVSCOPE_API_KEY_GPU_1": "CANARY"}
    )
    assert "server gpu-1: http://a:1 (API key: from KVSCOPE_API_KEY_GPU_1" in out
    assert "server main: http://b:1 (API key: from ~/main.key" in out
    assert "CANARY" not in out


def test_a_key_file_given_by_flag_goes_before_the_variable(check: Callable[..., str], tmp_path: Path) -> None:
    out = check("--api-key-file", f"main={key_file(tmp_path)}", env={"KVSCOPE_API_KEY_MAIN": "k"})
    assert "API key: from ~/main.key" in out


def test_an_empty_variable_is_no_setting(check: Callable[..., str]) -> None:
    assert "127.0.0.1:10188" in check(env={"KVSCOPE_LISTEN": "", "KVSCOPE_API_KEY_MAIN": ""})


def test_a_header_variable_holds_one_header_a_line(check: Callable[..., str]) -> None:
    out = check(env={"KVSCOPE_HEADER": "main=Authorization: Bearer CANARY\nmain=X-Team: blue\n"})
    assert "headers: Authorization, X-Team" in out
    assert "CANARY" not in out


def test_what_kubernetes_tells_of_a_service_called_kvscope_is_no_setting(check: Callable[..., str]) -> None:
    check(
        env={
            "KVSCOPE_SERVICE_HOST": "10.0.0.1",
            "KVSCOPE_SERVICE_PORT": "10188",
            "KVSCOPE_SERVICE_PORT_METRICS": "10188",
            "KVSCOPE_PORT": "tcp://10.0.0.1:10188",
            "KVSCOPE_PORT_10188_TCP": "tcp://10.0.0.1:10188",
            "KVSCOPE_PORT_10188_TCP_ADDR": "10.0.0.1",
        }
    )


def test_a_secret_that_everybody_can_read_is_warned_of_in_one_line(run: Run, tmp_path: Path) -> None:
    key = key_file(tmp_path, mode=0o644)
    code, _, err = run("serve", "--check-config", "--api-key-file", f"main={key}")
    assert code == 0
    assert err.count("\n") == 1
    assert "~/main.key holds a secret and every user can read it: chmod o-r" in err
    assert "CANARY" not in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--servr", "http://a:1"], "--servr"),
        (["--server"], "--server"),
        (["http://CANARY@a:1"], "--server NAME=URL"),
        (["--server", "a=http://a:1", "--server", "a=http://b:1"], "'a'"),
        (["--server", "a=http://a:1", "--server", "http://b:1"], "http://b:1"),
        (["--server", "a-b=http://a:1", "--server", "a_b=http://b:1"], "KVSCOPE_API_KEY_A_B"),
        (["--server", "main=http://u:CANARY@a:1"], "--api-key-file"),
        (["--listen", "127.0.0.1:99999"], "99999"),
        (["--busy-interval", "0"], "--busy-interval"),
        (["--busy-interval", "5"], "--idle-interval"),
        (["--idle-interval", "fast"], "'fast'"),
        (["--sleep-idle", "maybe"], "'maybe'"),
        (["--sleep-idle", "off", "--sleep-idle", "auto"], "--sleep-idle"),
        (["--sleep-idle", "other=off"], "'other'"),
        (["--api-key", "CANARY"], "--api-key-file"),
        (["--api-key=CANARY"], "--api-key-file"),
        (["--api-key-file", "CANARY"], "--api-key-file"),
        (["--api-key-file", "CANARY=="], "--api-key-file"),
        (["--api-key-file", "main=/nowhere/key"], "/nowhere/key"),
        (["--header", "main=Authorization: Bearer CANARY"], "KVSCOPE_HEADER"),
        (["--header", "main=X-Team: CANARY\nX: 1"], "X-Team"),
        (["--header", "main=X-Team: CANARY", "--header", "main=x-team: CANARY"], "x-team"),
        (["--ca-file", "main=/nowhere/ca.pem"], "/nowhere/ca.pem"),
        (["--ca-file", "other=/nowhere/ca.pem"], "main"),
        (["--log-level", "loud"], "loud"),
        (["--config", "/nowhere/kvscope.toml"], "/nowhere/kvscope.toml"),
        (["--config", "/"], "settings file /"),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(
    refused: Callable[..., str], arguments: list[str], named: str
) -> None:
    line = refused(*arguments)
    assert named in line
    assert "CANARY" not in line


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("KVSCOPE_LISTEN", "nowhere", "KVSCOPE_LISTEN"),
        ("KVSCOPE_SERVER_METRICS", "perhaps", "KVSCOPE_SERVER_METRICS"),
        ("KVSCOPE_SERVER", "a=http://u:CANARY@a:1", "KVSCOPE_SERVER"),
        ("KVSCOPE_SERVERS", "CANARY", "KVSCOPE_SERVERS"),
        ("KVSCOPE_PORT", "10188", "KVSCOPE_PORT"),
        ("KVSCOPE_API_KEY", "CANARY", "KVSCOPE_API_KEY_MAIN"),
        ("KVSCOPE_API_KEY_OTHER", "CANARY", "KVSCOPE_API_KEY_OTHER"),
        ("KVSCOPE_API_KEY_MAIN", "CANARY\x07", "KVSCOPE_API_KEY_MAIN"),
        ("KVSCOPE_API_KEY_FILE", "CANARY", "KVSCOPE_API_KEY_FILE"),
        ("KVSCOPE_HEADER", "main=CANARY", "KVSCOPE_HEADER"),
    ],
)
def test_a_wrong_variable_is_named_in_one_line(
    refused: Callable[..., str], variable: str, value: str, named: str
) -> None:
    line = refused(env={variable: value})
    assert named in line
    assert "CANARY" not in line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lisen = 'CANARY'", "'lisen'"),
        ("api_key = 'CANARY'", "'api_key'"),
        ("listen = 10188", "listen"),
        ("listen = 'h:99999'", "99999"),
        ("busy_interval = -1", "-1"),
        ("busy_interval = true", "True"),
        ("busy_interval = 5", "--idle-interval"),
        ("server_metrics = 'no'", "server_metrics"),
        ("log_level = 'loud'", "'loud'"),
        ("log_format = 3", "3"),
        ("sleep_idle = 0", "sleep_idle"),
        ("servers = 'http://a:1'", "[servers.main]"),
        ("[servers]", "[servers.main]"),
        ("servers.main = 'http://a:1'", "[servers.main]"),
        ("[servers.main]", "url"),
        ("[servers.main]\nurl = 'http://u:CANARY@a:1'", "servers.main.url"),
        ("[servers.main]\nurl = 'http://a:1'\napi_key = 'CANARY'", "api_key_file"),
        ("[servers.main]\nurl = 'http://a:1'\nkey = 'CANARY'", "'key'"),
        ("[servers.main]\nurl = 'http://a:1'\napi_key_file = 'nokey'", "nokey"),
        ("[servers.main]\nurl = 'http://a:1'\nheaders = { X-A = \"CANARY\\n\" }", "X-A"),
        ("[servers.main]\nurl = 'http://a:1'\nheaders = { X-A = 1 }", "X-A"),
        ("[servers.main]\nurl = 'http://a:1'\nheaders = 'X-A: CANARY'", "headers"),
        ("[servers.main]\nurl = 'http://a:1'\nheaders = { X-A = 'a', x-a = 'b' }", "x-a"),
        ("[servers.main]\nurl = 'http://a:1'\nsleep_idle = 'no'", "servers.main.sleep_idle"),
        ("[servers.'na me']\nurl = 'http://a:1'", "'na me'"),
        ("[servers.a-b]\nurl = 'http://a:1'\n[servers.a_b]\nurl = 'http://b:1'", "KVSCOPE_API_KEY_A_B"),
        ("listen = CANARY", "not TOML"),
        ("a = " + "[" * 5000, "~/kvscope.toml"),
    ],
)
def test_a_wrong_line_of_the_file_is_named_in_one_line(
    refused: Callable[..., str], tmp_path: Path, text: str, named: str
) -> None:
    line = refused("--config", settings_file(tmp_path, text))
    assert named in line
    assert "CANARY" not in line
    assert str(tmp_path) not in line


def test_a_file_that_is_no_text_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "kvscope.toml"
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused("--config", str(path))
    path.write_bytes(b"#" * 1_000_001)
    assert "larger than" in refused("--config", str(path))


def test_an_empty_key_file_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "~/main.key holds no key" in refused("--api-key-file", f"main={key_file(tmp_path, ' ')}")


def test_two_keys_for_one_server_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    env = {"KVSCOPE_API_KEY_MAIN": "CANARY", "KVSCOPE_API_KEY_FILE": f"main={key_file(tmp_path)}"}
    assert "KVSCOPE_API_KEY_MAIN" in refused(env=env)


def test_a_ca_file_without_a_certificate_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "holds no certificate" in refused("--ca-file", f"main={key_file(tmp_path)}")


def test_a_port_in_use_is_one_line_and_exit_code_1(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = run("serve", "--listen", address, "--server", "http://127.0.0.1:9")
    assert (code, out) == (1, "")
    assert err == (
        f"kvscope: {address} is in use: stop what listens there or choose another address with "
        "--listen HOST:PORT\n"
    )


def test_once_prints_one_look_and_ends(run: Run) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    code, out, _ = run("serve", "--once", "--server", f"http://127.0.0.1:{port}", "--log-level", "error")
    assert code == 0
    assert 'kvscope_server_state{server="main",state="unreachable"} 1.0' in out
    assert 'kvscope_server_up{server="main"} 0.0' in out


def test_the_help_and_the_version_need_no_settings(run: Run) -> None:
    assert run("--version")[1].startswith("kvscope ")
    for arguments in ([], ["--help"], ["serve", "--help"], ["healthcheck", "--help"]):
        code, out, err = run(*arguments, env={"KVSCOPE_NONSENSE": "1"})
        assert (code, err) == (0, "")
        assert "Example" in out


def test_every_option_of_serve_has_a_variable_except_those_for_one_run() -> None:
    without = {param.opts[0] for param in serve.params if not param.envvar}
    assert without == {"--once", "--check-config", "--api-key"}


def test_the_demo_without_its_packages_names_them_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "DEMO_NEEDS", ("kvscope_no_such_package",))
    code, out, err = run("demo", "--turns", "1")
    assert (code, out) == (1, "")
    assert err == "kvscope: the demo's own packages are missing: pip install 'kvscope[demo]'\n"


def test_the_demo_is_loaded_only_when_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    original = builtins.__import__

    def watched(name: str, *rest: object, **named: object) -> object:
        imported.append(name)
        return original(name, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", watched)
    run("--help")
    run("serve", "--check-config")
    assert not [name for name in imported if "demo" in name or name == "xllamacpp"]


def test_an_unknown_command_is_one_line(run: Run) -> None:
    code, out, err = run("watch")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "watch" in err


def test_healthcheck_says_when_nobody_answers(run: Run) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    code, out, err = run("healthcheck", "--listen", address)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert address in err
