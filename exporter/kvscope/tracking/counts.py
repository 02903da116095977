"""Counters of one model: they start at 0 for every label set that can occur, and only grow."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from kvscope.observed.server import Phase, ServerCounters
from kvscope.snapshot import EvictionCount, HistogramCounts, ModelCounts, SlotCounts
from kvscope.tracking.ledger import Settlement
from kvscope.tracking.slots import Loss, Reason

PREFILL_SECONDS_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)

_Key = TypeVar("_Key", bound=Hashable)


def no_counts(model: str | None, at: float) -> ModelCounts:
    """Return counters of which none can be read yet, created at a Unix time in seconds."""
    return ModelCounts(model=model, created_at=at, slots={}, requests={}, observations={}, evictions={})


@dataclass(frozen=True, slots=True)
class Countable:
    """What the sources at hand can count.

    counters: the last ones of /metrics. slots_tell_tokens: False on older builds, whose /slots says
    of a slot only that it works; None while no slot worked yet.
    """

    counters: ServerCounters | None
    slots_tell_tokens: bool | None

    @property
    def tokens_held(self) -> bool:
        """Whether a loss would show. Builds that count reused tokens tell what slots hold as well."""
        return self.slots_tell_tokens or (
            self.slots_tell_tokens is None
            and self.counters is not None
            and self.counters.reused_tokens is not None
        )

    @property
    def computed(self) -> bool:
        """Whether computed and generated tokens are told by anything."""
        return self.counters is not None or bool(self.slots_tell_tokens)

    @property
    def reused(self) -> bool:
        """Whether reused tokens are told by anything."""
        counted = self.counters is not None and self.counters.reused_tokens is not None
        return counted or bool(self.slots_tell_tokens)


def with_zeros(counts: ModelCounts, slot_ids: Iterable[int], countable: Countable) -> ModelCounts:
    """Return the counts with a 0 added for everything that the sources can count.

    Without slots nothing is known of requests; only with the server's counters besides can a
    request be known exactly; what slots lost is known only where they tell what they hold. What
    was ever counted stays, whatever the sources tell now.
    """
    sources = ("computed",) * countable.computed + ("unknown",) * countable.reused
    slots = dict(counts.slots)
    for slot_id in slot_ids:
        of_slot = slots.get(slot_id, _NO_SLOT_COUNTS)
        slots[slot_id] = replace(
            of_slot,
            prompt_tokens={**dict.fromkeys(sources, 0), **of_slot.prompt_tokens},
            generated_tokens=(of_slot.generated_tokens or 0)
            if countable.computed
            else of_slot.generated_tokens,
            evictions={**_NO_LOSSES, **of_slot.evictions} if countable.tokens_held else of_slot.evictions,
        )
    precisions = ("exact", "apportioned") if countable.counters is not None else ("apportioned",)
    histogram = counts.request_prefill_seconds
    if histogram is None and countable.counters is not None:
        histogram = HistogramCounts(PREFILL_SECONDS_BOUNDS, (0,) * (len(PREFILL_SECONDS_BOUNDS) + 1))
    return replace(
        counts,
        slots=slots,
        requests={"unknown": 0, **counts.requests},
        observations={**dict.fromkeys(precisions, 0), **counts.observations},
        evictions={**_NO_EVICTIONS, **counts.evictions} if countable.tokens_held else counts.evictions,
        request_prefill_seconds=histogram,
    )


def with_phase_seconds(counts: ModelCounts, phases: Mapping[int, Phase], seconds: float) -> ModelCounts:
    """Return the counts after each slot spent some seconds in a phase."""
    slots = dict(counts.slots)
    for slot_id, phase in phases.items():
        of_slot = slots.get(slot_id, _NO_SLOT_COUNTS)
        before = of_slot.phase_seconds
        slots[slot_id] = replace(of_slot, phase_seconds={**before, phase: before[phase] + seconds})
    return replace(counts, slots=slots)


def with_losses(counts: ModelCounts, losses: Iterable[Loss]) -> ModelCounts:
    """Return the counts after slots lost tokens; whether a copy is kept, polling cannot know."""
    slots, evictions = dict(counts.slots), dict(counts.evictions)
    for loss in losses:
        of_slot = slots.get(loss.slot, _NO_SLOT_COUNTS)
        slots[loss.slot] = replace(of_slot, evictions=_added(of_slot.evictions, loss.reason.value, 1))
        key = ("slot", loss.reason.value, "unknown")
        count = evictions.get(key, EvictionCount())
        evictions[key] = EvictionCount(count.events + loss.events, count.tokens + loss.tokens)
    return replace(counts, slots=slots, evictions=evictions)


def with_increase(counts: ModelCounts, last: ServerCounters, now: ServerCounters) -> ModelCounts:
    """Return the counts after the server's own counters of seconds grew.

    last and now tell the same counters (see `restarts.with_gaps_filled`).
    The server's seconds are wall time: several prompts read in one batch count once.
    """
    if counts.unattributed_tokens is None:
        kinds = ["computed", "generated"] + (["reused"] if now.reused_tokens is not None else [])
        counts = replace(counts, unattributed_tokens=dict.fromkeys(kinds, 0))
    return replace(
        counts,
        prefill_seconds=_grown(counts.prefill_seconds, last.prefill_seconds, now.prefill_seconds),
        decode_seconds=_grown(counts.decode_seconds, last.decode_seconds, now.decode_seconds),
    )


def with_drafts(counts: ModelCounts, accepted: int, rejected: int) -> ModelCounts:
    """Return the counts after so many drafted tokens were accepted, and so many were not."""
    drafts = _added(counts.draft_tokens or {"accepted": 0, "rejected": 0}, "accepted", accepted)
    return replace(counts, draft_tokens=_added(drafts, "rejected", rejected))


def with_settlement(counts: ModelCounts, settlement: Settlement) -> ModelCounts:
    """Return the counts after tokens were given to slots, and requests ended."""
    slots = dict(counts.slots)
    for slot_id, gained in settlement.credits.items():
        of_slot = slots.get(slot_id, _NO_SLOT_COUNTS)
        prompt = of_slot.prompt_tokens
        for source, amount in (("computed", gained.computed), ("unknown", gained.reused)):
            if amount:
                prompt = _added(prompt, source, amount)
        slots[slot_id] = replace(
            of_slot,
            prompt_tokens=prompt,
            generated_tokens=(
                of_slot.generated_tokens + gained.generated
                if of_slot.generated_tokens is not None
                else gained.generated or None
            ),
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
    for done in settlement.finished:
        requests = _added(requests, "unknown", 1)
        observations = _added(observations, "exact" if done.exact else "apportioned", 1)
        if done.exact and histogram is not None and done.claim.prefill_seconds is not None:
            histogram = _observed(histogram, done.claim.prefill_seconds)
    return replace(
        counts,
        slots=slots,
        unattributed_tokens=unattributed,
        requests=requests,
        observations=observations,
        request_prefill_seconds=histogram,
    )


_NO_SLOT_COUNTS = SlotCounts(
    phase_seconds=dict.fromkeys(Phase, 0.0), prompt_tokens={}, generated_tokens=None, evictions={}
)

_NO_LOSSES = {reason.value: 0 for reason in Reason}
_NO_EVICTIONS = {("slot", reason.value, "unknown"): EvictionCount() for reason in Reason}


def _grown(total: float | None, last: float | None, now: float | None) -> float | None:
    return total if now is None else (total or 0.0) + max(0.0, now - (last or 0.0))


def _observed(histogram: HistogramCounts, seconds: float) -> HistogramCounts:
    place = next(
        (place for place, bound in enumerate(histogram.bounds) if seconds <= bound), len(histogram.bounds)
    )
    counts = tuple(count + (index == place) for index, count in enumerate(histogram.counts))
    return replace(histogram, counts=counts, sum=histogram.sum + seconds)


def _added(counts: Mapping[_Key, int], key: _Key, amount: int) -> Mapping[_Key, int]:
    return {**counts, key: counts.get(key, 0) + amount}
