"""Allocation lines of real logs: the last load that came to its end counts, and only numbers are kept.

The figures were read off the logs by eye; MiB of two decimals, so bytes within half a hundredth.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.observed.logged_memory import ROUNDED_BY_BYTES, LoggedCache, LoggedMemory
from kvscope.sources.allocation_lines import parse_allocation

LOGS = Path(__file__).parent / "allocation_logs"
NAMES = sorted(path.stem for path in LOGS.glob("*.log"))


def log(name: str) -> list[str]:
    return (LOGS / f"b11549__{name}.log").read_text().splitlines()


def mib(size: float) -> int:
    return round(size * 2**20)


def shape(cache: LoggedCache) -> tuple[object, ...]:
    return (cache.kind, cache.cells, cache.layers, cache.sequences, cache.streams, cache.total_bytes)


CACHES: dict[str, list[tuple[object, ...]]] = {
    "window_separate": [
        ("full", 2048, 2, 2, 2, mib(4.00)),
        ("window", 256, 4, 2, 2, mib(1.00)),
    ],
    "window_default_fitted": [
        ("full", 4096, 2, 4, 1, mib(4.00)),
        ("window", 1024, 4, 4, 1, mib(2.00)),
    ],
    "hybrid_default": [
        ("full", 4096, 2, 4, 1, mib(1.50)),
        ("recurrent", 4, 4, 4, None, mib(0.15)),
    ],
    "indexer_behind_recurrent": [
        ("full", 1024, 1, 4, 1, mib(1.00)),
        ("recurrent", 4, 2, 4, None, mib(0.27)),
        ("indexer", 1024, 1, 4, 1, mib(0.75)),
    ],
    "compressed_default": [
        ("full", 1024, 0, 4, 4, 0),
        ("window", 768, 6, 4, 4, mib(2.25)),
        ("compressed", 256, 2, 4, 4, mib(0.25)),
        ("compressed", 256, 2, 4, 4, mib(0.25)),
        ("indexer", 256, 2, 4, 4, mib(0.50)),
        ("recurrent", 8, 2, None, 4, mib(0.06)),
        ("recurrent", 128, 2, None, 4, mib(0.50)),
        ("recurrent", 8, 2, None, 4, mib(0.12)),
    ],
    "draft_model_fitted": [("full", 4096, 4, 4, 1, mib(4.00))],
}


@pytest.mark.parametrize("name", CACHES)
def test_each_cache_is_told_with_its_kind_cells_layers_and_size(name: str) -> None:
    main = parse_allocation(log(name)).main
    assert main is not None
    assert [shape(cache) for cache in main.caches] == CACHES[name]
    assert main.cache_bytes == sum(cache.total_bytes for cache in main.caches)


def test_every_recorded_log_is_among_these() -> None:
    assert sorted(f"b11549__{name}" for name in CACHES) == NAMES


def test_settings_buffers_types_and_parts_of_separate_slots() -> None:
    main = parse_allocation(log("window_separate")).main
    assert main is not None
    assert (main.context_tokens, main.sequence_context_tokens, main.sequences) == (4096, 2048, 2)
    assert (main.unified, main.flash_attention) == (False, True)
    assert (main.batch_tokens, main.micro_batch_tokens, main.rollback_snapshots) == (512, 64, 0)
    assert main.model_buffers == {"CPU_Mapped": mib(4.22)}
    assert main.compute_buffers == {"CPU": mib(0.58)}
    window = main.caches[1]
    assert window.parts == {"K": mib(0.50), "V": mib(0.50)}
    assert window.types == {"K": "f16", "V": "f16"}
    assert window.devices == {"CPU": mib(1.00)}


def test_a_recurrent_state_has_its_own_parts() -> None:
    main = parse_allocation(log("hybrid_default")).main
    assert main is not None
    assert main.unified is True
    state = main.caches[1]
    assert state.parts == {"R": mib(0.02), "S": mib(0.12), "P": 0}
    assert set(state.types.values()) == {"f32"}


def test_what_was_only_measured_to_fit_does_not_count() -> None:
    lines = log("window_default_fitted")
    assert sum("constructing llama_context" in line for line in lines) == 2
    main = parse_allocation(lines).main
    assert main is not None
    assert main.caches[0].devices == {"CPU": mib(4.00)}
    assert main.model_buffers == {"CPU_Mapped": mib(4.22)}
    measured = lines[: next(n for n, line in enumerate(lines) if "fitting params to free" in line)]
    assert parse_allocation(measured) == LoggedMemory()


def test_a_draft_model_is_told_apart() -> None:
    memory = parse_allocation(log("draft_model_fitted"))
    assert len(memory.drafts) == 1
    assert [shape(cache) for cache in memory.drafts[0].caches] == [("full", 4096, 4, 4, 1, mib(4.00))]
    assert memory.drafts[0].model_buffers == {"CPU_Mapped": mib(2.15)}


def test_of_two_loads_the_last_counts_and_one_under_way_does_not() -> None:
    first, second = log("hybrid_default"), log("window_separate")
    assert parse_allocation(first + second) == parse_allocation(second)
    under_way = second[: next(n for n, line in enumerate(second) if "compute buffer" in line)]
    assert any("llama_kv_cache: size" in line for line in under_way)
    assert parse_allocation(first + under_way) == parse_allocation(first)


@pytest.mark.parametrize(
    "put_in_front",
    [
        "",
        "2026-03-01T10:00:00.123456789Z ",
        "llama-1  | ",
        "Mar 01 10:00:00 box llama-server[71]: ",
        '{"log":"',
    ],
)
def test_text_in_front_of_a_line_does_not_matter(put_in_front: str) -> None:
    bare = [line.split(" ", 2)[2] for line in log("window_separate")]
    assert parse_allocation(put_in_front + line for line in bare) == parse_allocation(log("window_separate"))


def test_a_log_without_its_head_tells_what_is_left() -> None:
    lines = log("window_separate")
    rest = lines[next(n for n, line in enumerate(lines) if "n_ctx_seq" in line) :]
    main = parse_allocation(rest).main
    assert main is not None
    assert (main.context_tokens, main.sequence_context_tokens, main.sequences) == (None, 2048, None)
    assert [shape(cache) for cache in main.caches] == CACHES["window_separate"]


def test_older_spellings_and_several_devices() -> None:
    main = parse_allocation(
        [
            "load_tensors:        CUDA0 model buffer size =  4403.49 MiB",
            "load_tensors:   CPU_Mapped model buffer size =   281.81 MiB",
            "llama_context: constructing llama_context",
            "llama_context: n_ctx_per_seq = 8192",
            "llama_context: flash_attn    = 1",
            "llama_kv_cache_unified:      CUDA0 KV buffer size =   272.00 MiB",
            "llama_kv_cache_unified:      CUDA1 KV buffer size =   272.00 MiB",
            "llama_kv_cache_unified: size =  544.00 MiB (  8192 cells,  32 layers,  1/ 1 seqs), "
            "K (q8_0):  272.00 MiB, V (q8_0):  272.00 MiB",
            "llama_context:      CUDA0 compute buffer size =   258.50 MiB",
            "alloc_compute_meta:      CUDA0 compute buffer size =   900.00 MiB",
        ]
    ).main
    assert main is not None
    assert (main.sequence_context_tokens, main.flash_attention) == (8192, True)
    assert main.model_buffers == {"CUDA0": mib(4403.49), "CPU_Mapped": mib(281.81)}
    assert main.compute_buffers == {"CUDA0": mib(258.50)}
    (cache,) = main.caches
    assert shape(cache) == ("full", 8192, 32, 1, 1, mib(544.00))
    assert cache.devices == {"CUDA0": mib(272.00), "CUDA1": mib(272.00)}
    assert cache.types == {"K": "q8_0", "V": "q8_0"}


USING_TWO = [
    "llama_prepare_model_devices: using device CUDA0 (NVIDIA RTX 4090) (0000:C1:00.0) - 23000 MiB free",
    "llama_prepare_model_devices: using device CUDA1 (NVIDIA 6000 (Ada)) (0000:01:00.0) - 47000 MiB free",
]
USING_ONE = [
    "llama_model_load_from_file_impl: using device Vulkan0 (AMD Radeon (RADV)) (unknown id) - 900 MiB free"
]
LOADED = [
    "llama_context: constructing llama_context",
    "sched_reserve:      CUDA0 compute buffer size =   200.00 MiB",
]
MODEL = ["llama_model_loader: loaded meta data with 23 key-value pairs"]


def test_the_devices_of_a_model_are_told_with_their_pci_ids_whether_before_or_after_its_header() -> None:
    ids = {"CUDA0": "0000:c1:00.0", "CUDA1": "0000:01:00.0"}
    for lines in (MODEL + USING_TWO + LOADED, USING_TWO + MODEL + LOADED):
        main = parse_allocation(lines).main
        assert main is not None
        assert main.devices == ids
    for lines in (MODEL + USING_ONE + LOADED, USING_ONE + MODEL + LOADED):
        after_another = parse_allocation(MODEL + USING_TWO + LOADED + lines).main
        assert after_another is not None
        assert after_another.devices == {"Vulkan0": None}
    # Builds before September 2025 print no id.
    without = "llama_model_load_from_file_impl: using device CUDA0 (Tesla P40) - 24290 MiB free"
    older = parse_allocation([without, *MODEL, *LOADED]).main
    assert older is not None
    assert older.devices == {"CUDA0": None}


def test_what_is_quoted_is_never_taken_for_a_line() -> None:
    said = [f"0.01.000.000 D slot: next token: 12 '{line}'" for line in log("hybrid_default")]
    assert parse_allocation(log("window_separate") + said) == parse_allocation(log("window_separate"))


def test_a_size_is_within_the_rounding_that_is_told() -> None:
    assert mib(0.005) <= ROUNDED_BY_BYTES < mib(0.0051)


@settings(max_examples=60)
@given(st.sampled_from(sorted(CACHES)), st.data())
def test_lines_cut_anywhere_and_strange_ones_never_crash_it(name: str, data: st.DataObject) -> None:
    lines = log(name)
    cut = data.draw(st.integers(0, len(lines) - 1))
    lines[cut] = lines[cut][: data.draw(st.integers(0, len(lines[cut])))]
    lines.insert(data.draw(st.integers(0, len(lines))), data.draw(st.text(max_size=40)))
    memory = parse_allocation(lines)
    assert memory.main is None or len(memory.main.caches) <= len(CACHES[name])
