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


def with_gaps_filled(counters: ServerCounters, last: ServerCounters) -> ServerCounters:
    """Return a reading of a process as it must be after the one before.

    A counter that one answer lacks, or shows lower, has not gone back: in one process they only grow.
    """

    def grown(now: _Number | None, before: _Number | None) -> _Number | None:
        return before if now is None else now if before is None else max(now, before)

    return replace(
        counters,
        computed_tokens=max(counters.computed_tokens, last.computed_tokens),
        generated_tokens=max(counters.generated_tokens, last.generated_tokens),
        reused_tokens=grown(counters.reused_tokens, last.reused_tokens),
        prefill_seconds=grown(counters.prefill_seconds, last.prefill_seconds),
        decode_seconds=grown(counters.decode_seconds, last.decode_seconds),
        drafted_tokens=grown(counters.drafted_tokens, last.drafted_tokens),
        draft_accepted_tokens=grown(counters.draft_accepted_tokens, last.draft_accepted_tokens),
    )


def with_first_readings(last: ServerCounters, now: ServerCounters) -> ServerCounters:
    """Return the last reading where a counter that it lacked stands at its first value, now's."""

    def either(before: _Number | None, first: _Number | None) -> _Number | None:
        return first if before is None else before

    return replace(
        last,
        reused_tokens=either(last.reused_tokens, now.reused_tokens),
        prefill_seconds=either(last.prefill_seconds, now.prefill_seconds),
        decode_seconds=either(last.decode_seconds, now.decode_seconds),
        drafted_tokens=either(last.drafted_tokens, now.drafted_tokens),
        draft_accepted_tokens=either(last.draft_accepted_tokens, now.draft_accepted_tokens),
    )
