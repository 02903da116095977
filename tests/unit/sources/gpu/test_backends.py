"""What holds for every GPU backend that there is, and for each that is added."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pkgutil
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pynvml  # type: ignore[import-untyped]
import pytest
from tests.nvml import stand_in
from tests.nvml.scripts import driver, gpu

import kvscope.sources.gpu
from kvscope.observed.gpu import GpuProcess, GpuReading, GpuSeen
from kvscope.sources.gpu import open_backends
from kvscope.sources.gpu.backend import BackendMissingError, GpuBackend, GpuOptions

NAMES = sorted(
    module.name
    for module in pkgutil.iter_modules(kvscope.sources.gpu.__path__)
    if hasattr(import_module(f"kvscope.sources.gpu.{module.name}"), "open_backend")
)

KEYS = {
    "clocks_hertz": {"graphics", "memory"},
    "pcie_bytes_per_second": {"rx", "tx"},
    "throttled": {"power", "thermal", "other"},
    "errors": {"ecc_corrected", "ecc_uncorrected", "xid"},
}
RATIOS = {"utilization_ratio", "memory_bandwidth_utilization_ratio"}
MAY_BE_NEGATIVE = {"temperature_celsius"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine with GPUs of a kind. break_it: take them away."""

    options: GpuOptions
    break_it: Callable[[], object]


Machines = Callable[[], contextlib.AbstractContextManager[Machine]]


@pytest.fixture
def machines(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Machines]:
    """By backend, a machine that has its GPUs."""

    @contextlib.contextmanager
    def nvml() -> Iterator[Machine]:
        with stand_in.loaded(request.getfixturevalue("nvml_library")) as loaded:
            loaded.script({**driver(2), **gpu(0, "GPU-zero"), **gpu(1, "GPU-one", f"{os.getpid()}:1000000")})
            yield Machine(GpuOptions(pcie_throughput=True), lambda: loaded.script({}))

    @contextlib.contextmanager
    def amdgpu() -> Iterator[Machine]:
        tree = Path(__file__).parent / "trees" / "rx-9070-xt"
        root = shutil.copytree(tree, tmp_path / "root", symlinks=True)
        yield Machine(GpuOptions(root=root, pcie_throughput=True), lambda: shutil.rmtree(root))

    @contextlib.contextmanager
    def pretend() -> Iterator[Machine]:
        yield Machine(GpuOptions(script="game"), lambda: None)

    return {"nvml": nvml, "amdgpu": amdgpu, "pretend": pretend}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def machine(name: str, machines: dict[str, Machines]) -> Iterator[Machine]:
    assert name in machines, f"a machine for the contract of the backend {name} is wanted here"
    with machines[name]() as machine:
        yield machine


@pytest.fixture
def backend(name: str, machine: Machine) -> Iterator[GpuBackend]:
    backend: GpuBackend = import_module(f"kvscope.sources.gpu.{name}").open_backend(machine.options)
    yield backend
    backend.close()


def test_the_backends_that_are_promised_are_found() -> None:
    assert set(NAMES) >= {"nvml", "amdgpu", "pretend"}


def test_a_backend_bears_the_name_of_its_module(name: str, backend: GpuBackend) -> None:
    assert backend.name == name


def test_a_reading_keeps_the_contract(backend: GpuBackend) -> None:
    reading = backend.look()
    assert reading.gpus
    assert reading.problems == ()
    check(reading)


def test_labels_and_uuids_name_one_gpu_each_and_stay(backend: GpuBackend) -> None:
    first, second = backend.look(), backend.look()
    for fact in ("gpu", "uuid"):
        facts = [getattr(seen, fact) for seen in first.gpus]
        assert len(set(facts)) == len(facts)
        assert facts == [getattr(seen, fact) for seen in second.gpus]


def test_gpus_that_are_taken_away_raise_nothing(backend: GpuBackend, machine: Machine) -> None:
    backend.look()
    machine.break_it()
    check(backend.look())


def test_another_thread_may_look(backend: GpuBackend) -> None:
    readings: list[GpuReading] = []
    thread = threading.Thread(target=lambda: readings.append(backend.look()))
    thread.start()
    thread.join()
    assert readings[0].gpus


def test_closing_twice_raises_nothing(backend: GpuBackend) -> None:
    backend.close()
    backend.close()


def test_a_machine_without_is_told_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    stand_in.forget()
    monkeypatch.setattr(pynvml, "CDLL", no_library)
    options = GpuOptions(root=tmp_path, script="no-such-script")
    with pytest.raises(BackendMissingError) as missing:
        import_module(f"kvscope.sources.gpu.{name}").open_backend(options)
    assert re.fullmatch(r"\S.{10,200}", str(missing.value))
    assert str(tmp_path) not in str(missing.value)


class Opened:
    """A backend, or the module of one: what it raises it raises when it is opened."""

    def __init__(self, name: str, raises: Exception | None = None) -> None:
        self.name = name
        self.raises = raises

    def open_backend(self, _options: GpuOptions) -> Opened:
        if self.raises is not None:
            raise self.raises
        return self

    def look(self) -> GpuReading:
        return GpuReading()

    def close(self) -> None:
        pass


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Opened]:
    """The modules of backends by name, to be put others in their place."""
    there = {name: Opened(name) for name in NAMES}
    monkeypatch.setattr(kvscope.sources.gpu, "import_module", lambda name: there[name.rpartition(".")[2]])
    return there


def test_auto_opens_what_is_there_and_says_what_is_not(modules: dict[str, Opened]) -> None:
    nvml, amdgpu = modules["nvml"], modules["amdgpu"]
    assert open_backends("auto", GpuOptions()) == ([nvml, amdgpu], None)
    nvml.raises = BackendMissingError("no driver")
    assert open_backends("auto", GpuOptions()) == (
        [amdgpu],
        "GPUs are watched through amdgpu only: no driver",
    )
    amdgpu.raises = BackendMissingError("no card")
    assert open_backends("auto", GpuOptions()) == ([], "no GPU is watched: no driver; no card")


def test_a_backend_that_is_there_later_comes_behind_those_that_are_open(modules: dict[str, Opened]) -> None:
    nvml, open_already = modules["nvml"], Opened("amdgpu")
    assert open_backends("auto", GpuOptions(), [open_already]) == ([open_already, nvml], None)


def test_a_backend_that_fails_to_open_costs_no_other(modules: dict[str, Opened]) -> None:
    modules["nvml"].raises = ImportError("/home/somebody/secret")
    found, missing = open_backends("auto", GpuOptions())
    assert found == [modules["amdgpu"]]
    assert missing is not None
    assert "nvml fails by a fault of kvscope (ImportError at test_backends.py" in missing
    assert "secret" not in missing


def test_none_opens_nothing(modules: dict[str, Opened]) -> None:
    assert open_backends("none", GpuOptions()) == ((), None)


def check(reading: GpuReading) -> None:
    """Hold a reading to what observed/gpu.py and the metrics' document promise of it."""
    for problem in reading.problems:
        assert re.fullmatch(r"\S[^\n]*", problem)
    for seen in reading.gpus:
        check_gpu(seen)


def check_gpu(seen: GpuSeen) -> None:
    assert re.fullmatch(r"(pretend)?\d+(:\d+)?", seen.gpu)
    assert seen.pci_id is None or re.fullmatch(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", seen.pci_id)
    for field in dataclasses.fields(GpuSeen):
        value = getattr(seen, field.name)
        if field.name in KEYS:
            assert value.keys() <= KEYS[field.name], field.name
            for figure in value.values():
                check_number(field.name, figure)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            check_number(field.name, value)
        elif isinstance(value, str):
            assert value == value.strip() != "", field.name
        if field.name.endswith("_bytes"):
            assert value is None or type(value) is int, field.name
    check_memory(seen)
    for process in seen.processes or ():
        check_process(process)
    assert seen.processes is not None or not seen.processes_complete


def check_memory(seen: GpuSeen) -> None:
    parts = (seen.memory_used_bytes, seen.memory_free_bytes, seen.memory_reserved_bytes)
    if seen.memory_total_bytes is not None:
        assert sum(part or 0 for part in parts) <= seen.memory_total_bytes
    if seen.gtt_total_bytes is not None and seen.gtt_used_bytes is not None:
        assert seen.gtt_used_bytes <= seen.gtt_total_bytes


def check_process(process: GpuProcess) -> None:
    assert process.pid is None or process.pid > 0
    assert process.name is None or re.fullmatch(r"[^/\n]+", process.name)
    for figure in (process.memory_bytes, process.gtt_bytes):
        assert figure is None or (type(figure) is int and figure >= 0)


def check_number(field: str, figure: float) -> None:
    assert math.isfinite(figure), field
    assert figure >= 0 or field in MAY_BE_NEGATIVE, field
    assert field not in RATIOS or figure <= 1, field
