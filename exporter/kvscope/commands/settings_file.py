"""The files that settings come from: TOML, API keys, certificates. No error repeats a secret."""

from __future__ import annotations

import contextlib
import os
import shlex
import ssl
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvscope import settings as written
from kvscope.observed.model import ContextSettings
from kvscope.settings import SettingsError
from kvscope.sources.gpu.backend import BackendMissingError
from kvscope.sources.gpu.pretend import built_in_scripts, read_script
from kvscope.sources.server_arguments import ArgumentsError, context_settings

LARGEST_SETTINGS_FILE_BYTES = 1_000_000
LARGEST_KEY_FILE_BYTES = 100_000

_PLAIN_KEYS = (
    "listen",
    "busy_interval",
    "idle_interval",
    "gpu",
    "gpu_interval",
    "gpu_pcie",
    "server_metrics",
    "log_level",
    "log_format",
)
_KEYS = (*_PLAIN_KEYS, "sleep_idle", "model_path_map", "servers")
_SERVER_KEYS = (
    "url",
    "api_key_file",
    "headers",
    "ca_file",
    "sleep_idle",
    "server_args",
    "model_file",
    "kv_shape",
)


@dataclass(frozen=True)
class ServerTable:
    """What a file says of one server."""

    address: written.Address
    api_key_file: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca_file: Path | None = None
    sleep_idle: str | float | None = None
    arguments: ContextSettings | None = None
    model_file: Path | None = None
    kv_shape: Path | None = None


@dataclass(frozen=True)
class SettingsFile:
    """What a TOML file says, read and checked. shown: its path, fit to be printed."""

    shown: str
    plain: Mapping[str, object]
    servers: Mapping[str, ServerTable]
    sleep_idle: str | float | None = None
    warnings: tuple[str, ...] = ()
    model_path_map: tuple[tuple[str, str], ...] = ()


def default_settings_file() -> Path | None:
    """Return the user's own settings file, if there is one."""
    base = os.environ.get("XDG_CONFIG_HOME")
    try:
        path = (Path(base) if base else Path.home() / ".config") / "kvscope" / "config.toml"
        return path if path.is_file() else None
    except (RuntimeError, OSError):  # no home, or none that this user may look into
        return None


def read_settings_file(path: Path) -> SettingsFile:
    """Return what the TOML file at path says. Raises SettingsError for anything unknown or impossible."""
    shown = shown_path(path)
    text = _text_of(path, "settings file", LARGEST_SETTINGS_FILE_BYTES)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"settings file {shown} is not TOML: {error}") from None
    except RecursionError:
        raise SettingsError(f"settings file {shown} is nested too deeply: no setting needs it") from None
    _refuse_unknown(shown, content, _KEYS)
    plain: dict[str, object] = {}
    for key in _PLAIN_KEYS:
        if key in content:
            with _told(f"{shown}: {key}"):
                plain[key] = _plain(key, content[key], path.parent)
    sleep_idle = None
    if "sleep_idle" in content:
        with _told(f"{shown}: sleep_idle"):
            sleep_idle = _sleep_idle(content["sleep_idle"])
    path_map: tuple[tuple[str, str], ...] = ()
    if "model_path_map" in content:
        with _told(f"{shown}: model_path_map"):
            path_map = _path_map(content["model_path_map"])
    tables = content.get("servers", {})
    if not isinstance(tables, dict) or ("servers" in content and not tables):
        raise SettingsError(f"{shown}: servers is no table with servers: write [servers.main]")
    servers = {name: _server(shown, name, table, path.parent) for name, table in tables.items()}
    secret = any(written.may_hold_secret(name) for table in servers.values() for name in table.headers)
    return SettingsFile(
        shown, plain, servers, sleep_idle, readable_by_others(path) if secret else (), path_map
    )


def key_from(path: Path) -> str:
    """Return the API key that the file at path holds in its first line."""
    text = _text_of(path, "key file", LARGEST_KEY_FILE_BYTES)
    return written.api_key(text, f"key file {shown_path(path)}")


def readable_by_others(path: Path) -> tuple[str, ...]:
    """Return one line of warning if every user may read the file at path, which holds a secret."""
    if os.name != "nt" and path.stat().st_mode & stat.S_IROTH:
        return (f"{shown_path(path)} holds a secret and every user can read it: chmod o-r it",)
    return ()


def refuse_bad_certificates(path: Path) -> None:
    """Raise SettingsError unless the file at path holds certificates."""
    try:
        ssl.create_default_context(cafile=str(path))
    except ssl.SSLError:
        raise SettingsError(
            f"CA file {shown_path(path)} holds no certificate that can be used: name a file in PEM format"
        ) from None
    except OSError as error:
        raise SettingsError(_cannot_read("CA file", path, error)) from None


def gpu_backend(text: str, folder: Path) -> str:
    """Return the value of --gpu, the file of its script as seen from folder.

    Raises SettingsError also for a script that cannot be read or played.
    """
    name, colon, script = written.gpu_backend(text).partition(":")
    if not colon:
        return text
    if script not in built_in_scripts():
        script = str(folder / path_of(script))
    try:
        read_script(script)
    except BackendMissingError as error:
        raise SettingsError(str(error)) from None
    return f"{name}:{script}"


def path_of(text: str) -> Path:
    """Return the path that text names, with ~ for the user's home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise SettingsError(f"{text!r} names a home folder that is not known: write the whole path") from None


def shown_path(path: Path) -> str:
    """Return a path as it may be printed: without the home folder's name."""
    try:
        home = Path.home()
        inside = path.absolute().relative_to(home)
    except (ValueError, RuntimeError):
        return str(path)
    # A service's home is often /, which hides nothing.
    return str(path) if home == Path(home.anchor) else f"~/{inside.as_posix()}"


def _text_of(path: Path, what: str, largest: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise SettingsError(
                f"{what} {shown_path(path)} is larger than {largest} bytes: name another file"
            )
        return content.decode()
    except OSError as error:
        raise SettingsError(_cannot_read(what, path, error)) from None
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{what} {shown_path(path)} is not UTF-8 text: name another file") from None


def _cannot_read(what: str, path: Path, error: OSError) -> str:
    return f"{what} {shown_path(path)} cannot be read ({error.strerror}): check its path and permissions"


def _server(shown: str, name: str, table: object, folder: Path) -> ServerTable:
    with _told(f"{shown}: servers"):
        written.server_name(name)
    where = f"{shown}: servers.{name}"
    if not isinstance(table, dict):
        raise SettingsError(f"{where} is no table: write [servers.{name}] and url = ... below it")
    if "api_key" in table:
        raise SettingsError(f"{where}.api_key is refused: put the key in a file and name it in api_key_file")
    _refuse_unknown(where, table, _SERVER_KEYS)
    if "url" not in table:
        raise SettingsError(f"{where} has no url: write url = {written.DEFAULT_SERVER!r}")
    values: dict[str, Any] = {}
    with _told(f"{where}.url"):
        values["address"] = written.server_address(_text(table["url"]))
    for key in ("api_key_file", "ca_file", "model_file", "kv_shape"):
        if key in table:
            with _told(f"{where}.{key}"):
                values[key] = folder / path_of(_text(table[key]))
    if "sleep_idle" in table:
        with _told(f"{where}.sleep_idle"):
            values["sleep_idle"] = _sleep_idle(table["sleep_idle"])
    if "server_args" in table:
        with _told(f"{where}.server_args"):
            values["arguments"] = server_arguments(table["server_args"])
    if "headers" in table:
        with _told(f"{where}.headers"):
            values["headers"] = _headers(table["headers"])
    return ServerTable(**values)


def server_arguments(value: object) -> ContextSettings:
    """Return what a server's arguments say, written as a shell takes them or as a list of words.

    Raises SettingsError for what llama-server would not take.
    """
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        words = value
    else:
        try:
            words = shlex.split(_text(value))
        except ValueError:
            raise SettingsError("the server's arguments have a quote that is not closed: close it") from None
    try:
        return context_settings(words, strict=True)
    except ArgumentsError as error:
        raise SettingsError(str(error)) from None


def _path_map(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise SettingsError("it is no table: write { '/srv/models' = '/models' }")
    return tuple(written.path_pair(there, _text(here)) for there, here in value.items())


def _headers(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise SettingsError("it is no table: write { X-Team = 'blue' }")
    headers: dict[str, str] = {}
    for name, text in value.items():
        if not isinstance(text, str):
            raise SettingsError(f"header {name!r} is no text: write it in quotes")
        name, text = written.header(name, text)
        if name.lower() in (each.lower() for each in headers):
            raise SettingsError(f"header {name!r} is there twice: keep one")
        headers[name] = text
    return headers


def _plain(key: str, value: object, folder: Path) -> object:
    """Return the value of a key that stands outside the server tables."""
    if key == "listen":
        return written.listen_address(_text(value))
    if key == "gpu":
        return gpu_backend(_text(value), folder)
    if key in ("busy_interval", "idle_interval", "gpu_interval"):
        return written.interval_seconds(_text_or_number(value))
    if key in ("server_metrics", "gpu_pcie"):
        if not isinstance(value, bool):
            raise SettingsError(f"{value!r} is not possible: write true or false")
        return value
    allowed = written.LOG_LEVELS if key == "log_level" else written.LOG_FORMATS
    if value not in allowed:
        raise SettingsError(f"{value!r} is not possible: write one of " + ", ".join(allowed))
    return value


def _sleep_idle(value: object) -> str | float:
    return written.sleep_idle_setting(_text_or_number(value))


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise SettingsError(f"{value!r} is no text: write it in quotes")
    return value


def _text_or_number(value: object) -> str | float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SettingsError(f"{value!r} is not possible: write a number of seconds")
    return value


def _refuse_unknown(where: str, table: Mapping[str, object], known: Iterable[str]) -> None:
    for key in table:
        if key not in known:
            raise SettingsError(f"{where}: {key!r} is no setting: it may hold " + ", ".join(known))


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Say of a SettingsError raised inside where it stands."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from None
