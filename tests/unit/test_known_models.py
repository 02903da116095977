"""The built-in list of models: what `kvscope plan --model` knows without a file."""

from __future__ import annotations

import re

from kvscope.sources.known_models import known_models

# As its publisher's header has it; every sixth of the 30 layers sees the whole context.
GEMMA = {
    "general.architecture": "gemma4",
    "gemma4.block_count": 30,
    "gemma4.context_length": 262144,
    "gemma4.attention.sliding_window": 1024,
    "gemma4.attention.sliding_window_pattern": (True, True, True, True, True, False) * 5,
    "gemma4.attention.head_count_kv": (8, 8, 8, 8, 8, 2) * 5,
}


def test_a_models_header_is_as_published_its_arrays_too() -> None:
    gemma = known_models().models["gemma-4-26b-a4b"]
    assert gemma.name == "Gemma-4-26B-A4B"
    assert gemma.header.architecture == "gemma4"
    assert GEMMA.items() <= dict(gemma.header.metadata).items()


def test_the_list_says_when_it_was_read_and_no_size_of_a_file() -> None:
    known = known_models()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", known.date)
    assert len(known.models) == 13
    assert all(model.header.file_bytes is None for model in known.models.values())


def test_every_model_is_known_by_an_id_that_is_easily_typed_and_has_a_length() -> None:
    for model_id, model in known_models().models.items():
        assert model.id == model_id
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", model_id)
        assert isinstance(model.header.metadata[f"{model.header.architecture}.context_length"], int)
