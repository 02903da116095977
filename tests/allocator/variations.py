"""Varies the header and the settings of a case at random, within what llama.cpp may still load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

Metadata = dict[str, Any]


class Header:
    """A case's metadata, changed by keys without the architecture's name."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata: Metadata = {key: value for key, value in metadata.items() if value is not None}
        self.architecture: str = metadata["general.architecture"]

    def __getitem__(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def __setitem__(self, key: str, value: Any) -> None:
        self.metadata[f"{self.architecture}.{key}"] = value

    def drop(self, key: str) -> None:
        """Leave a key out."""
        self.metadata.pop(f"{self.architecture}.{key}", None)

    @property
    def layers(self) -> int:
        """Return the layers that stand in the header."""
        return int(self["block_count"])


def block_count(header: Header, random: Random) -> None:
    """Other layers; lists of one entry a layer go on as they began."""
    old, new = header.layers, random.randint(1, 13)
    for key, value in header.metadata.items():
        if isinstance(value, list) and len(value) == old:
            header.metadata[key] = [value[il % old] for il in range(new)]
    header["block_count"] = new


def kv_heads(header: Header, random: Random) -> None:
    """Other KV heads, for all layers or layer by layer."""
    if isinstance(header["attention.head_count_kv"], list) and random.random() < 0.8:
        old = header["attention.head_count_kv"]
        header["attention.head_count_kv"] = [
            random.choice((0, 1, 2)) if x == 0 or il else 1 for il, x in enumerate(old)
        ]
    else:
        header["attention.head_count_kv"] = [random.choice((1, 2, 4)) for _ in range(header.layers)]


def heads(header: Header, random: Random) -> None:
    """More heads of the same length or shorter ones."""
    count = random.choice((1, 2, 4, 8))
    header["attention.head_count"] = count
    if not isinstance(header["attention.head_count_kv"], list):
        header["attention.head_count_kv"] = random.choice([n for n in (1, 2, 4, 8) if n <= count])


def lengths(header: Header, random: Random) -> None:
    """Keys and values of lengths of their own."""
    header["attention.key_length"] = random.choice((32, 48, 64, 80, 96, 128, 192))
    header["attention.value_length"] = random.choice((32, 48, 64, 96, 128))
    if header["rope.dimension_count"] is not None or random.random() < 0.5:
        header["rope.dimension_count"] = 32


def window_lengths(header: Header, random: Random) -> None:
    """Keys and values of windowed layers of lengths of their own."""
    header["attention.key_length_swa"] = random.choice((32, 64, 96, 128, 192))
    header["attention.value_length_swa"] = random.choice((32, 64, 96, 128))


def window(header: Header, random: Random) -> None:
    """Another window, none, or the key left out."""
    size = random.choice((None, 0, 1, 5, 32, 100, 600, 4096))
    header.drop("attention.sliding_window") if size is None else header.__setitem__(
        "attention.sliding_window", size
    )


def pattern(header: Header, random: Random) -> None:
    """Another pattern of windowed layers: left out, a number, or a list of bools or of numbers."""
    kind = random.choice(("none", "number", "bools", "numbers", "numbers"))
    key = "attention.sliding_window_pattern"
    if kind == "none":
        header.drop(key)
    elif kind == "number":
        header[key] = random.choice((0, 1, 2, 3, 4, 5, 7))
    else:
        # llama.cpp takes lists of any length.
        length = header.layers + random.choice((0, 0, 0, -1, 1))
        header[key] = [random.choice((0, 1)) for _ in range(length)]
        if kind == "bools":
            header[key] = [bool(flag) for flag in header[key]]


def further_layers(header: Header, random: Random) -> None:
    """Layers that predict further tokens."""
    header["nextn_predict_layers"] = random.randint(0, min(2, header.layers))


def _choice(key: str, *values: Any) -> Callable[[Header, Random], None]:
    def vary(header: Header, random: Random) -> None:
        value = random.choice(values)
        if value is None:
            header.drop(key)
        else:
            header[key] = value

    return vary


def _each_layer(key: str, *values: Any) -> Callable[[Header, Random], None]:
    def vary(header: Header, random: Random) -> None:
        if random.random() < 0.2:
            header.drop(key)
        else:
            header[key] = [random.choice(values) for _ in range(header.layers)]

    return vary


VARIATIONS: tuple[Callable[[Header, Random], None], ...] = (
    block_count,
    block_count,
    kv_heads,
    kv_heads,
    heads,
    lengths,
    lengths,
    window_lengths,
    window,
    window,
    pattern,
    pattern,
    further_layers,
    _choice("ssm.state_size", 64, 128, 256),
    _choice("ssm.conv_kernel", 1, 2, 3, 4, 6),
    _choice("ssm.group_count", 0, 1, 2, 4),
    _choice("ssm.inner_size", 128, 256, 512, 1024),
    _choice("kda.head_dim", 64, 128),
    _choice("wkv.head_size", 32, 64, 128),
    _choice("shortconv.l_cache", 1, 2, 3, 5),
    _choice("token_shift_count", 1, 2, 3),
    _choice("full_attention_interval", None, 1, 2, 3, 4, 8),
    _each_layer("attention.recurrent_layers", 0, 1),
    _choice("attention.indexer.key_length", 64, 128, 256),
    _choice("attention.indexer.top_k", None, 0, 8, 2048),
    _each_layer("attention.indexer.types", 0, 1),
    _each_layer("attention.compress_ratios", 0, 4, 4, 128),
    _choice("leading_dense_block_count", 0, 1, 2, 5),
    _choice("ple.layers", [0], [0, 2], [1], None),
    _choice("ple.conv_kernel", 1, 2, 4),
    _choice("hyper_connection.count", 2, 4),
    _choice("rope.dimension_sections", [0, 0, 0, 0], [16, 8, 8, 0], [0, 8, 8, 0], None),
    _choice("attention.causal", True, False),
    _choice("context_length", 256, 1000, 8192, 2097152),
    _choice("attention.shared_kv_layers", 0, 1, 3),
    _choice("num_loops", 1, 2, 3),
    _choice("attention.key_length_mla", 0, None, 192),
    _choice("attention.value_length_mla", 0, None, 128),
)


def varied_header(metadata: Mapping[str, Any], random: Random) -> Metadata:
    """Return metadata with up to four things changed."""
    header = Header(metadata)
    # What of it only weights need; with an odd head it would refuse to load.
    for change in random.sample(VARIATIONS, random.randint(0, 4)):
        change(header, random)
    return header.metadata


def varied_settings(random: Random, *, draft: bool) -> dict[str, Any]:
    """Return settings of a context."""
    settings: dict[str, Any] = {
        "n_ctx": random.choice((0, 1, 255, 256, 512, 1000, 2048, 3000, 4096, 9000, random.randint(1, 6000))),
        "n_seq_max": random.choice((1, 1, 2, 3, 4, 7)),
        "n_ubatch": random.choice((1, 16, 64, 128, 512, 600)),
        "n_batch": random.choice((32, 100, 2048)),
        "unified": random.random() < 0.4,
        "swa_full": random.random() < 0.2,
        "flash_attn": random.choice(("auto", "on", "off")),
        "mtp": draft,
    }
    if random.random() < 0.4:
        types = ["f16", "f32", "bf16"]
        quantized = ["q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
        settings["type_k"] = random.choice(types + quantized)
        settings["type_v"] = random.choice(types if settings["flash_attn"] == "off" else types + quantized)
    if random.random() < 0.3:
        settings["n_rs_seq"] = random.choice((1, 3))
    return settings


def variation(case: Mapping[str, Any], random: Random) -> dict[str, Any]:
    """Return a request to the allocator: a case, changed."""
    metadata = varied_header(case["gguf_metadata"], random)
    architecture = metadata["general.architecture"]
    further = metadata.get(f"{architecture}.nextn_predict_layers", 0)
    draft = bool(further) and random.random() < 0.4
    settings = varied_settings(random, draft=draft)
    if random.random() < 0.8 and metadata.get(f"{architecture}.attention.key_length_mla"):
        # Latents are keys and values in one.
        settings["type_v"] = settings["type_k"] = settings.get("type_v", "f16")
    return {
        "gguf_metadata": metadata,
        "settings": settings,
        "tokens": sorted({1, random.randint(2, 40), random.randint(41, 250)})
        if random.random() < 0.4
        else [],
    }
