"""A small part of the hunt of `python -m tests.allocator`, with the real llama.cpp."""

from __future__ import annotations

import pytest

pytest.importorskip("xllamacpp")

from tests.allocator.__main__ import variations
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
