"""`python -m tests.replay [RECORDING ...]`: write tests/expected anew from what the exporter shows now."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence

import click

from tests.replay.recording import EXPECTED, load, names
from tests.replay.replay import replay


@click.command()
@click.argument("chosen", nargs=-1, type=click.Choice(names()))
def main(chosen: Sequence[str]) -> None:
    """Replay these recordings, or all, and write what is to be expected; shows each line that changes."""
    for name in chosen or names():
        path = EXPECTED / f"{name}.metrics"
        before = path.read_text() if path.exists() else ""
        after = asyncio.run(replay(load(name))).metrics
        for line in difflib.unified_diff(before.splitlines(), after.splitlines(), name, name, "", "", 0, ""):
            click.echo(line)
        path.parent.mkdir(exist_ok=True)
        path.write_text(after)


if __name__ == "__main__":
    main()
