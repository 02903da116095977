"""A small part of the hunt of `python -m tests.allocator`, with the real llama.cpp."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("xllamacpp")

from tests.allocator.__main__ import cases_by_architecture, variations
from tests.allocator.allocator import Allocator, disagreements

KINDS = (
    "llama",
    "gemma3",
    "llama4",
    "deepseek2",
    "mamba2",
    "jamba",
    "lfm2",
    "minimax-m3",
    "glm-dsa",
    "deepseek4",
)


@pytest.mark.real_server
def test_the_real_allocator_agrees_on_headers_varied_at_random() -> None:
    measured = 0
    wrong = []
    with Allocator() as allocator:
        for request in variations(seed=3, count=40, only=KINDS):
            truth = allocator.ask(request)
            measured += "total" in truth
            wrong += [
                f"{request['gguf_metadata']['general.architecture']} {request['settings']}: {line}"
                for line in disagreements(request, truth)
            ]
    assert not wrong
    assert measured >= 15


# What no shared case shows: architecture, variant of its case, keys changed (None: left out), settings.
SEEN_NOWHERE_ELSE: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("gemma2", "base", {"attention.sliding_window": None}, {"n_ctx": 9000}),
    ("minimax-01", "base", {"block_count": 9, "full_attention_interval": None}, {"n_ctx": 512}),
    (
        "deepseek4",
        "base",
        {"attention.sliding_window": 100},
        {"n_ctx": 2048, "n_seq_max": 4, "unified": True},
    ),
    ("deepseek4", "base", {}, {"n_ctx": 1024, "n_seq_max": 2, "n_rs_seq": 3}),
    ("glm5-next", "nextn1_load1", {}, {"n_ctx": 512, "mtp": True}),
    ("qwen4exp", "nextn1_load1", {}, {"n_ctx": 512, "mtp": True}),
    ("gpt-oss", "base", {"attention.sliding_window_pattern": [True]}, {"n_ctx": 512}),
    ("lfm2", "gqa", {"nextn_predict_layers": 1, "attention.sliding_window": 32}, {"n_ctx": 512}),
    ("falcon-h1", "base", {"nextn_predict_layers": 1}, {"n_ctx": 512}),
    ("hy_v4", "no_indexer", {"nextn_predict_layers": 1, "attention.indexer.types": None}, {"n_ctx": 512}),
]


@pytest.mark.real_server
def test_the_real_allocator_agrees_where_no_shared_case_looks() -> None:
    cases = cases_by_architecture()
    with Allocator() as allocator:
        for name, variant, changes, settings in SEEN_NOWHERE_ELSE:
            case = next(case for case in cases[name] if case["variant"] == variant)
            metadata = dict(case["gguf_metadata"])
            for key, value in changes.items():
                metadata[f"{name}.{key}"] = value
            metadata = {key: value for key, value in metadata.items() if value is not None}
            request = {"gguf_metadata": metadata, "settings": {"n_ubatch": 64, **settings}}
            truth = allocator.ask(request)
            assert truth["caches"], f"{name} {changes}: {truth}"
            assert not disagreements(request, truth), f"{name} {changes}"


@pytest.mark.real_server
def test_a_figure_that_is_off_by_one_byte_is_found() -> None:
    with Allocator() as allocator:
        request = next(
            request
            for request in variations(seed=3, count=40, only=("llama",))
            if "total" in allocator.ask(request)
        )
        truth = allocator.ask(request)
    assert not disagreements(request, truth)
    assert disagreements(request, {**truth, "total": truth["total"] + 1})
