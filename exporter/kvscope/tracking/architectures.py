"""The table: one row for each architecture that llama.cpp b11434 knows, and what is odd about its memory.

A row says what llama_model::create_memory and the model's load_arch_hparams (src/llama-model.cpp,
src/models/, b11434) decide in code and no header tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from kvscope.observed.model import ModelHeader
from kvscope.tracking import memory_kinds as kinds
from kvscope.tracking.header_rules import (
    HeaderLayers,
    RecurrentRule,
    SizeRule,
    Window,
    WindowLayers,
    WindowTokens,
    all_but_shared,
    all_layers,
    always,
    attending_layers,
    borrowed,
    chunk_unless_zero,
    every,
    everywhere,
    fixed_if_positive,
    glm_indexers,
    in_trunk,
    indexed_or_plain,
    interval,
    kda,
    key_or,
    lightning,
    listed,
    listed_indexers,
    mamba,
    mamba2,
    needed_key,
    needed_mla_lengths,
    nemotron_attending,
    nemotron_recurrent,
    never,
    only_with_layers,
    own_indexers,
    positive_key,
    rwkv,
    short_convolution,
    with_any_sections,
    with_mla_lengths,
    with_sections,
    without_kv_heads,
)
from kvscope.tracking.memory_kinds import MemoryKind
from kvscope.tracking.model_shape import MOST_LAYERS, Keys, ModelShape, Recurrent, ShapeError


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row. memory: the kind of memory of the main context; draft: of one that predicts further tokens.

    draft is None: the attention of those layers alone; of models that keep states or nothing, memory.
    further_in_main: the layers that predict further tokens are cached in the main context too.

    latent: keys alone are cached (MLA). image_positions: the model rotates by several positions (M-RoPE).
    cached: how many layers own keys and values, out of all. extra: KV heads of layers behind the last.
    repeats: how often the layers are gone through, each time with a cache of their own. causal: no token
    looks at a later one, so that a batch is never larger than the context. lengths_without_heads: lengths
    of keys are read even where the first layer has no heads. nextn_by_tensors: layers that predict further
    tokens count only where their weights are in the file. rollback: states of tokens before are kept too
    (n_rs_seq).
    """

    memory: MemoryKind = kinds.attention
    draft: MemoryKind | None = None
    window: Window | None = None
    recurrent: RecurrentRule | None = None
    latent: Callable[[Keys], bool] = never
    image_positions: Callable[[Keys], bool] = never
    cached: Callable[[Keys, int], int] | None = None
    extra: tuple[int, ...] = ()
    repeats: Callable[[Keys], int] | None = None
    flash_attention: bool = True
    causal: bool = True
    lengths_without_heads: bool = False
    nextn_by_tensors: bool = False
    rollback: bool = False
    further_in_main: bool = False

    @property
    def draft_memory(self) -> MemoryKind:
        """The kind of memory of a context that predicts further tokens."""
        if self.draft is not None:
            return self.draft
        same = self.recurrent is not None or self.further_in_main or self.memory is kinds.none
        return self.memory if same else kinds.further_tokens


PLAIN = Architecture()
IMAGES = Architecture(image_positions=always)
IMAGES_BY_SECTIONS = Architecture(image_positions=with_sections)
NONE = Architecture(memory=kinds.none)
DIFFUSION = Architecture(memory=kinds.none, causal=False)
LATENT_BY_KEYS = Architecture(latent=with_mla_lengths)


def windowed(tokens: WindowTokens, layers: WindowLayers) -> Architecture:
    """Return a row of attention with windowed layers."""
    return Architecture(window=Window(tokens, layers))


def recurrent(sizes: SizeRule) -> Architecture:
    """Return a row of a model whose layers all keep a state."""
    return Architecture(memory=kinds.recurrent, recurrent=RecurrentRule(all_layers, sizes))


GATED_DELTA = RecurrentRule(interval(4), mamba2)
NEMOTRON = RecurrentRule(nemotron_recurrent, mamba2, nemotron_attending, trunk_only=False)
SHORT_CONVOLUTION = RecurrentRule(without_kv_heads, short_convolution, trunk_only=False)

GLM_INDEXER = kinds.Indexer(lambda _keys: 3, own_indexers, never)
QWEN_INDEXER = kinds.Indexer(
    lambda keys: 2 if keys.has("attention.compress_ratios") else 1,
    attending_layers,
    lambda keys: keys.has("ple.layers"),
)

ARCHITECTURES = MappingProxyType(
    {
        "afmoe": windowed(positive_key, every(4)),
        "apertus": PLAIN,
        "arcee": PLAIN,
        "arctic": PLAIN,
        "arwkv7": recurrent(rwkv),
        "baichuan": PLAIN,
        "bailingmoe": PLAIN,
        "bailingmoe2": PLAIN,
        "bailingmoe3": Architecture(
            kinds.hybrid,
            recurrent=RecurrentRule(without_kv_heads, kda, trunk_only=False),
            latent=needed_mla_lengths,
            image_positions=with_sections,
            rollback=True,
            draft=kinds.further_tokens,
        ),
        "bert": NONE,
        "bitnet": PLAIN,
        "bloom": PLAIN,
        "chameleon": PLAIN,
        "chatglm": PLAIN,
        "clef": NONE,
        "codeshell": PLAIN,
        "cogvlm": PLAIN,
        "cohere2": windowed(needed_key, every(4)),
        "cohere2moe": windowed(needed_key, every(4, dense_first=True)),
        "command-r": PLAIN,
        "dbrx": PLAIN,
        "deci": PLAIN,
        "deepseek": PLAIN,
        "deepseek2": LATENT_BY_KEYS,
        "deepseek2-ocr": PLAIN,
        "deepseek32": Architecture(kinds.dsa(attending_layers), latent=needed_mla_lengths),
        "deepseek4": Architecture(
            kinds.dsv4,
            draft=kinds.further_tokens,
            window=Window(needed_key, everywhere),
            nextn_by_tensors=True,
            rollback=True,
            further_in_main=True,
        ),
        "dflash": Architecture(window=Window(positive_key, listed), image_positions=with_any_sections),
        "dots1": PLAIN,
        "dots3note": Architecture(
            kinds.dsa(listed_indexers), window=Window(needed_key, listed), latent=needed_mla_lengths
        ),
        "dream": DIFFUSION,
        "eagle3": PLAIN,
        "ernie4_5": PLAIN,
        "ernie4_5-moe": PLAIN,
        "eurobert": NONE,
        "exaone": PLAIN,
        "exaone-moe": windowed(needed_key, every(4)),
        "exaone4": windowed(only_with_layers(64, 4096), every(4)),
        "falcon": PLAIN,
        "falcon-h1": Architecture(
            kinds.hybrid, recurrent=RecurrentRule(all_layers, mamba2, all_layers, trunk_only=False)
        ),
        "gemma": PLAIN,
        "gemma-embedding": DIFFUSION,
        "gemma2": windowed(key_or(4096), every(2)),
        "gemma3": windowed(positive_key, every(6)),
        "gemma3n": Architecture(
            window=Window(needed_key, every(5)), cached=lambda _keys, layers: min(layers, 20)
        ),
        "gemma4": Architecture(window=Window(needed_key, listed), cached=all_but_shared),
        "gemma4-assistant": Architecture(borrowed),
        "glm-dsa": Architecture(kinds.dsa(glm_indexers), latent=needed_mla_lengths),
        "glm4": IMAGES_BY_SECTIONS,
        "glm4moe": IMAGES_BY_SECTIONS,
        "glm5-next": Architecture(
            kinds.hybrid_indexed(GLM_INDEXER),
            recurrent=RecurrentRule(without_kv_heads, kda),
            latent=needed_mla_lengths,
            rollback=True,
            draft=kinds.hybrid_indexed(GLM_INDEXER, further=True),
        ),
        "gpt-oss": windowed(needed_key, every(2)),
        "gpt2": PLAIN,
        "gptneox": PLAIN,
        "granite": PLAIN,
        "granite_swa": windowed(needed_key, listed),
        "granitehybrid": Architecture(
            kinds.hybrid, recurrent=RecurrentRule(without_kv_heads, mamba2, trunk_only=False)
        ),
        "granitemoe": PLAIN,
        "graniteswitch": Architecture(extra=(1,)),
        "grok": Architecture(flash_attention=False),
        "grovemoe": PLAIN,
        "hrm_text": PLAIN,
        "hunyuan-dense": PLAIN,
        "hunyuan-moe": PLAIN,
        "hunyuan_vl": IMAGES_BY_SECTIONS,
        "hy_v3": PLAIN,
        "hy_v4": Architecture(indexed_or_plain, latent=needed_mla_lengths, further_in_main=True),
        "internlm2": PLAIN,
        "jais": PLAIN,
        "jais2": PLAIN,
        "jamba": Architecture(
            kinds.hybrid, recurrent=RecurrentRule(without_kv_heads, mamba, trunk_only=False)
        ),
        "jina-bert-v2": NONE,
        "jina-bert-v3": NONE,
        "kimi-k3": Architecture(
            kinds.hybrid,
            recurrent=RecurrentRule(without_kv_heads, kda, trunk_only=False),
            latent=needed_mla_lengths,
            rollback=True,
        ),
        "kimi-linear": Architecture(
            kinds.hybrid,
            recurrent=RecurrentRule(without_kv_heads, kda, trunk_only=False),
            latent=needed_mla_lengths,
        ),
        "laguna": windowed(positive_key, every(4, dense_first=True)),
        "lfm2": Architecture(
            kinds.hybrid, window=Window(positive_key, in_trunk), recurrent=SHORT_CONVOLUTION, rollback=True
        ),
        "lfm2moe": Architecture(kinds.hybrid, recurrent=SHORT_CONVOLUTION, rollback=True),
        "llada": DIFFUSION,
        "llada-moe": DIFFUSION,
        "llama": PLAIN,
        "llama-embed": PLAIN,
        "llama4": Architecture(window=Window(chunk_unless_zero(8192), every(4), chunked=True)),
        "maincoder": PLAIN,
        "mamba": recurrent(mamba),
        "mamba2": recurrent(mamba2),
        "maple": windowed(needed_key, listed),
        "mellum": windowed(positive_key, every(4)),
        "mimo2": windowed(needed_key, listed),
        "minicpm": PLAIN,
        "minicpm3": PLAIN,
        "minimax-01": Architecture(kinds.hybrid, recurrent=RecurrentRule(interval(8), lightning)),
        "minimax-m2": PLAIN,
        "minimax-m3": Architecture(kinds.msa, further_in_main=True),
        "mistral3": PLAIN,
        "mistral4": LATENT_BY_KEYS,
        "modern-bert": NONE,
        "mpt": PLAIN,
        "muse-glimmer": windowed(needed_key, every(4)),
        "nanbeige": Architecture(repeats=lambda keys: keys.number("num_loops", 1, least=1)),
        "nemotron": PLAIN,
        "nemotron_h": Architecture(
            kinds.hybrid, recurrent=NEMOTRON, rollback=True, draft=kinds.further_tokens
        ),
        "nemotron_h_moe": Architecture(
            kinds.hybrid, recurrent=NEMOTRON, rollback=True, draft=kinds.further_tokens
        ),
        "neo-bert": NONE,
        "nomic-bert": NONE,
        "nomic-bert-moe": NONE,
        "olmo": PLAIN,
        "olmo2": windowed(positive_key, every(4)),
        "olmoe": PLAIN,
        "openelm": PLAIN,
        "orion": PLAIN,
        "paddleocr": IMAGES,
        "pangu-embedded": PLAIN,
        "phi2": PLAIN,
        "phi3": PLAIN,
        "phimoe": PLAIN,
        "plamo": PLAIN,
        "plamo2": Architecture(
            kinds.hybrid,
            recurrent=RecurrentRule(without_kv_heads, mamba2, trunk_only=False),
            lengths_without_heads=True,
        ),
        "plamo3": windowed(positive_key, every(8)),
        "plm": PLAIN,
        "pockettts": PLAIN,
        "qwen": PLAIN,
        "qwen2": PLAIN,
        "qwen2moe": PLAIN,
        "qwen2vl": IMAGES,
        "qwen3": PLAIN,
        "qwen35": Architecture(
            kinds.hybrid,
            recurrent=GATED_DELTA,
            image_positions=always,
            rollback=True,
            draft=kinds.further_tokens,
        ),
        "qwen35moe": Architecture(
            kinds.hybrid,
            recurrent=GATED_DELTA,
            image_positions=always,
            rollback=True,
            draft=kinds.further_tokens,
        ),
        "qwen3moe": PLAIN,
        "qwen3next": Architecture(kinds.hybrid, recurrent=GATED_DELTA, draft=kinds.further_tokens),
        "qwen3tts": IMAGES,
        "qwen3vl": IMAGES,
        "qwen3vlmoe": IMAGES,
        "qwen4exp": Architecture(
            kinds.hybrid_indexed(QWEN_INDEXER),
            recurrent=RecurrentRule(interval(4), mamba2, history=True),
            image_positions=always,
            rollback=True,
            draft=kinds.hybrid_indexed(QWEN_INDEXER, further=True),
        ),
        "refact": PLAIN,
        "rnd1": DIFFUSION,
        "rwkv6": recurrent(rwkv),
        "rwkv6qwen2": recurrent(rwkv),
        "rwkv7": recurrent(rwkv),
        "seed_oss": PLAIN,
        "smallthinker": windowed(fixed_if_positive(4096), every(4, dense_first=True)),
        "smollm3": PLAIN,
        "spark2_5": windowed(needed_key, listed),
        "stablelm": PLAIN,
        "starcoder": PLAIN,
        "starcoder2": PLAIN,
        "step35": windowed(needed_key, listed),
        "t5": PLAIN,
        "t5encoder": PLAIN,
        "talkie": PLAIN,
        "wavtokenizer-dec": NONE,
        "xverse": PLAIN,
    }
)
KNOWN_ARCHITECTURES = tuple(ARCHITECTURES)
"""Every architecture whose memory can be told, by the name that `general.architecture` has."""


def architecture(name: str) -> Architecture:
    """Return the row of an architecture. Raises ShapeError for one that is not in the table."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise ShapeError(f"architecture {name[:64]} is not known") from None


def model_shape(header: ModelHeader, row: Architecture) -> ModelShape:
    """Return what a header says of memory: llama_model::load_hparams, src/llama-model.cpp, b11434.

    Raises ShapeError, naming the key, for one that is missing or holds what cannot be.
    """
    keys = Keys(header)
    header_layers = keys.number("block_count", least=1)
    repeats = row.repeats(keys) if row.repeats else 1
    layers = header_layers * repeats + len(row.extra)
    if layers > MOST_LAYERS:
        raise ShapeError(f"{keys.full_name('block_count')} means {layers} layers, more than {MOST_LAYERS}")
    further = _further_layers(keys, row, header_layers * repeats)
    heads = keys.per_layer("attention.head_count", header_layers, (0,) * header_layers)
    kv_heads = keys.per_layer("attention.head_count_kv", header_layers, heads)
    feed_forward = keys.per_layer("feed_forward_length", header_layers, (0,) * header_layers)
    if row.extra:
        header_layers, further = header_layers - further, 0
    heads, kv_heads, feed_forward = (
        values[:header_layers] * repeats + row.extra for values in (heads, kv_heads, feed_forward)
    )
    layers = len(kv_heads)
    trunk = layers - further
    embedding = keys.number("embedding_length", 0)
    key_length = value_length = embedding // heads[0] if heads[0] else 0
    if heads[0] or row.lengths_without_heads:
        key_length = keys.number("attention.key_length", key_length)
        value_length = keys.number("attention.value_length", value_length)
    lengths = HeaderLayers(trunk, layers, embedding, heads, kv_heads, feed_forward, key_length)

    window_tokens = row.window.tokens(keys, trunk) if row.window else None
    window_layers = (False,) * layers
    if row.window and window_tokens is not None:
        window_layers = row.window.layers(keys, trunk, layers)
    kept, attending = _layers_by_use(keys, row, lengths)
    return ModelShape(
        keys=keys,
        context_length=keys.number("context_length"),
        trunk_layers=trunk,
        layers=layers,
        kv_heads=kv_heads,
        key_length=key_length,
        value_length=value_length,
        key_length_window=keys.number("attention.key_length_swa", key_length),
        value_length_window=keys.number("attention.value_length_swa", value_length),
        window_tokens=window_tokens,
        chunked=row.window is not None and row.window.chunked,
        window_layers=window_layers,
        latent=row.latent(keys),
        image_positions=row.image_positions(keys),
        attention_layers=attending,
        recurrent=kept,
    )


def _further_layers(keys: Keys, row: Architecture, layers: int) -> int:
    name = "nextn_predict_layers"
    further = keys.number(name, 0)
    if row.nextn_by_tensors and not keys.nextn_tensors:
        further = 0
    if further >= layers and row.memory is not borrowed:
        raise ShapeError(f"{keys.full_name(name)} is {further} of {layers} layers")
    return min(further, layers)


def _layers_by_use(
    keys: Keys, row: Architecture, header: HeaderLayers
) -> tuple[Recurrent | None, tuple[int, ...]]:
    rule = row.recurrent
    if rule is None:
        cached = row.cached(keys, header.total) if row.cached else header.total
        return None, tuple(range(min(header.total if row.further_in_main else header.trunk, cached)))
    among = range(header.trunk if rule.trunk_only else header.total)
    flags = rule.layers(keys, header)
    attends = rule.attending(keys, header) if rule.attending else tuple(not flag for flag in flags)
    layers = tuple(il for il in range(header.trunk) if flags[il])
    convolution, state = rule.sizes(keys, header)
    history = 0
    history_layers: tuple[int, ...] = ()
    if rule.history and keys.has("ple.layers"):
        history_layers = tuple(il for il in keys.numbers("ple.layers") if il in layers)
        history = (
            max(keys.number("ple.conv_kernel") - 1, 0)
            * keys.number("ple.ngram_size")
            * keys.number("hyper_connection.count")
            * header.embedding
        )
    kept = Recurrent(layers, convolution, state, history, history_layers)
    return kept, tuple(il for il in among if attends[il])
