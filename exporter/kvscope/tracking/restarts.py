"""Whether it is still the same process that answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from kvscope.observed.server import ServerCounters, SlotSeen

_Number = TypeVar("_Number", int, float)


def restarted(last: ServerCounters, now: ServerCounters) -> bool:
    """Return whether two readings of /metrics come from two processes.

    The header `Process-Start-Time-Unix` tells even when the new process counted past the old one;
    without it, a counter that went back does.
    """
    if last.process_identity is not None and now.process_identity is not None:
        return last.process_identity != now.process_identity
    return any(
        then is not None and since is not None and since < then
        for then, since in zip(work(last), work(now), strict=True)
    )


def work(counters: ServerCounters) -> tuple[float | None, ...]:
    """Return the counters that any finished request moves."""
    return (
        counters.computed_tokens,
        counters.reused_tokens,
        counters.generated_tokens,
        counters.prefill_seconds,
        counters.decode_seconds,
    )


def counting_from_zero(counters: ServerCounters) -> ServerCounters:
    """Return the counters of a process that has just started and offers the same ones."""

    def zero(value: int | None) -> int | None:
        return None if value is None else 0

    return replace(
        counters,
        computed_tokens=0,
        generated_tokens=0,
        reused_tokens=zero(counters.reused_tokens),
        prefill_seconds=None if counters.prefill_seconds is None else 0.0,
        decode_seconds=None if counters.decode_seconds is None else 0.0,
        drafted_tokens=zero(counters.drafted_tokens),
        draft_accepted_tokens=zero(counters.draft_accepted_tokens),
        process_identity=None,
    )


def task_numbers_went_back(before: Iterable[SlotSeen], now: Iterable[SlotSeen]) -> bool:
    """Return whether the highest task number fell: they only grow in one process, even over a sleep."""
    highest_before = max((slot.task for slot in before if slot.task is not None), default=None)
    highest_now = max((slot.task for slot in now if slot.task is not None), default=None)
    return highest_before is not None and highest_now is not None and highest_now < highest_before


def with_gaps_filled(counters: ServerCounters, other: ServerCounters) -> ServerCounters:
    """Return counters where one that is missing has the value of another reading of the process.

    A line that one answer lacks has not gone back to 0; one that appears later grew from its own value.
    """

    def either(mine: _Number | None, its: _Number | None) -> _Number | None:
        return its if mine is None else mine

    return replace(
        counters,
        reused_tokens=either(counters.reused_tokens, other.reused_tokens),
        prefill_seconds=either(counters.prefill_seconds, other.prefill_seconds),
        decode_seconds=either(counters.decode_seconds, other.decode_seconds),
        drafted_tokens=either(counters.drafted_tokens, other.drafted_tokens),
        draft_accepted_tokens=either(counters.draft_accepted_tokens, other.draft_accepted_tokens),
    )
