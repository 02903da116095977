"""What llama.cpp's log says of the memory that it allocated when a model was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ROUNDED_BY_BYTES = 5243
"""The log prints MiB with two decimals: each size here is within half of 0.01 MiB of the true one."""


@dataclass(frozen=True, slots=True)
class LoggedCache:
    """One cache as its line says it.

    kind: full, window, compressed, indexer or recurrent; None where the log does not tell. cells: of one
    stream; the rows of a recurrent state. streams: None for a recurrent state, and where a line does not
    say. parts and types: by what the line names (K and V; R, S and P of a recurrent state). devices: bytes
    by the name of the device that holds them.
    """

    kind: str | None
    cells: int
    layers: int
    sequences: int | None
    streams: int | None
    total_bytes: int
    parts: Mapping[str, int] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoggedContext:
    """One context with the model it was made for; None: its lines do not say.

    context_tokens: n_ctx, sequence_context_tokens: n_ctx_seq, sequences: n_seq_max, rollback_snapshots:
    n_rs_seq. model_buffers and compute_buffers: bytes by device; a context on a model that was loaded for
    another one before has no model_buffers. devices: those that the model uses beside the CPU, with the
    PCI id (0000:01:00.0) where their line says it.
    """

    context_tokens: int | None = None
    sequence_context_tokens: int | None = None
    sequences: int | None = None
    unified: bool | None = None
    flash_attention: bool | None = None
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    rollback_snapshots: int | None = None
    caches: tuple[LoggedCache, ...] = ()
    model_buffers: Mapping[str, int] = field(default_factory=dict)
    compute_buffers: Mapping[str, int] = field(default_factory=dict)
    devices: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches together."""
        return sum(cache.total_bytes for cache in self.caches)


@dataclass(frozen=True, slots=True)
class LoggedMemory:
    """The contexts of the last load that came to its end; main is None where there was none.

    drafts: contexts that predict tokens for the main one.
    """

    main: LoggedContext | None = None
    drafts: tuple[LoggedContext, ...] = ()
