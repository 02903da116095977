"""The local process that listens on a server's port: its start, and what it was told to do."""

from __future__ import annotations

import contextlib
import re
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from urllib.parse import urlsplit

import psutil

from kvscope.observed.model import ContextSettings
from kvscope.observed.server import ServerProcess
from kvscope.settings import ServerSettings, is_loopback
from kvscope.sources.server_arguments import context_settings, with_file_left_out

# Whole names: what only mentions llama-server, as a title like "sshd: llama-server@pts/0" does, is none.
_LLAMA_SERVER = re.compile(
    r"[\w.-]*(?<!o)llama[-_.]?(?:cpp[-_.]?)?server[\w.-]*|[\w.-]*llamafile[\w.-]*|llama(?:\.exe)?",
    re.IGNORECASE,
)
_LLAMA = re.compile(r"llama(?:\.exe)?", re.IGNORECASE)
_STANDS_BEFORE_ONE = re.compile("proxy|tunnel|swap|exporter", re.IGNORECASE)
_PYTHON = re.compile(r"(?:python|pypy)w?[\d.]*(?:\.exe)?", re.IGNORECASE)
_PYTHON_OPTIONS_WITH_VALUE = frozenset({"-X", "-W", "--check-hash-based-pycs"})
_seen: dict[tuple[int, float], psutil.Process] = {}
"""Processes found so far and not ended: psutil knows them by a start that no step of the clock moves."""
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - looked for, not listened on


class NotReadableError(Exception):
    """The process cannot be seen; the message says why in one line."""


def find_server_process(settings: ServerSettings) -> ServerProcess:
    """Return the process that listens where the server's URL points.

    Raises NotReadableError for a server on another host, behind a unix socket, in another
    namespace (a container) or of another user.
    """
    url = urlsplit(settings.url)
    addresses = set() if settings.unix_socket else _addresses_here(url.hostname or "")
    if not addresses:
        raise NotReadableError("it is not reached over a port of this machine")
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        raise NotReadableError("this system does not let us list who listens on a port") from None
    listening = {
        connection.laddr.ip: connection.pid
        for connection in connections
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
    }
    # Two programs may share a port number on different addresses; a wildcard serves the rest.
    found = [address for address in (*sorted(addresses), *_WILDCARDS) if address in listening]
    if not found:
        raise NotReadableError("no process of this machine is seen listening there")
    pid = listening[found[0]]
    if pid is None:
        raise NotReadableError("it belongs to another user or lives in a container")
    return _read(pid)


def is_here(settings: ServerSettings) -> bool:
    """Return whether a server answers on this machine, so that its paths may be ours."""
    return settings.unix_socket is not None or bool(_addresses_here(urlsplit(settings.url).hostname or ""))


def is_alive(process: ServerProcess) -> bool:
    """Return whether this very process still runs (its pid was not given to another)."""
    seen = _seen.get((process.pid, process.started_at))
    try:
        found = seen or psutil.Process(process.pid)
        same = found.is_running() if seen else abs(found.create_time() - process.started_at) < 0.01
        if same and found.status() != psutil.STATUS_ZOMBIE:
            return True
    except (psutil.Error, OSError):
        pass
    _seen.pop((process.pid, process.started_at), None)
    return False


def _read(pid: int) -> ServerProcess:
    try:
        process = psutil.Process(pid)
        command_line = process.cmdline()
        environment = process.environ()
        started_at = process.create_time()
        name = process.name()
    except (psutil.Error, OSError):
        raise NotReadableError("its command line belongs to another user") from None
    # A container's proxy listens for a server whose own flags are out of sight.
    if not is_llama_server(command_line):
        raise NotReadableError(f"the process that listens there, {name}, is no llama-server")
    _seen[pid, started_at] = process
    settings = context_settings(arguments_of(command_line), environment)
    for file in _settings_files(pid, environment):
        settings = with_file_left_out(settings, file)
    return ServerProcess(
        pid=pid,
        started_at=started_at,
        sleep_idle_seconds=sleep_idle_seconds(settings),
        settings=settings,
        working_directory=_working_directory(process),
    )


def is_llama_server(command_line: Sequence[str]) -> bool:
    """Return whether a command line starts llama-server, itself or as a Python program.

    Only the program's own name counts: proxies and tunnels name the server that they lead to among
    their arguments, and proxies and launchers like llama-swap or ollama have flags of their own.
    """
    program, _ = _program(command_line)
    return _LLAMA_SERVER.fullmatch(program) is not None and not _STANDS_BEFORE_ONE.search(program)


def arguments_of(command_line: Sequence[str]) -> Sequence[str]:
    """Return what follows the program's name, or the word behind it in `llama serve`."""
    program, arguments = _program(command_line)
    has_word = _LLAMA.fullmatch(program) and arguments and not arguments[0].startswith("-")
    return arguments[1:] if has_word else arguments


def _program(command_line: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The name of what runs and its arguments; with a Python interpreter, of its script or module."""
    name = PurePath(command_line[0]).name if command_line else ""
    rest = deque(command_line[1:])
    if not _PYTHON.fullmatch(name):
        return name, tuple(rest)
    while rest:
        argument = rest.popleft()
        if argument in _PYTHON_OPTIONS_WITH_VALUE and rest:
            rest.popleft()
        elif argument == "-m" and rest:
            return rest.popleft().rpartition(".")[2], tuple(rest)
        elif argument == "-c":
            break
        elif not argument.startswith("-"):
            return PurePath(argument).name, tuple(rest)
    return "", ()


def sleep_idle_seconds(settings: ContextSettings) -> float | None:
    """Return after how many idle seconds the server sleeps, or None when it never does.

    llama.cpp common/arg.cpp (b11549): `--sleep-idle-seconds`, default -1, never.
    """
    seconds = settings.sleep_idle_seconds
    return seconds if seconds is not None and seconds > 0 else None


def _settings_files(pid: int, environment: Mapping[str, str]) -> Iterator[str]:
    """The files of settings that llama-server reads before its environment, by a name without a home.

    llama.cpp common/arg.cpp (b11549); flags and variables replace what they say; older builds read none.
    """
    own = environment.get("XDG_CONFIG_HOME") or f"{environment.get('HOME', '')}/.config"
    root = f"/proc/{pid}/root" if Path("/proc/self/root").exists() else ""
    for name, directory in (("/etc/", "/etc/"), ("its user's ", f"{own}/")):
        with contextlib.suppress(OSError, ValueError):
            if Path(f"{root}{directory}llama.cpp/config.ini").is_file():
                yield f"{name}llama.cpp/config.ini"


def _working_directory(process: psutil.Process) -> str | None:
    try:
        return process.cwd() or None
    except (psutil.Error, OSError):
        return None


def _addresses_here(host: str) -> set[str]:
    """The addresses of this machine that a host name or address stands for; none: it is elsewhere."""
    try:
        named = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, ValueError):
        return set()
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return {address for address in named if address in own or is_loopback(address)}
