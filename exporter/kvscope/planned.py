"""What `kvscope plan` answers: what its table and its JSON render.

The fields' names are the keys of `--json`. None means unknown and is left out there, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PLAN_VERSION = 1
"""Version of the JSON; it grows when a field is renamed or removed."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """The model. origin: file, shape or list; list_date: the day of the built-in list."""

    name: str
    architecture: str
    origin: str
    memory_class: str
    context_length: int | None = None
    weights_bytes: int | None = None
    list_date: str | None = None


@dataclass(frozen=True, slots=True)
class PlannedSettings:
    """The settings that all figures rest on, as llama-server would make of what was given."""

    slots: int
    unified: bool
    cache_type_k: str
    cache_type_v: str
    swa_full: bool
    flash_attention: bool
    batch_tokens: int
    micro_batch_tokens: int


@dataclass(frozen=True, slots=True)
class PlannedCache:
    """One cache as llama.cpp allocates it. cells: of one stream; layers: how many keep something in it.

    kind: full, window, compressed, recurrent, indexer, or draft for all caches of the draft context.
    """

    name: str
    kind: str
    cells: int
    streams: int
    layers: int
    k_bytes: int
    v_bytes: int
    state_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedContext:
    """What one size of context costs.

    context_tokens: of all slots together, as llama.cpp rounds it; slot_context_tokens: the most that one
    slot can hold. bytes_by_kind and kv_bytes: allocated, in all. slot_bytes_by_kind and slot_kv_bytes:
    each slot's share of it; absent where the slots share one pool. full_slot_bytes: what one slot
    occupies once it is full. needed_bytes: with the weights. left_bytes: of the GPU's memory, below 0
    where it does not suffice.
    """

    context_tokens: int
    slot_context_tokens: int
    caches: tuple[PlannedCache, ...]
    bytes_by_kind: Mapping[str, int]
    kv_bytes: int
    full_slot_bytes: int
    slot_bytes_by_kind: Mapping[str, int] | None = None
    slot_kv_bytes: int | None = None
    needed_bytes: int | None = None
    left_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ContextFit:
    """The largest context that fits. slot_context_tokens 0: not even 256 tokens a slot do.

    ended_by: memory; model where its own context_length is what ends it; refused where llama.cpp does
    not start with these settings, and problem says why.
    """

    cache_type_k: str
    cache_type_v: str
    slots: int
    unified: bool
    ended_by: str
    slot_context_tokens: int | None = None
    context_tokens: int | None = None
    kv_bytes: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that also takes memory, and between which sizes it typically is."""

    what: str
    typical_low_bytes: int
    typical_high_bytes: int
    words: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole answer. reserve_bytes: of the GPU's memory, what the user wants kept free."""

    model: PlannedModel
    settings: PlannedSettings
    contexts: tuple[PlannedContext, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    fits: tuple[ContextFit, ...] = ()
    vram_bytes: int | None = None
    reserve_bytes: int | None = None
