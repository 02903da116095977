"""Metrics of each slot: what it holds, what it does, when it was used."""

from __future__ import annotations

from kvscope.metrics.family import SLOT, Family, Kind, each_slot, each_slot_counted, one_of
from kvscope.observed.server import Phase

FAMILIES = (
    Family(
        "kvscope_slot_context_tokens",
        Kind.GAUGE,
        "Tokens that the slot's cache holds now.",
        SLOT,
        "slots",
        each_slot(lambda slot: slot.context_tokens),
    ),
    Family(
        "kvscope_slot_context_limit_tokens",
        Kind.GAUGE,
        "Tokens that the slot can hold at most; where all slots share one pool, the whole pool.",
        SLOT,
        "slots",
        each_slot(lambda slot: slot.context_limit_tokens),
    ),
    Family(
        "kvscope_slot_phase",
        Kind.STATE_SET,
        "What the slot does: 1 for the phase that holds, 0 for every other.",
        (*SLOT, "phase"),
        "slots",
        each_slot(lambda slot: one_of(Phase, slot.phase)),
    ),
    Family(
        "kvscope_slot_phase_started_timestamp_seconds",
        Kind.GAUGE,
        "When the slot's present phase was first seen, in seconds since 1970.",
        SLOT,
        "slots",
        each_slot(lambda slot: slot.phase_started_at),
    ),
    Family(
        "kvscope_slot_phase_seconds_total",
        Kind.COUNTER,
        "Time that the slot spent in each phase.",
        (*SLOT, "phase"),
        "slots",
        each_slot_counted(lambda counts: counts.phase_seconds),
    ),
    Family(
        "kvscope_slot_prefill_tokens",
        Kind.GAUGE,
        "Tokens of the current prompt that were read so far; only while the slot reads one.",
        SLOT,
        "slots",
        each_slot(lambda slot: slot.prefill_tokens),
    ),
    Family(
        "kvscope_slot_last_prefill_seconds",
        Kind.GAUGE,
        "How long reading the prompt of the slot's last finished request took; only where that is exact.",
        SLOT,
        "slots and metrics",
        each_slot(lambda slot: slot.last_prefill_seconds),
    ),
    Family(
        "kvscope_slot_last_prompt_tokens",
        Kind.GAUGE,
        "Tokens of the prompt of the slot's last finished request, by where they came from; only where "
        "that is exact.",
        (*SLOT, "source"),
        "slots and metrics",
        each_slot(lambda slot: slot.last_prompt_tokens),
    ),
    Family(
        "kvscope_slot_last_used_timestamp_seconds",
        Kind.GAUGE,
        "When the slot last worked on a request, in seconds since 1970.",
        SLOT,
        "slots",
        each_slot(lambda slot: slot.last_used_at),
    ),
    Family(
        "kvscope_slot_lru_rank",
        Kind.GAUGE,
        "The slot's place in the order in which unrelated prompts take idle slots: 1 is taken next; only "
        "with separate slots, and only after two requests were seen to end.",
        SLOT,
        "slots",
        each_slot(lambda slot: slot.lru_rank),
    ),
    Family(
        "kvscope_slot_evictions_total",
        Kind.COUNTER,
        "Times the slot lost tokens that it held, by reason.",
        (*SLOT, "reason"),
        "slots",
        each_slot_counted(lambda counts: counts.evictions),
    ),
)
