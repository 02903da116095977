"""From a model's shape and a context's settings to bytes: what llama.cpp allocates, what tokens occupy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kvscope.observed.model import ModelHeader


class CacheKind(StrEnum):
    """What a cache keeps; the label `cache` of `kvscope_kv_allocated_bytes`."""

    FULL = "full"
    WINDOW = "window"
    COMPRESSED = "compressed"
    RECURRENT = "recurrent"
    INDEXER = "indexer"


class ShapeError(ValueError):
    """A model whose memory cannot be told: an architecture that is not known, a key that is missing."""


@dataclass(frozen=True, slots=True)
class ContextParameters:
    """What llama_init_from_model is asked for; the defaults are llama-server's.

    context_tokens: 0 takes the model's own. rollback_snapshots: n_rs_seq. draft: the figures are those of
    the context that predicts further tokens with the model's own last layers (MTP).
    """

    context_tokens: int = 0
    sequences: int = 1
    unified: bool = False
    batch_tokens: int = 2048
    micro_batch_tokens: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    swa_full: bool = False
    flash_attention: bool = True
    rollback_snapshots: int = 0
    draft: bool = False


@dataclass(frozen=True, slots=True)
class CacheAllocation:
    """One cache as llama.cpp allocates it.

    name: as llama.cpp's classes call it (kv, base, swa, mla, idx, recurrent, ...). cells: of one stream;
    the rows of a recurrent state. layers: indices of those that keep something in it.
    """

    name: str
    kind: CacheKind
    cells: int
    streams: int
    layers: tuple[int, ...]
    k_bytes: int = 0
    v_bytes: int = 0
    state_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of K, V and state together."""
        return self.k_bytes + self.v_bytes + self.state_bytes


@dataclass(frozen=True, slots=True)
class KvMemory:
    """What one context allocates, and what sequences of tokens occupy in it."""

    memory_class: str
    context_tokens: int
    sequence_context_tokens: int
    caches: tuple[CacheAllocation, ...]
    bytes_per_token: float

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all caches together."""
        return sum(cache.total_bytes for cache in self.caches)

    def allocated_by_kind(self) -> Mapping[CacheKind, int]:
        """Return bytes by kind of cache, only kinds that are there."""
        raise NotImplementedError

    def sequence_bytes(self, tokens: int) -> int:
        """Return the bytes that a sequence of tokens occupies: what its next turn can reuse."""
        raise NotImplementedError

    def sequence_state_bytes(self, tokens: int) -> int:
        """Return what llama_state_seq_get_size gives for a sequence of tokens."""
        raise NotImplementedError

    def slot_file_bytes(self, tokens: int) -> int:
        """Return the size of a file that `POST /slots/N?action=save` writes."""
        raise NotImplementedError


def kv_memory(header: ModelHeader, parameters: ContextParameters) -> KvMemory:
    """Return the memory of one context. Raises ShapeError, naming the architecture or key that is missing."""
    raise NotImplementedError
