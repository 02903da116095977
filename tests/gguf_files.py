"""GGUF headers written byte by byte, so that they can be wrong wherever a test wants them to be.

The layout is that of ggml's docs/gguf.md: magic, version, two counts, keys with typed values, tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

LETTERS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
TEXT, ARRAY = 8, 9
MERGES = 514_906
VOCABULARY = 262_144
"""Those of Gemma 3; the largest vocabulary that is common."""


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def number(name: str, kind: str, value: float) -> bytes:
    code, letter = LETTERS[kind]
    return text(name) + struct.pack(f"<I{letter}", code, value)


def string(name: str | bytes, value: str | bytes) -> bytes:
    return text(name) + struct.pack("<I", TEXT) + text(value)


def array(name: str, kind: str, values: Sequence[float], count: int | None = None) -> bytes:
    """An array of numbers; count: what it says of its own length."""
    code, letter = LETTERS[kind]
    length = len(values) if count is None else count
    head = struct.pack("<IIQ", ARRAY, code, length)
    return text(name) + head + struct.pack(f"<{len(values)}{letter}", *values)


def strings(name: str, values: Iterable[str | bytes], count: int | None = None) -> bytes:
    written = [text(value) for value in values]
    length = len(written) if count is None else count
    return text(name) + struct.pack("<IIQ", ARRAY, TEXT, length) + b"".join(written)


def tensor(name: str, dimensions: Sequence[int] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def header(
    *keys: bytes,
    tensors: Sequence[bytes] = (),
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """A header of these keys and tensors; the counts are what it says of itself."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)


def llama(*keys: bytes, tensors: Sequence[bytes] = (), version: int = 3) -> bytes:
    """A header of a small llama model, and these keys after its own."""
    own = (
        string("general.architecture", "llama"),
        number("llama.block_count", "u32", 4),
        number("llama.context_length", "u32", 4096),
    )
    return header(*own, *keys, tensors=tensors, version=version)


def vocabulary(tokens: int = VOCABULARY, merges: int = MERGES) -> tuple[bytes, ...]:
    """Keys as a tokenizer has them, of this many tokens."""
    return (
        string("tokenizer.ggml.model", "gpt2"),
        strings("tokenizer.ggml.tokens", (f"token{number:x}"[: 3 + number % 9] for number in range(tokens))),
        array("tokenizer.ggml.scores", "f32", [-1.5] * tokens),
        array("tokenizer.ggml.token_type", "i32", [1] * tokens),
        strings("tokenizer.ggml.merges", (f"{number:x} {number % 97:x}" for number in range(merges))),
        string("tokenizer.chat_template", "{{ messages }}" * 2000),
    )


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_parts(directory: Path, name: str, contents: Sequence[bytes]) -> list[Path]:
    """Write the parts of one model as llama-gguf-split names them."""
    count = len(contents)
    return [
        write(directory / f"{name}-{part:05}-of-{count:05}.gguf", content)
        for part, content in enumerate(contents, 1)
    ]


def split_keys(part: int, count: int) -> tuple[bytes, ...]:
    """What llama-gguf-split adds to each part; part counts from 0."""
    return (
        number("split.no", "u16", part),
        number("split.count", "u16", count),
        number("split.tensors.count", "i32", 9),
    )
