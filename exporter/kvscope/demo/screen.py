"""What the demo shows: a live table on a terminal, plain lines anywhere else, and a picture."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from types import TracebackType

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvscope.observed.server import Phase
from kvscope.snapshot import Board, ServerBox, Snapshot
from kvscope.terminal.table import plain_lines, render

FRAME_SECONDS = 0.25
LINES_SECONDS = 1.0
PICTURE_COLUMNS = 100


class Screen:
    """The story, the address of the figures, and the slots; drawn while it is entered."""

    def __init__(self, server_name: str) -> None:
        self._board = Board((server_name,))
        self._story = ""
        self._url = ""
        self._printed: set[str] = set()
        self._published = asyncio.Event()
        self._fullest: tuple[tuple[int, ...], Snapshot, str] = ((), Snapshot(), "")
        console = Console()
        on_terminal = sys.stdout.isatty() and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False) if on_terminal else None

    def tell(self, story: str) -> None:
        """Show what happens now."""
        self._story = story
        self._draw_once()
        if not self._live:
            click.echo(f"* {story}")

    def listening(self, url: str) -> None:
        """Show where the figures are to be had."""
        self._url = url
        if not self._live:
            click.echo(f"* metrics: {url}/metrics")

    def publish(self, box: ServerBox) -> None:
        """Show the server's newest box from the next frame on."""
        self._board.publish(box)
        self._published.set()
        fullness = (
            int(any(evicted.events for counts in box.counts for evicted in counts.evictions.values())),
            sum(bool(slot.context_tokens) for slot in box.slots),
            int(any(slot.phase is Phase.PREFILL for slot in box.slots)),
            sum(slot.context_tokens or 0 for slot in box.slots),
        )
        if fullness >= self._fullest[0]:
            self._fullest = (fullness, self._board.snapshot(), self._story)

    async def next_publish(self) -> None:
        """Return when the server's next box was published."""
        self._published.clear()
        await self._published.wait()

    async def draw(self) -> None:
        """Draw what is shown until cancelled."""
        while True:
            await asyncio.sleep(FRAME_SECONDS if self._live else LINES_SECONDS)
            self._draw_once()

    def picture(self, title: str) -> str:
        """Return the fullest moment that was shown as SVG, which loads nothing from anywhere."""
        _, snapshot, story = self._fullest
        console = Console(record=True, width=PICTURE_COLUMNS, file=io.StringIO(), force_terminal=True)
        console.print(self._frame(snapshot, story))
        return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=title), flags=re.DOTALL)

    def __enter__(self) -> Screen:
        """Take the terminal, if there is one."""
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Draw the last state, and give the terminal back."""
        self._draw_once()
        if self._live:
            self._live.stop()

    def _draw_once(self) -> None:
        snapshot = self._board.snapshot()
        if self._live:
            self._live.update(self._frame(snapshot, self._story), refresh=True)
            return
        lines = plain_lines(snapshot)
        for line in lines:
            if line not in self._printed:
                click.echo(line)
        self._printed = set(lines)

    def _frame(self, snapshot: Snapshot, story: str) -> RenderableType:
        heading = Text("metrics  ", style="dim").append(
            f"{self._url}/metrics" if self._url else "", "underline"
        )
        heading.append("\nnow      ").append(story, "bold not dim")
        return Group(heading, Text(), render(snapshot))
