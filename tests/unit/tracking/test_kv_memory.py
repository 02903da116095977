"""What kvscope says of memory, against what llama.cpp's own allocator and state writer answered."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.unit.tracking.kv_cases import (
    KNOWN_MODELS,
    SHARED_CASES,
    case_header,
    case_parameters,
    failure_report,
    read_cases,
)

from kvscope.tracking.kv_memory import kv_memory

GIVEN_CASES = os.environ.get("KVSCOPE_KV_CASES")


@pytest.mark.parametrize("path", [SHARED_CASES, *([Path(GIVEN_CASES)] if GIVEN_CASES else [])], ids=str)
def test_every_case_of_the_real_allocator_is_exact_to_the_byte(path: Path) -> None:
    cases = read_cases(path)
    assert cases
    report = failure_report(cases)
    assert not report, report


def known_models() -> list[dict]:
    return json.loads(KNOWN_MODELS.read_text())["models"]


@pytest.mark.parametrize("model", known_models(), ids=lambda model: model["id"])
def test_a_known_model_allocates_and_holds_what_llama_cpp_says(model: dict) -> None:
    for case in model["cases"]:
        memory = kv_memory(case_header(model["gguf_metadata"]), case_parameters(case["settings"]))
        assert memory.allocated_bytes == case["allocated_bytes"]
        held = {tokens: memory.sequence_bytes(int(tokens)) for tokens in case["sequence_bytes"]}
        assert held == case["sequence_bytes"]
