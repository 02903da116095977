"""Which source says what of a server's context, and when there are no figures.

The model: 4 layers, 2 KV heads of 32 elements, so 4 * 2 * 32 * 2 bytes = 512 bytes of K at f16 for a
token, as much of V, and 272 of either at q8_0 (34 bytes for 32 elements).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvscope.observed.logged_memory import LoggedCache, LoggedContext, LoggedMemory
from kvscope.observed.model import ContextSettings, ModelHeader, ModelSeen
from kvscope.observed.server import ServerProps
from kvscope.tracking.context import ServerMemory, context_parameters, joined, server_memory, unified

TOKEN_F16 = 1024
TOKEN_Q8 = 544

MODEL = ModelSeen(
    ModelHeader(
        "llama",
        {
            "llama.block_count": 4,
            "llama.context_length": 65536,
            "llama.embedding_length": 128,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
        },
    )
)
UNKNOWN_MODEL = ModelSeen(ModelHeader("newarch", {"newarch.block_count": 4}))


def said(**what: Any) -> ContextSettings:
    return ContextSettings(**what)


def props(slots: int | None = None, limit: int | None = None) -> ServerProps:
    return ServerProps("tiny", total_slots=slots, context_limit_tokens=limit)


def logged(
    cells: int,
    streams: int,
    per_token: int = TOKEN_F16,
    *,
    devices: dict[str, int] | None = None,
    **more: Any,
) -> LoggedMemory:
    size = cells * streams * per_token
    cache = LoggedCache(
        "full", cells, 4, streams, streams, size, {"K": size // 2, "V": size // 2},
        {"K": more.pop("type_k", "f16"), "V": more.pop("type_v", "f16")}, devices or {"CPU": size},
    )  # fmt: skip
    main = LoggedContext(
        context_tokens=cells * streams,
        sequence_context_tokens=cells,
        sequences=more.pop("sequences", streams),
        unified=more.pop("unified", False),
        flash_attention=True,
        batch_tokens=2048,
        micro_batch_tokens=512,
        caches=(cache, *more.pop("caches", ())),
    )
    return LoggedMemory(replace(main, **more))


def source(memory: ServerMemory, setting: str) -> str:
    return memory.sources[setting]


# --- one pool or several ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        (said(), True),
        (said(slots=-1), True),
        (said(slots=-1, unified=False), True),
        (said(slots=2), False),
        (said(slots=1), False),
        (said(slots=2, unified=True), True),
        (said(slots=2, unified=False), False),
        (said(unreadable=("slots",)), None),
        (said(unified=True, unreadable=("slots",)), True),
        (said(slots=4, unreadable=("unified",)), None),
    ],
)
def test_slots_share_one_pool_unless_their_number_was_asked_for(
    settings: ContextSettings, shared: bool | None
) -> None:
    assert unified(settings) is shared


# --- who says what ----------------------------------------------------------------------------------


def test_the_users_settings_go_before_the_process_and_defaults_fill_what_both_leave_unsaid() -> None:
    memory = server_memory(
        MODEL,
        said(cache_type_k="q8_0"),
        said(context_tokens=8192, slots=2, cache_type_k="f16"),
        props(2, 4096),
    )
    assert memory.allocated_bytes == 8192 * (272 + 512)
    assert memory.sources == {
        "context": "process",
        "slots": "process",
        "unified": "default",
        "cache_type": "setting",
        "swa_full": "default",
        "flash_attention": "default",
        "batch": "default",
        "shape": "props",
    }


def test_a_shape_that_was_given_is_named_as_a_setting() -> None:
    memory = server_memory(replace(MODEL, given=True), said(), None, props(4, 65536))
    assert source(memory, "shape") == "setting"


def test_with_neither_settings_nor_process_there_is_no_figure_but_a_line_that_says_how_to_get_one() -> None:
    memory = server_memory(MODEL, None, None, props(4, 4096))
    assert (memory.known, memory.caches, memory.sequence_bytes(1)) == (False, {}, None)
    assert memory.problem is not None
    assert "--server-args" in memory.problem
    assert "--model-file" not in memory.problem


def test_without_a_model_the_line_names_the_ways_to_a_model() -> None:
    problem = server_memory(None, None, said(), props(4, 4096)).problem
    assert problem is not None
    assert "--model-file" in problem
    assert "--model-path-map" in problem
    assert "--kv-shape" in problem
    assert "--server-args" not in problem


def test_an_unknown_architecture_is_refused_by_name() -> None:
    memory = server_memory(UNKNOWN_MODEL, said(context_tokens=4096), None, props(4, 4096))
    assert not memory.known
    assert memory.problem is not None
    assert "newarch" in memory.problem


def test_the_first_that_says_a_thing_is_believed_also_where_it_says_no() -> None:
    settings, sources = joined(("setting", said(swa_full=False)), ("process", said(swa_full=True)))
    assert settings.swa_full is False
    assert sources["swa_full"] == "setting"


# --- the size of the context ------------------------------------------------------------------------


def test_a_context_that_is_not_said_is_what_a_slot_shows_times_the_separate_slots() -> None:
    memory = server_memory(MODEL, None, said(slots=2), props(2, 4096))
    assert memory.limit_tokens == 8192
    assert memory.allocated_bytes == 8192 * TOKEN_F16
    assert source(memory, "context") == "props"


def test_a_shared_pool_that_is_not_said_is_what_every_slot_shows() -> None:
    memory = server_memory(MODEL, None, said(), props(4, 4096))
    assert memory.limit_tokens == 4096
    assert source(memory, "slots") == "default"


def test_a_context_that_nobody_tells_is_no_figure() -> None:
    assert not server_memory(MODEL, None, said(), props(4, None)).known


def test_a_slot_shows_less_than_was_allocated_where_the_model_was_trained_on_less() -> None:
    """kv-memory: `-c 65536 -np 2` on an 8K model shows 8192 and allocates 32768 cells a slot."""
    short = replace(
        MODEL, header=replace(MODEL.header, metadata={**MODEL.header.metadata, "llama.context_length": 8192})
    )
    memory = server_memory(short, None, said(context_tokens=65536, slots=2), props(2, 8192))
    assert memory.allocated_bytes == 65536 * TOKEN_F16


def test_contexts_are_rounded_up_to_256_cells_a_slot() -> None:
    memory = server_memory(MODEL, None, said(context_tokens=1000, slots=3), props(3, 512))
    assert memory.limit_tokens == 1536


def test_slots_left_to_the_server_in_words_are_four() -> None:
    memory = server_memory(MODEL, None, said(context_tokens=4096, slots=-1), props(4, 4096))
    assert memory.limit_tokens == 4096


def test_a_build_that_runs_one_slot_when_none_is_asked_for_is_believed() -> None:
    memory = server_memory(MODEL, None, said(context_tokens=4096), props(1, 4096))
    assert memory.limit_tokens == 4096
    assert source(memory, "slots") == "props"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (said(context_tokens=8192, slots=2), props(4, 2048)),
        (said(context_tokens=4096, slots=2), props(2, 8192)),
        (said(context_tokens=16384, slots=2), props(2, 4096)),
        (said(context_tokens=16384), props(4, 4096)),
        (said(context_tokens=131072, slots=1), props(1, 32768)),
    ],
)
def test_arguments_that_the_running_server_contradicts_give_no_figure(
    given: ContextSettings, shown: ServerProps
) -> None:
    memory = server_memory(MODEL, given, None, shown)
    assert not memory.known
    assert memory.problem is not None
    assert "give the right ones with --server-args" in memory.problem


def test_a_slot_of_a_shared_pool_shows_less_than_the_pool_where_a_flag_caps_it() -> None:
    capped = said(context_tokens=8192, slots=4, unified=True, unified_slot_tokens=2048)
    memory = server_memory(MODEL, None, capped, props(4, 2048))
    assert memory.allocated_bytes == 8192 * TOKEN_F16


def test_a_size_for_each_slot_of_a_shared_pool_makes_the_pool() -> None:
    """Measured on b11549: `--kv-unified-per-slot 1024` without `-c` allocates slots x 1024 cells."""
    memory = server_memory(MODEL, None, said(slots=2, unified=True, unified_slot_tokens=1024), props(2, 1024))
    assert memory.limit_tokens == 2048


def test_no_micro_batch_is_as_many_tokens_as_a_batch() -> None:
    memory = server_memory(MODEL, None, said(context_tokens=4096, micro_batch_tokens=0), props(4, 4096))
    assert memory.known


@pytest.mark.parametrize("field", ["context_tokens", "slots", "cache_type_v", "draft_kinds"])
def test_no_default_stands_in_for_what_is_said_but_cannot_be_told(field: str) -> None:
    process = said(slots=2, unreadable=(field,)) if field != "slots" else said(unreadable=(field,))
    memory = server_memory(MODEL, None, process, props(2, 4096))
    assert not memory.known
    assert memory.problem is not None
    assert field.replace("_", " ") in memory.problem


def test_what_the_user_says_makes_up_for_what_cannot_be_told() -> None:
    process = said(context_tokens=8192, slots=2, unreadable=("cache_type_k", "cache_type_v"))
    memory = server_memory(MODEL, said(cache_type_k="f16", cache_type_v="f16"), process, props(2, 4096))
    assert memory.allocated_bytes == 8192 * TOKEN_F16


# --- drafts -----------------------------------------------------------------------------------------


def test_the_models_own_last_layers_draft_in_caches_of_f16_whatever_the_others_are() -> None:
    drafting = ModelSeen(
        ModelHeader(
            "glm4moe",
            {
                "glm4moe.block_count": 5,
                "glm4moe.nextn_predict_layers": 1,
                "glm4moe.context_length": 65536,
                "glm4moe.embedding_length": 128,
                "glm4moe.attention.head_count": 4,
                "glm4moe.attention.head_count_kv": 2,
            },
        )
    )
    asked = said(context_tokens=4096, cache_type_k="q8_0", cache_type_v="q8_0", draft_kinds=("draft-mtp",))
    memory = server_memory(drafting, asked, None, props(4, 4096))
    assert memory.caches == {(None, "full"): 4096 * (TOKEN_Q8 + TOKEN_F16 // 4)}
    memory = server_memory(drafting, replace(asked, draft_cache_type_k="q8_0"), None, props(4, 4096))
    assert memory.caches == {(None, "full"): 4096 * (TOKEN_Q8 + (TOKEN_F16 + TOKEN_Q8) // 8)}
    # A draft model in a file of its own leaves the last layers alone.
    memory = server_memory(drafting, replace(asked, draft_model="small.gguf"), None, props(4, 4096))
    assert memory.caches == {(None, "full"): 4096 * TOKEN_Q8}


@pytest.mark.parametrize(
    ("settings", "snapshots"),
    [
        (said(draft_kinds=("draft-mtp",)), 3),
        (said(draft_kinds=("ngram-mod", "draft-eagle3"), draft_tokens_max=5), 5),
        (said(draft_kinds=("draft-mtp",), draft_tokens_max=0), 0),
        (said(draft_kinds=("draft-simple", "ngram-mod"), draft_tokens_max=5), 0),
        (said(draft_tokens_max=5), 0),
    ],
)
def test_drafts_that_may_be_taken_back_keep_a_state_for_each_token(
    settings: ContextSettings, snapshots: int
) -> None:
    assert context_parameters(settings, 4096, 1).rollback_snapshots == snapshots


def test_how_much_is_drafted_matters_only_where_something_drafts() -> None:
    process = said(context_tokens=4096, unreadable=("draft_tokens_max",))
    assert server_memory(MODEL, None, process, props(4, 4096)).known
    drafting = replace(process, draft_kinds=("draft-eagle3",))
    assert not server_memory(MODEL, None, drafting, props(4, 4096)).known


def test_a_draft_model_of_its_own_is_said_to_be_left_out() -> None:
    memory = server_memory(MODEL, said(context_tokens=4096, draft_model="small.gguf"), None, props(4, 4096))
    assert any("draft model" in remark for remark in memory.remarks)


def test_what_the_arguments_could_not_tell_is_remarked() -> None:
    memory = server_memory(
        MODEL, said(context_tokens=4096, notes=("a preset is left out",)), None, props(4, 4096)
    )
    assert memory.remarks == ("a preset is left out",)


# --- the log ------------------------------------------------------------------------------------------


def test_a_log_that_agrees_gives_its_device_to_the_exact_size() -> None:
    memory = server_memory(
        MODEL,
        None,
        said(context_tokens=8192, slots=2),
        props(2, 4096),
        logged(4096, 2, devices={"CUDA0": 8388000}),
    )
    assert memory.caches == {("CUDA0", "full"): 8192 * TOKEN_F16}
    assert memory.disagreement == 0
    assert memory.warnings == ()
    assert source(memory, "context") == "log"


def test_a_cache_on_several_devices_is_told_by_the_log_alone() -> None:
    parts = {"CUDA0": 5 * 2**20, "CUDA1": 3 * 2**20}
    memory = server_memory(
        MODEL, None, said(context_tokens=8192, slots=2), props(2, 4096), logged(4096, 2, devices=parts)
    )
    assert memory.caches == {("CUDA0", "full"): 5 * 2**20, ("CUDA1", "full"): 3 * 2**20}


def test_the_log_is_enough_where_no_process_and_no_setting_tells() -> None:
    memory = server_memory(MODEL, None, None, props(2, 4096), logged(4096, 2))
    assert memory.allocated_bytes == 8192 * TOKEN_F16
    assert memory.sequence_bytes(100) == 100 * TOKEN_F16
    assert set(memory.sources.values()) <= {"log", "props", "default"}


def test_the_log_wins_over_the_users_settings_where_they_are_more_than_a_hundredth_apart() -> None:
    given = said(context_tokens=8192, slots=2)
    memory = server_memory(
        MODEL, given, None, props(2, 4096),
        logged(4096, 2, TOKEN_Q8, type_k="q8_0", type_v="q8_0"),
    )  # fmt: skip
    # The user did not say the type: the log does, so nothing disagrees.
    assert memory.disagreement == 0
    wrong = server_memory(
        MODEL, replace(given, cache_type_k="f16", cache_type_v="f16"), None, props(2, 4096),
        logged(4096, 2, TOKEN_Q8, type_k="q8_0", type_v="q8_0"),
    )  # fmt: skip
    assert wrong.allocated_bytes == 8192 * TOKEN_Q8
    assert wrong.sequence_bytes(10) == 10 * TOKEN_Q8
    assert wrong.disagreement == pytest.approx(abs(TOKEN_Q8 - TOKEN_F16) / TOKEN_Q8)
    assert len(wrong.warnings) == 1
    assert source(wrong, "cache_type") == "log"


def test_a_log_that_no_setting_explains_gives_its_own_sizes_and_no_more_than_it_tells() -> None:
    window = LoggedCache("window", 1024, 2, 2, 2, 2**20, {}, {}, {"CPU": 2**20})
    memory = server_memory(
        MODEL,
        None,
        said(context_tokens=8192, slots=2),
        props(2, 4096),
        logged(4096, 2, 3000, caches=(window,)),
    )
    assert memory.caches == {("CPU", "full"): 8192 * 3000, ("CPU", "window"): 2**20}
    assert memory.sequence_bytes(10) is None
    assert memory.bytes_per_token is None
    assert memory.disagreement is not None
    assert memory.disagreement > 0.01


def test_a_log_supplies_an_unknown_architecture_whose_one_plain_cache_takes_a_cell_a_token() -> None:
    memory = server_memory(UNKNOWN_MODEL, None, said(), props(2, 4096), logged(4096, 2, 3000))
    assert memory.allocated_bytes == 8192 * 3000
    assert memory.sequence_bytes(7) == 21000
    assert memory.disagreement is None
    assert source(memory, "shape") == "log"


def test_a_log_without_a_finished_load_changes_nothing() -> None:
    with_it = server_memory(MODEL, None, said(context_tokens=8192), props(4, 8192), LoggedMemory())
    assert with_it == server_memory(MODEL, None, said(context_tokens=8192), props(4, 8192))


def test_a_draft_models_context_in_the_log_is_no_disagreement_with_the_main_one() -> None:
    with_draft = replace(logged(4096, 2), drafts=(logged(4096, 2, 300).main,))
    asked = said(context_tokens=8192, slots=2, draft_model="small.gguf")
    memory = server_memory(MODEL, None, asked, props(2, 4096), with_draft)
    assert memory.disagreement == 0
    assert memory.caches == {("CPU", "full"): 8192 * TOKEN_F16}
    assert memory.warnings == ()
    assert any("draft model" in remark for remark in memory.remarks)
