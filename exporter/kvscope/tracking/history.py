"""One way in: advance(history, look) -> history; one way out: box(history, now) -> ServerBox."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kvscope.observed.server import (
    Phase,
    ServerCounters,
    ServerLook,
    ServerProcess,
    ServerProps,
    ServerState,
    SlotSeen,
)
from kvscope.snapshot import (
    EvictionCount,
    HistogramCounts,
    ModelCounts,
    ServerBox,
    SlotBox,
    SlotCounts,
    SourceBox,
)
from kvscope.tracking.ledger import (
    Claim,
    Claims,
    Settlement,
    Tokens,
    awaits_counters,
    settle,
    settle_without_counters,
)
from kvscope.tracking.slots import (
    Loss,
    Reason,
    SlotTrack,
    Surroundings,
    advance_slot,
    began_task,
    decide_ended,
    has_begun,
    lru_ranks,
    released,
    was_reset,
)

PREFILL_SECONDS_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
SHORTEST_VALIDITY_SECONDS = 10.0
VALID_POLLS = 3
RELEASES_FOR_LRU = 2
"""Before the second release seen, the order among the slots rests on nothing that was observed."""

STATES_UP = frozenset(
    {
        ServerState.READY,
        ServerState.LOADING,
        ServerState.SLEEPING,
        ServerState.STALLED,
        ServerState.SLOTS_DISABLED,
    }
)

_SEEN_WITHOUT_SLOTS = frozenset({ServerState.STALLED, ServerState.SLEEPING})

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class History:
    """Everything that is known of one server. Counters of models that left stay in `counts`."""

    name: str
    created_at: float | None = None
    state: ServerState = ServerState.UNREACHABLE
    model: str | None = None
    props: ServerProps | None = None
    props_seen: float | None = None
    process: ServerProcess | None = None
    metrics_available: bool | None = None
    kv_unified: bool | None = None
    tracks: Mapping[int, SlotTrack] = field(default_factory=dict)
    slots_seen: float | None = None
    gap: bool = False
    counters: ServerCounters | None = None
    counters_seen: float | None = None
    claims: Claims = field(default_factory=dict)
    looks: int = 0
    releases: int = 0
    restarts: int = 0
    last_restart_at: float | None = None
    counts: Mapping[str | None, ModelCounts] = field(default_factory=dict)
    sources: Mapping[str, SourceBox] = field(default_factory=dict)
    problem: str | None = None

    @property
    def awaits_counters(self) -> bool:
        """Whether a request ended that /metrics was not asked about yet."""
        return awaits_counters(self.claims)

    @property
    def any_busy(self) -> bool:
        """Whether a slot worked when it was last seen."""
        return any(track.seen.processing for track in self.tracks.values())

    @property
    def all_busy(self) -> bool:
        """Whether requests may have to wait: every slot worked when it was last seen."""
        return bool(self.tracks) and all(track.seen.processing for track in self.tracks.values())

    @property
    def any_prefill(self) -> bool:
        """Whether a slot was reading its prompt when it was last seen."""
        return any(track.seen.phase == Phase.PREFILL for track in self.tracks.values())


def looks_restarted(history: History, slots: Iterable[SlotSeen]) -> bool:
    """Return whether slots look like those of a new process, so that /metrics must be read first."""
    seen = {slot.id: slot for slot in slots}
    if set(seen) != set(history.tracks) and history.tracks:
        return True
    if any(was_reset(track.seen, seen[slot_id]) for slot_id, track in history.tracks.items()):
        return True
    return _task_numbers_went_back(history.tracks, seen.values())


def counters_moved(history: History, counters: ServerCounters) -> bool:
    """Return whether the server works now, or did since its counters were last settled."""
    if counters.requests_processing:
        return True
    last = history.counters
    return last is None or _work(last) != _work(counters) or _restarted(last, counters)


def advance(history: History, look: ServerLook) -> History:
    """Return the history after one look. Pure: the clock is in the look."""
    elapsed_slots = None if history.slots_seen is None else look.monotonic - history.slots_seen
    history = _with_frame(history, look)
    if look.process_readable and look.process is not None:
        replaced = history.process is not None and (
            (history.process.pid, history.process.started_at) != (look.process.pid, look.process.started_at)
        )
        # A process may be replaced before the first look at the new one: its counters tell then.
        if replaced and not _counters_tell(look):
            history = _restart(history, look.at)
        history = replace(history, process=look.process)
    if look.metrics_available is False and history.counters is not None:
        history = replace(history, counters=None, counters_seen=None)
    if _shows_restart(history, look):
        history = _restart(history, look.at)
    first = not history.tracks and history.counters is None
    if look.state is ServerState.SLEEPING:
        history = _with_phase_seconds(history, elapsed_slots)
        history = _asleep(history, look)
    elif look.slots is not None:
        history = _with_slots(history, look, look.slots, elapsed_slots)
    elif look.quiet and history.tracks:
        history = _with_phase_seconds(history, elapsed_slots)
        history = replace(history, slots_seen=look.monotonic, gap=False)
    if look.counters is not None:
        history = _with_counters(history, look, look.counters, first)
    elif history.metrics_available is False and history.awaits_counters:
        history = _settled(history, settle_without_counters(history.claims))
    return history


# --- frame: state, model, sources ---------------------------------------------------------------


def _with_frame(history: History, look: ServerLook) -> History:
    sources = dict(history.sources)
    for answer in look.answers:
        box = sources.get(answer.source, SourceBox())
        succeeded = answer.problem is None
        sources[answer.source] = replace(
            box,
            up=succeeded,
            failures=box.failures + (0 if succeeded else 1),
            last_success_at=look.at if succeeded else box.last_success_at,
            duration_seconds=answer.duration_seconds if succeeded else None,
        )
    for source, interval in look.intervals:
        sources[source] = replace(sources.get(source, SourceBox()), interval_seconds=interval)
    seen = look.slots is not None or look.quiet or look.state in _SEEN_WITHOUT_SLOTS
    history = replace(
        history,
        created_at=look.at if history.created_at is None else history.created_at,
        state=look.state,
        looks=history.looks + 1,
        sources=sources,
        gap=history.gap or not seen,
        metrics_available=(
            history.metrics_available if look.metrics_available is None else look.metrics_available
        ),
        problem=next((answer.problem for answer in look.answers if answer.problem), None),
    )
    if look.props is not None:
        model = look.props.model or history.model
        if history.model is not None and model != history.model:
            history = replace(_blanked(_emptied(history, Reason.RESTART)), claims={})
        history = replace(history, props=look.props, props_seen=look.monotonic, model=model)
    if history.model not in history.counts and (look.slots is not None or look.counters is not None):
        history = replace(
            history, counts={**history.counts, history.model: _no_counts(history.model, look.at)}
        )
    return history


def _no_counts(model: str | None, at: float) -> ModelCounts:
    evictions = {("slot", reason.value, "unknown"): EvictionCount() for reason in Reason}
    return ModelCounts(
        model=model,
        created_at=at,
        slots={},
        requests={"unknown": 0},
        observations={"exact": 0, "apportioned": 0},
        evictions=evictions,
        request_prefill_seconds=HistogramCounts(
            PREFILL_SECONDS_BOUNDS, (0,) * (len(PREFILL_SECONDS_BOUNDS) + 1)
        ),
    )


def _no_slot_counts() -> SlotCounts:
    return SlotCounts(
        phase_seconds=dict.fromkeys(Phase, 0.0),
        prompt_tokens={"computed": 0, "unknown": 0},
        generated_tokens=0,
        evictions={reason.value: 0 for reason in Reason},
    )


def _counts(history: History) -> ModelCounts:
    return history.counts.get(history.model) or _no_counts(history.model, history.created_at or 0.0)


def _with_counts(history: History, counts: ModelCounts) -> History:
    return replace(history, counts={**history.counts, history.model: counts})


# --- slots ----------------------------------------------------------------------------------------


def _with_slots(
    history: History, look: ServerLook, slots: tuple[SlotSeen, ...], elapsed: float | None
) -> History:
    seen = {slot.id: slot for slot in slots}
    if history.tracks and set(seen) != set(history.tracks):
        # Another number of slots: the old ones are gone with what they held.
        history = _emptied(history, Reason.RESTART)
        history = replace(history, tracks={slot.id: _blank_track(slot, look.at) for slot in slots}, claims={})
    elif any(was_reset(track.seen, seen[slot_id]) for slot_id, track in history.tracks.items()):
        # New slots in a process that did not restart: it slept and woke between two looks.
        slept = look.counters is not None and look.counters.process_identity is not None
        history = _blanked(_emptied(history, Reason.SLEEP if slept else Reason.UNKNOWN))
    first = not history.tracks
    if not first:
        history = _with_phase_seconds(history, elapsed, seen)
    begun = 0 if first else sum(began_task(history.tracks[slot_id].seen, seen[slot_id]) for slot_id in seen)
    surroundings = Surroundings(
        tasks_begun=begun,
        lru_ranks=lru_ranks(history.tracks.values()),
        pool_may_have_filled=_pool_may_have_filled(history, seen),
        kv_unified=history.kv_unified,
    )
    tracks: dict[int, SlotTrack] = {}
    claims = dict(history.claims)
    losses: list[Loss] = []
    releases = history.releases
    for slot_id, now in seen.items():
        if first:
            tracks[slot_id] = SlotTrack(
                now, phase_started_at=look.at, last_used_at=look.at if now.processing else None
            )
            if now.processing:
                counted = Tokens(now.computed_tokens or 0, now.reused_tokens or 0)
                claim = Claim(now.task or 0, whole=False, credited=counted)
                claims[slot_id] = (_seen_at_work(claim, now, None),)
            continue
        track = history.tracks[slot_id]
        claims_of_slot = _claims_after(claims.get(slot_id, ()), track.seen, now)
        if claims_of_slot:
            claims[slot_id] = claims_of_slot
        releases += released(track.seen, now)
        tracks[slot_id], lost = advance_slot(track, now, look.at, history.looks, surroundings)
        losses += lost
    counts = _counts(history)
    missing = {slot_id: _no_slot_counts() for slot_id in seen if slot_id not in counts.slots}
    if missing:
        history = _with_counts(history, replace(counts, slots={**counts.slots, **missing}))
    history = replace(
        history,
        tracks=tracks,
        claims=claims,
        releases=releases,
        slots_seen=look.monotonic,
        gap=False,
        kv_unified=_kv_unified(history, seen.values()),
    )
    return _with_losses(history, losses)


def _claims_after(claims: tuple[Claim, ...], before: SlotSeen, now: SlotSeen) -> tuple[Claim, ...]:
    *done, last = claims if claims else (None,)
    open_claim = last if last is not None and not last.ended else None
    finished = tuple(claim for claim in (*done, None if open_claim else last) if claim is not None)
    if began_task(before, now):
        if open_claim is not None:
            finished = (*finished, replace(open_claim, ended=True))
        claim = Claim(now.task if now.task is not None else -1)
        held_before = before.held_tokens
    elif open_claim is not None:
        claim = open_claim
        held_before = None if claim.begun else before.held_tokens
    else:
        return finished
    if now.processing:
        return (*finished, _seen_at_work(claim, now, held_before))
    return (*finished, replace(claim, held=now.held_tokens, ended=True, at_end=now.held_tokens is not None))


def _seen_at_work(claim: Claim, now: SlotSeen, held_before: int | None) -> Claim:
    if not claim.begun and not has_begun(now, held_before):
        return claim
    return replace(
        claim,
        begun=True,
        computed=max(claim.computed, now.computed_tokens or 0),
        reused=max(claim.reused, now.reused_tokens or 0),
        decoded=max(claim.decoded, now.decoded_tokens or 0),
        held=now.held_tokens,
    )


def _pool_may_have_filled(history: History, seen: Mapping[int, SlotSeen]) -> bool:
    """Whether a unified pool could have run out, if all that was held and is held lay in it at once."""
    pool = next((slot.context_limit_tokens for slot in seen.values()), None)
    if pool is None or not history.tracks:
        return True
    held = sum(track.seen.held_tokens or 0 for track in history.tracks.values())
    changed = sum(
        slot.held_tokens or 0
        for slot_id, slot in seen.items()
        if slot.processing or began_task(history.tracks[slot_id].seen, slot)
    )
    return held + changed > pool


def _kv_unified(history: History, seen: Iterable[SlotSeen]) -> bool | None:
    if history.process is not None and history.process.kv_unified is not None:
        return history.process.kv_unified
    slots = list(seen)
    limits = [slot.context_limit_tokens for slot in slots if slot.context_limit_tokens]
    if limits and sum(slot.held_tokens or 0 for slot in slots) > max(limits):
        return False  # more than one pool of that size could hold
    return history.kv_unified


def _with_phase_seconds(
    history: History, elapsed: float | None, seen: Mapping[int, SlotSeen] | None = None
) -> History:
    if elapsed is None or elapsed <= 0:
        return history
    counts = _counts(history)
    slots = dict(counts.slots)
    for slot_id, track in history.tracks.items():
        phase = track.seen.phase
        if phase is None or slot_id not in slots:
            continue
        if history.gap and not _still_the_same(track.seen, seen.get(slot_id) if seen else None):
            continue
        seconds = slots[slot_id].phase_seconds
        slots[slot_id] = replace(slots[slot_id], phase_seconds={**seconds, phase: seconds[phase] + elapsed})
    return _with_counts(history, replace(counts, slots=slots))


def _still_the_same(before: SlotSeen, now: SlotSeen | None) -> bool:
    """Whether a slot did one thing all through a time in which nobody looked."""
    return now is not None and (before.task, before.phase) == (now.task, now.phase)


def _with_losses(history: History, losses: Iterable[Loss]) -> History:
    counts = _counts(history)
    slots, evictions = dict(counts.slots), dict(counts.evictions)
    for loss in losses:
        of_slot = slots.get(loss.slot) or _no_slot_counts()
        slots[loss.slot] = replace(of_slot, evictions=_added(of_slot.evictions, loss.reason.value, 1))
        key = ("slot", loss.reason.value, "unknown")
        count = evictions.get(key, EvictionCount())
        evictions[key] = EvictionCount(count.events + loss.events, count.tokens + loss.tokens)
    return _with_counts(history, replace(counts, slots=slots, evictions=evictions))


def _emptied(history: History, reason: Reason) -> History:
    """Everything that was held is lost at once: one event, whatever the number of slots."""
    losses: list[Loss] = []
    for slot_id, track in history.tracks.items():
        if track.seen.held_tokens:
            losses.append(Loss(slot_id, reason, track.seen.held_tokens, events=0 if losses else 1))
    return _with_losses(history, losses)


def _blanked(history: History) -> History:
    """Slots as a new process or a model that was loaded again has them: none has ever worked."""
    tracks = {
        slot_id: replace(_blank_track(track.seen, track.phase_started_at), last_used_at=track.last_used_at)
        for slot_id, track in history.tracks.items()
    }
    return replace(history, tracks=tracks)


def _blank_track(slot: SlotSeen, at: float) -> SlotTrack:
    seen = SlotSeen(slot.id, slot.context_limit_tokens, phase=Phase.IDLE, held_tokens=0)
    return SlotTrack(seen, phase_started_at=at)


def _asleep(history: History, look: ServerLook) -> History:
    if any(track.seen.task is not None for track in history.tracks.values()):
        history = _blanked(_emptied(history, Reason.SLEEP))
    ended = {
        slot: tuple(replace(claim, ended=True) for claim in of_slot)
        for slot, of_slot in history.claims.items()
    }
    history = replace(history, claims=ended)
    if history.tracks:
        history = replace(history, slots_seen=look.monotonic, gap=False)
    return history


# --- counters ---------------------------------------------------------------------------------------


def _with_counters(history: History, look: ServerLook, counters: ServerCounters, first: bool) -> History:
    last = history.counters
    history = replace(history, counters=counters, counters_seen=look.monotonic)
    counts = _counts(history)
    reuse_counted = counters.reused_tokens is not None
    if counts.unattributed_tokens is None:
        kinds = ("computed", "reused", "generated") if reuse_counted else ("computed", "generated")
        counts = replace(counts, unattributed_tokens=dict.fromkeys(kinds, 0))
    if last is None:
        # What was counted before the first look is not ours.
        base = counters
        if not first:
            history = replace(history, claims=_without_past(history.claims))
    else:
        base = last
    prefill, decode = (
        _grown(base.prefill_seconds, counters.prefill_seconds),
        _grown(base.decode_seconds, counters.decode_seconds),
    )
    if prefill is not None:
        counts = replace(counts, prefill_seconds=(counts.prefill_seconds or 0.0) + prefill)
    if decode is not None:
        counts = replace(counts, decode_seconds=(counts.decode_seconds or 0.0) + decode)
    drafted = _grown(base.drafted_tokens, counters.drafted_tokens)
    accepted = _grown(base.draft_accepted_tokens, counters.draft_accepted_tokens)
    if drafted is not None and accepted is not None:
        before = counts.draft_tokens or {"accepted": 0, "rejected": 0}
        counts = replace(
            counts,
            draft_tokens={
                "accepted": before["accepted"] + int(accepted),
                "rejected": before["rejected"] + max(0, int(drafted) - int(accepted)),
            },
        )
    history = _with_counts(history, counts)
    reused = int(_grown(base.reused_tokens, counters.reused_tokens) or 0)
    if not reuse_counted:
        # Builds without this counter: what /slots showed of it is all there is to know.
        reused = sum(claim.firm.reused for claims in history.claims.values() for claim in claims)
    increase = Tokens(
        counters.computed_tokens - base.computed_tokens,
        reused,
        counters.generated_tokens - base.generated_tokens,
    )
    if not history.claims and not increase.total:
        return history
    return _settled(history, settle(history.claims, increase, prefill or 0.0, look.consistent))


def _grown(before: float | None, now: float | None) -> float | None:
    if now is None:
        return None
    return now - (before or 0)


def _without_past(claims: Claims) -> Claims:
    return {
        slot: tuple(
            replace(claim, whole=False, credited=Tokens(claim.computed, claim.reused))
            for claim in of_slot
            if not claim.ended
        )
        for slot, of_slot in claims.items()
    }


def _settled(history: History, settlement: Settlement) -> History:
    counts = _counts(history)
    slots = dict(counts.slots)
    for slot_id, gained in settlement.credits.items():
        of_slot = slots.get(slot_id) or _no_slot_counts()
        prompt = _added(of_slot.prompt_tokens, "computed", gained.computed)
        slots[slot_id] = replace(
            of_slot,
            prompt_tokens=_added(prompt, "unknown", gained.reused),
            generated_tokens=of_slot.generated_tokens + gained.generated,
        )
    unattributed = counts.unattributed_tokens
    if unattributed is not None:
        left = settlement.unattributed
        unattributed = _added(unattributed, "computed", left.computed)
        unattributed = _added(unattributed, "generated", left.generated)
        if left.reused or "reused" in unattributed:
            unattributed = _added(unattributed, "reused", left.reused)
    requests, observations = counts.requests, counts.observations
    histogram = counts.request_prefill_seconds
    tracks = dict(history.tracks)
    losses: list[Loss] = []
    for done in settlement.finished:
        requests = _added(requests, "unknown", 1)
        observations = _added(observations, "exact" if done.exact else "apportioned", 1)
        track = tracks.get(done.slot)
        if track is not None:
            track, loss = decide_ended(track, done.claim, done.exact)
            if loss is not None:
                losses.append(loss)
            tracks[done.slot] = replace(
                track,
                last_prefill_seconds=done.claim.prefill_seconds if done.exact else None,
                last_prompt_tokens=(
                    {"computed": done.claim.credited.computed, "unknown": done.claim.credited.reused}
                    if done.exact
                    else None
                ),
            )
        if done.exact:
            histogram = _observed(histogram, done.claim.prefill_seconds)
    history = replace(history, claims=settlement.open, tracks=tracks)
    history = _with_counts(
        history,
        replace(
            counts,
            slots=slots,
            unattributed_tokens=unattributed,
            requests=requests,
            observations=observations,
            request_prefill_seconds=histogram,
        ),
    )
    return _with_losses(history, losses)


def _observed(histogram: HistogramCounts, seconds: float) -> HistogramCounts:
    place = next(
        (place for place, bound in enumerate(histogram.bounds) if seconds <= bound), len(histogram.bounds)
    )
    counts = tuple(count + (index == place) for index, count in enumerate(histogram.counts))
    return replace(histogram, counts=counts, sum=histogram.sum + seconds)


def _added(counts: Mapping[_Key, int], key: _Key, amount: int) -> Mapping[_Key, int]:
    return {**counts, key: counts.get(key, 0) + amount}


# --- restarts -----------------------------------------------------------------------------------------


def _shows_restart(history: History, look: ServerLook) -> bool:
    if look.counters is not None and history.counters is not None:
        if _restarted(history.counters, look.counters):
            return True
        if look.counters.process_identity is not None:
            return False
    return look.slots is not None and _task_numbers_went_back(history.tracks, look.slots)


def _restarted(last: ServerCounters, now: ServerCounters) -> bool:
    if last.process_identity is not None and now.process_identity is not None:
        return last.process_identity != now.process_identity
    return any(
        b is not None and n is not None and n < b for b, n in zip(_work(last), _work(now), strict=True)
    )


def _work(counters: ServerCounters) -> tuple[float | None, ...]:
    return (
        counters.computed_tokens,
        counters.reused_tokens,
        counters.generated_tokens,
        counters.prefill_seconds,
        counters.decode_seconds,
    )


def _task_numbers_went_back(tracks: Mapping[int, SlotTrack], slots: Iterable[SlotSeen]) -> bool:
    """Task numbers only grow in one process (they survive a sleep)."""
    before = max((t.seen.task for t in tracks.values() if t.seen.task is not None), default=None)
    now = max((slot.task for slot in slots if slot.task is not None), default=None)
    return before is not None and now is not None and now < before


def _counters_tell(look: ServerLook) -> bool:
    return look.counters is not None and look.counters.process_identity is not None


def _restart(history: History, at: float) -> History:
    history = _blanked(_emptied(history, Reason.RESTART))
    counters = history.counters
    if counters is not None:
        # A new process counts from 0; all it counted since is new, even where it passed the old.
        counters = replace(
            counters,
            computed_tokens=0,
            generated_tokens=0,
            reused_tokens=None if counters.reused_tokens is None else 0,
            prefill_seconds=None if counters.prefill_seconds is None else 0.0,
            decode_seconds=None if counters.decode_seconds is None else 0.0,
            drafted_tokens=None if counters.drafted_tokens is None else 0,
            draft_accepted_tokens=None if counters.draft_accepted_tokens is None else 0,
            process_identity=None,
        )
    return replace(
        history,
        claims={},
        counters=counters,
        restarts=history.restarts + 1,
        last_restart_at=at,
        releases=0,
    )


# --- out ------------------------------------------------------------------------------------------------


def validity_seconds(interval_seconds: float) -> float:
    """Return how long a reading stays valid: the longer of three polls and 10 s."""
    return max(VALID_POLLS * interval_seconds, SHORTEST_VALIDITY_SECONDS)


def expires_at(history: History, monotonic: float) -> float | None:
    """Return when (monotonic seconds) the next reading ages out, or None when none will."""
    times = (
        seen + _validity(history, source)
        for seen, source in (
            (history.slots_seen, "slots"),
            (history.props_seen, "props"),
            (history.counters_seen, "metrics"),
        )
        if seen is not None
    )
    return min((time for time in times if time >= monotonic), default=None)


def _validity(history: History, source: str) -> float:
    box = history.sources.get(source)
    return validity_seconds((box.interval_seconds if box else None) or 0.0)


def _valid(history: History, seen: float | None, source: str, monotonic: float) -> bool:
    return seen is not None and monotonic <= seen + _validity(history, source)


def box(history: History, monotonic: float) -> ServerBox:
    """Return what views render of a history at one instant; readings that aged out are absent."""
    up = history.state in STATES_UP
    slots_valid = _valid(history, history.slots_seen, "slots", monotonic)
    props_valid = _valid(history, history.props_seen, "props", monotonic)
    stalled = history.state is ServerState.STALLED
    ranks = (
        lru_ranks(history.tracks.values())
        if history.kv_unified is False and history.releases >= RELEASES_FOR_LRU
        else {}
    )
    slots = tuple(
        _slot_box(track, ranks.get(slot_id), slots_valid or (stalled and not track.seen.processing))
        for slot_id, track in sorted(history.tracks.items())
    )
    deferred: int | None = None
    if slots_valid and history.tracks:
        if not history.all_busy:
            deferred = 0  # only while every slot works can a request wait
        elif history.counters is not None and _valid(history, history.counters_seen, "metrics", monotonic):
            deferred = history.counters.requests_deferred
    known = props_valid or up
    props = history.props if known else None
    return ServerBox(
        name=history.name,
        state=history.state,
        up=up,
        created_at=history.created_at or 0.0,
        model=history.model,
        build=props.build if props else None,
        file_type=props.file_type if props else None,
        metrics_available=history.metrics_available if known else None,
        restarts=history.restarts,
        started_at=history.process.started_at if history.process and up else None,
        last_restart_at=history.last_restart_at,
        slots_total=(
            len(history.tracks)
            if history.tracks and slots_valid
            else props.total_slots
            if props and props_valid
            else None
        ),
        slots_busy=(
            sum(track.seen.processing for track in history.tracks.values())
            if slots_valid and history.tracks
            else None
        ),
        requests_deferred=deferred,
        kv_unified=history.kv_unified if known else None,
        slots=slots,
        counts=tuple(history.counts.values()),
        sources=history.sources,
        problem=history.problem,
    )


def _slot_box(track: SlotTrack, rank: int | None, valid: bool) -> SlotBox:
    seen = track.seen
    if not valid:
        return SlotBox(seen.id, last_used_at=track.last_used_at)
    prefilling = seen.phase is Phase.PREFILL
    return SlotBox(
        id=seen.id,
        context_tokens=seen.held_tokens,
        context_limit_tokens=seen.context_limit_tokens,
        phase=seen.phase,
        phase_started_at=track.phase_started_at if seen.phase else None,
        prefill_tokens=(
            (seen.computed_tokens or 0) + (seen.reused_tokens or 0)
            if prefilling and seen.computed_tokens is not None
            else None
        ),
        last_prefill_seconds=track.last_prefill_seconds,
        last_prompt_tokens=track.last_prompt_tokens,
        last_used_at=track.last_used_at,
        lru_rank=rank,
    )
