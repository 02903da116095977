"""kvscope serve: watch servers and answer scrapes; or one look; or only say what would be watched."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import click

from kvscope.commands.options import Chosen, chosen_settings, listen_options, log_options, server_options
from kvscope.commands.settings_file import shown_path
from kvscope.logs import start_logging
from kvscope.settings import ServerSettings, Settings, host_and_port

log = logging.getLogger(__name__)

EXAMPLES = """
\b
Examples:
  kvscope serve
  kvscope serve --server main=http://127.0.0.1:8080 --server gpu2=http://10.0.0.7:8080
  kvscope serve --server main=unix:/run/llama.sock --listen 0.0.0.0:10188
  KVSCOPE_API_KEY_MAIN=... kvscope serve --server main=https://llama.example.org/prefix
  kvscope serve --config kvscope.toml --check-config
  kvscope serve --once | grep context_tokens
  kvscope serve --server-args main='-c 65536 -np 4 -ctk q8_0' --model-path-map /srv/models=/models

\b
A settings file:
  listen = "127.0.0.1:10188"
  [servers.main]
  url = "http://127.0.0.1:8080"
  api_key_file = "main.key"
  headers = { X-Team = "blue" }
  server_args = "-c 65536 -np 4 -ctk q8_0"

A flag goes before its variable, a variable before the file. Servers named by flag or variable take the place
of all servers in the file. Settings are read once: to change them, restart (there is no reload by SIGHUP).
SIGTERM and Ctrl-C end it with exit code 0; a wrong setting refuses to start with exit code 2.
"""


@click.command(epilog=EXAMPLES, context_settings={"allow_extra_args": True, "show_default": False})
@listen_options
@server_options
@click.option("--once", is_flag=True, help="Print one look at every server as Prometheus text, and exit.")
@click.option("--check-config", is_flag=True, help="Print what would be watched, without secrets, and exit.")
@log_options
@click.pass_context
def serve(ctx: click.Context, /, *, once: bool, check_config: bool, **_: object) -> int:
    """Watch llama.cpp servers and answer Prometheus' scrapes at /metrics."""
    chosen = chosen_settings(ctx)
    settings = chosen.settings
    start_logging(settings.log_level, settings.log_format)
    for warning in chosen.warnings:
        log.warning("%s", warning)
    if check_config:
        click.echo(summary(chosen))
        return 0
    if once:
        return _print_one_look(settings)
    return _serve(settings)


def summary(chosen: Chosen) -> str:
    """Return what would be watched, a line for each thing, without secrets."""
    settings = chosen.settings
    backend, colon, script = settings.gpu.partition(":")
    lines = [
        f"settings file: {chosen.file or 'none'}",
        f"listen: http://{host_and_port(settings.listen_host, settings.listen_port)}/metrics",
        f"looks: every {settings.busy_interval_seconds:g} s while busy, "
        f"{settings.idle_interval_seconds:g} s while idle",
        f"server metrics: {'on' if settings.server_metrics else 'off'}",
        f"GPUs: {backend}{colon}{Path(script).name}; they and the host: every "
        f"{settings.gpu_interval_seconds:g} s",
    ]
    lines += [
        f"model folder: {there} is {shown_path(Path(here))} here" for there, here in settings.model_path_map
    ]
    return "\n".join([*lines, *(_server_line(server) for server in settings.servers)])


def _server_line(server: ServerSettings) -> str:
    address = server.url
    if server.unix_socket:
        address = f"unix:{shown_path(Path(server.unix_socket))}" + server.url.removeprefix(
            "http://localhost"
        ).replace("/", ":/", 1)
    sleep_idle = server.sleep_idle if isinstance(server.sleep_idle, str) else f"{server.sleep_idle:g} s"
    facts = [f"API key: {'from ' + str(server.api_key_from) if server.api_key else 'none'}"]
    if server.headers:
        facts.append("headers: " + ", ".join(server.headers))
    if server.ca_file:
        facts.append(f"CA file: {shown_path(Path(server.ca_file))}")
    if server.arguments is not None:
        facts.append("arguments: given")
    if server.model_file:
        facts.append(f"model file: {shown_path(Path(server.model_file))}")
    if server.kv_shape:
        facts.append(f"shape file: {shown_path(Path(server.kv_shape))}")
    return f"server {server.name}: {address} ({'; '.join(facts)}; sleep idle: {sleep_idle})"


def _serve(settings: Settings) -> int:
    from kvscope.app import CannotListen, serve

    def listening(url: str) -> None:
        log.info(
            "metrics at %s/metrics, watching %s", url, ", ".join(server.name for server in settings.servers)
        )

    try:
        asyncio.run(serve(settings, listening=listening))
    except CannotListen as error:
        raise click.ClickException(str(error)) from None
    return 0


def _print_one_look(settings: Settings) -> int:
    from kvscope.app import look_once
    from kvscope.metrics.collector import Exposition, Format

    snapshot = asyncio.run(look_once(settings))
    click.echo(Exposition().render(snapshot, Format.TEXT), nl=False)
    return 0
