"""Writes a tiny model: its header from the table, its weights random, their shapes as llama.cpp asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from tests.tiny_models.kinds import EVERY, TinyModel
from tests.tiny_models.llama_cpp import wanted_weights

SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = 256
ADD = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}


def write_model(model: TinyModel, path: Path) -> None:
    """Write a model that llama.cpp loads and decodes with; the same bytes every time.

    Raises ValueError when llama.cpp takes no such model.
    """
    _write(model, path, {})
    _write(model, path, wanted_weights(path))


def _write(model: TinyModel, path: Path, weights: Mapping[str, tuple[int, ...]]) -> None:
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, model.architecture)
    for key, value in {**EVERY, **model.metadata}.items():
        getattr(writer, ADD[type(value)])(f"{model.architecture}.{key}", value)
    _add_vocabulary(writer)
    for name, shape in weights.items():
        if "norm" in name and name.endswith(".weight"):
            values = np.ones(shape, dtype=np.float32)
        else:
            values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """One token a byte."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(BYTES))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.BYTE] * BYTES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_vocab_size(len(tokens))
