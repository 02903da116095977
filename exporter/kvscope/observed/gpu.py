"""What one look at the machine's GPUs shows. A field is None where nothing tells it, never 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU.

    pid: None where it lives in another namespace. name: of the program, without path and arguments.
    gtt_bytes: system memory that it mapped for the GPU (AMD).
    """

    pid: int | None
    name: str | None = None
    memory_bytes: int | None = None
    gtt_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GpuSeen:
    """One GPU.

    gpu: the label: its index as text, `pretend0` for the pretend backend. vendor: NVIDIA, AMD or pretend.
    pci_id: as 0000:01:00.0, in lower case. memory_*: bytes of the card's own memory; gtt_*: system memory
    that it may map. unified: its memory is a share of the system's (an APU). processes: None where none can
    be read; processes_complete: whether everybody who holds memory is among them. clocks_hertz by graphics
    and memory, pcie_bytes_per_second by rx and tx, throttled by power, thermal and other, errors by
    ecc_corrected, ecc_uncorrected and xid.
    """

    gpu: str
    uuid: str | None = None
    name: str | None = None
    vendor: str | None = None
    driver: str | None = None
    pci_id: str | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    gtt_total_bytes: int | None = None
    gtt_used_bytes: int | None = None
    unified: bool = False
    processes: tuple[GpuProcess, ...] | None = None
    processes_complete: bool = False
    utilization_ratio: float | None = None
    memory_bandwidth_utilization_ratio: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    energy_joules: float | None = None
    temperature_celsius: float | None = None
    clocks_hertz: Mapping[str, int] = field(default_factory=dict)
    pcie_bytes_per_second: Mapping[str, float] = field(default_factory=dict)
    throttled: Mapping[str, bool] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GpuReading:
    """All GPUs of one backend at one instant.

    problems: one line for each thing that could not be read although it should be. load_lines: by server,
    what a log would say of its load (the pretend backend only).
    """

    gpus: tuple[GpuSeen, ...] = ()
    problems: tuple[str, ...] = ()
    load_lines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
