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

from kvscope.tracking.kv_memory import CacheKind, ContextParameters, KvMemory, ShapeError, kv_memory

GIVEN_CASES = os.environ.get("KVSCOPE_KV_CASES")
CASE_FILES = [SHARED_CASES, *([Path(GIVEN_CASES)] if GIVEN_CASES else [])]


@pytest.mark.parametrize("path", CASE_FILES, ids=lambda path: path.name)
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


def memory_of(model: str, **settings: object) -> KvMemory:
    found = next(known for known in known_models() if known["id"] == model)
    return kv_memory(case_header(found["gguf_metadata"]), case_parameters(settings))


MIB = 1024 * 1024


def test_llama_grows_by_128_kib_a_token_and_by_68_at_q8_0() -> None:
    assert memory_of("llama-3.1-8b").bytes_per_token == 131072
    assert memory_of("llama-3.1-8b", type_k="q8_0", type_v="q8_0").bytes_per_token == 69632


@pytest.mark.parametrize(
    ("settings", "mib"),
    [
        ({}, 3184),
        ({"n_seq_max": 4, "unified": True}, 4432),
        ({"n_seq_max": 4}, 5056),
        ({"swa_full": True}, 15872),
    ],
)
def test_gemma_3_27b_at_32k_allocates_what_llama_cpp_prints(settings: dict, mib: int) -> None:
    assert memory_of("gemma-3-27b", n_ctx=32768, **settings).allocated_bytes == mib * MIB


def test_a_window_stops_growing_and_only_full_layers_count_for_a_token() -> None:
    memory = memory_of("gemma-3-27b", n_ctx=32768)
    assert memory.bytes_per_token == 80 * 1024
    assert memory.sequence_bytes(20001) - memory.sequence_bytes(20000) == 80 * 1024
    # Within the window all 62 layers grow, of which 10 are full.
    assert memory.sequence_bytes(501) - memory.sequence_bytes(500) == 80 * 1024 * 62 // 10


def test_a_recurrent_state_is_there_with_the_first_token_and_never_grows() -> None:
    memory = memory_of("rwkv-7-2.9b")
    assert memory.sequence_bytes(0) == 0
    assert memory.sequence_bytes(1) == memory.sequence_bytes(100000) > 0
    assert memory.bytes_per_token == 0


def test_a_slot_file_is_its_state_its_tokens_and_a_short_header() -> None:
    memory = memory_of("llama-3.1-8b", n_ctx=4096)
    assert memory.slot_file_bytes(1000) == 28 + 4 * 1000 + memory.sequence_state_bytes(1000) - 8


def test_a_checkpoint_holds_the_window_alone_and_stays_the_same_size() -> None:
    memory = memory_of("gemma-3-27b", n_ctx=32768)
    assert (
        memory.checkpoint_bytes(20000) == memory.checkpoint_bytes(30000) < memory.sequence_state_bytes(20000)
    )
    plain = memory_of("llama-3.1-8b", n_ctx=4096)
    assert plain.checkpoint_bytes(1000) == plain.sequence_state_bytes(1000)


def test_bytes_by_kind_of_cache_are_all_the_bytes() -> None:
    by_kind = memory_of("qwen3-next-80b-a3b", n_ctx=32768).allocated_by_kind()
    assert set(by_kind) == {CacheKind.FULL, CacheKind.RECURRENT}
    assert sum(by_kind.values()) == memory_of("qwen3-next-80b-a3b", n_ctx=32768).allocated_bytes


def test_deepseek4_keeps_its_last_layers_in_the_main_context_whether_the_file_has_their_weights_or_not() -> (
    None
):
    # Read off the real llama.cpp with a file that has them: llama_kv_cache, layers 0 to 4 of 5.
    case = next(case for case in read_cases(SHARED_CASES) if case["variant"] == "nextn1_tensor")
    for tensors in (True, False, None):
        memory = kv_memory(
            case_header(case["gguf_metadata"], tensors), ContextParameters(context_tokens=2048)
        )
        layers = next(cache.layers for cache in memory.caches if cache.name == "raw_swa")
        assert layers == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("tensors", [False, None])
def test_deepseek4_predicts_further_tokens_only_with_the_weights_for_it(tensors: bool | None) -> None:
    case = next(case for case in read_cases(SHARED_CASES) if case["variant"] == "nextn1_tensor")
    with pytest.raises(ShapeError, match="no layers that predict further tokens"):
        kv_memory(case_header(case["gguf_metadata"], tensors), ContextParameters(draft=True))


def test_deepseek4s_layers_behind_the_trunk_keep_compressed_rows_but_no_state_of_the_compression() -> None:
    case = next(case for case in read_cases(SHARED_CASES) if case["variant"] == "nextn1_tensor")
    metadata = {**case["gguf_metadata"], "deepseek4.attention.compress_ratios": [0, 4, 128, 4, 4]}
    parameters = ContextParameters(context_tokens=2048, micro_batch_tokens=64)
    memory = kv_memory(case_header(metadata, nextn_tensors=True), parameters)
    # llama_get_memory_breakdown and llama_state_seq_get_size of the real llama.cpp with such a file.
    assert memory.allocated_bytes == 901120
    assert memory.sequence_state_bytes(0) == 115368
