"""The NVML backend on a stand-in for the driver: what it reads, and what each error costs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import psutil
import pynvml  # type: ignore[import-untyped]
import pytest
from tests.nvml.scripts import driver, gpu
from tests.nvml.stand_in import Lines, StandIn

from kvscope.observed.gpu import GpuProcess, GpuReading, GpuSeen
from kvscope.sources.gpu.backend import GpuOptions
from kvscope.sources.gpu.nvml import NvmlBackend, open_backend

OURS = os.getpid()
OUR_NAME = psutil.Process().name()
NOBODY = 2**22 - 1
"""No process has this number: one below the most that Linux gives, and nobody counts that far."""

ERRORS = {
    name: value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_") and value < 1000
}
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
