"""From a model's shape and a context's settings to bytes: what llama.cpp allocates, what tokens occupy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvscope.observed.model import ModelHeader
from kvscope.tracking.architectures import KNOWN_ARCHITECTURES, Architecture, architecture, model_shape
from kvscope.tracking.memory_kinds import (
    ROW_TYPES,
    CacheAllocation,
    CacheKind,
    Context,
    SequencePart,
    dsv4,
    padded,
)
from kvscope.tracking.model_shape import LARGEST_VALUE, ModelShape, ShapeError

__all__ = [
    "KNOWN_ARCHITECTURES",
    "CacheAllocation",
    "CacheKind",
    "ContextParameters",
    "KvMemory",
    "ShapeError",
    "kv_memory",
]

MOST_SEQUENCES = 256
"""LLAMA_MAX_SEQ of src/llama-cparams.h, b11434."""
STATE_HEADER_BYTES = 8
"""What llama_context::state_seq_write_data writes before the memory's own part, b11434."""
FILE_HEADER_BYTES = 28
BYTES_PER_SAVED_TOKEN = 4
"""A file has magic, version and count of tokens, then the tokens (state_seq_save_file, b11434)."""


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
class KvMemory:
    """What one context allocates, and what sequences of tokens occupy in it.

    context_tokens and sequence_context_tokens: n_ctx and n_ctx_seq after llama.cpp's own rounding;
    batch_tokens and micro_batch_tokens: n_batch and n_ubatch after it. rollback_snapshots: n_rs_seq, 0 where
    the architecture keeps none. bytes_per_token: by which a sequence grows once it is beyond every window.
    """

    memory_class: str
    context_tokens: int
    sequence_context_tokens: int
    caches: tuple[CacheAllocation, ...]
    bytes_per_token: float
    batch_tokens: int = 0
    micro_batch_tokens: int = 0
    rollback_snapshots: int = 0
    parts: tuple[SequencePart, ...] = field(default=(), repr=False)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all caches together."""
        return sum(cache.total_bytes for cache in self.caches)

    def allocated_by_kind(self) -> Mapping[CacheKind, int]:
        """Return bytes by kind of cache, only kinds that are there."""
        kinds: dict[CacheKind, int] = {}
        for cache in self.caches:
            if cache.layers:
                kinds[cache.kind] = kinds.get(cache.kind, 0) + cache.total_bytes
        return kinds

    def sequence_bytes(self, tokens: int) -> int:
        """Return the bytes that a sequence of tokens occupies: what its next turn can reuse.

        Alive, not merely not yet overwritten: of a windowed cache the window alone. 0 for no tokens.
        """
        return sum(part.bytes_held(tokens) for part in self.parts)

    def sequence_state_bytes(self, tokens: int) -> int:
        """Return what llama_state_seq_get_size gives for a sequence of tokens."""
        return STATE_HEADER_BYTES + sum(part.bytes_saved(tokens) for part in self.parts)

    def checkpoint_bytes(self, tokens: int) -> int:
        """Return the size of a context checkpoint taken after so many tokens.

        What llama_state_seq_get_size_ext gives with LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: only windows and
        recurrent states where there are any, as llama-server keeps them in host RAM.
        """
        return STATE_HEADER_BYTES + sum(part.bytes_saved(tokens) for part in self.parts if part.checkpoint)

    def slot_file_bytes(self, tokens: int) -> int:
        """Return the size of a file that `POST /slots/N?action=save` writes."""
        payload = self.sequence_state_bytes(tokens) - STATE_HEADER_BYTES
        return FILE_HEADER_BYTES + BYTES_PER_SAVED_TOKEN * tokens + payload


def kv_memory(header: ModelHeader, parameters: ContextParameters) -> KvMemory:
    """Return the memory of one context. Raises ShapeError, naming the architecture or key that is missing."""
    row = architecture(header.architecture)
    shape = model_shape(header, row)
    context = _context(shape, row, parameters)
    name, caches = (row.draft_memory if parameters.draft else row.memory)(shape, context)
    parts = tuple(part for _, part in caches)
    return KvMemory(
        memory_class=name,
        context_tokens=context.tokens,
        sequence_context_tokens=context.sequence_tokens,
        caches=tuple(cache for cache, _ in caches),
        bytes_per_token=sum(
            part.row_bytes / part.live.ratio for part in parts if part.live.window is part.live.chunk
        ),
        batch_tokens=context.batch_tokens,
        micro_batch_tokens=context.micro_batch_tokens,
        rollback_snapshots=context.rollback_snapshots,
        parts=parts,
    )


def _context(shape: ModelShape, row: Architecture, asked: ContextParameters) -> Context:
    """Return what llama_context makes of parameters (src/llama-context.cpp, b11434)."""
    flash_attention = asked.flash_attention and row.flash_attention
    _check_cache_types(shape, row, asked, flash_attention)
    if not 1 <= asked.sequences <= MOST_SEQUENCES:
        raise ShapeError(f"{asked.sequences} slots: llama.cpp has 1 to {MOST_SEQUENCES}")
    if not 0 <= asked.context_tokens <= LARGEST_VALUE:
        raise ShapeError(f"a context of {asked.context_tokens} tokens cannot be")
    if asked.batch_tokens < 1 or asked.micro_batch_tokens < 0 or asked.rollback_snapshots < 0:
        raise ShapeError(f"a batch of {asked.batch_tokens}, {asked.micro_batch_tokens} tokens cannot be")
    wanted = asked.context_tokens or shape.context_length
    if not wanted:
        raise ShapeError(f"{shape.keys.full_name('context_length')} is 0 and no context was asked for")
    causal = row.causal and bool(shape.keys.number("attention.causal", 1))
    batch = min(wanted, asked.batch_tokens) if causal else asked.batch_tokens
    tokens = padded(wanted)
    sequence_tokens = tokens
    if not asked.unified:
        sequence_tokens = padded(tokens // asked.sequences)
        tokens = sequence_tokens * asked.sequences
    return Context(
        tokens=tokens,
        sequence_tokens=sequence_tokens,
        batch_tokens=batch,
        micro_batch_tokens=min(batch, asked.micro_batch_tokens or asked.batch_tokens),
        sequences=asked.sequences,
        unified=asked.unified,
        flash_attention=flash_attention,
        swa_full=asked.swa_full,
        cache_type_k=asked.cache_type_k,
        cache_type_v=asked.cache_type_v,
        rollback_snapshots=asked.rollback_snapshots if row.rollback else 0,
    )


def _check_cache_types(
    shape: ModelShape, row: Architecture, asked: ContextParameters, flash_attention: bool
) -> None:
    """Raise ShapeError for types that llama_init_from_model refuses (src/llama-context.cpp, b11549)."""
    k, v = asked.cache_type_k, asked.cache_type_v
    for name, cache_type, length in (("K", k, shape.key_length), ("V", v, shape.value_length)):
        if cache_type not in ROW_TYPES:
            raise ShapeError(f"cache type {cache_type!r} of {name} is not known; {', '.join(ROW_TYPES)} are")
        block, _ = ROW_TYPES[cache_type]
        if flash_attention and length % block:
            raise ShapeError(f"cache type {cache_type} of {name} has blocks of {block}, a head has {length}")
    if not flash_attention and ROW_TYPES[v][0] > 1:
        raise ShapeError(f"cache type {v} of V needs flash attention, which is off")
    if k != v and (shape.latent or row.memory is dsv4):
        raise ShapeError(
            f"{shape.keys.architecture} caches keys alone: {k} of K and {v} of V must be one type"
        )
