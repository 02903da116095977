"""The table of architectures, and headers that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.tracking.kv_cases import SHARED_CASES, case_header, read_cases

from kvscope.observed.model import ModelHeader
from kvscope.tracking.architectures import KNOWN_ARCHITECTURES
from kvscope.tracking.kv_memory import ContextParameters, ShapeError, kv_memory

CASES = {case["arch"]: case["gguf_metadata"] for case in read_cases(SHARED_CASES)}


def test_every_architecture_of_the_cases_has_a_row_and_no_other_has() -> None:
    assert sorted(KNOWN_ARCHITECTURES) == sorted(CASES)
    assert len(KNOWN_ARCHITECTURES) == 152


def test_an_architecture_that_is_not_in_the_table_is_refused_by_name() -> None:
    with pytest.raises(ShapeError, match="architecture qwen9 is not known"):
        kv_memory(ModelHeader("qwen9", {"qwen9.block_count": 2}), ContextParameters())


LLAMA: dict[str, Any] = {
    "llama.context_length": 4096,
    "llama.block_count": 2,
    "llama.embedding_length": 256,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", None),
        ("llama.block_count", 0),
        ("llama.block_count", -3),
        ("llama.block_count", 2**60),
        ("llama.block_count", "two"),
        ("llama.context_length", None),
        ("llama.context_length", 2**60),
        ("llama.attention.head_count", (4, 4, 4)),
        ("llama.attention.head_count_kv", (2, "x")),
        ("llama.attention.head_count_kv", math.nan),
        ("llama.attention.key_length", math.inf),
        ("llama.attention.key_length", -1),
        ("llama.nextn_predict_layers", 2),
    ],
)
def test_a_key_that_is_missing_or_nonsense_is_named(key: str, value: Any) -> None:
    metadata = {**LLAMA, key: value}
    if value is None:
        del metadata[key]
    with pytest.raises(ShapeError, match=key.replace(".", r"\.")):
        kv_memory(ModelHeader("llama", metadata), ContextParameters())


def test_values_may_be_bools_and_whole_floats() -> None:
    metadata = {**LLAMA, "llama.attention.head_count_kv": (True, 2.0)}
    memory = kv_memory(ModelHeader("llama", metadata), ContextParameters(context_tokens=256))
    # 64 elements a head of two bytes, keys and values, 1 + 2 heads.
    assert memory.sequence_bytes(1) == 64 * 2 * 2 * 3


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (ContextParameters(cache_type_k="q3_k"), "cache type 'q3_k' of K is not known"),
        (ContextParameters(cache_type_v="q8_0", flash_attention=False), "needs flash attention"),
        (ContextParameters(sequences=0), "0 slots"),
        (ContextParameters(sequences=257), "257 slots"),
        (ContextParameters(context_tokens=-1), "-1 tokens"),
        (ContextParameters(batch_tokens=0), "batch of 0"),
        (ContextParameters(draft=True), r"llama\.nextn_predict_layers"),
    ],
)
def test_settings_that_llama_cpp_refuses_are_refused(parameters: ContextParameters, says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        kv_memory(ModelHeader("llama", LLAMA), parameters)


def test_latents_have_one_cache_type() -> None:
    header = case_header(CASES["kimi-linear"])
    with pytest.raises(ShapeError, match="q8_0 of K and f16 of V"):
        kv_memory(header, ContextParameters(cache_type_k="q8_0"))


def test_heads_that_fill_no_blocks_cannot_be_quantized() -> None:
    metadata = {**LLAMA, "llama.attention.key_length": 80}
    with pytest.raises(ShapeError, match="blocks of 32, a head has 80"):
        kv_memory(ModelHeader("llama", metadata), ContextParameters(cache_type_k="q4_0"))


NONSENSE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.integers(min_value=0, max_value=40),
    st.floats(),
    st.text(max_size=5),
    st.lists(
        st.one_of(st.integers(min_value=-5, max_value=2**40), st.floats(), st.booleans()), max_size=20
    ).map(tuple),
)


@settings(max_examples=400, deadline=2000)
@given(data=st.data())
def test_no_header_gets_anything_but_figures_or_a_shape_error(data: st.DataObject) -> None:
    architecture = data.draw(st.sampled_from(KNOWN_ARCHITECTURES))
    header = case_header(CASES[architecture])
    metadata = dict(header.metadata)
    keys = sorted(key for key in metadata if key.startswith(f"{architecture}."))
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=4)):
        value = data.draw(NONSENSE)
        if value is None:
            metadata.pop(key, None)
        else:
            metadata[key] = value
    parameters = data.draw(
        st.builds(
            ContextParameters,
            context_tokens=st.integers(min_value=-1, max_value=2**33),
            sequences=st.integers(min_value=-1, max_value=300),
            unified=st.booleans(),
            swa_full=st.booleans(),
            flash_attention=st.booleans(),
            rollback_snapshots=st.integers(min_value=-1, max_value=2**20),
            draft=st.booleans(),
        )
    )
    given_header = ModelHeader(
        architecture, metadata, nextn_tensors=data.draw(st.sampled_from([None, True, False]))
    )
    refusal, memory = "", None
    try:
        memory = kv_memory(given_header, parameters)
    except ShapeError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert len(refusal) < 300
    if memory is None:
        assert refusal
        return
    assert memory.allocated_bytes == sum(memory.allocated_by_kind().values())
    assert memory.sequence_bytes(0) == 0
    assert 0 <= memory.sequence_bytes(1) <= memory.sequence_bytes(1 << 20) + memory.sequence_bytes(1)
    assert memory.checkpoint_bytes(1000) <= memory.sequence_state_bytes(1000)
