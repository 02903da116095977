"""`python -m tests.record [SITUATION ...]`: record real servers anew, for tests/recordings."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import click

from kvscope.demo.tiny_model import write_tiny_model
from tests.record.recorder import Stage
from tests.record.situations import SITUATIONS
from tests.replay.recording import Recording, save

BUILD = "b11549"
PACKAGE = "2026.10.11549"
MODEL = Path("models/kvscope-tiny.gguf")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(SITUATIONS)))
def main(names: Sequence[str]) -> None:
    """Record these situations, or all of them, with a real llama.cpp server."""
    if version("xllamacpp") != PACKAGE:
        raise click.ClickException(
            f"xllamacpp {version('xllamacpp')} is installed, the situations are named after {BUILD} "
            f"({PACKAGE}): install that, or name them after the build you record"
        )
    for name in names or SITUATIONS:
        # Relative: what a server says of its model's path must not tell where it was recorded.
        with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
            MODEL.parent.mkdir()
            recording = asyncio.run(_record(name, write_tiny_model(MODEL)))
        path = save(recording)
        click.echo(f"{name}: {len(recording.lines)} lines, {path.stat().st_size / 1000:.0f} kB")
    click.echo("Now read facts.toml of each against the new raw answers, then: python -m tests.replay")


async def _record(name: str, model: Path) -> Recording:
    head = {"build": BUILD, "package": f"xllamacpp {PACKAGE}", "situation": name}
    return await Stage(SITUATIONS[name], model).record(name, head)


if __name__ == "__main__":
    main()
