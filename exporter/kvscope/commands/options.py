"""Where settings come from: flag > environment > TOML file > default, and what is told about them.

click reads flags and environment; a file's plain values become click's default_map. What belongs to one
server is put together here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from kvscope import settings as written
from kvscope.commands.settings_file import (
    ServerTable,
    SettingsFile,
    default_settings_file,
    gpu_backend,
    key_from,
    path_of,
    read_settings_file,
    readable_by_others,
    refuse_bad_certificates,
    server_arguments,
    shown_path,
)
from kvscope.observed.model import ContextSettings
from kvscope.settings import ServerSettings, Settings, SettingsError

Command = TypeVar("Command", bound=Callable[..., Any])

_FILE_KEY = "kvscope.settings_file"
_DEFAULTS = Settings()


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # older versions of click have no generic one
    _ParamType = click.ParamType


class Written(_ParamType):
    """A value that a function of kvscope.settings reads; `apart` is what its variable is split at."""

    def __init__(self, name: str, read: Callable[[str], object], apart: str | None = None) -> None:
        self.name = name
        self._read = read
        self._apart = apart

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return what was read; a value from the file was read before."""
        if not isinstance(value, str):
            return value
        try:
            return self._read(value)
        except SettingsError as error:
            self.fail(str(error), param, ctx)

    def split_envvar_value(self, rv: str) -> list[str]:
        """Return the values that one environment variable holds."""
        return [value.strip() for value in rv.split(self._apart) if value.strip()]


@dataclass(frozen=True)
class Chosen:
    """The settings that hold, where they came from, and what to warn of, one line each."""

    settings: Settings
    file: str | None
    warnings: tuple[str, ...]


def listen_options(command: Command) -> Command:
    """Add the options --config and --listen."""
    return _add(
        command,
        click.option(
            "--config",
            envvar="KVSCOPE_CONFIG",
            metavar="FILE",
            is_eager=True,
            expose_value=False,
            callback=_use_file,
            help="A TOML file.  [default: kvscope/config.toml in $XDG_CONFIG_HOME or ~/.config, "
            "if there is one]",
        ),
        click.option(
            "--listen",
            envvar="KVSCOPE_LISTEN",
            metavar="HOST:PORT",
            type=Written("listen", written.listen_address),
            default=written.DEFAULT_LISTEN,
            show_default=True,
            help="Where scrapes are answered.",
        ),
    )


def server_options(command: Command) -> Command:
    """Add the options that say which servers are watched and how."""

    return _add(
        command,
        _repeated(
            "--server",
            "[NAME=]URL",
            Written("server", written.server_and_address),
            "A server: http://HOST:PORT[/PREFIX], https://..., or unix:/PATH[:/PREFIX]. NAME= may be left "
            f"out where there is only one, then called main.  [default: main={written.DEFAULT_SERVER}]",
        ),
        _repeated(
            "--api-key-file",
            "NAME=PATH",
            Written("api_key_file", _named_path),
            "File with the server's API key in its first line. Or set KVSCOPE_API_KEY_<NAME>.",
        ),
        click.option("--api-key", hidden=True, expose_value=False, callback=_refuse_key),
        _repeated(
            "--header",
            "NAME='Header: value'",
            Written("header", written.header_of_server, apart="\n"),
            "A header for every request to the server; in the variable one a line. One that holds a "
            "credential is taken from variable or file only.",
        ),
        _repeated(
            "--ca-file",
            "NAME=PATH",
            Written("ca_file", _named_path),
            "Certificates (PEM) to trust for an https server.",
        ),
        _repeated(
            "--sleep-idle",
            "[NAME=]auto|off|SECONDS",
            Written("sleep_idle", written.sleep_idle_of_server),
            "Whether the server sleeps when idle, as given to it with --sleep-idle-seconds. One that may is "
            "not asked for /slots while idle, since each request would keep it awake.  [default: auto]",
        ),
        _repeated(
            "--server-args",
            "NAME='ARGUMENTS'",
            Written("server_args", _named_arguments, apart="\n"),
            "What the server was started with, in its own flags, where its process cannot be read or for "
            "what it does not say: '-c 65536 -np 4 -ctk q8_0'. In the variable one server a line.",
        ),
        _repeated(
            "--model-file",
            "NAME=PATH",
            Written("model_file", _named_path),
            "The model's file, where the path that the server names is not readable here.",
        ),
        _repeated(
            "--model-path-map",
            "HOST=CONTAINER",
            Written("model_path_map", written.mapped_path),
            "A folder of models as servers name it, and where kvscope sees the same folder.",
        ),
        _repeated(
            "--kv-shape",
            "NAME=FILE",
            Written("kv_shape", _named_path),
            "What `kvscope plan MODEL --shape` printed elsewhere, instead of the model's file.",
        ),
        _interval(
            "--busy-interval", _DEFAULTS.busy_interval_seconds, "Seconds between looks at a busy server."
        ),
        _interval(
            "--idle-interval", _DEFAULTS.idle_interval_seconds, "Seconds between looks at an idle server."
        ),
        click.option(
            "--gpu",
            envvar="KVSCOPE_GPU",
            metavar="|".join(written.GPU_BACKENDS) + "[:FILE]",
            type=Written("gpu", lambda text: gpu_backend(text, Path())),
            default=_DEFAULTS.gpu,
            show_default=True,
            help="How GPUs are read; auto takes what is there. pretend shows made-up ones by a script.",
        ),
        _interval(
            "--gpu-interval", _DEFAULTS.gpu_interval_seconds, "Seconds between looks at GPUs and host."
        ),
        click.option(
            "--gpu-pcie/--no-gpu-pcie",
            envvar="KVSCOPE_GPU_PCIE",
            default=False,
            help="Read how much goes over PCI Express too: NVIDIA's driver takes some 40 ms for it, AMD's a "
            "second.  [default: off]",
        ),
        click.option(
            "--server-metrics/--no-server-metrics",
            envvar="KVSCOPE_SERVER_METRICS",
            default=True,
            help="Read the server's own /metrics too, as seldom as possible: each fetch resets its two speed "
            "averages for everybody who reads them.  [default: on]",
        ),
    )


def log_options(command: Command) -> Command:
    """Add the options of the log on stderr."""
    return _add(
        command,
        click.option(
            "--log-level",
            envvar="KVSCOPE_LOG_LEVEL",
            type=click.Choice(written.LOG_LEVELS),
            default=_DEFAULTS.log_level,
            show_default=True,
        ),
        click.option(
            "--log-format",
            envvar="KVSCOPE_LOG_FORMAT",
            type=click.Choice(written.LOG_FORMATS),
            default=_DEFAULTS.log_format,
            show_default=True,
        ),
    )


def chosen_settings(ctx: click.Context, environment: Mapping[str, str] = os.environ) -> Chosen:
    """Return the settings that the command's options, the environment and the file add up to.

    Reads key files. Raises SettingsError.
    """
    _refuse_extra(ctx)
    given = ctx.params
    file: SettingsFile | None = ctx.meta.get(_FILE_KEY)
    warnings = list(file.warnings) if file else []
    addresses, tables = _watched(ctx, file)
    names = tuple(addresses)
    per_server = _PerServer(ctx, names)
    _refuse_unknown_variables(ctx, names, environment)

    key_files = per_server.single("api_key_file")
    ca_files = per_server.single("ca_file")
    headers = per_server.headers()
    sleeps = per_server.single("sleep_idle")
    arguments = per_server.single("server_args")
    model_files = per_server.single("model_file")
    shapes = per_server.single("kv_shape")
    key_files_by_flag = ctx.get_parameter_source("api_key_file") is ParameterSource.COMMANDLINE
    servers = []
    for name, address in addresses.items():
        table = tables.get(name, ServerTable(address))
        path = path_of(key_files[name]) if name in key_files else None
        variable = environment.get(written.key_variable(name))
        if path and variable and not key_files_by_flag:
            raise SettingsError(
                f"server {name!r} has a key in {written.key_variable(name)} and one in KVSCOPE_API_KEY_FILE: "
                "keep one"
            )
        if path is None and not variable:
            path = table.api_key_file
        key = origin = None
        if path:
            key, origin = key_from(path), shown_path(path)
            warnings += readable_by_others(path)
        elif variable:
            origin = written.key_variable(name)
            key = written.api_key(variable, origin)
        ca_file = path_of(ca_files[name]) if name in ca_files else table.ca_file
        if ca_file:
            refuse_bad_certificates(ca_file)
        model_file = path_of(model_files[name]) if name in model_files else table.model_file
        shape = path_of(shapes[name]) if name in shapes else table.kv_shape
        if name in model_files and name not in shapes:
            shape = None  # what stands nearer to the user goes before the file
        elif name in shapes and name not in model_files:
            model_file = None
        sleep_idle = (sleeps.get(name), sleeps.get(None), table.sleep_idle, file.sleep_idle if file else None)
        servers.append(
            ServerSettings(
                name=name,
                url=address.url,
                unix_socket=address.unix_socket,
                api_key=key,
                api_key_from=origin,
                headers=_joined(table.headers, headers.get(name, {})),
                ca_file=str(ca_file) if ca_file else None,
                sleep_idle=next((each for each in sleep_idle if each is not None), "auto"),
                arguments=arguments.get(name, table.arguments),
                model_file=str(model_file) if model_file else None,
                kv_shape=str(shape) if shape else None,
            )
        )
    host, port = given["listen"]
    settings = Settings(
        servers=tuple(servers),
        listen_host=host,
        listen_port=port,
        busy_interval_seconds=given["busy_interval"],
        idle_interval_seconds=given["idle_interval"],
        server_metrics=given["server_metrics"],
        gpu=given["gpu"],
        gpu_interval_seconds=given["gpu_interval"],
        gpu_pcie_throughput=given["gpu_pcie"],
        log_level=given["log_level"],
        log_format=given["log_format"],
        model_path_map=tuple(given["model_path_map"]) or (file.model_path_map if file else ()),
    )
    written.refuse_impossible(settings)
    if file and file.servers and not tables:
        warnings.append(f"the servers of {file.shown} are set aside with their keys: --server names others")
    return Chosen(settings, file.shown if file else None, tuple(warnings))


def _add(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def _variable(flag: str) -> str:
    return "KVSCOPE_" + flag.removeprefix("--").replace("-", "_").upper()


def _named_path(text: str) -> tuple[str, str]:
    return written.named_value(text, "PATH")


def _named_arguments(text: str) -> tuple[str, ContextSettings]:
    name, value = written.named_value(text, "'ARGUMENTS'")
    return name, server_arguments(value)


def _repeated(flag: str, metavar: str, kind: Written, help_text: str) -> Callable[[Command], Command]:
    return click.option(
        flag, envvar=_variable(flag), metavar=metavar, type=kind, multiple=True, help=help_text
    )


def _interval(flag: str, default: float, help_text: str) -> Callable[[Command], Command]:
    return click.option(
        flag,
        envvar=_variable(flag),
        metavar="SECONDS",
        type=Written("interval", written.interval_seconds),
        default=default,
        show_default=True,
        help=help_text,
    )


def _refuse_key(_ctx: click.Context, _param: click.Parameter, value: object) -> None:
    if value is not None:
        raise SettingsError(
            "--api-key is refused, every program could read the key there: put it in a file for "
            "--api-key-file NAME=PATH or set KVSCOPE_API_KEY_<NAME>"
        )


def _refuse_extra(ctx: click.Context) -> None:
    if ctx.args:
        raise SettingsError(
            f"{len(ctx.args)} word(s) too many after `{ctx.command_path}`: write --server NAME=URL"
        )


def _watched(
    ctx: click.Context, file: SettingsFile | None
) -> tuple[dict[str, written.Address], Mapping[str, ServerTable]]:
    """Return the address of each server, and the file's tables if the servers are the file's."""
    named: tuple[tuple[str | None, written.Address], ...] = ctx.params["server"]
    if not named:
        if file and file.servers:
            return {name: table.address for name, table in file.servers.items()}, file.servers
        return {"main": written.Address(written.DEFAULT_SERVER)}, {}
    addresses: dict[str, written.Address] = {}
    for name, address in named:
        if name is None and len(named) > 1:
            raise SettingsError(
                f"{address.url!r} has no name among {len(named)} servers: write NAME=URL for each"
            )
        name = name or "main"
        if name in addresses:
            raise SettingsError(f"server {name!r} is named twice: give each server its own name")
        addresses[name] = address
    return addresses, {}


class _PerServer:
    """The repeated options that name a server."""

    def __init__(self, ctx: click.Context, names: tuple[str, ...]) -> None:
        self._ctx = ctx
        self._names = names

    def single(self, option: str) -> dict[str | None, Any]:
        """Return an option's value by server; None stands for all servers."""
        values: dict[str | None, Any] = {}
        for name, value in self._ctx.params[option]:
            self._refuse_unknown(option, name)
            if name in values:
                raise SettingsError(f"{self._origin(option)} is given twice for the same server: keep one")
            values[name] = value
        return values

    def headers(self) -> dict[str, dict[str, str]]:
        """Return headers by server."""
        headers: dict[str, dict[str, str]] = {}
        on_command_line = self._ctx.get_parameter_source("header") is ParameterSource.COMMANDLINE
        for name, (field_name, value) in self._ctx.params["header"]:
            self._refuse_unknown("header", name)
            if on_command_line and written.may_hold_secret(field_name):
                raise SettingsError(
                    f"--header {field_name!r} may hold a credential that every program could read there: "
                    "set it by KVSCOPE_HEADER or under headers in the TOML file"
                )
            of_server = headers.setdefault(name, {})
            if field_name.lower() in (each.lower() for each in of_server):
                raise SettingsError(
                    f"{self._origin('header')} gives {field_name!r} twice to {name!r}: keep one"
                )
            of_server[field_name] = value
        return headers

    def _refuse_unknown(self, option: str, name: str | None) -> None:
        if name is not None and name not in self._names:
            # The name is not repeated: what stands before = may be part of a key put in the wrong place.
            shown = f" {name!r}" if option == "sleep_idle" else ""
            raise SettingsError(
                f"{self._origin(option)} names a server{shown} that is not watched: name one of "
                + ", ".join(self._names)
            )

    def _origin(self, option: str) -> str:
        flag = "--" + option.replace("_", "-")
        from_variable = self._ctx.get_parameter_source(option) is ParameterSource.ENVIRONMENT
        return _variable(flag) if from_variable else flag


def _refuse_unknown_variables(
    ctx: click.Context, names: tuple[str, ...], environment: Mapping[str, str]
) -> None:
    known = {str(param.envvar) for param in ctx.command.params if param.envvar}
    keys = [written.key_variable(name) for name in names]
    for variable, value in sorted(environment.items()):
        if not variable.startswith("KVSCOPE_") or variable in known or variable in keys:
            continue
        if _set_by_kubernetes(variable, value):
            continue
        if variable.startswith("KVSCOPE_API_KEY"):
            raise SettingsError(f"{variable} belongs to no server: unset it or call it " + " or ".join(keys))
        raise SettingsError(
            f"{variable} is no setting of kvscope: unset it, `kvscope serve --help` lists all"
        )


def _set_by_kubernetes(variable: str, value: str) -> bool:
    """Return whether the variable tells of a Kubernetes service whose name begins with kvscope."""
    if re.fullmatch(r"KVSCOPE_(\w+_)?SERVICE_(HOST|PORT)(_\w+)?", variable):
        return True
    if re.fullmatch(r"KVSCOPE_(\w+_)?PORT(_\d+_(TCP|UDP|SCTP))?", variable):
        return re.match(r"(tcp|udp|sctp)://", value) is not None
    return re.fullmatch(r"KVSCOPE_(\w+_)?PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)", variable) is not None


def _use_file(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    path = path_of(value) if value else default_settings_file()
    if path is None:
        return
    file = read_settings_file(path)
    ctx.meta[_FILE_KEY] = file
    ctx.default_map = {**(ctx.default_map or {}), **file.plain}


def _joined(headers: Mapping[str, str], over: Mapping[str, str]) -> dict[str, str]:
    """Return both; a header's name is the same whatever its case."""
    replaced = {name.lower() for name in over}
    return {**{name: value for name, value in headers.items() if name.lower() not in replaced}, **over}
