"""Who holds a GPU's memory: figures by hand, and sums that hold whatever the readings say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvscope.observed.gpu import GpuProcess, GpuSeen
from kvscope.observed.logged_memory import LoggedMemory
from kvscope.observed.model import ContextSettings, ModelHeader, ModelSeen
from kvscope.sources.allocation_lines import parse_allocation
from kvscope.tracking.context import ServerMemory
from kvscope.tracking.vram import (
    KINDS,
    Budget,
    ServerClaim,
    ServerLoad,
    ServerSizes,
    budget,
    largest_processes,
    server_bytes,
    server_sizes_on,
)

MIB = 2**20
CARD = GpuSeen(
    "0",
    vendor="NVIDIA",
    pci_id="0000:01:00.0",
    memory_total_bytes=1000,
    memory_used_bytes=600,
    memory_free_bytes=380,
    memory_reserved_bytes=20,
    processes=(GpuProcess(7, "llama-server", 500), GpuProcess(8, "firefox", 60)),
    processes_complete=True,
)
SIZES = ServerSizes(weights=300, kv=120, compute=50)
MAIN = ServerClaim("main", 7, SIZES)


def parts(gpu: GpuSeen, *claims: ServerClaim) -> dict[str, int]:
    """By kind, with the server's name behind it."""
    seen = budget(gpu, claims)
    assert seen is not None
    assert seen.total_bytes == gpu.memory_total_bytes
    return {f"{kind} {server}" if server else kind: size for (kind, server), size in seen.parts.items()}


def test_a_servers_memory_is_split_and_the_rest_of_the_card_told() -> None:
    assert parts(CARD, MAIN) == {
        "weights main": 300,
        "kv main": 120,
        "compute main": 50,
        "server_rest main": 30,
        "other_processes": 60,
        "unattributed": 40,
        "reserved": 20,
        "free": 380,
    }


def test_what_cannot_be_told_apart_stays_together() -> None:
    split = parts(CARD, ServerClaim("main", 7, ServerSizes(kv=120)))
    assert (split["kv main"], split["server_unsplit main"]) == (120, 380)
    split = parts(CARD, ServerClaim("main", 7, replace(SIZES, compute=None)))
    assert (split["weights main"], split["kv main"], split["server_unsplit main"]) == (300, 120, 80)
    assert "server_rest main" not in split
    assert parts(CARD, ServerClaim("main", 7))["server_unsplit main"] == 500


def test_sizes_above_what_the_process_holds_split_nothing() -> None:
    split = parts(CARD, ServerClaim("main", 7, replace(SIZES, weights=331)))
    assert split["server_unsplit main"] == 500
    assert not {"weights main", "kv main", "compute main", "server_rest main"} & set(split)


def test_a_process_out_of_sight_is_unattributed() -> None:
    nobody = replace(CARD, processes=None, processes_complete=False)
    assert parts(nobody, ServerClaim("main", None, SIZES)) == {
        "unattributed": 600,
        "reserved": 20,
        "free": 380,
    }
    named = replace(CARD, processes=(GpuProcess(None, None, 500), GpuProcess(None, "game", 60)))
    split = parts(named, ServerClaim("main", None, SIZES))
    assert (split["other_processes"], split["unattributed"]) == (60, 540)


def test_a_server_among_processes_of_another_namespace_has_what_its_log_says() -> None:
    """NVML lists the host's pids; kvscope and the server share a container without `pid: host`."""
    outside = replace(CARD, processes=(GpuProcess(None, None, 500),))
    split = parts(outside, MAIN)
    assert (split["weights main"], split["unattributed"]) == (300, 130)
    assert "other_processes" not in split


def test_a_local_server_whose_memory_cannot_be_read_has_what_its_log_says() -> None:
    """WSL2 lists processes without their memory."""
    unread = replace(CARD, processes=(GpuProcess(7), GpuProcess(8)), processes_complete=False)
    assert parts(unread, MAIN) == {
        "weights main": 300,
        "kv main": 120,
        "compute main": 50,
        "unattributed": 130,
        "reserved": 20,
        "free": 380,
    }
    too_much = ServerClaim("main", 7, replace(SIZES, weights=431))
    assert parts(unread, too_much) == {"unattributed": 600, "reserved": 20, "free": 380}


def test_a_server_that_holds_nothing_of_the_card_has_no_part() -> None:
    assert not [name for name in parts(CARD, ServerClaim("elsewhere", 99, SIZES)) if "elsewhere" in name]


def test_a_log_that_contradicts_the_list_of_all_processes_is_not_believed() -> None:
    without = replace(CARD, processes=(GpuProcess(8, "firefox", 60),))
    assert parts(without, MAIN) == {
        "other_processes": 60,
        "unattributed": 540,
        "reserved": 20,
        "free": 380,
    }


def test_a_size_below_nothing_is_not_believed() -> None:
    unread = replace(CARD, processes=(GpuProcess(7),))
    for gpu, kind in ((unread, "unattributed"), (CARD, "server_unsplit main")):
        split = parts(gpu, ServerClaim("main", 7, replace(SIZES, kv=-1)))
        assert kind in split
        assert "kv main" not in split


def test_several_servers_on_one_card() -> None:
    gpu = replace(CARD, processes=(GpuProcess(7, "llama-server", 340), GpuProcess(9, "llama-server", 200)))
    claims = (
        ServerClaim("main", 7, ServerSizes(200, 100, 30)),
        ServerClaim("other", 9, ServerSizes(150, 20, 10)),
    )
    split = parts(gpu, *claims)
    assert (split["kv main"], split["server_rest main"]) == (100, 10)
    assert (split["kv other"], split["server_rest other"]) == (20, 20)
    assert split["other_processes"] == 0
    assert server_bytes(gpu, claims) == {"main": 340, "other": 200}


def test_two_names_of_one_process_do_not_count_it_twice() -> None:
    split = parts(CARD, MAIN, ServerClaim("again", 7, SIZES))
    assert split["weights main"] == 300
    assert not [name for name in split if "again" in name]
    assert server_bytes(CARD, (MAIN, ServerClaim("again", 7))) == {"main": 500}


def test_a_process_that_is_listed_for_computing_and_drawing_counts_once() -> None:
    twice = replace(CARD, processes=(*(CARD.processes or ()), GpuProcess(7, "llama-server", 500)))
    assert parts(twice, MAIN) == parts(CARD, MAIN)
    assert largest_processes(twice) == {"llama-server": 500, "firefox": 60}


@pytest.mark.parametrize(
    ("used", "free", "reserved", "expected"),
    [
        (600, 380, 20, {"unattributed": 600, "reserved": 20, "free": 380}),  # beside it: nvmlMemory_v2_t
        (620, 380, 20, {"unattributed": 600, "reserved": 20, "free": 380}),  # within it: nvmlMemory_t
        (620, 380, None, {"unattributed": 620, "free": 380}),  # not told: amdgpu
        (620, None, None, {"unattributed": 620, "free": 380}),
        (None, 380, 20, {"unattributed": 600, "reserved": 20, "free": 380}),
        (600, 350, 20, {"unattributed": 630, "reserved": 20, "free": 350}),  # 30 are neither
        (600, 900, 20, {"unattributed": 600, "reserved": 20, "free": 380}),
        (1200, 0, 20, {"unattributed": 1000, "reserved": 0, "free": 0}),
    ],
)
def test_reserved_memory_is_told_beside_the_used_one_or_within_it(
    used: int | None, free: int | None, reserved: int | None, expected: dict[str, int]
) -> None:
    gpu = GpuSeen("0", None, None, None, None, None, 1000, used, free, reserved)
    assert parts(gpu) == expected


def test_processes_that_sum_to_more_than_is_used_leave_no_hole() -> None:
    shared = replace(CARD, processes=(GpuProcess(7, "llama-server", 500), GpuProcess(8, "kwin", 300)))
    split = parts(shared, MAIN)
    assert (split["weights main"], split["other_processes"], split["unattributed"]) == (300, 100, 0)
    beyond = replace(CARD, processes=(GpuProcess(7, "llama-server", 700),))
    assert parts(beyond, MAIN)["server_unsplit main"] == 600


@pytest.mark.parametrize(
    "gpu",
    [
        replace(CARD, memory_total_bytes=None),
        replace(CARD, memory_used_bytes=None, memory_free_bytes=None),
        replace(CARD, unified=True),
    ],
    ids=["total", "used", "GTT of a unified GPU"],
)
def test_without_total_or_use_there_is_no_budget(gpu: GpuSeen) -> None:
    assert budget(gpu, [MAIN]) is None


def test_a_unified_gpu_is_judged_on_vram_and_gtt() -> None:
    apu = GpuSeen(
        "0",
        vendor="AMD",
        memory_total_bytes=100,
        memory_used_bytes=90,
        memory_free_bytes=10,
        gtt_total_bytes=900,
        gtt_used_bytes=500,
        unified=True,
        processes=(GpuProcess(7, "llama-server", 60, 420), GpuProcess(8, "kwin", 5, None)),
        processes_complete=True,
    )
    seen = budget(apu, [MAIN])
    assert seen is not None
    assert seen.parts == {
        ("weights", "main"): 300,
        ("kv", "main"): 120,
        ("compute", "main"): 50,
        ("server_rest", "main"): 10,
        ("other_processes", None): 5,
        ("unattributed", None): 105,
        ("free", None): 410,
    }
    assert largest_processes(apu) == {"llama-server": 480, "kwin": 5}
    discrete = replace(apu, unified=False)
    assert largest_processes(discrete) == {"llama-server": 60, "kwin": 5}


def test_the_largest_programs_are_told_by_name_only() -> None:
    many = tuple(GpuProcess(n, f"program{n:02}", n) for n in range(1, 15))
    gpu = replace(CARD, processes=(*many, GpuProcess(20, "program01", 30), GpuProcess(21, None, 900)))
    names = largest_processes(gpu)
    assert list(names.items())[:2] == [("program01", 31), ("program14", 14)]
    assert len(names) == 10
    assert largest_processes(gpu, at_most=3) == {"program01": 31, "program14": 14, "program13": 13}
    assert largest_processes(replace(CARD, processes=(GpuProcess(None, "game", 5),))) == {"game": 5}


figures = st.none() | st.integers(-50, 2000)
pids = st.none() | st.integers(1, 4)
gpus = st.builds(
    GpuSeen,
    gpu=st.just("0"),
    memory_total_bytes=figures | st.just(0),
    memory_used_bytes=figures,
    memory_free_bytes=figures,
    memory_reserved_bytes=figures,
    gtt_total_bytes=figures,
    gtt_used_bytes=figures,
    unified=st.booleans(),
    processes=st.none()
    | st.lists(st.builds(GpuProcess, pids, st.none() | st.sampled_from("ab"), figures, figures)).map(tuple),
    processes_complete=st.booleans(),
)
claims_of_servers = st.lists(
    st.builds(
        ServerClaim,
        st.sampled_from(("main", "other")),
        pids,
        st.builds(ServerSizes, figures, figures, figures),
    ),
    max_size=4,
)


@given(gpus, claims_of_servers)
@example(replace(CARD, memory_used_bytes=1200), [MAIN])
def test_whatever_the_readings_say_the_parts_sum_to_the_total(
    gpu: GpuSeen, claims: list[ServerClaim]
) -> None:
    seen = budget(gpu, claims)
    total, used, free = gpu.memory_total_bytes, gpu.memory_used_bytes, gpu.memory_free_bytes
    if gpu.unified:
        total = None if total is None or gpu.gtt_total_bytes is None else total + gpu.gtt_total_bytes
        used, free = None if used is None or gpu.gtt_used_bytes is None else used, None
    assert (seen is None) == (total is None or total < 0 or (used is None and free is None))
    if seen is not None:
        assert seen.total_bytes == total
        assert all(size >= 0 for size in seen.parts.values())
        assert {kind for kind, _ in seen.parts} <= set(KINDS)
        owned = {"weights", "kv", "compute", "server_rest", "server_unsplit"}
        assert all((kind in owned) == (server is not None) for kind, server in seen.parts)


@given(
    gpus,
    st.lists(st.builds(GpuProcess, st.integers(1, 4), memory_bytes=st.integers(0, 900))),
    claims_of_servers,
)
def test_no_server_has_more_than_its_process_holds(
    gpu: GpuSeen, processes: list[GpuProcess], claims: list[ServerClaim]
) -> None:
    seen_whole = replace(gpu, unified=False, processes=tuple(processes), processes_complete=True)
    seen = budget(seen_whole, claims) or Budget({})
    held = server_bytes(seen_whole, claims)
    for server in ("main", "other"):
        assert sum(size for (_, name), size in seen.parts.items() if name == server) <= held.get(server, 0)


# ---- the sizes on one GPU

LOAD = """\
llama_model_loader: loaded meta data with 23 key-value pairs and 183 tensors from model.gguf
llama_prepare_model_devices: using device CUDA0 (NVIDIA GeForce RTX 4090) (0000:41:00.0) - 23000 MiB free
llama_prepare_model_devices: using device CUDA1 (NVIDIA RTX A6000 (Ada)) (0000:01:00.0) - 47000 MiB free
load_tensors:        CUDA0 model buffer size =  4000.00 MiB
load_tensors:        CUDA1 model buffer size =  6000.00 MiB
load_tensors:   CPU_Mapped model buffer size =   281.00 MiB
llama_context: constructing llama_context
llama_kv_cache:      CUDA0 KV buffer size =   400.00 MiB
llama_kv_cache:      CUDA1 KV buffer size =   600.00 MiB
llama_kv_cache: size = 1000.00 MiB (8192 cells, 32 layers, 1/1 seqs), K (f16): 500.00 MiB, V (f16): 500.00 MiB
sched_reserve:      CUDA0 compute buffer size =   200.00 MiB
sched_reserve:      CUDA1 compute buffer size =   300.00 MiB
sched_reserve:  CUDA_Host compute buffer size =    20.00 MiB
"""
FIRST, SECOND = CARD, replace(CARD, gpu="1", pci_id="0000:41:00.0")


def logged(text: str) -> ServerLoad:
    memory = parse_allocation(text.splitlines())
    assert memory.main is not None
    return ServerLoad(memory)


def mebibytes(sizes: ServerSizes) -> tuple[int | None, ...]:
    return tuple(None if size is None else size // MIB for size in (sizes.weights, sizes.kv, sizes.compute))


def test_the_logs_first_device_is_not_the_first_gpu_but_the_one_with_its_pci_id() -> None:
    gpus = (FIRST, SECOND)
    assert mebibytes(server_sizes_on(FIRST, gpus, 7, logged(LOAD))) == (6000, 600, 300)
    assert mebibytes(server_sizes_on(SECOND, gpus, 7, logged(LOAD))) == (4000, 400, 200)


def test_devices_of_other_machines_cards_are_on_none_of_these() -> None:
    elsewhere = replace(FIRST, pci_id="0000:02:00.0")
    assert server_sizes_on(elsewhere, (elsewhere,), 7, logged(LOAD)) == ServerSizes(0, 0, 0)
    unknown = replace(FIRST, pci_id=None)
    assert server_sizes_on(unknown, (unknown,), 7, logged(LOAD)) == ServerSizes()


WITHOUT_IDS = LOAD.replace(" (0000:41:00.0)", "").replace(" (0000:01:00.0)", "")
ONE_DEVICE = "\n".join(line for line in WITHOUT_IDS.splitlines() if "CUDA1" not in line)


def test_programs_are_told_to_hold_nothing_only_where_all_can_be_seen() -> None:
    alone = replace(CARD, processes=(GpuProcess(7, "llama-server", 500),))
    assert parts(alone, MAIN)["other_processes"] == 0
    assert "other_processes" not in parts(replace(alone, processes_complete=False), MAIN)


def test_without_pci_ids_only_a_single_device_of_a_single_gpu_is_certain() -> None:
    assert mebibytes(server_sizes_on(FIRST, (FIRST,), 7, logged(ONE_DEVICE))) == (4000, 400, 200)
    assert server_sizes_on(FIRST, (FIRST, SECOND), 7, logged(ONE_DEVICE)) == ServerSizes()
    assert server_sizes_on(FIRST, (FIRST,), 7, logged(WITHOUT_IDS)) == ServerSizes()
    radeon = replace(SECOND, vendor="AMD")
    assert mebibytes(server_sizes_on(FIRST, (FIRST, radeon), 7, logged(ONE_DEVICE))) == (4000, 400, 200)
    assert server_sizes_on(radeon, (FIRST, radeon), 7, logged(ONE_DEVICE)) == ServerSizes(0, 0, 0)
    for vendor in (None, "pretend"):
        unknown = replace(FIRST, vendor=vendor)
        assert server_sizes_on(unknown, (unknown,), 7, logged(ONE_DEVICE)) == ServerSizes()
    # Vulkan0 may be any card, a built-in one of a third vendor too.
    vulkan = logged(ONE_DEVICE.replace("CUDA", "Vulkan"))
    assert server_sizes_on(FIRST, (FIRST,), 7, vulkan) == ServerSizes()


def test_a_kind_with_a_buffer_on_several_devices_is_not_known_the_others_are() -> None:
    split = LOAD.replace("CUDA0 model buffer", "CUDA0_Split model buffer")
    assert mebibytes(server_sizes_on(FIRST, (FIRST, SECOND), 7, logged(split))) == (None, 600, 300)


def test_a_draft_models_buffers_count_too() -> None:
    draft = LOAD.replace("CUDA0", "CUDA1").replace("0000:41:00.0", "0000:01:00.0")
    both = LOAD + "srv load_model: loading draft model\n" + draft
    memory = parse_allocation(both.splitlines())
    assert len(memory.drafts) == 1
    both_sizes = server_sizes_on(SECOND, (FIRST, SECOND), 7, logged(both))
    assert mebibytes(both_sizes) == (4000, 400, 200)
    assert server_sizes_on(FIRST, (FIRST, SECOND), 7, logged(both)).kv == (600 + 600) * MIB


def test_a_draft_that_shares_the_models_weights_has_none_of_its_own() -> None:
    shared = LOAD + LOAD[LOAD.index("llama_context: constructing") :]
    assert mebibytes(server_sizes_on(FIRST, (FIRST, SECOND), 7, logged(shared))) == (6000, 1200, 600)


def without(text: str, part: str) -> ServerLoad:
    return logged("\n".join(line for line in text.splitlines() if part not in line))


def test_what_the_log_does_not_tell_is_not_known() -> None:
    gpus = (FIRST, SECOND)
    assert mebibytes(server_sizes_on(FIRST, gpus, 7, without(LOAD, "model buffer"))) == (None, 600, 300)
    assert mebibytes(server_sizes_on(FIRST, gpus, 7, without(LOAD, "KV buffer"))) == (6000, None, 300)
    draft = LOAD + "srv load_model: loading draft model\n" + LOAD
    only_draft = logged(draft.replace("model buffer", "other buffer", 3))
    assert server_sizes_on(FIRST, gpus, 7, only_draft).weights is None


def test_layers_on_another_machine_are_no_memory_of_this_one() -> None:
    remote = logged(LOAD.replace("CUDA0", "RPC0[10.0.0.2:50052]"))
    assert mebibytes(server_sizes_on(FIRST, (FIRST, SECOND), 7, remote)) == (6000, 600, 300)


def test_a_restart_in_one_log_forgets_the_former_devices() -> None:
    swapped = LOAD.replace("41:00", "00:00").replace("01:00.0", "41:00.0").replace("00:00.0", "01:00.0")
    sizes = server_sizes_on(SECOND, (FIRST, SECOND), 7, logged(LOAD + swapped))
    assert mebibytes(sizes) == (6000, 600, 300)


def test_older_builds_name_the_devices_before_the_model() -> None:
    head, *rest = LOAD.splitlines()
    older = "\n".join([*rest[:2], head, *rest[2:]])
    assert mebibytes(server_sizes_on(FIRST, (FIRST, SECOND), 7, logged(LOAD + older))) == (6000, 600, 300)


def test_a_sleeping_server_holds_nothing_that_it_had_loaded() -> None:
    asleep = replace(logged(LOAD), asleep=True)
    assert server_sizes_on(FIRST, (FIRST, SECOND), 7, asleep) == ServerSizes(0, 0, 0)


BY_FORMULA = ServerLoad(
    logged=LoggedMemory(),
    memory=ServerMemory(caches={(None, "full"): 100, (None, "window"): 20}, sources={"context": "process"}),
    settings=ContextSettings(gpu_layers="all"),
    model=ModelSeen(ModelHeader("llama", {"llama.block_count": 32}, gpu_weights_bytes=300)),
)


def told(**settings: object) -> ServerLoad:
    return replace(BY_FORMULA, settings=ContextSettings(**settings))  # type: ignore[arg-type]


def test_without_a_log_weights_and_kv_are_known_where_every_layer_is_on_the_processs_one_gpu() -> None:
    second = replace(SECOND, processes=(GpuProcess(8, "firefox", 60),))
    assert server_sizes_on(FIRST, (FIRST, second), 7, BY_FORMULA) == ServerSizes(300, 120)
    assert server_sizes_on(second, (FIRST, second), 7, BY_FORMULA) == ServerSizes()
    # On both cards, or on none that can be seen, nothing is certain.
    assert server_sizes_on(FIRST, (FIRST, SECOND), 7, BY_FORMULA) == ServerSizes()
    assert server_sizes_on(FIRST, (FIRST,), None, BY_FORMULA) == ServerSizes()
    assert server_sizes_on(replace(FIRST, processes=None), (FIRST,), 9, BY_FORMULA) == ServerSizes()


@pytest.mark.parametrize(
    ("load", "weights", "kv"),
    [
        (told(gpu_layers="33"), 300, 120),
        (told(gpu_layers="999"), 300, 120),
        (told(gpu_layers="32"), None, None),  # b11549: the output layer comes first, one layer stays behind
        (told(gpu_layers="auto"), None, None),
        (told(), None, None),
        (told(gpu_layers="all", kv_on_gpu=False), 300, None),
        (told(gpu_layers="all", kv_on_gpu=True), 300, 120),
        (told(gpu_layers="all", unreadable=("kv_on_gpu",)), 300, None),
        (told(gpu_layers="all", unreadable=("tensor_placement",)), None, 120),
        (told(gpu_layers="all", unreadable=("gpu_layers",)), None, None),
        (told(gpu_layers="all", draft_model="draft.gguf"), None, None),
        (told(gpu_layers="all", unreadable=("draft_model",)), None, 120),
        (replace(told(gpu_layers="999"), model=None), None, None),
        (replace(BY_FORMULA, model=None), None, 120),
        (replace(BY_FORMULA, model=ModelSeen(ModelHeader("llama", {}))), None, 120),
        (replace(BY_FORMULA, settings=None), None, None),
        (replace(BY_FORMULA, memory=None), None, None),
        (replace(BY_FORMULA, memory=ServerMemory(problem="left out")), None, None),
    ],
)
def test_without_a_log_nothing_is_guessed(load: ServerLoad, weights: int | None, kv: int | None) -> None:
    assert server_sizes_on(FIRST, (FIRST,), 7, load) == ServerSizes(weights, kv)


def test_a_unified_gpu_may_use_the_pages_of_the_models_file() -> None:
    unified = replace(FIRST, unified=True)
    assert server_sizes_on(unified, (unified,), 7, BY_FORMULA) == ServerSizes(kv=120)


def test_what_is_left_of_weights_and_kv_without_a_log_stays_unsplit() -> None:
    split = parts(FIRST, ServerClaim("main", 7, server_sizes_on(FIRST, (FIRST,), 7, BY_FORMULA)))
    assert (split["weights main"], split["kv main"], split["server_unsplit main"]) == (300, 120, 80)
    assert not {"compute main", "server_rest main"} & set(split)
