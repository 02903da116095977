"""kvscope healthcheck: ask a running exporter whether it is healthy, for containers."""

from __future__ import annotations

import asyncio

import aiohttp
import click

from kvscope.commands.options import listen_options
from kvscope.settings import SettingsError, host_and_port

ANSWER_WITHIN_SECONDS = 5.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - asked, not listened on


@click.command(
    epilog="""
\b
Example:
  HEALTHCHECK CMD ["kvscope", "healthcheck"]
"""
)
@listen_options
def healthcheck(listen: tuple[str, int]) -> int:
    """Ask the exporter that listens at --listen whether it is healthy; exit code 0 if so, else 1."""
    host, port = listen
    if port == 0:
        raise SettingsError(
            "--listen with port 0 cannot be asked: name the port that the exporter listens on"
        )
    address = host_and_port(_ANY_ADDRESS.get(host, host), port)
    try:
        status = asyncio.run(_status(f"http://{address}/-/healthy"))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise click.ClickException(
            f"no exporter answers at {address} ({type(error).__name__}): start it or name it with --listen"
        ) from None
    if status != 200:
        raise click.ClickException(f"{address} answers /-/healthy with {status}: see the exporter's log")
    click.echo("healthy")
    return 0


async def _status(url: str) -> int:
    timeout = aiohttp.ClientTimeout(total=ANSWER_WITHIN_SECONDS)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(url, allow_redirects=False) as answer,
    ):
        return answer.status
