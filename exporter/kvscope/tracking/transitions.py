"""What changed on one slot between two looks."""

from __future__ import annotations

from kvscope.observed.server import SlotSeen


def began_task(before: SlotSeen, now: SlotSeen) -> bool:
    """Return whether a task that was not seen before began on the slot."""
    if now.task is None:  # builds without id_task show only that it got busy
        return before.task is None and now.processing and not before.processing
    return now.task != before.task


def was_reset(before: SlotSeen, now: SlotSeen) -> bool:
    """Return whether the slot is a new one that never worked, after a restart or a sleep."""
    return before.task is not None and now.task is None


def has_begun(now: SlotSeen, held_before: int | None) -> bool:
    """Return whether the task under way reads its prompt, so that its reused tokens are known.

    Before that the slot still shows what it held and zeros.
    """
    return (
        now.processing
        and now.reused_tokens is not None
        and (
            bool(now.decoded_tokens)
            or bool(now.computed_tokens)
            or bool(now.reused_tokens)
            or now.held_tokens != held_before
        )
    )


def released(before: SlotSeen, now: SlotSeen) -> bool:
    """Return whether a task ended on the slot since it was last seen."""
    return not now.processing and (before.processing or began_task(before, now))
