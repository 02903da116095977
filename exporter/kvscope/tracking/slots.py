"""What one slot went through between two looks: phases, requests, what it lost and why.

The table "what polls saw -> reason, kept" is docs/decisions/0010-evictions-by-polling.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from kvscope.observed.server import Phase, SlotSeen
from kvscope.tracking.claims import Claim
from kvscope.tracking.transitions import began_task, has_begun, released


class Reason(StrEnum):
    """Why a slot lost tokens, as far as polling can know."""

    TAKEOVER = "takeover"
    DIVERGED = "diverged"
    IDLE_CLEAR = "idle_clear"
    CONTEXT_SHIFT = "context_shift"
    ERASE = "erase"
    SLEEP = "sleep"
    RESTART = "restart"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Loss:
    """Tokens that left a slot. events is 0 where they belong to an event counted elsewhere."""

    slot: int
    reason: Reason
    tokens: int
    events: int = 1


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the other slots tell about this one between the same two looks.

    tasks_begun: tasks that were first seen now, on any slot. lru_places: before they began, as
    `lru_places` has them.
    pool_may_have_filled: idle clearing and a purge cannot be told apart then.
    kv_unified: None where it is not known.
    """

    tasks_begun: int
    lru_places: Mapping[int, tuple[int, int]]
    pool_may_have_filled: bool
    kv_unified: bool | None


@dataclass(frozen=True, slots=True)
class SlotTrack:
    """One slot's own last seen state, and what polling has worked out about it.

    held_before: tokens it held when the task under way began, until it is known what became of
    them. taken_by_lru: whether that task may have got the slot as the least recently used one
    (None: it was busy when it was last seen). shifted: tokens that were seen to leave by context
    shifts during the last task. release: order of the last release seen, the same for two in one
    look.
    """

    seen: SlotSeen
    phase_started_at: float
    last_used_at: float | None = None
    release: int | None = None
    held_before: int | None = None
    taken_by_lru: bool | None = None
    shifted: int = 0
    last_prefill_seconds: float | None = None
    last_prompt_tokens: Mapping[str, int] | None = None


def never_worked(slot: SlotSeen, at: float) -> SlotTrack:
    """Return a slot as a new process has it: idle since a Unix time, holding nothing."""
    seen = SlotSeen(slot.id, slot.context_limit_tokens, phase=Phase.IDLE, held_tokens=0)
    return SlotTrack(seen, phase_started_at=at)


def lru_places(tracks: Iterable[SlotTrack]) -> Mapping[int, tuple[int, int]]:
    """Return for each idle slot the first and the last place at which LRU may take it, from 1.

    Never-used slots go first, highest id first; then by the release of the last task
    (llama.cpp tools/server/server-context.cpp, get_available_slot). The places differ where the order
    is not known: of releases in one look, and of those before the first look.
    """
    idle = [track for track in tracks if not track.seen.processing]
    fresh = sorted(-track.seen.id for track in idle if track.seen.task is None)
    places = {-number: (place, place) for place, number in enumerate(fresh, 1)}
    used = [track for track in idle if track.seen.task is not None]
    for release in sorted({-1 if track.release is None else track.release for track in used}):
        group = [track for track in used if (-1 if track.release is None else track.release) == release]
        first = len(places) + 1
        places |= {track.seen.id: (first, first + len(group) - 1) for track in group}
    return places


def advance_slot(
    track: SlotTrack, now: SlotSeen, at: float, look: int, surroundings: Surroundings
) -> tuple[SlotTrack, tuple[Loss, ...]]:
    """Return the slot's track after a look, and what it lost for certain by then.

    A task that began and ended between two looks is decided by `decide_ended` once the counters
    are settled.
    """
    before = track.seen
    held = before.held_tokens
    losses: list[Loss] = []
    if began_task(before, now):
        first_place, _ = surroundings.lru_places.get(now.id, (None, None))
        track = replace(
            track,
            held_before=held if held else None,
            taken_by_lru=None if first_place is None else first_place <= surroundings.tasks_begun,
            shifted=0,
        )
    elif held and now.held_tokens is not None and now.held_tokens < held:
        loss = _shrunk(before, now, surroundings)
        if loss is not None:
            losses.append(loss)
            if loss.reason is Reason.CONTEXT_SHIFT:
                track = replace(track, shifted=track.shifted + loss.tokens)
    reused = now.reused_tokens or 0
    if track.held_before is not None and has_begun(now, track.held_before) and reused <= track.held_before:
        loss = taken(track, reused)
        if loss is not None:
            losses.append(loss)
        track = replace(track, held_before=None)
    ended = released(before, now)
    phase_changed = now.phase != before.phase or began_task(before, now)
    return (
        replace(
            track,
            seen=now,
            phase_started_at=at if phase_changed else track.phase_started_at,
            last_used_at=at if now.processing or ended else track.last_used_at,
            release=look if ended else track.release,
        ),
        tuple(losses),
    )


def taken(track: SlotTrack, reused: int) -> Loss | None:
    """Return what a task that reused so many tokens made the slot lose, or None for nothing.

    More than the slot held can only have come out of host RAM, in place of all that it held: a prompt
    that continues what a slot holds is never looked for there. That holds only where nothing else
    ran on the slot since, so it is asked once the task is exactly known.
    """
    held = track.held_before or 0
    lost = held if reused > held else held - reused
    # At least one prompt token is always computed again: that one was not lost.
    if lost <= 1:
        return None
    if track.taken_by_lru is None:
        reason = Reason.UNKNOWN
    elif reused == 0:
        if not track.taken_by_lru:
            # Picked by similarity, yet nothing reused: `cache_prompt: false` computes all again.
            return None
        reason = Reason.TAKEOVER
    else:
        # Found by LRU the tokens may have come from host RAM: takeover and diverged both fit.
        reason = Reason.UNKNOWN if track.taken_by_lru else Reason.DIVERGED
    return Loss(track.seen.id, reason, lost)


def decide_ended(track: SlotTrack, claim: Claim, exact: bool) -> tuple[SlotTrack, tuple[Loss, ...]]:
    """Decide what a task made its slot lose that only its settlement tells.

    Context shifts that fell between two looks; and what a task took that was never seen at work, or
    that reused more than the slot held: an exactly known one is judged by what it reused, of others
    only what is certainly gone counts, the slot holds less than before.
    """
    if track.seen.processing or track.seen.task != claim.task:
        return track, ()
    losses: list[Loss | None] = []
    unseen = claim.shifted_out - track.shifted
    if unseen > 0:
        losses.append(Loss(track.seen.id, Reason.CONTEXT_SHIFT, unseen))
    if track.held_before is not None:
        lost = track.held_before - (track.seen.held_tokens or 0)
        if exact:
            losses.append(taken(track, claim.credited.reused))
        elif lost > 1:
            losses.append(Loss(track.seen.id, Reason.UNKNOWN, lost))
    return replace(track, held_before=None), tuple(loss for loss in losses if loss is not None)


def _shrunk(before: SlotSeen, now: SlotSeen, surroundings: Surroundings) -> Loss | None:
    held, held_now = before.held_tokens or 0, now.held_tokens or 0
    if before.processing and now.processing:
        if before.phase == now.phase == Phase.DECODE:
            grown = (now.decoded_tokens or 0) - (before.decoded_tokens or 0)
            return Loss(now.id, Reason.CONTEXT_SHIFT, held + max(0, grown) - held_now)
        return None  # a batch in flight that was taken back
    elsewhere = surroundings.tasks_begun > 0
    cleared_for_others = elsewhere and surroundings.kv_unified is not False
    # A child of `n > 1` is cleared at its end, a cancelled batch is taken back: no loss.
    if before.processing and (held_now or not cleared_for_others):
        return None
    if held_now:
        return Loss(now.id, Reason.UNKNOWN, held - held_now)
    if not elsewhere:
        return Loss(now.id, Reason.ERASE, held)
    surely_cleared = cleared_for_others and not surroundings.pool_may_have_filled
    return Loss(now.id, Reason.IDLE_CLEAR if surely_cleared else Reason.UNKNOWN, held)
