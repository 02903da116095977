"""The machine's poller: drivers that hang or are missing, servers joined with GPUs, readings that age out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from kvscope.machine_poller import OPEN_AGAIN_EVERY_SECONDS, MachinePoller
from kvscope.observed.gpu import GpuProcess, GpuReading, GpuSeen
from kvscope.observed.host import HostSeen, ProcessMemory
from kvscope.settings import Settings
from kvscope.snapshot import MachineBox
from kvscope.sources.gpu.backend import GpuBackend, GpuOptions
from kvscope.tracking.machine import ServerOnMachine
from kvscope.tracking.vram import ServerLoad

GIB = 2**30
HOST = HostSeen(64 * GIB, 32 * GIB, 0, {"some": 1.0, "full": 0.5})
SERVER = ServerOnMachine("main", 7, ServerLoad())
CARD = GpuSeen(
    "0",
    memory_total_bytes=8 * GIB,
    memory_used_bytes=6 * GIB,
    memory_free_bytes=2 * GIB,
    processes=(GpuProcess(7, "llama-server", 5 * GIB),),
)


class Backend:
    """Gives what a test wants; while `hangs` is set it answers only when let go."""

    name = "test"

    def __init__(self, *gpus: GpuSeen) -> None:
        self.reading = GpuReading(gpus)
        self.closed = 0
        self.looks = 0
        self.hangs: threading.Event | None = None

    def look(self) -> GpuReading:
        self.looks += 1
        if self.hangs is not None:
            self.hangs.wait(60)
        return self.reading

    def close(self) -> None:
        self.closed += 1


class Watched:
    """A machine that is watched on a clock that tests move."""

    def __init__(
        self,
        *backends: Backend,
        missing: str | None = None,
        gpu: str = "auto",
        servers: Sequence[ServerOnMachine] = (SERVER,),
        memory: Mapping[int, ProcessMemory] | None = None,
        patient: float = 60.0,
    ) -> None:
        self.seconds = 1000.0
        self.backends = backends
        self.missing = missing
        self.opened: list[tuple[str, GpuOptions]] = []
        self.boxes: list[MachineBox] = []
        self.poller = MachinePoller(
            Settings(gpu=gpu, gpu_interval_seconds=patient),
            self.boxes.append,
            lambda: servers,
            open_gpus=self._open,
            host=lambda: HOST,
            process_memory=lambda pid: (memory or {}).get(pid, ProcessMemory()),
            clock=lambda: 1.8e9 + self.seconds,
            monotonic=lambda: self.seconds,
        )

    def _open(self, setting: str, options: GpuOptions) -> tuple[Sequence[GpuBackend], str | None]:
        self.opened.append((setting, options))
        return self.backends, self.missing

    async def look(self) -> MachineBox:
        box = await self.poller.look_once()
        self.seconds += 2.0
        return box


@pytest.fixture
def let_go() -> Iterator[Callable[[Backend], threading.Event]]:
    waiting: list[threading.Event] = []

    def hang(backend: Backend) -> threading.Event:
        backend.hangs = threading.Event()
        waiting.append(backend.hangs)
        return backend.hangs

    yield hang
    for each in waiting:
        each.set()


async def test_gpus_host_and_the_servers_process_are_published_together() -> None:
    box = await Watched(Backend(CARD), memory={7: ProcessMemory(3 * GIB, GIB, 0)}).look()
    (gpu,) = box.gpus
    assert gpu.seen == CARD
    assert gpu.server_bytes == {"main": 5 * GIB}
    assert gpu.budget is not None
    assert sum(gpu.budget.values()) == 8 * GIB
    assert box.host == HOST
    assert box.pressure_seconds == {"some": 1.0, "full": 0.5}
    assert box.server_memory == {"main": ProcessMemory(3 * GIB, GIB, 0)}
    assert (box.sources["gpu"].up, box.sources["host"].up) == (True, True)


async def test_a_server_whose_process_is_out_of_sight_has_no_memory_figures() -> None:
    box = await Watched(Backend(CARD), servers=(ServerOnMachine("far", None, ServerLoad()),)).look()
    assert box.server_memory == {}
    assert box.gpus[0].server_bytes == {}


async def test_two_backends_are_read_side_by_side_and_no_label_stands_for_two_cards() -> None:
    other = GpuSeen("0", memory_total_bytes=GIB, memory_used_bytes=0)
    box = await Watched(Backend(CARD), Backend(other)).look()
    assert [gpu.gpu for gpu in box.gpus] == ["0", "test0"]


async def test_a_machine_without_a_gpu_has_no_gpu_source_and_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    watched = Watched(missing="no GPU is watched: nothing is there")
    for _ in range(3):
        box = await watched.look()
    assert box.gpus == ()
    assert "gpu" not in box.sources
    assert box.host == HOST
    assert [record.getMessage() for record in caplog.records] == ["no GPU is watched: nothing is there"]


async def test_a_backend_that_was_asked_for_and_is_missing_is_a_source_that_is_down() -> None:
    box = await Watched(missing="no driver", gpu="nvml").look()
    assert box.sources["gpu"].up is False


async def test_a_driver_that_is_loaded_later_is_found() -> None:
    watched = Watched(missing="no driver")
    await watched.look()
    await watched.look()
    assert len(watched.opened) == 1
    watched.backends, watched.missing = (Backend(CARD),), None
    watched.seconds += OPEN_AGAIN_EVERY_SECONDS
    assert [gpu.gpu for gpu in (await watched.look()).gpus] == ["0"]


async def test_none_means_that_no_driver_is_touched() -> None:
    watched = Watched(Backend(CARD), gpu="none")
    box = await watched.look()
    assert watched.opened == []
    assert box.gpus == ()
    assert box.host == HOST


async def test_a_driver_that_hangs_delays_nothing_else_and_its_figures_age_out(
    let_go: Callable[[Backend], threading.Event],
) -> None:
    backend = Backend(CARD)
    watched = Watched(backend, patient=0.05)
    assert (await watched.look()).gpus[0].seen == CARD
    go = let_go(backend)
    for _ in range(6):
        box = await watched.look()
    assert box.gpus == () or box.gpus[0].seen is None
    assert box.sources["gpu"].up is False
    assert box.host == HOST
    assert backend.looks == 2, "one look hangs, no second is piled on it"
    go.set()
    backend.hangs = None
    while not (await watched.look()).sources["gpu"].up:
        pass
    assert watched.boxes[-1].gpus[0].seen == CARD


async def test_a_problem_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend()
    backend.reading = GpuReading((), ("GPU 0 is lost",))
    watched = Watched(backend)
    for _ in range(3):
        box = await watched.look()
    assert box.sources["gpu"].failures == 3
    assert [record.getMessage() for record in caplog.records] == ["GPU 0 is lost"]


async def test_load_lines_of_the_pretend_backend_part_a_servers_memory() -> None:
    lines = (
        "load_tensors:        CUDA0 model buffer size =  2048.00 MiB",
        "llama_kv_cache:      CUDA0 KV buffer size =  1024.00 MiB",
        "llama_kv_cache: size = 1024.00 MiB (  4096 cells,  32 layers,  1/1 seqs), K (f16):  512.00 MiB, "
        "V (f16):  512.00 MiB",
        "sched_reserve:      CUDA0 compute buffer size =   512.00 MiB",
    )
    backend = Backend()
    backend.reading = GpuReading(
        (GpuSeen("pretend0", vendor="nvidia", memory_total_bytes=8 * GIB, memory_used_bytes=6 * GIB,
                 memory_free_bytes=2 * GIB, processes=CARD.processes),),
        load_lines={"main": lines},
    )  # fmt: skip
    (gpu,) = (await Watched(backend).look()).gpus
    assert gpu.budget is not None
    assert gpu.budget["kv", "main"] == GIB
    assert gpu.budget["compute", "main"] == GIB // 2
