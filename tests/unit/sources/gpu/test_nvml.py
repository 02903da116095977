"""The NVML backend on a stand-in for the driver: what it reads, and what each error costs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pynvml  # type: ignore[import-untyped]
import pytest
from tests.nvml import stand_in
from tests.nvml.scripts import GIB, MIB, driver, gpu
from tests.nvml.stand_in import Lines, StandIn

from kvscope.observed.gpu import GpuProcess, GpuReading, GpuSeen
from kvscope.sources.gpu.backend import BackendMissingError, GpuOptions
from kvscope.sources.gpu.nvml import NvmlBackend, open_backend, pci_id

OURS = os.getpid()
OUR_NAME = psutil.Process().name()
NOBODY = 2**22 - 1
"""No process has this number: one below the most that Linux gives, and nobody counts that far."""

ERRORS = {
    name: value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_") and value < 1000
} | {"NVML_ERROR_OF_A_NEWER_DRIVER": 77}
GONE = {
    "UNINITIALIZED",
    "DRIVER_NOT_LOADED",
    "LIB_RM_VERSION_MISMATCH",
    "GPU_IS_LOST",
    "RESET_REQUIRED",
    "GPU_NOT_FOUND",
}
"""With these errors the whole GPU is away."""
SILENT = {
    "NOT_SUPPORTED",
    "FUNCTION_NOT_FOUND",
    "ARGUMENT_VERSION_MISMATCH",
    "DEPRECATED",
    "NO_DATA",
    "VGPU_ECC_NOT_SUPPORTED",
}
"""With these the GPU has no such figure: nothing to report."""

FULL = GpuSeen(
    gpu="1",
    uuid="GPU-one",
    name="NVIDIA GeForce RTX 3090",
    vendor="NVIDIA",
    driver="580.65.06",
    pci_id="0000:a1:00.0",
    memory_total_bytes=25_769_803_776,
    memory_used_bytes=6_127_878_144,
    memory_free_bytes=19_327_352_832,
    memory_reserved_bytes=314_572_800,
    processes=(GpuProcess(OURS, OUR_NAME, 6_127_878_144),),
    processes_complete=True,
    utilization_ratio=0.87,
    memory_bandwidth_utilization_ratio=0.42,
    power_watts=285.4,
    power_limit_watts=350.0,
    energy_joules=123_456.789,
    temperature_celsius=71,
    clocks_hertz={"graphics": 1_695_000_000, "memory": 9_751_000_000},
    pcie_bytes_per_second={"rx": 250_000.0, "tx": 1_500_000.0},
    throttled={"power": True, "thermal": False, "other": False},
    errors={"ecc_corrected": 30, "ecc_uncorrected": 4, "xid": 0},
)
"""What scripts.gpu(1) tells, in the units of the metrics."""

NO_MEMORY: dict[str, Any] = {
    "memory_total_bytes": None,
    "memory_used_bytes": None,
    "memory_free_bytes": None,
    "memory_reserved_bytes": None,
    "processes_complete": False,
}
COSTS: dict[str, dict[str, Any]] = {
    "nvmlDeviceGetUUID": {"uuid": None},
    "nvmlDeviceGetName": {"name": None},
    "nvmlDeviceGetPciInfo_v3": {"pci_id": None},
    "nvmlDeviceGetMemoryInfo_v2": NO_MEMORY,
    "nvmlDeviceGetComputeRunningProcesses_v3": {"processes": None, "processes_complete": False},
    "nvmlDeviceGetGraphicsRunningProcesses_v3": {},
    "nvmlDeviceGetUtilizationRates": {"utilization_ratio": None, "memory_bandwidth_utilization_ratio": None},
    "nvmlDeviceGetPowerUsage": {"power_watts": None},
    "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_watts": None},
    "nvmlDeviceGetTotalEnergyConsumption": {"energy_joules": None},
    "nvmlDeviceGetTemperature": {"temperature_celsius": None},
    "nvmlDeviceGetClockInfo": {"clocks_hertz": {}},
    "nvmlDeviceGetCurrentClocksEventReasons": {"throttled": {}},
    "nvmlDeviceGetTotalEccErrors": {"errors": {"xid": 0}},
    "nvmlEventSetWait_v2": {"errors": {"ecc_corrected": 30, "ecc_uncorrected": 4}},
    "nvmlDeviceGetPcieThroughput": {"pcie_bytes_per_second": {}},
    "nvmlDeviceGetMigMode": {},
}
"""What is absent when a function fails."""

OTHER_WAY = {
    "NOT_SUPPORTED",
    "FUNCTION_NOT_FOUND",
    "ARGUMENT_VERSION_MISMATCH",
    "INVALID_ARGUMENT",
    "DEPRECATED",
}
"""With these errors the older function is asked, where there is one."""
INSTEAD: dict[str, dict[str, Any]] = {
    # The old function counts what is reserved as used.
    "nvmlDeviceGetMemoryInfo_v2": {
        "memory_used_bytes": 6_442_450_944,
        "memory_reserved_bytes": None,
        "processes_complete": False,
    },
    "nvmlDeviceGetComputeRunningProcesses_v3": {},
    "nvmlDeviceGetGraphicsRunningProcesses_v3": {},
    "nvmlDeviceGetCurrentClocksEventReasons": {},
}
if hasattr(pynvml, "nvmlDeviceGetTemperatureV"):  # not in the oldest nvidia-ml-py that will do
    INSTEAD["nvmlDeviceGetTemperature"] = {}

PCIE = GpuOptions(pcie_throughput=True)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def two(extra: Lines | None = None) -> Lines:
    """Return the script of a machine with two GPUs, the second with a process, with other lines besides."""
    return {
        **driver(2),
        **gpu(0, "GPU-zero"),
        **gpu(1, "GPU-one", f"{OURS}:{FULL.memory_used_bytes}"),
        **(extra or {}),
    }


@pytest.fixture
def backend(nvml: StandIn) -> Iterator[NvmlBackend]:
    nvml.script(two())
    backend = open_backend(PCIE)
    yield backend
    backend.close()


def second(reading: GpuReading) -> GpuSeen | None:
    return next((seen for seen in reading.gpus if seen.gpu == "1"), None)


def test_every_error_of_nvml_h_is_among_those_tried() -> None:
    """Its newest (29 and 30) are not yet in the oldest nvidia-ml-py that will do."""
    assert set(ERRORS.values()) >= {*range(1, 29), 999}


def test_everything_that_a_driver_tells_is_read(backend: NvmlBackend) -> None:
    reading = backend.look()
    assert reading.gpus[1] == FULL
    assert [seen.uuid for seen in reading.gpus] == ["GPU-zero", "GPU-one"]
    assert reading.problems == ()


@pytest.mark.parametrize("function", COSTS)
def test_an_error_costs_what_the_function_tells_and_no_more(nvml: StandIn, function: str) -> None:
    for name, code in ERRORS.items():
        error = name.removeprefix("NVML_ERROR_")
        nvml.script(two())
        backend = open_backend(PCIE)
        untouched = backend.look().gpus[0]
        nvml.script(two({(function, 1): f"error {code}"}))
        backend.close()
        backend = open_backend(PCIE)
        reading = backend.look()
        backend.close()
        assert reading.gpus[0] == untouched, error
        problems = "\n".join(reading.problems)
        if error in GONE:
            assert [seen.gpu for seen in reading.gpus] == ["0"], error
            assert len(reading.problems) == 1, error
            continue
        if function == "nvmlEventSetWait_v2" and error == "TIMEOUT":
            cost: dict[str, Any] = {}
            silent = True
        elif error in OTHER_WAY and function in INSTEAD:
            cost, silent = INSTEAD[function], True
        else:
            cost, silent = COSTS[function], error in SILENT
        assert second(reading) == dataclasses.replace(FULL, **cost), error
        assert (problems == "") == silent, (error, problems)
        if not silent:
            assert problems.startswith("GPU 1: nvml"), error
            assert "\n" not in problems or function in ("nvmlDeviceGetClockInfo",), problems


# --- the driver and the GPUs coming and going -------------------------------------------------------


@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2"])
def test_a_driver_that_does_not_start_is_named_in_one_line(nvml: StandIn, function: str) -> None:
    for code in ERRORS.values():
        nvml.script(two({(function, "-"): f"error {code}"}))
        with pytest.raises(BackendMissingError, match=r"^[^\n]*NVIDIA[^\n]*$"):
            open_backend(PCIE)
        assert nvml.started == 0


def test_a_missing_library_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    stand_in.forget()
    monkeypatch.setattr(pynvml, "CDLL", missing)
    with pytest.raises(BackendMissingError, match="install the driver, or give the container its GPUs"):
        open_backend(PCIE)


@pytest.mark.parametrize(
    "lines",
    [
        driver(0),
        {**driver(1), ("nvmlDeviceGetHandleByIndex_v2", 0): "error 4"},
        {**driver(1), ("nvmlDeviceGetHandleByIndex_v2", 0): "error 17"},
    ],
    ids=["none", "no permission", "blocked by the operating system"],
)
def test_a_driver_without_a_gpu_for_us_is_no_backend(nvml: StandIn, lines: Lines) -> None:
    nvml.script(lines)
    with pytest.raises(BackendMissingError, match="no GPU that kvscope may open"):
        open_backend(PCIE)
    assert nvml.started == 0


def test_an_error_while_a_gpu_is_opened_leaves_the_other_as_it_is(nvml: StandIn) -> None:
    for name, code in ERRORS.items():
        nvml.script(two({("nvmlDeviceGetHandleByIndex_v2", 1): f"error {code}"}))
        backend = open_backend(PCIE)
        reading = backend.look()
        backend.close()
        assert [seen.uuid for seen in reading.gpus] == ["GPU-zero"], name
        others = name in ("NVML_ERROR_NO_PERMISSION", "NVML_ERROR_OPERATING_SYSTEM")
        assert len(reading.problems) == (0 if others else 1), name


@pytest.mark.parametrize(
    ("function", "device"), [("nvmlEventSetCreate", "-"), ("nvmlDeviceRegisterEvents", 1)]
)
def test_without_events_only_the_xid_errors_are_unknown(nvml: StandIn, function: str, device: object) -> None:
    for name, code in ERRORS.items():
        nvml.script(two({(function, device): f"error {code}"}))
        backend = open_backend(PCIE)
        reading = backend.look()
        backend.close()
        expected = dataclasses.replace(FULL, errors={"ecc_corrected": 30, "ecc_uncorrected": 4})
        assert second(reading) == expected, name
        assert nvml.open_sets == 0, name


def test_without_the_drivers_version_the_rest_stays(nvml: StandIn) -> None:
    for name, code in ERRORS.items():
        if name.removeprefix("NVML_ERROR_") in GONE:
            continue
        nvml.script(two({("nvmlSystemGetDriverVersion", "-"): f"error {code}"}))
        backend = open_backend(PCIE)
        reading = backend.look()
        backend.close()
        assert second(reading) == dataclasses.replace(FULL, driver=None), name
        assert len(reading.problems) <= 1, name


@pytest.mark.parametrize("function", ["nvmlShutdown", "nvmlEventSetFree"])
def test_letting_go_of_a_driver_that_fails_raises_nothing(nvml: StandIn, function: str) -> None:
    for code in ERRORS.values():
        nvml.script(two({(function, "-"): f"error {code}"}))
        open_backend(PCIE).close()


def test_closing_gives_everything_back(nvml: StandIn) -> None:
    nvml.script(two())
    backend = open_backend(PCIE)
    assert (nvml.started, nvml.open_sets) == (1, 2)
    backend.close()
    assert (nvml.started, nvml.open_sets) == (0, 0)
    backend.close()


def test_a_gpu_lost_at_any_call_of_a_look_is_absent_and_the_other_is_not(nvml: StandIn) -> None:
    clock = Clock()
    nvml.script(two())
    backend = NvmlBackend(PCIE, clock)
    whole = backend.look()
    for calls in range(1000):
        nvml.script(two({("lost", 1): calls}))
        reading = backend.look()
        if len(reading.gpus) == 2:
            break
        assert reading.gpus == whole.gpus[:1]
        assert len(reading.problems) == 1
        assert reading.problems[0].startswith("GPU 1: GPU is lost")
        nvml.script(two())
        clock.now += 1000
        assert backend.look() == whole
    assert calls > 15
    backend.close()
    assert (nvml.started, nvml.open_sets) == (0, 0)


def test_a_lost_gpu_is_looked_for_less_and_less_often(nvml: StandIn) -> None:
    clock = Clock()
    nvml.script(two({("lost", 1): 0}))
    backend = NvmlBackend(PCIE, clock)
    began, starts, seen_at = clock.now, nvml.starts, []
    while clock.now < began + 1200:
        reading = backend.look()
        assert [seen.gpu for seen in reading.gpus] == ["0"]
        if nvml.starts != starts:
            starts = nvml.starts
            seen_at.append(clock.now - began)
        clock.now += 1
    # 5 seconds, doubled each time, 300 at most
    assert seen_at == [5, 15, 35, 75, 155, 315, 615, 915]
    backend.close()


def test_a_gpu_that_answers_again_by_itself_ends_the_search(nvml: StandIn) -> None:
    clock = Clock()
    nvml.script(two())
    backend = NvmlBackend(PCIE, clock)
    nvml.script(two({("lost", 1): 0}))
    assert len(backend.look().gpus) == 1
    nvml.script(two())
    assert len(backend.look().gpus) == 2
    starts = nvml.starts
    clock.now += 1000
    assert len(backend.look().gpus) == 2
    assert nvml.starts == starts
    backend.close()


def test_an_unloaded_driver_is_one_line_and_comes_back_by_itself(nvml: StandIn) -> None:
    clock = Clock()
    nvml.script(two())
    backend = NvmlBackend(PCIE, clock)
    whole = backend.look()
    nvml.script({key: value if key[1] == "-" else "error 1" for key, value in two().items()})
    assert backend.look() == GpuReading(
        (),
        (
            "the NVIDIA driver: Uninitialized; its figures are left out until it answers again, "
            "see nvidia-smi",
        ),
    )
    nvml.script({("nvmlInitWithFlags", "-"): "error 9"})
    clock.now += 5
    assert backend.look() == GpuReading((), ("the NVIDIA driver is not loaded: load it (modprobe nvidia)",))
    assert backend.look().gpus == ()
    nvml.script(two())
    clock.now += 10
    assert backend.look() == whole
    backend.close()


def test_a_gpu_back_in_another_place_keeps_its_uuid_and_its_counters(nvml: StandIn) -> None:
    clock = Clock()
    nvml.script(two({("nvmlEventSetWait_v2", 1): "79 31"}))
    backend = NvmlBackend(PCIE, clock)
    assert backend.look().gpus[1].errors["xid"] == 2
    nvml.script({**two(), ("lost", 0): 0})
    assert [seen.uuid for seen in backend.look().gpus] == ["GPU-one"]
    # Only one is left, and it is the first now; since the driver was loaded it used no energy yet.
    nvml.script(
        {
            **driver(1),
            **gpu(0, "GPU-one"),
            ("nvmlDeviceGetTotalEnergyConsumption", 0): 1000,
            ("nvmlEventSetWait_v2", 0): 13,
        }
    )
    clock.now += 5
    (seen,) = backend.look().gpus
    assert (seen.gpu, seen.uuid) == ("0", "GPU-one")
    assert seen.errors["xid"] == 3
    assert seen.energy_joules == pytest.approx(123_457.789)
    backend.close()


UPDATED_WHILE_IN_USE = """
import pathlib, sys
import pynvml
from kvscope.sources.gpu.backend import GpuOptions
from kvscope.sources.gpu.nvml import NvmlBackend

script, library, other = map(pathlib.Path, sys.argv[1:])
now = 0.0
backend = NvmlBackend(GpuOptions(), lambda: now)
print(*(seen.driver for seen in backend.look().gpus))
pynvml.nvmlLib.stand_in_script(b"lost 0 0")
script.write_text(script.read_text().replace("580.65.06", "590.1"))
other.replace(library)
for look in range(3):
    reading = backend.look()
    print(*(seen.driver for seen in reading.gpus), *reading.problems)
    now += 1000
"""


def test_a_driver_updated_underneath_is_loaded_anew(nvml_library: Path, tmp_path: Path) -> None:
    """Until it is let go the library of the version before stays in the process."""
    library = tmp_path / nvml_library.name
    other = tmp_path / "updated"
    for path in (library, other):
        path.write_bytes(nvml_library.read_bytes())
    script = tmp_path / "script"
    script.write_text(stand_in.text({**driver(1), **gpu(0)}))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "KVSCOPE_STAND_IN": str(script)}
    answer = subprocess.run(
        [sys.executable, "-c", UPDATED_WHILE_IN_USE, script, library, other],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert answer.stderr == ""
    before, lost, mismatch, after = answer.stdout.splitlines()
    assert before == "580.65.06"
    assert "GPU is lost" in lost
    assert "different versions" in mismatch
    assert after == "590.1"


# --- memory and who holds it ------------------------------------------------------------------------


def looked(nvml: StandIn, lines: Lines, options: GpuOptions = PCIE) -> GpuReading:
    """Return one look at a machine with one GPU that says this besides."""
    nvml.script({**driver(1), **gpu(0), **lines})
    backend = open_backend(options)
    reading = backend.look()
    backend.close()
    return reading


def holders(nvml: StandIn, compute: object, graphics: object = "") -> GpuSeen:
    """Return a GPU of which 5844 MiB are in use, and who says to hold them."""
    (seen,) = looked(
        nvml,
        {
            ("nvmlDeviceGetComputeRunningProcesses_v3", 0): compute,
            ("nvmlDeviceGetGraphicsRunningProcesses_v3", 0): graphics,
        },
    ).gpus
    return seen


def test_programs_are_named_without_path_and_arguments(nvml: StandIn) -> None:
    with subprocess.Popen(["/bin/sleep", "1000"]) as sleeping:
        try:
            seen = holders(nvml, f"{sleeping.pid}:{GIB}", f"{OURS}:{MIB}")
        finally:
            sleeping.kill()
    expected = {GpuProcess(sleeping.pid, "sleep", GIB), GpuProcess(OURS, OUR_NAME, MIB)}
    assert set(seen.processes or ()) == expected


def test_a_program_that_computes_and_draws_counts_once(nvml: StandIn) -> None:
    seen = holders(nvml, f"{OURS}:{5 * GIB}", f"{OURS}:{5 * GIB}")
    assert seen.processes == (GpuProcess(OURS, OUR_NAME, 5 * GIB),)


def test_a_process_of_another_namespace_has_neither_number_nor_name(nvml: StandIn) -> None:
    seen = holders(nvml, f"{NOBODY}:{5844 * MIB}")
    assert seen.processes == (GpuProcess(None, None, 5844 * MIB),)
    assert seen.processes_complete


@pytest.mark.parametrize(
    ("compute", "graphics", "complete"),
    [
        (f"{OURS}:{5844 * MIB}", "", True),
        (f"{OURS}:{5000 * MIB}", f"{NOBODY}:{844 * MIB}", True),
        # Some MiB are the driver's own, and some may be counted twice.
        (f"{OURS}:{5800 * MIB}", "", True),
        (f"{OURS}:{5900 * MIB}", "", True),
        # Seen from a container: who else holds memory is not listed.
        (f"{OURS}:{5700 * MIB}", "", False),
        ("", "", False),
        # WSL2 and Windows do not say how much.
        (f"{OURS}:none", "", False),
        (f"{OURS}:{5844 * MIB}", f"{NOBODY}:none", False),
    ],
)
def test_all_are_seen_only_where_they_explain_what_is_in_use(
    nvml: StandIn, compute: str, graphics: str, complete: bool
) -> None:
    assert holders(nvml, compute, graphics).processes_complete == complete


def test_a_size_that_is_not_told_is_unknown(nvml: StandIn) -> None:
    assert holders(nvml, f"{OURS}:none").processes == (GpuProcess(OURS, OUR_NAME, None),)


def test_nobody_on_an_idle_gpu_is_known(nvml: StandIn) -> None:
    (seen,) = looked(
        nvml, {("nvmlDeviceGetMemoryInfo_v2", 0): f"{24 * GIB} {GIB} {23 * GIB - 2 * MIB} {2 * MIB}"}
    ).gpus
    assert (seen.processes, seen.processes_complete) == ((), True)


def test_a_missing_permission_for_processes_is_named(nvml: StandIn) -> None:
    reading = looked(nvml, {("nvmlDeviceGetComputeRunningProcesses_v3", 0): "error 4"})
    assert reading.gpus[0].processes is None
    assert reading.problems == (
        "GPU 0: nvmlDeviceGetComputeRunningProcesses_v3 fails: Insufficient Permissions",
    )


def test_a_program_is_named_again_when_its_number_is_another_programs(
    nvml: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding = {("nvmlDeviceGetComputeRunningProcesses_v3", 0): f"{OURS}:{GIB}"}
    nvml.script({**driver(1), **gpu(0), **holding})
    backend = open_backend(PCIE)
    names = []
    for name, lines in (("first", holding), ("second", holding), ("second", {}), ("third", holding)):
        monkeypatch.setattr(psutil.Process, "name", lambda process, name=name: name)
        nvml.script({**driver(1), **gpu(0), **lines})
        names += [process.name for process in backend.look().gpus[0].processes or ()]
    backend.close()
    assert names == ["first", "first", "third"]


def test_reserved_memory_is_not_in_use_whichever_way_the_driver_counts(nvml: StandIn) -> None:
    """nvml.h: it "accounts separately for reserved memory and includes it in the used memory amount"."""
    apart = looked(nvml, {("nvmlDeviceGetMemoryInfo_v2", 0): "1000 100 600 300"}).gpus[0]
    within = looked(nvml, {("nvmlDeviceGetMemoryInfo_v2", 0): "1000 100 600 400"}).gpus[0]
    for seen in (apart, within):
        assert (seen.memory_used_bytes, seen.memory_reserved_bytes, seen.memory_free_bytes) == (300, 100, 600)


def test_a_gpu_without_memory_of_its_own_shares_the_systems(nvml: StandIn) -> None:
    """nvml.h: memory is not supported on an integrated GPU that shares memory with the system."""
    refused = {("nvmlDeviceGetMemoryInfo_v2", 0): "error 3", ("nvmlDeviceGetMemoryInfo", 0): "error 3"}
    (seen,) = looked(nvml, refused).gpus
    assert seen.unified
    assert seen.memory_total_bytes is None
    (seen,) = looked(nvml, dict.fromkeys(refused, "error 4")).gpus
    assert not seen.unified


def test_an_old_driver_tells_what_it_can(old_nvml_library: Path) -> None:
    with stand_in.loaded(old_nvml_library) as nvml:
        nvml.script(two())
        backend = open_backend(PCIE)
        reading = backend.look()
        backend.close()
    assert reading.problems == ()
    assert reading.gpus[1] == dataclasses.replace(FULL, **INSTEAD["nvmlDeviceGetMemoryInfo_v2"])


# --- MIG --------------------------------------------------------------------------------------------


def instance(device: int, uuid: str, compute: object) -> Lines:
    """Return what a MIG instance of 10 GiB says: memory and processes, nothing of the card's clocks."""
    return {
        ("nvmlDeviceGetUUID", device): uuid,
        ("nvmlDeviceGetName", device): "NVIDIA A100-SXM4-40GB MIG 2g.10gb",
        ("nvmlDeviceGetMemoryInfo_v2", device): f"{10 * GIB} {GIB} {6 * GIB} {3 * GIB}",
        ("nvmlDeviceGetComputeRunningProcesses_v3", device): compute,
        ("nvmlDeviceGetGraphicsRunningProcesses_v3", device): "",
    }


def mig() -> Lines:
    return {
        ("nvmlDeviceGetMigMode", 0): "1 1",
        ("nvmlDeviceGetMaxMigDeviceCount", 0): 7,
        ("nvmlDeviceGetMigDeviceHandleByIndex", 0): "100 - 102",
        **instance(100, "MIG-a", f"{OURS}:{3 * GIB}"),
        **instance(102, "MIG-c", ""),
        # The whole card's memory is not for everybody to see.
        ("nvmlDeviceGetMemoryInfo_v2", 0): "error 4",
        ("nvmlDeviceGetComputeRunningProcesses_v3", 0): "error 4",
        ("nvmlDeviceGetUtilizationRates", 0): "error 3",
    }


def test_each_mig_instance_is_a_gpu_with_memory_of_its_own(nvml: StandIn) -> None:
    reading = looked(nvml, mig())
    card, first, third = reading.gpus
    assert reading.problems == ()
    assert (card.gpu, card.memory_total_bytes, card.processes, card.pci_id) == ("0", None, None, None)
    assert (card.power_watts, card.utilization_ratio) == (285.4, None)
    assert first == GpuSeen(
        gpu="0:0",
        uuid="MIG-a",
        name="NVIDIA A100-SXM4-40GB MIG 2g.10gb",
        vendor="NVIDIA",
        driver="580.65.06",
        pci_id="0000:a0:00.0",
        memory_total_bytes=10 * GIB,
        memory_used_bytes=3 * GIB,
        memory_free_bytes=6 * GIB,
        memory_reserved_bytes=GIB,
        processes=(GpuProcess(OURS, OUR_NAME, 3 * GIB),),
        processes_complete=True,
    )
    assert (third.gpu, third.uuid, third.processes, third.processes_complete) == ("0:2", "MIG-c", (), False)


@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetMaxMigDeviceCount", "nvmlDeviceGetMigDeviceHandleByIndex"]
)
def test_mig_instances_that_cannot_be_asked_leave_the_card(nvml: StandIn, function: str) -> None:
    for name, code in ERRORS.items():
        reading = looked(nvml, {**mig(), (function, 0): f"error {code}"})
        gone = name.removeprefix("NVML_ERROR_") in GONE
        assert [seen.gpu for seen in reading.gpus] == ([] if gone else ["0"]), name


@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetComputeRunningProcesses_v3"]
)
def test_an_error_of_one_mig_instance_leaves_the_others(nvml: StandIn, function: str) -> None:
    others = looked(nvml, mig()).gpus
    for name, code in ERRORS.items():
        if name.removeprefix("NVML_ERROR_") not in GONE:
            reading = looked(nvml, {**mig(), (function, 100): f"error {code}"})
            assert (reading.gpus[0], reading.gpus[2]) == (others[0], others[2]), name


# --- the other figures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reasons", "throttled"),
    [
        (0x000, ""),
        (0x001, ""),  # idle
        (0x002, ""),  # clocks that somebody set
        (0x004, "power"),  # software power cap
        (0x008, "other"),  # hardware slowdown, reason not told
        (0x010, "other"),  # held with the others of its group
        (0x020, "thermal"),  # software, thermal
        (0x048, "thermal"),  # hardware slowdown, thermal
        (0x088, "power"),  # hardware slowdown, power brake
        (0x100, "other"),  # display clock
        (0x0E4, "power thermal"),
        (0x8000_0000_0000_0000, ""),  # unheard of
    ],
)
def test_throttling_is_told_by_its_reason(nvml: StandIn, reasons: int, throttled: str) -> None:
    (seen,) = looked(nvml, {("nvmlDeviceGetCurrentClocksEventReasons", 0): hex(reasons)}).gpus
    assert seen.throttled.keys() == {"power", "thermal", "other"}
    assert {reason for reason, active in seen.throttled.items() if active} == set(throttled.split())


def test_pcie_throughput_is_not_asked_for_unless_wanted(nvml: StandIn) -> None:
    failing = {("nvmlDeviceGetPcieThroughput", 0): "error 999"}
    assert looked(nvml, failing, GpuOptions()).problems == ()
    assert looked(nvml, {}, GpuOptions()).gpus[0].pcie_bytes_per_second == {}
    assert len(looked(nvml, failing).problems) == 1


def test_one_clock_without_the_other(nvml: StandIn) -> None:
    (seen,) = looked(nvml, {("nvmlDeviceGetClockInfo", 0): "1500 1500 - -"}).gpus
    assert seen.clocks_hertz == {"graphics": 1_500_000_000}


def test_a_gpu_without_ecc_counts_xid_errors_alone(nvml: StandIn) -> None:
    assert looked(nvml, {("nvmlDeviceGetTotalEccErrors", 0): "- - - -"}).gpus[0].errors == {"xid": 0}


def test_the_xid_error_that_a_lost_gpu_tells_last_is_counted(nvml: StandIn) -> None:
    clock = Clock()
    nvml.script(two())
    backend = NvmlBackend(PCIE, clock)
    backend.look()
    # Two counts of ECC errors, the event, then no answer any more.
    nvml.script({**two({("nvmlEventSetWait_v2", 1): "79"}), ("lost", 1): 3})
    assert [seen.gpu for seen in backend.look().gpus] == ["0"]
    nvml.script(two())
    clock.now += 5
    assert backend.look().gpus[1].errors["xid"] == 1
    backend.close()


def test_each_xid_error_counts_once(backend: NvmlBackend, nvml: StandIn) -> None:
    counted = []
    for xids in ("", "13 31 79", "", "43"):
        nvml.script(two({("nvmlEventSetWait_v2", 1): xids}))
        counted += [seen.errors["xid"] for seen in backend.look().gpus]
        counted += [seen.errors["xid"] for seen in backend.look().gpus]
    assert counted[1::2] == [0, 0, 3, 3, 3, 3, 4, 4]
    assert counted[::2] == [0] * 8


def test_counters_never_go_back(backend: NvmlBackend, nvml: StandIn) -> None:
    """The driver starts energy anew when it is loaded, and nvidia-smi can clear ECC counts."""
    energy, corrected = [], []
    for millijoules, count in ((5000, 7), (6000, 9), (500, 0), (1500, 2)):
        nvml.script(
            two(
                {
                    ("nvmlDeviceGetTotalEnergyConsumption", 1): millijoules,
                    ("nvmlDeviceGetTotalEccErrors", 1): f"0 0 {count} 0",
                }
            )
        )
        seen = backend.look().gpus[1]
        energy.append(seen.energy_joules)
        corrected.append(seen.errors["ecc_corrected"])
    assert energy == [5.0, 6.0, 6.5, 7.5]
    assert corrected == [7, 9, 9, 11]


def test_a_name_that_is_no_text_costs_the_name(nvml: StandIn) -> None:
    reading = looked(nvml, {("nvmlDeviceGetName", 0): "\udcff\udcfe"})
    assert reading.gpus[0].name is None
    assert reading.gpus[0].power_watts == 285.4
    assert reading.problems == ("GPU 0: nvmlDeviceGetName gives nonsense (UnicodeDecodeError)",)


@pytest.mark.parametrize(
    ("told", "read"),
    [
        ("00000000:0A:00.0", "0000:0a:00.0"),
        ("0000:01:00.0", "0000:01:00.0"),
        ("00010000:C1:00.0", "10000:c1:00.0"),
        ("nonsense", None),
        ("", None),
    ],
)
def test_pci_ids_are_written_as_in_sysfs(told: str, read: str | None) -> None:
    assert pci_id(told) == read
