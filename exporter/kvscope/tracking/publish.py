"""One way out: what views may render of a history at one instant."""

from __future__ import annotations

from kvscope.observed.server import Phase, ServerState, Source
from kvscope.snapshot import ServerBox, SlotBox, TierBox
from kvscope.tracking.context import ServerMemory
from kvscope.tracking.history import History
from kvscope.tracking.slots import SlotTrack, lru_places

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


def box(history: History, monotonic: float) -> ServerBox:
    """Return what views render of a history at one instant; readings that aged out are absent."""
    up = history.state in STATES_UP
    slots_valid = _valid(history, history.slots_seen, Source.SLOTS, monotonic)
    props_valid = _valid(history, history.props_seen, Source.PROPS, monotonic)
    stalled = history.state is ServerState.STALLED
    ranks: dict[int, int] = {}
    if history.kv_unified is False and history.releases >= RELEASES_FOR_LRU:
        places = lru_places(history.tracks.values())
        ranks = {slot_id: first for slot_id, (first, last) in places.items() if first == last}
    # What loads may be another model; anything else that is up was not replaced.
    known = props_valid or (up and history.state is not ServerState.LOADING)
    memory = history.memory if known and history.memory.known else None
    slots = tuple(
        _slot_box(track, ranks.get(slot_id), slots_valid or (stalled and not track.seen.processing), memory)
        for slot_id, track in sorted(history.tracks.items())
    )
    deferred: int | None = None
    if slots_valid and history.tracks:
        if not history.all_busy:
            deferred = 0  # only while every slot works can a request wait
        elif history.counters is not None and _valid(
            history, history.counters_seen, Source.METRICS, monotonic
        ):
            deferred = history.counters.requests_deferred
    header = history.model_seen.header if history.model_seen and known else None
    asleep = history.state is ServerState.SLEEPING
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
        architecture=header.architecture if header else None,
        kv_unified=history.kv_unified if known else None,
        kv_allocated=(
            {key: 0 if asleep else size for key, size in memory.caches.items()} if memory else None
        ),
        kv_bytes_per_token=memory.bytes_per_token if memory else None,
        kv_sources=memory.sources if memory else None,
        kv_disagreement=memory.disagreement if memory else None,
        model_bytes=header.file_bytes if header else None,
        tiers={"slot": _slot_tier(slots, memory, asleep)},
        slots=slots,
        counts=tuple(history.counts.values()),
        sources=history.sources,
        problem=history.problem,
    )


def expires_at(history: History, monotonic: float) -> float | None:
    """Return when (monotonic seconds) the next reading ages out, or None when none will."""
    times = (
        seen + _validity(history, source)
        for seen, source in (
            (history.slots_seen, Source.SLOTS),
            (history.props_seen, Source.PROPS),
            (history.counters_seen, Source.METRICS),
        )
        if seen is not None
    )
    return min((time for time in times if time >= monotonic), default=None)


def validity_seconds(interval_seconds: float) -> float:
    """Return how long a reading stays valid: the longer of three polls and 10 s."""
    return max(VALID_POLLS * interval_seconds, SHORTEST_VALIDITY_SECONDS)


def _validity(history: History, source: Source) -> float:
    return validity_seconds(history.read_every.get(source, 0.0))


def _valid(history: History, seen: float | None, source: Source, monotonic: float) -> bool:
    return seen is not None and monotonic <= seen + _validity(history, source)


def _slot_tier(slots: tuple[SlotBox, ...], memory: ServerMemory | None, asleep: bool) -> TierBox:
    tokens = [slot.context_tokens for slot in slots if slot.context_tokens is not None]
    sizes = [slot.kv_bytes for slot in slots if slot.kv_bytes is not None]
    return TierBox(
        held_bytes=sum(sizes) if slots and len(sizes) == len(slots) else None,
        limit_bytes=(0 if asleep else memory.allocated_bytes) if memory else None,
        tokens=sum(tokens) if slots and len(tokens) == len(slots) else None,
        limit_tokens=(0 if asleep else memory.limit_tokens) if memory else None,
    )


def _slot_box(track: SlotTrack, rank: int | None, valid: bool, memory: ServerMemory | None) -> SlotBox:
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
        kv_bytes=memory.sequence_bytes(seen.held_tokens) if memory and seen.held_tokens is not None else None,
    )
