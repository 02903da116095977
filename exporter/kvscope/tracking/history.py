"""One way in: advance(history, look) -> history."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from kvscope.observed.logged_memory import LoggedMemory
from kvscope.observed.model import ContextSettings, ModelSeen
from kvscope.observed.server import (
    Phase,
    ServerCounters,
    ServerLook,
    ServerProcess,
    ServerProps,
    ServerState,
    SlotSeen,
    Source,
)
from kvscope.snapshot import ModelCounts, SourceBox
from kvscope.tracking import counts as counting
from kvscope.tracking.claims import Claim, Claims, Tokens, claims_after, seen_at_work, without_past
from kvscope.tracking.context import ServerMemory, joined, server_memory, slots_contradict, unified
from kvscope.tracking.ledger import Finished, Settlement, awaits_counters, settle, settle_without_counters
from kvscope.tracking.restarts import (
    counting_from_zero,
    restarted,
    task_numbers_went_back,
    with_first_readings,
    with_gaps_filled,
    work,
)
from kvscope.tracking.slots import (
    Loss,
    Reason,
    SlotTrack,
    Surroundings,
    advance_slot,
    decide_ended,
    lru_places,
    never_worked,
)
from kvscope.tracking.transitions import began_task, released, was_reset

MOST_MODELS = 64
MOST_CLAIMS = 256
"""While /metrics fails, requests that ended wait for it; beyond this they are counted without tokens."""

COARSEST_STEP_RATIO = 0.05
"""A prefill that is told only to more than 5 % is not told."""

_AWAY = frozenset({ServerState.UNREACHABLE, ServerState.UNAUTHORIZED, ServerState.NOT_LLAMA_SERVER})
_TELL_STATE = frozenset(Source) - {Source.MODEL_FILE}
_SEEN_WITHOUT_SLOTS = frozenset({ServerState.STALLED, ServerState.SLEEPING})


@dataclass(frozen=True, slots=True)
class History:
    """Everything that is known of one server.

    *_seen: monotonic seconds of the last good reading. gap: a look failed since the slots were last
    seen. slots_tell_tokens: None until a slot worked; older builds show only that it works.
    last_process: (pid, start) of the last process seen behind these slots. counted: what was settled
    of the counters so far, which are printed rounded. from_zero: the next counters are a new
    process's first. rejected_owed: drafted tokens that rounding hides or shows too early.
    read_every: seconds after which each source's newest reading was to be followed by the next, which
    decide how long it stays valid. counts: by model; those of models that left stay. given: what the
    user says of the server's context; model_seen: the shape of its model; logged: what its log says of
    it; memory: what follows from them.
    """

    name: str
    given: ContextSettings | None = None
    created_at: float | None = None
    state: ServerState = ServerState.UNREACHABLE
    model: str | None = None
    props: ServerProps | None = None
    props_seen: float | None = None
    process: ServerProcess | None = None
    last_process: tuple[int, float] | None = None
    metrics_available: bool | None = None
    model_seen: ModelSeen | None = None
    logged: LoggedMemory | None = None
    memory: ServerMemory = field(default_factory=ServerMemory)
    slots_proved_separate: bool = False
    tracks: Mapping[int, SlotTrack] = field(default_factory=dict)
    slots_seen: float | None = None
    gap: bool = False
    slots_tell_tokens: bool | None = None
    counters: ServerCounters | None = None
    counted: Tokens = field(default_factory=Tokens)
    counters_seen: float | None = None
    from_zero: bool = False
    rejected_owed: int = 0
    claims: Claims = field(default_factory=dict)
    looks: int = 0
    releases: int = 0
    restarts: int = 0
    last_restart_at: float | None = None
    counts: Mapping[str | None, ModelCounts] = field(default_factory=dict)
    sources: Mapping[str, SourceBox] = field(default_factory=dict)
    read_every: Mapping[Source, float] = field(default_factory=dict)
    problem: str | None = None

    @property
    def seen(self) -> tuple[SlotSeen, ...]:
        """The slots as they were last seen."""
        return tuple(track.seen for track in self.tracks.values())

    @property
    def kv_unified(self) -> bool | None:
        """Whether all slots share one pool; None while nothing tells."""
        settings = self.settings
        if settings is not None and not slots_contradict(settings, self.props):
            return unified(settings)
        return False if self.slots_proved_separate else None

    @property
    def settings(self) -> ContextSettings | None:
        """What user and process say of the context together; None where neither can be read."""
        if self.given is None and self.process is None:
            return None
        return joined(("setting", self.given), ("process", self._process_settings))[0]

    @property
    def _process_settings(self) -> ContextSettings | None:
        return None if self.process is None else self.process.settings

    @property
    def awaits_counters(self) -> bool:
        """Whether a request ended that /metrics was not asked about yet."""
        return awaits_counters(self.claims)

    @property
    def any_busy(self) -> bool:
        """Whether a slot worked when it was last seen."""
        return any(slot.processing for slot in self.seen)

    @property
    def all_busy(self) -> bool:
        """Whether requests may have to wait: every slot worked when it was last seen."""
        return bool(self.tracks) and all(slot.processing for slot in self.seen)

    @property
    def any_prefill(self) -> bool:
        """Whether a slot was reading its prompt when it was last seen."""
        return any(slot.phase is Phase.PREFILL for slot in self.seen)


def looks_restarted(history: History, slots: Iterable[SlotSeen]) -> bool:
    """Return whether slots look like those of a new process, so that /metrics must be read first."""
    if not history.tracks:
        return False
    now = {slot.id: slot for slot in slots}
    return (
        set(now) != set(history.tracks)
        or any(was_reset(slot, now[slot.id]) for slot in history.seen)
        or task_numbers_went_back(history.seen, now.values())
    )


def counters_moved(history: History, counters: ServerCounters) -> bool:
    """Return whether the server works now, or did since its counters were last settled."""
    last = history.counters
    return (
        bool(counters.requests_processing)
        or last is None
        or work(last) != work(counters)
        or restarted(last, counters)
    )


def of_another_process(history: History, counters: ServerCounters) -> bool:
    """Return whether counters come from another process than the last ones."""
    return history.counters is not None and restarted(history.counters, counters)


def advance(history: History, look: ServerLook) -> History:
    """Return the history after one look. Pure: the clock is in the look."""
    elapsed = None if history.slots_seen is None else look.monotonic - history.slots_seen
    was_away = history.state in (ServerState.UNREACHABLE, ServerState.LOADING)
    history = _with_frame(history, look)
    if look.counters_readable is False and history.counters is not None:
        history = replace(history, counters=None, counted=Tokens(), counters_seen=None)
    if _process_was_replaced(history, look) or _shows_restart(history, look, was_away):
        history, elapsed = _restart(history, look.at), None
    history = _with_memory(_with_props(_with_process(history, look), look), look, history)
    first = not history.tracks and history.counters is None
    if look.state is ServerState.SLEEPING:
        history = _asleep(_with_phase_seconds(history, elapsed), look)
    elif look.slots is not None:
        history = _with_slots(history, look, look.slots, elapsed)
    elif look.quiet and history.tracks:
        history = _with_phase_seconds(history, elapsed)
        history = replace(history, slots_seen=look.monotonic, gap=False)
    if history.tracks:
        countable = counting.Countable(look.counters or history.counters, history.slots_tell_tokens)
        history = _with_counts(history, counting.with_zeros(_counts(history), history.tracks, countable))
    if look.counters is not None:
        history = _with_counters(history, look, look.counters, first)
    elif look.counters_readable is False and history.awaits_counters:
        history = _settled(history, settle_without_counters(history.claims))
    elif sum(len(of_slot) for of_slot in history.claims.values()) > MOST_CLAIMS:
        history = _settled(history, settle(history.claims, Tokens()))
    return history


# --- frame: state, sources, process, model ------------------------------------------------------


def _with_frame(history: History, look: ServerLook) -> History:
    seen = look.slots is not None or look.quiet or look.state in _SEEN_WITHOUT_SLOTS
    return replace(
        history,
        created_at=look.at if history.created_at is None else history.created_at,
        state=look.state,
        looks=history.looks + 1,
        sources=_sources(history.sources, look),
        read_every=_read_every(history.read_every, look),
        gap=history.gap or not seen,
        metrics_available=(
            history.metrics_available if look.metrics_available is None else look.metrics_available
        ),
        problem=next(
            (each.problem for each in look.answers if each.problem and each.source in _TELL_STATE), None
        ),
    )


def _with_props(history: History, look: ServerLook) -> History:
    if look.props is not None:
        model = look.props.model or history.model
        if history.model is not None and model != history.model:
            history = replace(_emptied(history, Reason.RESTART, look.at), claims={})
        history = replace(history, props=look.props, props_seen=look.monotonic, model=model)
    if history.model not in history.counts and (look.slots is not None or look.counters is not None):
        kept = list(history.counts.items())[-(MOST_MODELS - 1) :]
        history = replace(history, counts=dict(kept))
        history = _with_counts(history, counting.no_counts(history.model, look.at))
    return history


def _sources(sources: Mapping[str, SourceBox], look: ServerLook) -> Mapping[str, SourceBox]:
    after = dict(sources)
    for answer in look.answers:
        before = after.get(answer.source, SourceBox())
        succeeded = answer.problem is None
        after[answer.source] = replace(
            before,
            up=succeeded,
            failures=before.failures + (0 if succeeded else 1),
            last_success_at=look.at if succeeded else before.last_success_at,
            duration_seconds=answer.duration_seconds if succeeded else None,
        )
    waited = dict(look.intervals)
    for source in {*after, *waited}:
        # One that is not asked at present has no interval.
        after[source] = replace(after.get(source, SourceBox()), interval_seconds=waited.get(Source(source)))
    return {source: after[source] for source in Source if source in after}


def _read_every(before: Mapping[Source, float], look: ServerLook) -> Mapping[Source, float]:
    """The pauses of a back-off make no old reading shorter or longer valid; slots that are left alone
    are proven by what is asked instead.
    """
    if look.state in _AWAY:
        return before
    waited = dict(look.intervals)
    read = {
        Source.SLOTS: look.slots is not None or look.quiet or look.state is ServerState.SLEEPING,
        Source.PROPS: look.props is not None,
        Source.METRICS: look.counters is not None,
    }
    shortest = min(waited.values(), default=0.0)
    return {
        source: waited.get(source, shortest) if now else max(before.get(source, 0.0), waited.get(source, 0.0))
        for source, now in read.items()
    }


def _with_process(history: History, look: ServerLook) -> History:
    process = look.process if look.process_readable else None
    last = history.last_process if process is None else (process.pid, process.started_at)
    return replace(history, process=process, last_process=last)


def _with_memory(history: History, look: ServerLook, before: History) -> History:
    """Worked out only when something changed that it rests on."""
    history = replace(history, model_seen=look.model, logged=look.logged)
    process, last_process = history._process_settings, before._process_settings
    told = (look.model, look.logged, process, history.props)
    if told == (before.model_seen, before.logged, last_process, before.props):
        return history
    memory = server_memory(look.model, history.given, process, history.props, look.logged)
    return replace(history, memory=memory)


def _counts(history: History) -> ModelCounts:
    return history.counts.get(history.model) or counting.no_counts(history.model, history.created_at or 0.0)


def _with_counts(history: History, counts: ModelCounts) -> History:
    return replace(history, counts={**history.counts, history.model: counts})


# --- slots ----------------------------------------------------------------------------------------


def _with_slots(
    history: History, look: ServerLook, slots: tuple[SlotSeen, ...], elapsed: float | None
) -> History:
    now = {slot.id: slot for slot in slots}
    history = _with_new_slots_told(history, look, now)
    if history.tracks:
        history = _with_slots_advanced(_with_phase_seconds(history, elapsed, now), look, now)
    else:
        history = _with_first_slots(history, look, now)
    return replace(
        history,
        slots_seen=look.monotonic,
        gap=False,
        slots_proved_separate=history.slots_proved_separate or _prove_separate_pools(slots),
        slots_tell_tokens=_slots_tell_tokens(history, slots),
    )


def _with_new_slots_told(history: History, look: ServerLook, now: Mapping[int, SlotSeen]) -> History:
    if not history.tracks:
        return history
    if set(now) != set(history.tracks):
        # Another number of slots: the old ones are gone with what they held.
        history = _emptied(history, Reason.RESTART, look.at)
        tracks = {slot.id: never_worked(slot, look.at) for slot in now.values()}
        return replace(history, tracks=tracks, claims={})
    if any(was_reset(slot, now[slot.id]) for slot in history.seen):
        # New slots in a process that did not restart: it slept and woke between two looks.
        same_process = look.counters is not None and look.counters.process_identity is not None
        return _emptied(history, Reason.SLEEP if same_process else Reason.UNKNOWN, look.at)
    return history


def _with_first_slots(history: History, look: ServerLook, now: Mapping[int, SlotSeen]) -> History:
    tracks: dict[int, SlotTrack] = {}
    claims = dict(history.claims)
    for slot_id, slot in now.items():
        tracks[slot_id] = SlotTrack(slot, look.at, last_used_at=look.at if slot.processing else None)
        if slot.processing:
            counted = Tokens(slot.computed_tokens or 0, slot.reused_tokens or 0)
            claim = Claim(slot.task or 0, whole=False, credited=counted)
            claims[slot_id] = (seen_at_work(claim, slot, None),)
    return replace(history, tracks=tracks, claims=claims)


def _with_slots_advanced(history: History, look: ServerLook, now: Mapping[int, SlotSeen]) -> History:
    surroundings = Surroundings(
        tasks_begun=sum(began_task(slot, now[slot.id]) for slot in history.seen),
        lru_places=lru_places(history.tracks.values()),
        pool_may_have_filled=_pool_may_have_filled(history.seen, now),
        kv_unified=history.kv_unified,
    )
    tracks: dict[int, SlotTrack] = {}
    claims = dict(history.claims)
    losses: list[Loss] = []
    for slot_id, track in history.tracks.items():
        slot = now[slot_id]
        of_slot = claims_after(claims.get(slot_id, ()), track.seen, slot)
        if of_slot:
            claims[slot_id] = of_slot
        tracks[slot_id], lost = advance_slot(track, slot, look.at, history.looks, surroundings)
        losses += lost
    releases = sum(released(slot, now[slot.id]) for slot in history.seen)
    history = replace(history, tracks=tracks, claims=claims, releases=history.releases + releases)
    return _with_counts(history, counting.with_losses(_counts(history), losses))


def _pool_may_have_filled(before: Iterable[SlotSeen], now: Mapping[int, SlotSeen]) -> bool:
    """Whether a unified pool could have run out, if all that was held and is held lay in it at once."""
    pool = next((slot.context_limit_tokens for slot in now.values()), None)
    if pool is None:
        return True
    held = 0
    for slot in before:
        held += slot.held_tokens or 0
        after = now[slot.id]
        if after.processing or began_task(slot, after):
            held += after.held_tokens or 0
    return held > pool


def _prove_separate_pools(slots: Iterable[SlotSeen]) -> bool:
    """Whether idle slots hold more than one pool could; those of `n > 1` share cells while they work."""
    limits = [slot.context_limit_tokens for slot in slots if slot.context_limit_tokens]
    held = sum(slot.held_tokens or 0 for slot in slots if not slot.processing)
    return bool(limits) and held > max(limits)


def _slots_tell_tokens(history: History, slots: Iterable[SlotSeen]) -> bool | None:
    worked = [slot for slot in slots if slot.task is not None or slot.processing]
    if history.slots_tell_tokens or not worked:
        return history.slots_tell_tokens
    return any(slot.held_tokens is not None for slot in worked)


def _with_phase_seconds(
    history: History, elapsed: float | None, now: Mapping[int, SlotSeen] | None = None
) -> History:
    if elapsed is None or elapsed <= 0:
        return history

    def known_throughout(slot: SlotSeen) -> bool:
        if not history.gap:
            return True
        after = now.get(slot.id) if now else None
        return after is not None and (slot.task, slot.phase) == (after.task, after.phase)

    phases = {slot.id: slot.phase for slot in history.seen if slot.phase and known_throughout(slot)}
    return _with_counts(history, counting.with_phase_seconds(_counts(history), phases, elapsed))


def _emptied(history: History, reason: Reason, at: float) -> History:
    """All that was held is lost at once: one event. The slots are as if they had never worked."""
    losses: list[Loss] = []
    for slot in history.seen:
        if slot.held_tokens:
            losses.append(Loss(slot.id, reason, slot.held_tokens, events=0 if losses else 1))
    if losses:
        history = _with_counts(history, counting.with_losses(_counts(history), losses))
    tracks = {
        slot_id: replace(
            never_worked(track.seen, track.phase_started_at if track.seen.phase is Phase.IDLE else at),
            last_used_at=track.last_used_at,
        )
        for slot_id, track in history.tracks.items()
    }
    return replace(history, tracks=tracks)


def _asleep(history: History, look: ServerLook) -> History:
    if any(slot.task is not None for slot in history.seen):
        history = _emptied(history, Reason.SLEEP, look.at)
    elif not history.tracks and history.props is not None:
        # Not seen awake yet, but what a sleeping server holds is known: nothing.
        slots = range(history.props.total_slots or 0)
        limit = history.props.context_limit_tokens
        tracks = {slot: never_worked(SlotSeen(slot, limit), look.at) for slot in slots}
        history = replace(history, tracks=tracks)
    claims = {
        slot: tuple(replace(claim, ended=True) for claim in of_slot)
        for slot, of_slot in history.claims.items()
    }
    return replace(history, claims=claims, slots_seen=look.monotonic if history.tracks else None, gap=False)


# --- counters ---------------------------------------------------------------------------------------


def _with_counters(history: History, look: ServerLook, counters: ServerCounters, first: bool) -> History:
    last = history.counters
    if history.from_zero:
        last = counting_from_zero(counters)
        history = replace(history, counted=Tokens(), from_zero=False)
    elif last is None:
        # What was counted before the first look is not ours.
        last = counters
        if not first:
            history = _settled(history, settle(history.claims, Tokens()))
            history = replace(history, claims=without_past(history.claims))
        history = replace(history, counted=_tokens(counters))
    now = with_gaps_filled(counters, last)
    if last.reused_tokens is None and now.reused_tokens is not None:
        history = replace(history, counted=replace(history.counted, reused=now.reused_tokens))
    last = with_first_readings(last, now)
    if counters.prefill_seconds is None:
        now = replace(now, prefill_seconds_step=math.inf)
    history = replace(history, counters=now, counters_seen=look.monotonic)
    history = _with_drafts(history, last, now)
    history = _with_counts(history, counting.with_increase(_counts(history), last, now))
    increase = _tokens(now) - history.counted
    if now.reused_tokens is None:
        # Builds without this counter: what /slots showed of it is all there is to know.
        shown = sum(claim.firm.reused for claims in history.claims.values() for claim in claims)
        increase = replace(increase, reused=shown)
    steps = Tokens(now.computed_step, now.reused_step, now.generated_step)
    if not history.claims and increase.within(Tokens(), steps):
        return history
    settlement = settle(
        history.claims, increase, _prefill_seconds(last, now), consistent=look.consistent, steps=steps
    )
    finished = tuple(_told_finely(done, now.prefill_seconds_step) for done in settlement.finished)
    history = replace(history, counted=history.counted + settlement.given)
    return _settled(history, replace(settlement, finished=finished))


def _with_drafts(history: History, last: ServerCounters, now: ServerCounters) -> History:
    if now.drafted_tokens is None or now.draft_accepted_tokens is None:
        return history
    drafted = now.drafted_tokens - (last.drafted_tokens or 0)
    accepted = now.draft_accepted_tokens - (last.draft_accepted_tokens or 0)
    owed = history.rejected_owed + drafted - accepted
    rejected = max(0, owed)
    history = replace(history, rejected_owed=owed - rejected)
    return _with_counts(history, counting.with_drafts(_counts(history), accepted, rejected))


def _told_finely(done: Finished, step: float) -> Finished:
    """The request without its prefill seconds where the step they are printed in hides them."""
    seconds = done.claim.prefill_seconds
    if seconds is None or step <= seconds * COARSEST_STEP_RATIO:
        return done
    return replace(done, claim=replace(done.claim, prefill_seconds=None))


def _tokens(counters: ServerCounters) -> Tokens:
    return Tokens(counters.computed_tokens, counters.reused_tokens or 0, counters.generated_tokens)


def _prefill_seconds(last: ServerCounters, now: ServerCounters) -> float | None:
    """Growth of the prefill seconds, None where an answer lacked them."""
    if now.prefill_seconds is None or last.prefill_seconds is None:
        return None
    if math.inf in (last.prefill_seconds_step, now.prefill_seconds_step):
        return None
    return now.prefill_seconds - last.prefill_seconds


def _settled(history: History, settlement: Settlement) -> History:
    tracks = dict(history.tracks)
    losses: list[Loss] = []
    for done in settlement.finished:
        if done.slot not in tracks:
            continue
        track, lost = decide_ended(tracks[done.slot], done.claim, done.exact)
        losses += lost
        credited = done.claim.credited
        tracks[done.slot] = replace(
            track,
            last_prefill_seconds=done.claim.prefill_seconds if done.exact else None,
            last_prompt_tokens=(
                {"computed": credited.computed, "unknown": credited.reused} if done.exact else None
            ),
        )
    counts = counting.with_losses(counting.with_settlement(_counts(history), settlement), losses)
    return _with_counts(replace(history, claims=settlement.open, tracks=tracks), counts)


# --- restarts -----------------------------------------------------------------------------------------


def _process_was_replaced(history: History, look: ServerLook) -> bool:
    if look.process is None or history.last_process is None or not look.process_readable:
        return False
    # Where the counters say which process they are of, they also say what it did before this look.
    told = look.counters is not None and look.counters.process_identity is not None
    return not told and history.last_process != (look.process.pid, look.process.started_at)


def _shows_restart(history: History, look: ServerLook, was_away: bool) -> bool:
    if look.counters is not None and history.counters is not None:
        if restarted(history.counters, look.counters):
            return True
        if look.counters.process_identity is not None:
            return False
    if look.slots is None:
        return False
    # A server that sleeps and wakes goes on answering; one that was away and is new was restarted.
    new = was_away and look.counters is None and looks_restarted(history, look.slots)
    return new or task_numbers_went_back(history.seen, look.slots)


def _restart(history: History, at: float) -> History:
    history = _emptied(history, Reason.RESTART, at)
    counters = history.counters
    return replace(
        history,
        claims={},
        # All that the new process counted is new, even where it passed the old one.
        counters=None if counters is None else counting_from_zero(counters),
        from_zero=True,
        counted=Tokens(),
        # Whichever process is found next is this new one.
        last_process=None,
        slots_proved_separate=False,
        slots_tell_tokens=None,
        restarts=history.restarts + 1,
        last_restart_at=at,
        releases=0,
        rejected_owed=0,
    )
