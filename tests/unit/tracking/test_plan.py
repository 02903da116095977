"""What a plan answers: what a context costs, in all and for each slot, and the largest that fits.

The truth are the figures of llama.cpp's own allocator in tests/data/known-models.json, and figures
worked out by hand from a model's shape.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.observed.model import ContextSettings, ModelHeader
from kvscope.planned import ContextFit, Plan, PlannedContext
from kvscope.sources.known_models import known_models
from kvscope.tracking.kv_memory import ContextParameters, ShapeError, kv_memory
from kvscope.tracking.plan import Question, RefusedError, largest_context, plan

GIB = 1 << 30
DATA = Path(__file__).parents[2] / "data" / "known-models.json"
CASES = [
    (model["id"], case["settings"], case["allocated_bytes"])
    for model in json.loads(DATA.read_text(encoding="utf-8"))["models"]
    for case in model["cases"]
]
with gzip.open(DATA.with_name("kv-memory-cases.jsonl.gz"), "rt", encoding="utf-8") as lines:
    DRAFT_CASES = [case for case in map(json.loads, lines) if case["settings"].get("mtp")]
ONE_SLOT = ContextSettings(slots=1)

# Gemma-4-26B-A4B at f16: five layers of 2 heads x 512 see all, 25 of 8 heads x 256 a window of 1 024.
GEMMA_TOKEN = 5 * 2 * 512 * 2 * 2
GEMMA_WINDOW_CELL = 25 * 8 * 256 * 2 * 2
GEMMA_WINDOW = GEMMA_WINDOW_CELL * (1024 + 512)

PLAIN = ModelHeader(
    "llama",
    {
        "llama.context_length": 5000,
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
    },
    file_bytes=1000,
)
PLAIN_TOKEN = 2 * 1 * 32 * 2 * 2


def known(model: str) -> ModelHeader:
    return known_models().models[model].header


def asked(header: ModelHeader, settings: ContextSettings = ONE_SLOT, *sizes: int, **more: Any) -> Plan:
    return plan(Question(header, "a model", "file", settings, context_tokens=sizes, **more))


def only(answer: Plan) -> PlannedContext:
    (context,) = answer.contexts
    return context


def fit(answer: Plan, cache_type: str, slots: int, *, unified: bool = False) -> ContextFit:
    (found,) = [
        each
        for each in answer.fits
        if (each.cache_type_k, each.slots, each.unified) == (cache_type, slots, unified)
    ]
    return found


@pytest.mark.parametrize(("model", "settings", "allocated"), CASES)
def test_the_bytes_are_those_that_llama_cpp_allocated(
    model: str, settings: Mapping[str, Any], allocated: int
) -> None:
    given_settings = ContextSettings(
        slots=settings["n_seq_max"],
        unified=settings.get("kv_unified"),
        cache_type_k=settings.get("type_k"),
        cache_type_v=settings.get("type_v"),
    )
    context = only(asked(known(model), given_settings, settings["n_ctx"]))
    assert context.kv_bytes == allocated
    assert sum(context.bytes_by_kind.values()) == allocated
    assert sum(cache.total_bytes for cache in context.caches) == allocated


def test_separate_slots_have_each_their_part_and_the_parts_are_the_whole() -> None:
    context = only(asked(known("gemma-4-26b-a4b"), ContextSettings(slots=4), 131072))
    assert context.slot_context_tokens == 32768
    assert context.slot_bytes_by_kind == {"full": 32768 * GEMMA_TOKEN, "window": GEMMA_WINDOW}
    assert context.slot_kv_bytes == 32768 * GEMMA_TOKEN + GEMMA_WINDOW
    assert context.kv_bytes == 4 * context.slot_kv_bytes


def test_without_np_four_slots_share_a_pool_and_it_is_said_so() -> None:
    answer = asked(known("gemma-4-26b-a4b"), ContextSettings(unified=False), 131072)
    context = only(answer)
    assert (answer.settings.slots, answer.settings.unified) == (4, True)
    assert context.slot_context_tokens == 131072
    assert context.slot_kv_bytes is None
    assert context.full_slot_bytes == 131072 * GEMMA_TOKEN + 1024 * GEMMA_WINDOW_CELL
    assert any("four slots on one unified pool" in note for note in answer.notes)
    assert any("-no-kvu changes nothing" in note for note in answer.notes)


def test_each_slot_is_rounded_up_to_256_cells_and_it_is_said_so() -> None:
    answer = asked(PLAIN, ContextSettings(slots=3), 1000)
    assert only(answer).context_tokens == 1536
    assert any("-c 1000 becomes 1536" in note for note in answer.notes)


def test_weights_are_the_files_unless_given_and_absent_where_nobody_knows() -> None:
    assert only(asked(PLAIN, ONE_SLOT, 1024)).needed_bytes == 1000 + 1024 * PLAIN_TOKEN
    assert only(asked(PLAIN, ONE_SLOT, 1024, weights_bytes=7)).needed_bytes == 7 + 1024 * PLAIN_TOKEN
    unknown = asked(replace(PLAIN, file_bytes=None), ONE_SLOT, 1024, vram_bytes=GIB)
    assert only(unknown).needed_bytes is None
    assert only(unknown).left_bytes == GIB - 1024 * PLAIN_TOKEN
    assert any(note.startswith("KV only") for note in unknown.notes)


def test_what_is_left_may_be_below_nothing_and_is_said_so() -> None:
    answer = asked(PLAIN, ONE_SLOT, 1024, vram_bytes=1024 * PLAIN_TOKEN)
    assert only(answer).left_bytes == -1000
    assert any("-c 1024 does not fit" in note for note in answer.notes)


def test_without_c_usual_sizes_are_shown_and_the_models_own() -> None:
    sizes = [context.context_tokens for context in asked(known("llama-3.1-8b")).contexts]
    assert sizes == [8192, 32768, 131072]
    assert [context.context_tokens for context in asked(PLAIN).contexts] == [5120]


def test_a_context_of_0_is_the_models_own_for_each_separate_slot() -> None:
    for settings, tokens in ((ContextSettings(slots=2), 262144), (ContextSettings(), 131072)):
        assert only(asked(known("llama-3.1-8b"), settings, 0)).context_tokens == tokens


def test_a_context_past_the_models_own_is_allocated_but_of_no_use() -> None:
    answer = asked(PLAIN, ONE_SLOT, 10240)
    assert only(answer).kv_bytes == 10240 * PLAIN_TOKEN
    assert only(answer).slot_context_tokens == 5000
    assert any("no slot grow past the model's own 5000" in note for note in answer.notes)


def test_the_largest_context_that_fits_is_exact_to_256_cells() -> None:
    header = known("gemma-4-26b-a4b")
    weights = int(13.26 * GIB)
    answer = asked(header, ONE_SLOT, 131072, weights_bytes=weights, vram_bytes=16 * GIB)
    free = 16 * GIB - weights
    found = fit(answer, "f16", 1)
    assert found.slot_context_tokens == (free - GEMMA_WINDOW) // GEMMA_TOKEN // 256 * 256
    assert found.kv_bytes == found.slot_context_tokens * GEMMA_TOKEN + GEMMA_WINDOW
    assert found.ended_by == "memory"
    two = fit(answer, "f16", 2)
    assert two.slot_context_tokens == (free // 2 - GEMMA_WINDOW) // GEMMA_TOKEN // 256 * 256
    assert two.context_tokens == 2 * two.slot_context_tokens
    # A block of 32 elements takes 34 bytes at q8_0 where f16 takes 64.
    q8_0 = fit(answer, "q8_0", 1)
    assert q8_0.slot_context_tokens == (free * 64 // 34 - GEMMA_WINDOW) // GEMMA_TOKEN // 256 * 256


def test_what_is_kept_free_is_not_there() -> None:
    free = 1000 + 2048 * PLAIN_TOKEN
    assert fit(asked(PLAIN, ONE_SLOT, vram_bytes=free), "f16", 1).slot_context_tokens == 2048
    answer = asked(PLAIN, ONE_SLOT, vram_bytes=free, reserve_bytes=1)
    assert fit(answer, "f16", 1).slot_context_tokens == 1792


def test_the_models_own_limit_ends_it_where_memory_does_not() -> None:
    found = fit(asked(PLAIN, ONE_SLOT, vram_bytes=GIB), "f16", 2)
    assert (found.ended_by, found.slot_context_tokens, found.context_tokens) == ("model", 5000, 10000)


def test_where_nothing_fits_the_largest_context_is_none() -> None:
    found = fit(asked(PLAIN, ONE_SLOT, vram_bytes=900), "f16", 1)
    assert (found.ended_by, found.slot_context_tokens, found.kv_bytes) == ("memory", 0, None)


def test_a_pool_is_sized_too_where_the_slots_share_one() -> None:
    answer = asked(known("gemma-4-26b-a4b"), ContextSettings(slots=3, unified=True), vram_bytes=3 * GIB)
    window = GEMMA_WINDOW_CELL * (3 * 1024 + 512)
    found = fit(answer, "f16", 3, unified=True)
    assert found.context_tokens == found.slot_context_tokens
    assert found.slot_context_tokens == (3 * GIB - window) // GEMMA_TOKEN // 256 * 256


def test_other_cache_types_and_numbers_of_slots_that_are_asked_for_are_sized_too() -> None:
    settings = ContextSettings(slots=3, cache_type_k="q5_1", cache_type_v="f16")
    answer = asked(PLAIN, settings, vram_bytes=GIB)
    assert fit(answer, "q5_1", 3).cache_type_v == "f16"
    assert {each.slots for each in answer.fits} == {1, 2, 3, 4}


def test_a_state_that_does_not_grow_ends_at_the_models_own_limit() -> None:
    answer = asked(known("mamba2-2.7b"), ONE_SLOT, vram_bytes=GIB)
    context = answer.contexts[-1]
    assert set(context.bytes_by_kind) == {"recurrent"}
    assert context.full_slot_bytes == context.kv_bytes
    assert fit(answer, "f16", 4).ended_by == "model"


def test_a_quantized_v_without_flash_attention_is_refused_and_named() -> None:
    off = ContextSettings(slots=1, flash_attention="off")
    with pytest.raises(RefusedError, match=r"-ctv q8_0 with -fa off.*flash attention"):
        asked(PLAIN, replace(off, cache_type_v="q8_0"), 1024)
    answer = asked(PLAIN, replace(off, cache_type_k="q8_0"), 1024, vram_bytes=GIB)
    assert fit(answer, "f16", 1).ended_by == "model"
    assert fit(answer, "q4_0", 1).ended_by == "refused"
    assert fit(answer, "q4_0", 1).slot_context_tokens is None


@pytest.mark.parametrize("flag", ["cache_type_k", "cache_type_v"])
def test_a_quantized_type_whose_blocks_do_not_divide_a_head_is_refused(flag: str) -> None:
    """As by b11549: `K cache type q8_0 with block size 32 does not divide n_embd_head_k=48`."""
    heads_of_48 = replace(PLAIN, metadata={**PLAIN.metadata, "llama.embedding_length": 96})
    with pytest.raises(RefusedError, match=r"q8_0 is refused.*blocks of 32.*heads of 48"):
        asked(heads_of_48, ContextSettings(slots=1, **{flag: "q8_0"}), 1024)  # type: ignore[arg-type]
    found = fit(asked(heads_of_48, ONE_SLOT, 1024, vram_bytes=GIB), "q4_0", 1)
    assert found.ended_by == "refused"
    assert "heads of 48" in str(found.problem)


def test_more_slots_than_llama_server_takes_are_refused() -> None:
    with pytest.raises(RefusedError, match=r"-np 257"):
        asked(PLAIN, ContextSettings(slots=257), 1024)


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(ShapeError, match="nonsense"):
        asked(ModelHeader("nonsense", {"nonsense.context_length": 4096}), ONE_SLOT, 1024)


def test_a_model_without_a_length_of_its_own_needs_one_asked_for() -> None:
    without = replace(PLAIN, metadata={k: v for k, v in PLAIN.metadata.items() if "context" not in k})
    with pytest.raises(ShapeError, match=r"llama\.context_length"):
        asked(without)


def test_a_draft_context_is_named_as_left_out_unless_it_is_counted() -> None:
    assert "draft_context" in {each.what for each in asked(PLAIN, ONE_SLOT, 1024).left_out}


@pytest.mark.parametrize("case", DRAFT_CASES, ids=lambda case: str(case["arch"]))
def test_a_draft_context_that_is_asked_for_takes_what_llama_cpp_allocated(case: Mapping[str, Any]) -> None:
    settings = case["settings"]
    metadata = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in case["gguf_metadata"].items()
    }
    given_settings = ContextSettings(
        slots=settings["n_seq_max"],
        unified=settings.get("unified"),
        micro_batch_tokens=settings["n_ubatch"],
        draft_kinds=("draft-mtp",),
        draft_cache_type_k=settings.get("type_k"),
        draft_cache_type_v=settings.get("type_v"),
    )
    header = ModelHeader(case["arch"], metadata, nextn_tensors=True)
    answer = asked(header, given_settings, settings["n_ctx"])
    context = only(answer)
    assert context.bytes_by_kind["draft"] == case["allocated_bytes"]["total"]
    assert context.kv_bytes == sum(context.bytes_by_kind.values())
    assert "draft_context" not in {each.what for each in answer.left_out}


@given(
    model=st.sampled_from(sorted(known_models().models)),
    slots=st.integers(1, 5),
    unified=st.booleans(),
    most=st.integers(0, 40 * GIB),
)
def test_the_largest_context_fits_and_256_tokens_more_do_not(
    model: str, slots: int, unified: bool, most: int
) -> None:
    header = known(model)
    own = header.metadata[f"{header.architecture}.context_length"]
    assert isinstance(own, int)
    parameters = ContextParameters(sequences=slots, unified=unified)
    found = largest_context(header, parameters, ContextSettings(), most, own)

    def needed(tokens: int) -> int:
        whole = tokens * (1 if unified else slots)
        return kv_memory(header, replace(parameters, context_tokens=whole)).allocated_bytes

    assert found == 0 or needed(found) <= most
    assert found == own or needed(min(found + 256, own)) > most
