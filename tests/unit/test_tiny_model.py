"""The demo's model is the same everywhere, small, and one token a byte."""

from __future__ import annotations

from pathlib import Path

import gguf

from kvscope.demo.tiny_model import write_tiny_model


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first = write_tiny_model(tmp_path / "first.gguf", seed=7).read_bytes()
    again = write_tiny_model(tmp_path / "again.gguf", seed=7).read_bytes()
    other = write_tiny_model(tmp_path / "other.gguf", seed=8).read_bytes()
    assert first == again
    assert first != other
    assert len(first) < 8_000_000


def test_every_byte_is_one_token(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write_tiny_model(tmp_path / "tiny.gguf"))
    tokens = reader.get_field("tokenizer.ggml.tokens")
    assert tokens is not None
    assert tokens.contents()[3:] == [f"<0x{byte:02X}>" for byte in range(256)]
