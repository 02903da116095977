"""One frozen Settings; flag > environment > file > default. No I/O here.

The functions read one written value each; they raise SettingsError with one line that names the value
and the way out, and never repeat what may be a secret.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from kvscope.observed.model import ContextSettings

DEFAULT_LISTEN = "127.0.0.1:10188"
DEFAULT_SERVER = "http://127.0.0.1:8080"

SHORTEST_INTERVAL_SECONDS = 0.05
LONGEST_INTERVAL_SECONDS = 3600.0
LONGEST_SOCKET_PATH_BYTES = 107

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
GPU_BACKENDS = ("auto", "nvml", "amdgpu", "none", "pretend")

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_EXAMPLES = {
    "URL": DEFAULT_SERVER,
    "PATH": "/etc/kvscope/main.file",
    "'Header: value'": "'X-Team: blue'",
    "auto|off|SECONDS": "off",
    "'ARGUMENTS'": "'-c 65536 -np 4'",
}
_SECRET_WORDS = ("auth", "cookie", "key", "password", "secret", "token")


class SettingsError(ValueError):
    """A setting that is impossible or unknown; its text is one line without secrets."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How one server is reached.

    url: http(s)://host:port[/prefix], without a slash at its end; with unix_socket, the host in it is only
    a name.
    api_key never leaves the Authorization header: it is left out of repr and of every output.
    api_key_from: where the key was read, fit to be shown.
    sleep_idle: "auto", "off", or the seconds after which the server sleeps. arguments: what the user says
    that the server was started with. model_file, kv_shape: the model's file, or a file with its shape
    alone, as kvscope can read it.
    """

    name: str
    url: str = DEFAULT_SERVER
    unix_socket: str | None = None
    api_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca_file: str | None = None
    sleep_idle: str | float = "auto"
    api_key_from: str | None = None
    arguments: ContextSettings | None = None
    model_file: str | None = None
    kv_shape: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything `kvscope serve` can be told.

    model_path_map: (folder as servers name it, the same folder as kvscope sees it). gpu: a backend's name,
    of the pretend one with its script behind a colon.
    """

    servers: tuple[ServerSettings, ...] = (ServerSettings("main"),)
    listen_host: str = "127.0.0.1"
    listen_port: int = 10188
    busy_interval_seconds: float = 0.5
    idle_interval_seconds: float = 2.0
    server_metrics: bool = True
    log_level: str = "info"
    log_format: str = "text"
    model_path_map: tuple[tuple[str, str], ...] = ()
    gpu: str = "auto"
    gpu_interval_seconds: float = 2.0
    gpu_pcie_throughput: bool = False


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server answers: a URL, and the socket it is reached through if it is no TCP port."""

    url: str
    unix_socket: str | None = None


def listen_address(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT or [IPV6]:PORT; port 0 lets the system choose a free one."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise SettingsError(f"{text!r} is an IPv6 address without brackets: write [{host}]:{port}")
    if not colon or not host or re.search(r"[\s/@\[\]]", host):
        raise SettingsError(f"{text!r} is not HOST:PORT: write for example {DEFAULT_LISTEN}")
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise SettingsError(f"{text!r} has the port {port!r}: it must be a number from 0 to 65535")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine reach a port that listens on host."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def host_and_port(host: str, port: int) -> str:
    """Return HOST:PORT as it stands in a URL, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def server_name(text: str) -> str:
    """Return text if it can name a server."""
    if not _NAME.fullmatch(text):
        raise SettingsError(
            f"{_without_credentials(text)!r} cannot name a server: use 1 to 64 letters, digits, _ . or -"
        )
    if key_variable(text) == "KVSCOPE_API_KEY_FILE":
        raise SettingsError(f"{text!r} cannot name a server, KVSCOPE_API_KEY_FILE has another use: rename it")
    return text


def key_variable(name: str) -> str:
    """Return the environment variable that holds the API key of the server called name."""
    return "KVSCOPE_API_KEY_" + re.sub(r"[.-]", "_", name).upper()


def server_and_address(text: str) -> tuple[str | None, Address]:
    """Return name and address of NAME=URL; the name is None where only a URL is written."""
    if re.match(r"(https?://|unix:)", text, re.IGNORECASE):
        return None, server_address(text)
    name, url = named_value(text, "URL")
    return name, server_address(url)


def named_value(text: str, what: str) -> tuple[str, str]:
    """Return both sides of NAME=VALUE; `what` is the word for VALUE in an error.

    Only a URL is repeated in an error: in the place of any other value somebody may have put a key.
    """
    name, equals, value = text.partition("=")
    if not equals or not value or not _NAME.fullmatch(name):
        shown = repr(_without_credentials(text)) if what == "URL" else "the value"
        raise SettingsError(f"{shown} is not NAME={what}: write for example main={_EXAMPLES[what]}")
    return server_name(name), value


def server_address(text: str) -> Address:
    """Return the address of http(s)://HOST[:PORT][/PREFIX] or unix:/PATH[:/PREFIX]."""
    shown = _without_credentials(text)
    if any(character.isspace() or not character.isprintable() for character in text):
        raise SettingsError(f"{shown!r} holds a space or control character: write it without")
    if text[:5].lower() == "unix:":
        return _socket_address(text[5:], shown)
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise SettingsError(
            f"{shown!r} is not a URL with a port from 1 to 65535: write for example {DEFAULT_SERVER}"
        ) from None
    if "@" in parts.netloc:
        raise SettingsError(
            f"{shown!r} holds a user name or password: leave it out and put the key in a file, --api-key-file"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(
            f"{shown!r} is no http://, https:// or unix: address: write for example {DEFAULT_SERVER}"
        )
    if "?" in text or "#" in text:
        raise SettingsError(f"{shown!r} goes on with ? or #: end it after the path")
    if port == 0:
        raise SettingsError(f"{shown!r} has the port 0: it must be from 1 to 65535")
    return Address(f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/"))


def _socket_address(text: str, shown: str) -> Address:
    path, _, prefix = text.partition(":")
    if not path.startswith("/") or path.endswith("/"):
        raise SettingsError(f"{shown!r} has no absolute socket path: write for example unix:/run/llama.sock")
    if len(path.encode()) > LONGEST_SOCKET_PATH_BYTES:
        raise SettingsError(
            f"{shown!r} is too long for a socket: its path must be at most {LONGEST_SOCKET_PATH_BYTES} bytes"
        )
    if (prefix and not prefix.startswith("/")) or "?" in prefix or "#" in prefix:
        raise SettingsError(f"{shown!r} has no path after the colon: write for example unix:{path}:/prefix")
    return Address("http://localhost" + prefix.rstrip("/"), path)


def interval_seconds(value: str | float) -> float:
    """Return a waiting time in seconds, from 0.05 to 3600."""
    seconds = _seconds(value)
    if not SHORTEST_INTERVAL_SECONDS <= seconds <= LONGEST_INTERVAL_SECONDS:
        raise SettingsError(
            f"{value!r} is not possible: it must be from {SHORTEST_INTERVAL_SECONDS:g} "
            f"to {LONGEST_INTERVAL_SECONDS:g} seconds"
        )
    return seconds


def sleep_idle_setting(value: str | float) -> str | float:
    """Return "auto", "off", or the seconds after which the server sleeps."""
    if value in ("auto", "off"):
        return value
    try:
        seconds = _seconds(value)
    except SettingsError:
        seconds = 0.0
    if seconds <= 0:
        raise SettingsError(
            f"{value!r} is not possible: write auto, off, or the seconds after --sleep-idle-seconds"
        )
    return seconds


def _seconds(value: str | float) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if isinstance(value, bool) or not math.isfinite(seconds):
        raise SettingsError(f"{value!r} is not a number of seconds: write for example 0.5")
    return seconds


def sleep_idle_of_server(text: str) -> tuple[str | None, str | float]:
    """Return server name and value of [NAME=]auto|off|SECONDS; the name is None where it is for all."""
    if "=" not in text:
        return None, sleep_idle_setting(text)
    name, value = named_value(text, "auto|off|SECONDS")
    return name, sleep_idle_setting(value)


def gpu_backend(text: str) -> str:
    """Return the value of --gpu: a backend's name, for pretend with a script behind a colon."""
    name, colon, script = text.partition(":")
    if name not in GPU_BACKENDS or (colon and (name != "pretend" or not script)):
        raise SettingsError(
            f"{text!r} is no kind of GPU: write " + ", ".join(GPU_BACKENDS) + " or pretend:FILE"
        )
    return text


def mapped_path(text: str) -> tuple[str, str]:
    """Return both folders of HOST=CONTAINER: as the server names it, and as kvscope sees it."""
    there, equals, here = text.partition("=")
    return path_pair(there, here) if equals else path_pair(text, "")


def path_pair(there: str, here: str) -> tuple[str, str]:
    """Return two folders if both are absolute. They are not repeated in errors: a home may stand there."""
    absolute = there.startswith("/") or re.match(r"[A-Za-z]:[\\/]", there)
    if not absolute or not here.startswith("/"):
        raise SettingsError(
            "a path map needs two absolute folders, the server's and kvscope's: "
            "write for example /srv/models=/models"
        )
    return there.rstrip("/") or "/", here.rstrip("/") or "/"


def header(name: str, value: str) -> tuple[str, str]:
    """Return a request header's name and value, if HTTP can carry them. No error repeats the value."""
    if not _HEADER_NAME.fullmatch(name):
        raise SettingsError("a header name may hold only letters, digits and - : write 'Name: value'")
    value = value.strip(" \t")
    if not value.isascii() or any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise SettingsError(
            f"header {name!r} has a value with a line break or another character that HTTP cannot carry: "
            "use printable ASCII"
        )
    return name, value


def header_of_server(text: str) -> tuple[str, tuple[str, str]]:
    """Return server name, and header name and value, of NAME='Header: value'."""
    name, rest = named_value(text, "'Header: value'")
    field_name, colon, value = rest.partition(":")
    if not colon:
        raise SettingsError("the header's value has no colon: write for example main='X-Team: blue'")
    return name, header(field_name.strip(), value)


def may_hold_secret(header_name: str) -> bool:
    """Return whether a header of this name usually carries a credential."""
    return any(word in header_name.lower() for word in _SECRET_WORDS)


def api_key(text: str, origin: str) -> str:
    """Return the first line of text that is not empty, as a key; origin is named in errors.

    A file for llama-server's own --api-key-file holds one key a line, each of them good.
    """
    key = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if not key:
        raise SettingsError(f"{origin} holds no key: write the API key or token into it")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise SettingsError(f"{origin} holds a key that HTTP cannot carry: use one line of printable ASCII")
    return key


def refuse_impossible(settings: Settings) -> None:
    """Raise SettingsError where settings that are possible alone do not go together."""
    if not settings.servers:
        raise SettingsError("no server is named: write --server NAME=URL or leave it out")
    if settings.busy_interval_seconds > settings.idle_interval_seconds:
        raise SettingsError(
            f"the busy interval of {settings.busy_interval_seconds:g} s is longer than the idle interval of "
            f"{settings.idle_interval_seconds:g} s: set --idle-interval too"
        )
    named: dict[str, str] = {}
    for server in settings.servers:
        variable = key_variable(server.name)
        other = named.get(variable)
        if other == server.name:
            raise SettingsError(f"server {server.name!r} is named twice: give each server its own name")
        if other is not None:
            raise SettingsError(
                f"servers {other!r} and {server.name!r} would share the key variable {variable}: rename one"
            )
        named[variable] = server.name
        if server.model_file and server.kv_shape:
            raise SettingsError(
                f"server {server.name!r} has a model file and a shape file: keep the one that is right"
            )
        if server.api_key and any(name.lower() == "authorization" for name in server.headers):
            raise SettingsError(
                f"server {server.name!r} has an API key and an Authorization header: keep only one"
            )


def _without_credentials(url: str) -> str:
    """Return a URL without what stands before @ or after ?, where secrets are written."""
    shown = re.split(r"[?#]", url, maxsplit=1)[0]
    if "@" in url:
        scheme, slashes, _ = url.partition("://")
        rest = re.split(r"[/?#]", url.rpartition("@")[2], maxsplit=1)[0]
        shown = f"{scheme}{slashes}...@{rest}" if slashes else f"...@{rest}"
    return shown
