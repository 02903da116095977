"""Rows of the comparison: ours, the truth, the difference, and whether it is as wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rich.console import Console
from rich.table import Table

Figure = float | str | None
"""None is rendered as `absent`."""


class Verdict(StrEnum):
    """OK and MISSED are of wanted rows; TOLD is a row that is printed and never fails."""

    OK = "ok"
    MISSED = "MISSED"
    TOLD = "not wanted"


@dataclass(frozen=True)
class Row:
    """One comparison. difference is ours minus truth where both are numbers, else empty."""

    name: str
    ours: Figure
    truth: Figure
    verdict: Verdict
    difference: str = ""


def equal(name: str, ours: Figure, truth: Figure) -> Row:
    """Wanted: the same figure, or the same text. Absent equals only absent."""
    return _row(name, ours, truth, ours == truth)


def within(name: str, ours: float | None, truth: float, share: float) -> Row:
    """Wanted: a number that is at most share * truth away."""
    close = ours is not None and abs(ours - truth) <= share * abs(truth)
    return _row(f"{name} (within {share * 100:g} %)", ours, truth, close)


def at_most(name: str, ours: float | None, truth: float) -> Row:
    """Wanted: never more than the truth; absent is nothing claimed."""
    return _row(f"{name} (at most)", ours, truth, (ours or 0) <= truth)


def between(name: str, ours: float | None, low: float, high: float) -> Row:
    """Wanted: a number from low to high, both included."""
    if low == high:
        return _row(name, ours, high, ours == high)
    inside = ours is not None and low <= ours <= high
    return Row(name, ours, f"{_text(low)} to {_text(high)}", _verdict(inside), "")


def told(name: str, ours: Figure, truth: Figure) -> Row:
    """Not wanted: printed with its size, because polling cannot know it."""
    return Row(name, ours, truth, Verdict.TOLD, _difference(ours, truth))


def _row(name: str, ours: Figure, truth: Figure, good: bool) -> Row:
    return Row(name, ours, truth, _verdict(good), _difference(ours, truth))


def _verdict(good: bool) -> Verdict:
    return Verdict.OK if good else Verdict.MISSED


def _difference(ours: Figure, truth: Figure) -> str:
    if ours is None or truth is None or isinstance(ours, str) or isinstance(truth, str):
        return ""
    return _text(ours - truth) if ours != truth else "0"


def _text(figure: Figure) -> str:
    if figure is None:
        return "absent"
    if isinstance(figure, str):
        return figure
    return f"{figure:.0f}" if figure == int(figure) else f"{figure:.4f}"


@dataclass(frozen=True)
class Outcome:
    """One scenario in one mode of the server."""

    scenario: str
    mode: str
    rows: Sequence[Row]
    seconds: float

    @property
    def missed(self) -> int:
        """How many wanted rows were missed."""
        return sum(row.verdict is Verdict.MISSED for row in self.rows)


def print_table(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print every row of every scenario, the missed ones in red."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("scenario", "mode", "row"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ours", "truth", "difference"):
        table.add_column(heading, justify="right")
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        for number, row in enumerate(outcome.rows):
            table.add_row(
                outcome.scenario,
                outcome.mode,
                row.name,
                _text(row.ours),
                _text(row.truth),
                row.difference,
                row.verdict,
                style="bold red" if row.verdict is Verdict.MISSED else None,
                end_section=number == len(outcome.rows) - 1,
            )
    console.print(table)
    wanted = sum(row.verdict is not Verdict.TOLD for outcome in outcomes for row in outcome.rows)
    missed = sum(outcome.missed for outcome in outcomes)
    console.print(f"{len(outcomes)} scenarios, {wanted} wanted rows, {missed} missed")
