"""Scripts for the stand-in: what a driver says of its GPUs."""

from __future__ import annotations

from tests.nvml.stand_in import Lines

GIB = 2**30
MIB = 2**20


def driver(count: int, version: str = "580.65.06") -> Lines:
    """Return what a driver says of itself."""
    return {("nvmlDeviceGetCount_v2", "-"): count, ("nvmlSystemGetDriverVersion", "-"): version}


def gpu(device: int, uuid: str = "GPU-0", processes: str = "") -> Lines:
    """Return what a GPU with 24 GiB says that can tell everything; of processes as PID:BYTES."""
    return {
        ("nvmlDeviceGetUUID", device): uuid,
        ("nvmlDeviceGetName", device): "NVIDIA GeForce RTX 3090",
        ("nvmlDeviceGetPciInfo_v3", device): f"00000000:{0xA0 + device:02X}:00.0",
        # total, reserved, free, used
        ("nvmlDeviceGetMemoryInfo_v2", device): f"{24 * GIB} {300 * MIB} {18 * GIB} {6 * GIB - 300 * MIB}",
        # total, free, used
        ("nvmlDeviceGetMemoryInfo", device): f"{24 * GIB} {18 * GIB} {6 * GIB}",
        ("nvmlDeviceGetComputeRunningProcesses_v3", device): processes,
        ("nvmlDeviceGetComputeRunningProcesses_v2", device): processes,
        ("nvmlDeviceGetGraphicsRunningProcesses_v3", device): "",
        ("nvmlDeviceGetGraphicsRunningProcesses_v2", device): "",
        ("nvmlDeviceGetUtilizationRates", device): "87 42",
        ("nvmlDeviceGetPowerUsage", device): 285_400,
        ("nvmlDeviceGetEnforcedPowerLimit", device): 350_000,
        ("nvmlDeviceGetTotalEnergyConsumption", device): 123_456_789,
        ("nvmlDeviceGetTemperature", device): 71,
        ("nvmlDeviceGetTemperatureV", device): 71,
        # graphics, SM, memory, video
        ("nvmlDeviceGetClockInfo", device): "1695 1700 9751 1500",
        ("nvmlDeviceGetCurrentClocksEventReasons", device): "0x4",
        ("nvmlDeviceGetCurrentClocksThrottleReasons", device): "0x4",
        # volatile corrected, uncorrected, aggregate corrected, uncorrected
        ("nvmlDeviceGetTotalEccErrors", device): "1 2 30 4",
        # tx, rx, in KB/s
        ("nvmlDeviceGetPcieThroughput", device): "1500 250",
        ("nvmlDeviceGetMigMode", device): "0 0",
    }
