"""What a row of the table may say: how a header's keys become windows, recurrent layers and latents.

Each rule is what a load_arch_hparams of llama.cpp does (src/models/, b11434).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvscope.tracking import memory_kinds as kinds
from kvscope.tracking.model_shape import Keys, ModelShape

Flags = tuple[bool, ...]
WindowTokens = Callable[[Keys, int], int | None]
"""Header and layers of the trunk -> tokens of the window; None: the model has none."""
WindowLayers = Callable[[Keys, int, int], Flags]
"""Header, layers of the trunk, all layers -> which are windowed."""


@dataclass(frozen=True, slots=True)
class Window:
    """Where an architecture's sliding window comes from, and which layers have it."""

    tokens: WindowTokens
    layers: WindowLayers
    chunked: bool = False


@dataclass(frozen=True, slots=True)
class HeaderLayers:
    """What recurrent rules look at: one entry a layer."""

    trunk: int
    total: int
    embedding: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    feed_forward: tuple[int, ...]
    key_length: int


LayerRule = Callable[[Keys, HeaderLayers], Flags]
SizeRule = Callable[[Keys, HeaderLayers], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class RecurrentRule:
    """Which layers keep a state, and how many elements of R and S; the others attend, unless attending says.

    trunk_only: layers that predict further tokens have no part in the main context.
    """

    layers: LayerRule
    sizes: SizeRule
    attending: LayerRule | None = None
    trunk_only: bool = True
    history: bool = False


def never(_keys: Keys) -> bool:
    """Answer no for every header."""
    return False


def always(_keys: Keys) -> bool:
    """Answer yes for every header."""
    return True


# Windows


def needed_key(keys: Keys, _trunk: int) -> int | None:
    """The key must be there; 0 is a window of no tokens."""
    return keys.number("attention.sliding_window")


def positive_key(keys: Keys, _trunk: int) -> int | None:
    """No key and 0 mean no window."""
    return keys.number("attention.sliding_window", 0) or None


def key_or(default: int) -> WindowTokens:
    """Without a key, the window is the default."""
    return lambda keys, _trunk: keys.number("attention.sliding_window", default)


def chunk_unless_zero(size: int) -> WindowTokens:
    """Whatever the key says, unless it is 0 (llama4)."""
    return lambda keys, _trunk: size if keys.number("attention.sliding_window", size) else None


def fixed_if_positive(size: int) -> WindowTokens:
    """The key only switches the window on (smallthinker)."""
    return lambda keys, _trunk: size if keys.number("attention.sliding_window", 0) else None


def only_with_layers(layers: int, default: int) -> WindowTokens:
    """Only models of so many layers have a window (exaone4)."""
    return lambda keys, trunk: keys.number("attention.sliding_window", default) if trunk == layers else None


def every(period: int, *, dense_first: bool = False) -> WindowLayers:
    """Every period-th layer is full, the last of each group or, dense_first, its first.

    A number in the header replaces the period, a list says it layer by layer; a number speaks of the trunk
    alone (llama_hparams::set_swa_pattern).
    """

    def layers(keys: Keys, trunk: int, total: int) -> Flags:
        name = "attention.sliding_window_pattern"
        if keys.is_list(name):
            return listed(keys, trunk, total)
        step = keys.number(name, period)
        full = 0 if dense_first else step - 1
        return tuple(il < trunk and (step == 0 or il % step != full) for il in range(total))

    return layers


def listed(keys: Keys, _trunk: int, total: int) -> Flags:
    """The header must say it, layer by layer."""
    return tuple(bool(flag) for flag in keys.listed("attention.sliding_window_pattern", total))


def everywhere(_keys: Keys, _trunk: int, total: int) -> Flags:
    """All layers are windowed."""
    return (True,) * total


def in_trunk(_keys: Keys, trunk: int, total: int) -> Flags:
    """All layers but those that predict further tokens are windowed."""
    return tuple(il < trunk for il in range(total))


# Recurrent layers


def all_layers(_keys: Keys, header: HeaderLayers) -> Flags:
    """Every layer."""
    return (True,) * header.total


def without_kv_heads(_keys: Keys, header: HeaderLayers) -> Flags:
    """Layers that have no KV heads."""
    return tuple(il < header.trunk and heads == 0 for il, heads in enumerate(header.kv_heads))


def nemotron_recurrent(keys: Keys, header: HeaderLayers) -> Flags:
    """Layers of the trunk with neither KV heads nor a feed-forward network."""
    without = without_kv_heads(keys, header)
    return tuple(flag and not ff for flag, ff in zip(without, header.feed_forward, strict=True))


def nemotron_attending(keys: Keys, header: HeaderLayers) -> Flags:
    """The others without a feed-forward network."""
    without = without_kv_heads(keys, header)
    return tuple(not flag and not ff for flag, ff in zip(without, header.feed_forward, strict=True))


def interval(default: int) -> LayerRule:
    """All but every n-th layer, or what attention.recurrent_layers lists."""

    def layers(keys: Keys, header: HeaderLayers) -> Flags:
        if keys.is_list("attention.recurrent_layers"):
            return tuple(bool(flag) for flag in keys.per_layer("attention.recurrent_layers", header.total))
        step = keys.number("full_attention_interval", default, least=1)
        return tuple((il + 1) % step != 0 for il in range(header.total))

    return layers


def mamba(keys: Keys, _header: HeaderLayers) -> tuple[int, int]:
    """Return R and S of Mamba: one group (llama_hparams::n_embd_r, n_embd_s)."""
    return _mamba(keys, 0)


def mamba2(keys: Keys, _header: HeaderLayers) -> tuple[int, int]:
    """Return R and S of Mamba-2 and gated delta nets."""
    return _mamba(keys, keys.number("ssm.group_count"))


def _mamba(keys: Keys, groups: int) -> tuple[int, int]:
    inner, state = keys.number("ssm.inner_size"), keys.number("ssm.state_size")
    kernel = keys.number("ssm.conv_kernel")
    return max(kernel - 1, 0) * (inner + 2 * groups * state), state * inner


def rwkv(keys: Keys, header: HeaderLayers) -> tuple[int, int]:
    """Return token shift and state of RWKV."""
    shifts = keys.number("token_shift_count", 2)
    return shifts * header.embedding, header.embedding * keys.number("wkv.head_size")


def kda(keys: Keys, header: HeaderLayers) -> tuple[int, int]:
    """Return R and S of Kimi's delta attention."""
    size, kernel = keys.number("kda.head_dim"), keys.number("ssm.conv_kernel")
    heads = header.heads[0]
    return 3 * max(kernel - 1, 0) * heads * size, size * size * heads


def lightning(_keys: Keys, header: HeaderLayers) -> tuple[int, int]:
    """Return the state of lightning attention: no convolution."""
    return 0, header.key_length**2 * header.heads[0]


def short_convolution(keys: Keys, header: HeaderLayers) -> tuple[int, int]:
    """Return the convolution of LFM2: no state."""
    return header.embedding * max(keys.number("shortconv.l_cache") - 1, 0), 0


# Latents, positions, layers


def with_mla_lengths(keys: Keys) -> bool:
    """Newer files of these models keep latents; older ones full keys and values (llama_hparams::is_mla)."""
    return bool(keys.number("attention.key_length_mla", 0) and keys.number("attention.value_length_mla", 0))


def needed_mla_lengths(keys: Keys) -> bool:
    """The lengths must be in the header; it is latents unless they are 0."""
    return bool(keys.number("attention.key_length_mla") and keys.number("attention.value_length_mla"))


def with_sections(keys: Keys) -> bool:
    """M-RoPE only where the header has sections for it (llama_hparams::use_mrope)."""
    if not keys.has("rope.dimension_sections"):
        return False
    sections = keys.numbers("rope.dimension_sections")
    return len(sections) > 1 and sections[0] > 0 and sections[1] > 0


def with_any_sections(keys: Keys) -> bool:
    """M-RoPE where the header names sections (dflash)."""
    return keys.has("rope.dimension_sections") and any(keys.numbers("rope.dimension_sections"))


def all_but_shared(keys: Keys, layers: int) -> int:
    """The last layers use an earlier one's keys and values (gemma4)."""
    return max(layers - keys.number("attention.shared_kv_layers", 0), 0)


def attending_layers(shape: ModelShape) -> Sequence[int]:
    """Every layer that attends has an indexer."""
    return shape.attention_layers


def own_indexers(shape: ModelShape) -> Sequence[int]:
    """Layers that attention.indexer.types marks."""
    return kinds.indexed_layers(shape)


def listed_indexers(shape: ModelShape) -> Sequence[int]:
    """Layers that a list of any length marks; all where there is none (dots3note)."""
    if not shape.keys.has("attention.indexer.types"):
        return shape.attention_layers
    marked = shape.keys.listed("attention.indexer.types", shape.layers)
    return [il for il in shape.attention_layers if marked[il]]


def glm_indexers(shape: ModelShape) -> Sequence[int]:
    """What the header marks, else what load_arch_hparams of glm-dsa builds in."""
    if shape.keys.has("attention.indexer.types") or shape.context_length < GLM_LONG_CONTEXT:
        return own_indexers(shape)
    return [il for il in shape.attention_layers if il < 3 or (il - 2) % 4 == 0]


GLM_LONG_CONTEXT = 1048576


def indexed_or_plain(shape: ModelShape, context: kinds.Context) -> tuple[str, list[kinds.Cache]]:
    """Without a top_k there is no indexer (hy_v4)."""
    memory = kinds.dsa(own_indexers) if shape.keys.number("attention.indexer.top_k", 0) else kinds.attention
    return memory(shape, context)


def borrowed(_shape: ModelShape, _context: kinds.Context) -> tuple[str, list[kinds.Cache]]:
    """Only views of another model's caches (gemma4-assistant)."""
    return "iswa", []
