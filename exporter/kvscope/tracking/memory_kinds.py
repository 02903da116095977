"""One small function for each kind of memory that llama.cpp knows: which caches, how large, what is alive.

The kinds are the classes that llama_model::create_memory builds (src/llama-model.cpp, b11434).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from kvscope.tracking.model_shape import Keys, ModelShape, ShapeError

CELL_PADDING = 256
"""Caches have a multiple of so many cells (llama_context, src/llama-context.cpp, b11434)."""
BYTES_PER_STATE_ELEMENT = 4
"""Recurrent states are f32 whatever -ctk and -ctv say (create_memory, b11434)."""
DSV4_STATE_HEADER = 12
LATENT_RATIOS = {4: 2, 128: 1}
"""deepseek4's compression ratio -> how many latents wide a row of its state is (llama_dsv4_comp_state)."""

ROW_TYPES = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "iq4_nl": (32, 18),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
}
"""Cache type -> elements of a block and its bytes (ggml_row_size; the types of -ctk, common/arg.cpp)."""


class CacheKind(StrEnum):
    """What a cache keeps; the label `cache` of `kvscope_kv_allocated_bytes`."""

    FULL = "full"
    WINDOW = "window"
    COMPRESSED = "compressed"
    RECURRENT = "recurrent"
    INDEXER = "indexer"


@dataclass(frozen=True, slots=True)
class CacheAllocation:
    """One cache as llama.cpp allocates it.

    name: as llama.cpp's classes call it (kv, base, swa, mla, idx, recurrent, ...). cells: of one stream;
    the rows of a recurrent state. layers: indices of those that keep something in it. state_parts: the
    bytes of R, S and P of a recurrent memory.
    """

    name: str
    kind: CacheKind
    cells: int
    streams: int
    layers: tuple[int, ...]
    k_bytes: int = 0
    v_bytes: int = 0
    state_bytes: int = 0
    state_parts: tuple[int, int, int] = (0, 0, 0)

    @property
    def total_bytes(self) -> int:
        """Bytes of K, V and state together."""
        return self.k_bytes + self.v_bytes + self.state_bytes


@dataclass(frozen=True, slots=True)
class Live:
    """How many of a sequence's tokens one cache keeps alive.

    window: the last so many; chunk: those since the last multiple of it; ratio: one row for so many tokens.
    """

    window: int | None = None
    chunk: int | None = None
    ratio: int = 1

    def tokens(self, tokens: int) -> int:
        """Return rows that are alive once a sequence has so many tokens (llama_hparams::is_masked_swa)."""
        if tokens <= 0:
            return 0
        if self.chunk is not None:
            return (tokens - 1) % self.chunk + 1
        if self.window is not None:
            return min(tokens, self.window)
        return tokens // self.ratio


@dataclass(frozen=True, slots=True)
class SequencePart:
    """What one cache holds, and writes into a file, of one sequence: state_write of its class, b11434.

    row_bytes: of one live row, all layers. held_bytes: as soon as there is a token. The rest is what only a
    file has: empty_bytes always, live_bytes once a row is alive, cell_bytes for every live row.
    checkpoint: it is part of a context checkpoint (LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY).
    """

    live: Live
    row_bytes: int = 0
    held_bytes: int = 0
    empty_bytes: int = 0
    live_bytes: int = 0
    cell_bytes: int = 0
    checkpoint: bool = True

    def bytes_held(self, tokens: int) -> int:
        """Return the bytes that a sequence of tokens occupies."""
        return self.live.tokens(tokens) * self.row_bytes + (self.held_bytes if tokens > 0 else 0)

    def bytes_saved(self, tokens: int) -> int:
        """Return the bytes that a sequence of tokens makes in a file."""
        live = self.live.tokens(tokens)
        saved = self.empty_bytes + live * (self.row_bytes + self.cell_bytes)
        return saved + (self.live_bytes if live else 0)


Cache = tuple[CacheAllocation, SequencePart]


@dataclass(frozen=True, slots=True)
class Context:
    """What llama.cpp makes of the parameters of a context (llama_context, src/llama-context.cpp, b11434)."""

    tokens: int
    sequence_tokens: int
    batch_tokens: int
    micro_batch_tokens: int
    sequences: int
    unified: bool
    flash_attention: bool
    swa_full: bool
    cache_type_k: str
    cache_type_v: str
    rollback_snapshots: int

    @property
    def streams(self) -> int:
        """Caches have one stream that all sequences share, or one for each of them."""
        return 1 if self.unified else self.sequences


MemoryKind = Callable[[ModelShape, Context], tuple[str, list[Cache]]]
Width = Callable[[int], int]


def padded(cells: int) -> int:
    """Return cells rounded up to what caches are made of."""
    return -(-cells // CELL_PADDING) * CELL_PADDING


def row_bytes(cache_type: str, elements: int) -> int:
    """Return the bytes of a row. Raises ShapeError where elements do not fill whole blocks of the type."""
    block, size = ROW_TYPES[cache_type]
    if elements % block:
        raise ShapeError(f"a row of {elements} elements cannot be kept as {cache_type}: blocks of {block}")
    return elements // block * size


def kv_cache(
    name: str,
    kind: CacheKind,
    context: Context,
    layers: Sequence[int],
    k_width: Width,
    v_width: Width | None,
    *,
    widest_v: int = 0,
    cells: int | None = None,
    streams: int | None = None,
    live: Live | None = None,
    image_positions: bool = False,
    checkpoint: bool = True,
) -> Cache:
    """Return one cache of keys and, unless v_width is None, values: llama_kv_cache, b11434.

    widest_v: the widest row of values of all the model's layers; without flash attention the values
    stand transposed and every layer's are allocated so wide.
    """
    cells = context.sequence_tokens if cells is None else cells
    streams = context.streams if streams is None else streams
    k_row = sum(row_bytes(context.cache_type_k, k_width(layer)) for layer in layers)
    v_row = v_allocated = 0
    if v_width is not None:
        v_row = sum(row_bytes(context.cache_type_v, v_width(layer)) for layer in layers)
        v_allocated = v_row
        if not context.flash_attention:
            v_allocated = len(layers) * row_bytes(context.cache_type_v, widest_v)
    allocation = CacheAllocation(
        name,
        kind,
        cells,
        streams,
        tuple(layers),
        k_bytes=k_row * cells * streams,
        v_bytes=v_allocated * cells * streams,
    )
    part = SequencePart(
        live or Live(),
        row_bytes=k_row + v_row,
        empty_bytes=4 + 4 * streams,
        live_bytes=16 + 12 * len(layers) * (1 if v_width is None else 2),
        cell_bytes=24 if image_positions else 12,
        checkpoint=checkpoint,
    )
    return allocation, part


def none(_shape: ModelShape, _context: Context) -> tuple[str, list[Cache]]:
    """Models that look at all tokens at once keep nothing."""
    return "none", []


def attention(shape: ModelShape, context: Context, *, checkpoint: bool = True) -> tuple[str, list[Cache]]:
    """Keys and values of every token; of windowed layers, of the window alone: llama_kv_cache(_iswa)."""
    layers = shape.attention_layers
    v_width = None if shape.latent else shape.v_width
    widest = max((shape.v_width(layer) for layer in range(shape.layers)), default=0)

    def cache(
        name: str, kind: CacheKind, kept: Sequence[int], cells: int, live: Live, checkpoint: bool
    ) -> Cache:
        return kv_cache(
            name,
            kind,
            context,
            kept,
            shape.k_width,
            v_width,
            widest_v=widest,
            cells=cells,
            live=live,
            image_positions=shape.image_positions,
            checkpoint=checkpoint,
        )

    every = context.sequence_tokens
    if shape.window_tokens is None:
        return "kv", [cache("kv", CacheKind.FULL, layers, every, Live(), checkpoint)]
    full = [layer for layer in layers if not shape.window_layers[layer]]
    windowed = [layer for layer in layers if shape.window_layers[layer]]
    cells = window_cells(shape.window_tokens, context)
    return "iswa", [
        cache("base", CacheKind.FULL, full, every, Live(), checkpoint=False),
        cache("swa", CacheKind.WINDOW, windowed, cells, window(shape), checkpoint=True),
    ]


def window(shape: ModelShape) -> Live:
    """Return what of a sequence is alive in the windowed layers."""
    if shape.chunked:
        return Live(chunk=shape.window_tokens)
    return Live(window=shape.window_tokens)


def window_cells(tokens: int, context: Context) -> int:
    """Return the cells of a window's cache: llama_kv_cache_iswa, b11434."""
    if context.swa_full:
        return context.sequence_tokens
    needed = tokens * (context.sequences if context.unified else 1) + context.micro_batch_tokens
    return padded(min(context.sequence_tokens, needed))


def further_tokens(shape: ModelShape, context: Context) -> tuple[str, list[Cache]]:
    """The context of the layers that predict further tokens (MTP): attention, whatever the model."""
    return attention(of_further_layers(shape), context)


def of_further_layers(shape: ModelShape) -> ModelShape:
    """Return the shape of the layers that predict further tokens alone; none of them keeps a state."""
    if not shape.further:
        key = shape.keys.full_name("nextn_predict_layers")
        raise ShapeError(f"no layers that predict further tokens (MTP): {key} has none, or the file has not")
    kept = shape.recurrent and replace(shape.recurrent, layers=(), history_layers=())
    return replace(shape, attention_layers=shape.further, recurrent=kept)


def recurrent(shape: ModelShape, context: Context) -> tuple[str, list[Cache]]:
    """A state of fixed size for each sequence: llama_memory_recurrent."""
    return "recurrent", [_recurrent_state(shape, context)]


def _recurrent_state(shape: ModelShape, context: Context) -> Cache:
    kept = shape.recurrent
    assert kept is not None
    rows = context.sequences * (1 + (context.rollback_snapshots if kept.layers else 0))
    parts = (
        BYTES_PER_STATE_ELEMENT * len(kept.layers) * kept.convolution,
        BYTES_PER_STATE_ELEMENT * len(kept.layers) * kept.state,
        BYTES_PER_STATE_ELEMENT * len(kept.history_layers) * kept.history,
    )
    one = sum(parts)
    r, s, p = (rows * part for part in parts)
    allocation = CacheAllocation(
        "recurrent",
        CacheKind.RECURRENT,
        rows,
        1,
        kept.layers,
        state_bytes=rows * one,
        state_parts=(r, s, p),
    )
    part = SequencePart(
        Live(window=1),
        held_bytes=one,
        empty_bytes=12 + 24 * len(kept.layers) + 8 * len(kept.history_layers),
        live_bytes=8 + one,
    )
    return allocation, part


def hybrid(shape: ModelShape, context: Context) -> tuple[str, list[Cache]]:
    """Some layers attend, some keep a state: llama_memory_hybrid(_iswa)."""
    kind, caches = attention(shape, context, checkpoint=False)
    if kind == "kv":
        caches = [_renamed(cache, "attn") for cache in caches]
    name = "hybrid" if kind == "kv" else "hybrid_iswa"
    return name, [*caches, _recurrent_state(shape, context)]


def _renamed(cache: Cache, name: str) -> Cache:
    return replace(cache[0], name=name), cache[1]


@dataclass(frozen=True, slots=True)
class Indexer:
    """A third cache of a hybrid: rows of the indexer's keys a token, the layers that have it, its cells."""

    rows: Callable[[Keys], int]
    layers: Callable[[ModelShape], Sequence[int]]
    image_positions: Callable[[Keys], bool]


def hybrid_indexed(indexer: Indexer, *, further: bool = False) -> MemoryKind:
    """A hybrid with a third cache, of keys that an indexer searches: llama_memory_hybrid_idx.

    further: of the layers that predict further tokens.
    """

    def kind(shape: ModelShape, context: Context) -> tuple[str, list[Cache]]:
        if further:
            shape = of_further_layers(shape)
        _, caches = hybrid(shape, context)
        width = indexer.rows(shape.keys) * shape.keys.number("attention.indexer.key_length")
        third = kv_cache(
            "idx",
            CacheKind.INDEXER,
            context,
            indexer.layers(shape),
            lambda _: width,
            None,
            image_positions=indexer.image_positions(shape.keys),
            checkpoint=False,
        )
        return "hybrid_idx", [caches[0], third, *caches[1:]]

    return kind


def indexed_layers(shape: ModelShape) -> list[int]:
    """Return attending layers that have an indexer of their own (llama_hparams::is_indexer_full)."""
    # The list has an entry for each layer of the trunk; some files have one for the layers behind it too.
    name = "attention.indexer.types"
    entries = shape.trunk_layers
    if shape.keys.is_list(name) and len(shape.keys.numbers(name)) == shape.layers:
        entries = shape.layers
    own = shape.keys.per_layer(name, entries, (1,) * entries)
    return [layer for layer in shape.attention_layers if layer >= entries or own[layer]]


def dsa(indexed: Callable[[ModelShape], Sequence[int]]) -> MemoryKind:
    """Latents (MLA) and a cache of keys that an indexer searches: llama_kv_cache_dsa."""

    def kind(shape: ModelShape, context: Context) -> tuple[str, list[Cache]]:
        _, caches = attention(shape, context)
        indexer = _indexer(shape, context, indexed(shape))
        if shape.window_tokens is None:
            return "dsa", [_renamed(caches[0], "mla"), indexer]
        return "dsa_iswa", [_renamed(caches[0], "mla"), indexer, caches[1]]

    return kind


def _indexer(shape: ModelShape, context: Context, layers: Sequence[int]) -> Cache:
    length = shape.keys.number("attention.indexer.key_length")

    def width(layer: int) -> int:
        # llama.cpp gives the indexer one head of its own length, but lets windowed layers keep theirs.
        return shape.key_length_window if shape.window_layers[layer] else length

    checkpoint = shape.window_tokens is None
    return kv_cache("lid", CacheKind.INDEXER, context, layers, width, None, checkpoint=checkpoint)


def msa(shape: ModelShape, context: Context) -> tuple[str, list[Cache]]:
    """Attention and, behind the leading dense layers, an indexer with keys and values: llama_kv_cache_msa."""
    _, caches = attention(shape, context)
    dense = shape.keys.number("leading_dense_block_count")
    width = shape.keys.number("attention.indexer.key_length")
    indexer = kv_cache(
        "idx",
        CacheKind.INDEXER,
        context,
        [layer for layer in shape.attention_layers if layer >= dense],
        lambda _: width,
        lambda _: shape.value_length,
        widest_v=shape.value_length,
        image_positions=shape.image_positions,
    )
    return "msa", [_renamed(caches[0], "base"), indexer]


def dsv4(shape: ModelShape, context: Context) -> tuple[str, list[Cache]]:
    """A window of latents, and everything before it compressed: llama_kv_cache_dsv4.

    Every sequence has a stream of its own, also where -kvu was asked for.
    """
    assert shape.window_tokens is not None
    keys, streams = shape.keys, context.sequences
    if not keys.is_list("attention.compress_ratios"):
        raise ShapeError(f"{keys.full_name('attention.compress_ratios')} is needed, one entry a layer")
    ratios = keys.listed("attention.compress_ratios", shape.layers)
    indexer_length = keys.number("attention.indexer.key_length")
    by_ratio = {
        ratio: [il for il in shape.attention_layers if ratios[il] == ratio] for ratio in LATENT_RATIOS
    }

    def raw(name: str, kind: CacheKind, layers: Sequence[int], cells: int, live: Live) -> Cache:
        return kv_cache(
            name,
            kind,
            context,
            layers,
            shape.k_width,
            None,
            cells=cells,
            streams=streams,
            live=live,
            checkpoint=kind is CacheKind.WINDOW,
        )

    def compressed(name: str, kind: CacheKind, ratio: int, width: Width) -> Cache:
        layers = by_ratio[ratio]
        cells = padded(-(-context.sequence_tokens // ratio))
        row = sum(row_bytes(context.cache_type_k, width(layer)) for layer in layers)
        allocation = CacheAllocation(name, kind, cells, streams, tuple(layers), k_bytes=row * cells * streams)
        empty = 16 + 32 * len(layers)
        return allocation, SequencePart(Live(ratio=ratio), row, empty_bytes=empty, checkpoint=False)

    def state(name: str, ratio: int, width: int) -> Cache:
        # Layers that predict further tokens keep compressed rows, but no state of the compression.
        layers = [layer for layer in by_ratio[ratio] if layer < shape.trunk_layers]
        latents = LATENT_RATIOS[ratio]
        one = len(layers) * 2 * ratio * latents * latents * width * BYTES_PER_STATE_ELEMENT
        total = one * streams * (1 + context.rollback_snapshots)
        allocation = CacheAllocation(
            name, CacheKind.RECURRENT, ratio * latents, streams, tuple(layers), state_bytes=total
        )
        # A file has the state of a sequence without tokens too.
        saved = 24 + 60 * len(layers) + one
        return allocation, SequencePart(Live(window=1), held_bytes=one, empty_bytes=saved)

    # Every layer is windowed, so the window's lengths are those of what is compressed too.
    length = shape.key_length_window
    full = [layer for layer in shape.attention_layers if not shape.window_layers[layer]]
    windowed = [layer for layer in shape.attention_layers if shape.window_layers[layer]]
    cells = window_cells(shape.window_tokens, replace(context, unified=False))
    raw_swa, raw_part = raw("raw_swa", CacheKind.WINDOW, windowed, cells, window(shape))
    raw_part = replace(raw_part, empty_bytes=raw_part.empty_bytes + DSV4_STATE_HEADER)
    return "dsv4", [
        raw("raw_base", CacheKind.FULL, full, context.sequence_tokens, Live()),
        (raw_swa, raw_part),
        compressed("csa", CacheKind.COMPRESSED, 4, shape.k_width),
        compressed("hca", CacheKind.COMPRESSED, 128, shape.k_width),
        compressed("lid", CacheKind.INDEXER, 4, lambda _: indexer_length),
        state("csa_state", 4, length),
        state("hca_state", 128, length),
        state("lid_state", 4, indexer_length),
    ]
