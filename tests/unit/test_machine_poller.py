"""The machine's poller: drivers that hang or are missing, servers joined with GPUs, readings that age out."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from kvscope.machine_poller import CALM_SECONDS, OPEN_AGAIN_EVERY_SECONDS, MachinePoller
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
        self.hangs_at_end: threading.Event | None = None
        self.raises: Exception | None = None

    def look(self) -> GpuReading:
        self.looks += 1
        if self.hangs is not None:
            self.hangs.wait(60)
        if self.raises is not None:
            raise self.raises
        return self.reading

    def close(self) -> None:
        self.closed += 1
        if self.hangs_at_end is not None:
            self.hangs_at_end.wait(60)


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
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        self.seconds = 1000.0
        self.backends = backends
        self.missing = missing
        self.opened: list[tuple[str, GpuOptions]] = []
        self.boxes: list[MachineBox] = []
        self.published = asyncio.Event()
        self.poller = MachinePoller(
            Settings(gpu=gpu, gpu_interval_seconds=patient),
            self._publish,
            lambda: servers,
            open_gpus=self._open,
            host=lambda: HOST,
            process_memory=lambda pid: (memory or {}).get(pid, ProcessMemory()),
            clock=lambda: 1.8e9 + self.seconds,
            monotonic=monotonic or (lambda: self.seconds),
        )

    def _open(
        self, setting: str, options: GpuOptions, opened: Sequence[GpuBackend]
    ) -> tuple[Sequence[GpuBackend], str | None]:
        self.opened.append((setting, options))
        return self.backends, self.missing

    def _publish(self, box: MachineBox) -> None:
        self.boxes.append(box)
        self.published.set()

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


async def test_backends_are_told_which_process_is_whose_and_who_sleeps() -> None:
    awake, asleep = SERVER, ServerOnMachine("far", None, ServerLoad(asleep=True))
    watched = Watched(Backend(CARD), servers=(awake, asleep))
    await watched.look()
    ((_, options),) = watched.opened
    assert options.server_pids() == {"main": 7}
    assert set(options.asleep()) == {"far"}


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


async def test_a_driver_that_is_loaded_after_another_one_is_found_and_changes_no_label() -> None:
    other = Backend(GpuSeen("0", memory_total_bytes=GIB, memory_used_bytes=0))
    watched = Watched(Backend(CARD), missing="only one driver")
    assert [gpu.gpu for gpu in (await watched.look()).gpus] == ["0"]
    watched.backends, watched.missing = (*watched.backends, other), None
    watched.seconds += OPEN_AGAIN_EVERY_SECONDS
    assert [gpu.gpu for gpu in (await watched.look()).gpus] == ["0", "test0"]
    watched.seconds += OPEN_AGAIN_EVERY_SECONDS
    await watched.look()
    assert len(watched.opened) == 2, "nothing is missing any more"


async def test_one_of_two_drivers_missing_is_told_and_no_failure_of_a_source(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    box = await Watched(Backend(CARD), missing="only one driver").look()
    assert box.sources["gpu"].up is True
    assert [record.getMessage() for record in caplog.records] == ["only one driver"]


async def test_a_late_look_for_gpus_that_finds_none_leaves_no_source_behind() -> None:
    go = threading.Event()
    watched = Watched(missing="no GPU is watched: nothing is there", patient=0.05)
    opened = watched.poller._open_gpus
    watched.poller._open_gpus = lambda *given: opened(*given) if go.wait(60) else ((), None)
    assert (await watched.look()).sources["gpu"].up is False
    go.set()
    while "gpu" in (await watched.look()).sources:
        pass


async def test_a_backend_that_raises_costs_its_own_gpus_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, whole = Backend(CARD), Backend(GpuSeen("0", memory_total_bytes=GIB, memory_used_bytes=0))
    watched = Watched(broken, whole)
    broken.raises = AttributeError("/home/somebody/secret")
    box = await watched.look()
    assert [gpu.gpu for gpu in box.gpus] == ["test0"]
    assert (box.sources["gpu"].up, box.host) == (False, HOST)
    (record,) = caplog.records
    assert "fault of kvscope (AttributeError at test_machine_poller.py" in record.getMessage()
    assert "secret" not in record.getMessage()
    broken.raises = None
    assert [gpu.gpu for gpu in (await watched.look()).gpus] == ["0", "test0"]


async def test_a_lost_card_is_no_failure_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend(CARD)
    backend.reading = GpuReading((CARD,), ("GPU 1 is lost",))
    box = await Watched(backend).look()
    assert (box.sources["gpu"].up, box.sources["gpu"].failures) == (True, 0)
    assert [record.getMessage() for record in caplog.records] == ["GPU 1 is lost"]


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


async def test_figures_that_age_out_are_taken_back_without_another_look(
    let_go: Callable[[Backend], threading.Event],
) -> None:
    backend = Backend(CARD)
    watched = Watched(backend, patient=0.05)
    await watched.look()
    let_go(backend)
    watched.seconds = 1009.99
    assert (await watched.look()).gpus[0].seen == CARD
    watched.published.clear()
    watched.seconds = 1010.01
    await asyncio.wait_for(watched.published.wait(), 5)
    assert watched.boxes[-1].gpus == ()


async def test_a_problem_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend()
    backend.reading = GpuReading((), ("GPU 0 is lost",))
    watched = Watched(backend)
    for _ in range(3):
        box = await watched.look()
    assert box.sources["gpu"].failures == 3
    assert [record.getMessage() for record in caplog.records] == ["GPU 0 is lost"]


async def test_a_problem_that_was_away_for_long_is_news(caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend(CARD)
    watched = Watched(backend)
    for lost in (True, False, True):
        backend.reading = GpuReading((), ("GPU 0 is lost",) if lost else ())
        await watched.look()
    assert len(caplog.records) == 1, "what comes and goes is not told each time"
    watched.seconds += CALM_SECONDS
    await watched.look()
    assert len(caplog.records) == 2


async def test_a_source_is_not_slow_because_the_other_one_is(
    let_go: Callable[[Backend], threading.Event],
) -> None:
    backend = Backend(CARD)
    let_go(backend)
    watched = Watched(backend, patient=0.3, monotonic=time.monotonic)
    duration = (await watched.look()).sources["host"].duration_seconds
    assert duration is not None
    assert duration < 0.2


async def test_a_run_that_ends_closes_its_drivers_and_the_next_one_opens_them_anew() -> None:
    backend = Backend(CARD)
    watched = Watched(backend)
    for _ in range(2):
        run = asyncio.create_task(watched.poller.run())
        await watched.published.wait()
        watched.published.clear()
        run.cancel()
        await asyncio.wait([run])
    assert (len(watched.opened), backend.closed) == (2, 2)


async def test_a_driver_that_hangs_when_it_is_let_go_does_not_hold_up_the_end() -> None:
    backend = Backend(CARD)
    backend.hangs_at_end = threading.Event()
    watched = Watched(backend)
    run = asyncio.create_task(watched.poller.run())
    await watched.published.wait()
    began = time.monotonic()
    run.cancel()
    await asyncio.wait([run])
    assert time.monotonic() - began < 1
    assert backend.closed == 1
    backend.hangs_at_end.set()


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
