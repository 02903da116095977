"""The comparison of the NVML backend with nvidia-smi, on an answer in the form that nvidia-smi gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.nvml.scripts import GIB, MIB, driver, gpu
from tests.nvml.stand_in import Lines, StandIn
from tests.record.gpu import compare, without_secrets

from kvscope.observed.gpu import GpuReading
from kvscope.sources.gpu.backend import GpuOptions
from kvscope.sources.gpu.nvml import open_backend

LOG = (Path(__file__).parents[3] / "nvml" / "nvidia-smi.xml").read_text()

UTILIZATION = ("utilization_ratio", "memory_bandwidth_utilization_ratio")
REASONS = ("power", "thermal")
MEMORY_DIFFERS = {"1:0 memory_total_bytes", "1:0 memory_free_bytes"}

MIG_CARD: Lines = {
    ("nvmlDeviceGetUUID", 1): "GPU-one",
    ("nvmlDeviceGetName", 1): "NVIDIA A100-SXM4-40GB",
    ("nvmlDeviceGetMigMode", 1): "1 1",
    ("nvmlDeviceGetMaxMigDeviceCount", 1): 7,
    ("nvmlDeviceGetMigDeviceHandleByIndex", 1): "100",
    ("nvmlDeviceGetTemperature", 1): 40,
    ("nvmlDeviceGetPowerUsage", 1): 90_000,
    ("nvmlDeviceGetEnforcedPowerLimit", 1): 400_000,
    ("nvmlDeviceGetClockInfo", 1): "1095 1095 1215 1000",
    ("nvmlDeviceGetCurrentClocksEventReasons", 1): "0",
    ("nvmlDeviceGetMemoryInfo_v2", 100): f"{10 * GIB} {GIB} {6 * GIB} {3 * GIB}",
}


def looked(nvml: StandIn, changed: Lines | None = None) -> GpuReading:
    nvml.script({**driver(2), **gpu(0, "GPU-zero", f"4242:{5844 * MIB}"), **MIG_CARD, **(changed or {})})
    backend = open_backend(GpuOptions())
    reading = backend.look()
    backend.close()
    return reading


@pytest.fixture(autouse=True)
def _visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvscope.sources.gpu.nvml._program", lambda pid: (True, "llama-server"))


def differing(*looks: GpuReading) -> set[str]:
    return {f"{row.gpu} {row.field}" for row in compare(looks, LOG) if not row.agrees}


def test_what_both_say_alike_agrees(nvml: StandIn) -> None:
    look = looked(nvml)
    rows = compare((look, look), LOG)
    assert [row for row in rows if not row.agrees] == []
    known = {f"{row.gpu} {row.field}" for row in rows if row.theirs is not None}
    assert len(known) > 25
    assert {"0 memory of process 4242", "0 ecc_uncorrected", "1:0 memory_free_bytes", "1 driver"} <= known


@pytest.mark.parametrize(
    ("function", "device", "value", "differ"),
    [
        ("nvmlDeviceGetUUID", 0, "GPU-other", {"0 uuid"}),
        ("nvmlDeviceGetName", 0, "another", {"0 name"}),
        ("nvmlDeviceGetPciInfo_v3", 0, "00000000:A7:00.0", {"0 pci_id"}),
        ("nvmlSystemGetDriverVersion", "-", "1", {"0 driver", "1 driver"}),
        ("nvmlDeviceGetUtilizationRates", 0, "42 87", {f"0 {name}" for name in UTILIZATION}),
        ("nvmlDeviceGetUtilizationRates", 1, "0 0", {f"1 {name}" for name in UTILIZATION}),
        ("nvmlDeviceGetPowerUsage", 0, 28_540, {"0 power_watts"}),
        ("nvmlDeviceGetEnforcedPowerLimit", 0, "error 3", {"0 power_limit_watts"}),
        ("nvmlDeviceGetTemperature", 0, 17, {"0 temperature_celsius"}),
        ("nvmlDeviceGetClockInfo", 0, "9751 0 1695 0", {"0 graphics clock", "0 memory clock"}),
        ("nvmlDeviceGetTotalEccErrors", 0, "30 4 1 2", {"0 ecc_corrected", "0 ecc_uncorrected"}),
        ("nvmlDeviceGetCurrentClocksEventReasons", 0, "0x20", {f"0 throttled by {why}" for why in REASONS}),
        ("nvmlDeviceGetComputeRunningProcesses_v3", 0, f"4242:{GIB}", {"0 memory of process 4242"}),
        ("nvmlDeviceGetComputeRunningProcesses_v3", 0, "", {"0 memory of process 4242"}),
        ("nvmlDeviceGetMemoryInfo_v2", 100, f"{9 * GIB} {GIB} {5 * GIB} {3 * GIB}", MEMORY_DIFFERS),
        ("nvmlDeviceGetMigDeviceHandleByIndex", 1, "-", {"1:0 there"}),
        ("nvmlDeviceGetMigDeviceHandleByIndex", 1, "- 100", {"1:0 there", "1:1 there"}),
    ],
)
def test_what_they_say_otherwise_differs(
    nvml: StandIn, function: str, device: object, value: object, differ: set[str]
) -> None:
    look = looked(nvml, {(function, device): value})
    assert differing(look, look) == differ


def test_what_moved_between_the_looks_agrees_in_between(nvml: StandIn) -> None:
    looks = [looked(nvml, {("nvmlDeviceGetPowerUsage", 0): watts}) for watts in (100_000, 400_000)]
    assert differing(*looks) == set()
    assert differing(looks[0], looks[0]) == {"0 power_watts"}


def test_a_gpu_that_only_one_of_them_sees_differs(nvml: StandIn) -> None:
    look = looked(nvml, {("nvmlDeviceGetCount_v2", "-"): 1})
    assert differing(look, look) == {"1 there", "1:0 there"}


def test_a_recording_keeps_no_serial_number_and_no_path(nvml: StandIn) -> None:
    kept = without_secrets(LOG)
    assert "/opt/models" not in kept
    assert "16500000" not in kept
    look = looked(nvml)
    assert compare((look, look), kept) == compare((look, look), LOG)
