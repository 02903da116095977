"""AMD's GPUs through the Linux driver amdgpu: plain files of /sys, no vendor library, no device opened.

Linux Documentation/gpu/amdgpu/driver-misc.rst and thermal.rst describe the files, Documentation/hwmon/
the units of those under hwmon.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvscope.observed.gpu import GpuProcess, GpuReading, GpuSeen
from kvscope.sources.amdgpu_processes import Held, Holders, Processes
from kvscope.sources.gpu.backend import BackendMissingError, GpuOptions
from kvscope.sources.small_files import count_of, names_in, read_bytes, read_count, read_text

_CARD = re.compile(r"card\d+")
_PCI_ID = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_UNIQUE_ID = re.compile(r"[0-9a-f]{1,32}")
_STARRED_CLOCK = re.compile(r"^\S+ (\d{1,6}) ?mhz \*[ \t]*$", re.MULTILINE | re.IGNORECASE)
_ERRORS = re.compile(r"^(ue|ce): (\d+)$", re.MULTILINE)
_MEMORY_FILES = {
    "memory_total_bytes": "mem_info_vram_total",
    "memory_used_bytes": "mem_info_vram_used",
    "gtt_total_bytes": "mem_info_gtt_total",
    "gtt_used_bytes": "mem_info_gtt_used",
}
_PERCENT_FILES = {
    "utilization_ratio": "gpu_busy_percent",
    "memory_bandwidth_utilization_ratio": "mem_busy_percent",
}
# What hwmon tells, as files to try in turn and how many of their unit make one of ours. The second
# temperature, of the hottest spot, is the only one on MI300.
_SENSOR_FILES = {
    "power_watts": (("power1_average", "power1_input"), 1e6),
    "power_limit_watts": (("power1_cap",), 1e6),
    "energy_joules": (("energy1_input",), 1e6),
    "temperature_celsius": (("temp1_input", "temp2_input"), 1e3),
}
_CLOCK_FILES = {"graphics": ("freq1_input", "pp_dpm_sclk"), "memory": ("freq2_input", "pp_dpm_mclk")}
_ERROR_KINDS = {"ce": "ecc_corrected", "ue": "ecc_uncorrected"}
# Linux drivers/gpu/drm/amd/include/kgd_pp_interface.h: where gpu_metrics_v1_3 and v2_2 and later keep
# indep_throttle_status, whose bits amdgpu_smu.h names; other layouts have none.
_THROTTLE_STATUS_AT = {(1, 3): 112, (2, 2): 120, (2, 3): 120, (2, 4): 120}
_THROTTLE_BITS = {"power": 0x0000_0000_FFFF_FFFF, "thermal": 0x0000_FFFF_0000_0000}
_NOT_SUPPORTED = 2**64 - 1
LONGEST_LABEL = 128


@dataclass(frozen=True, slots=True)
class _Card:
    """What does not change while the card is there."""

    gpu: str
    pci_id: str
    device: Path
    uuid: str | None
    name: str | None
    unified: bool


def open_backend(options: GpuOptions) -> AmdGpu:
    """Return the backend for the AMD GPUs under options.root.

    Raises BackendMissingError where the driver amdgpu runs none.
    """
    backend = AmdGpu(options)
    if not backend.cards():
        raise BackendMissingError(
            "amdgpu: no GPU of this driver under /sys/class/drm; in a container, is /sys there?"
        )
    return backend


class AmdGpu:
    """Reads the GPUs that the driver amdgpu runs."""

    name = "amdgpu"

    def __init__(self, options: GpuOptions) -> None:
        self._root = options.root
        self._drm = options.root / "sys/class/drm"
        self._pcie_throughput = options.pcie_throughput
        self._server_pids = options.server_pids
        self._processes = Processes(options.root)
        self._labels: dict[str, str] = {}
        """By PCI id: a card keeps its number while we run, whichever other comes or goes."""
        self._cards: dict[tuple[str, str], _Card] = {}
        self._driver = _driver(options.root)

    def cards(self) -> tuple[_Card, ...]:
        """Return the cards that are there now, in the order of their PCI ids."""
        found: list[tuple[str, str]] = []
        for name in names_in(self._drm) or ():
            if _CARD.fullmatch(name):
                facts = _uevent(self._drm / name / "device")
                if facts.get("DRIVER") == "amdgpu" and _PCI_ID.fullmatch(facts.get("PCI_SLOT_NAME", "")):
                    found.append((facts["PCI_SLOT_NAME"], name))
        found.sort()
        for pci_id, _ in found:
            self._labels.setdefault(pci_id, str(len(self._labels)))
        self._cards = {key: self._cards.get(key) or self._card(*key) for key in found}
        return tuple(self._cards.values())

    def look(self) -> GpuReading:
        """Return what can be read now of each card; a card that is gone is named in the problems."""
        cards = self.cards()
        holders = self._processes.look(frozenset(self._server_pids().values())) if cards else None
        gpus = tuple(self._seen(card, holders) for card in cards)
        there = {card.pci_id for card in cards}
        problems = [
            f"amdgpu: GPU {label} ({pci_id}) is gone"
            for pci_id, label in self._labels.items()
            if pci_id not in there
        ]
        problems += [
            f"amdgpu: GPU {seen.gpu} ({seen.pci_id}) does not tell its memory"
            for seen in gpus
            if (seen.gtt_used_bytes if seen.unified else seen.memory_used_bytes) is None
        ]
        return GpuReading(gpus=gpus, problems=tuple(problems))

    def close(self) -> None:
        """Nothing is held open."""

    def _card(self, pci_id: str, name: str) -> _Card:
        device = self._drm / name / "device"
        uuid = (read_text(device / "unique_id") or "").lower()
        return _Card(
            gpu=self._labels[pci_id],
            pci_id=pci_id,
            device=device,
            uuid=uuid if _UNIQUE_ID.fullmatch(uuid) and uuid.strip("0") else None,
            name=_product_name(self._root, device),
            unified=_is_apu(device),
        )

    def _seen(self, card: _Card, holders: Holders | None) -> GpuSeen:
        memory: dict[str, Any] = {
            figure: read_count(card.device / file) for figure, file in _MEMORY_FILES.items()
        }
        seen = GpuSeen(
            gpu=card.gpu,
            uuid=card.uuid,
            name=card.name,
            vendor="AMD",
            driver=self._driver,
            pci_id=card.pci_id,
            memory_free_bytes=_free(memory["memory_total_bytes"], memory["memory_used_bytes"]),
            unified=card.unified,
        )
        seen = dataclasses.replace(seen, **memory)
        if holders is not None:
            seen = dataclasses.replace(
                seen,
                processes=tuple(
                    self._process(seen, pid, held)
                    for pid, held in sorted(holders.by_gpu.get(card.pci_id, {}).items())
                ),
                processes_complete=holders.complete,
            )
        # Asking a sensor would wake a sleeping card up (until Linux 6.14); the memory figures do not.
        if read_text(card.device / "power/runtime_status") == "suspended":
            return seen
        return self._with_sensors(seen, card.device)

    def _with_sensors(self, seen: GpuSeen, device: Path) -> GpuSeen:
        hwmon = _hwmon(device)
        sensors: dict[str, Any] = {
            figure: _ratio(read_count(device / file)) for figure, file in _PERCENT_FILES.items()
        }
        if hwmon is not None:
            for figure, (files, units) in _SENSOR_FILES.items():
                values = [value for file in files if (value := read_count(hwmon / file)) is not None]
                sensors[figure] = values[0] / units if values else None
        return dataclasses.replace(
            seen,
            clocks_hertz=_clocks(device, hwmon),
            pcie_bytes_per_second=_pcie(device) if self._pcie_throughput else {},
            throttled=parse_throttling(read_bytes(device / "gpu_metrics") or b""),
            errors=_errors(device),
            **sensors,
        )

    def _process(self, seen: GpuSeen, pid: int, held: Held) -> GpuProcess:
        memory, gtt = held.memory_bytes, held.gtt_bytes
        if held.kfd_bytes is not None:
            memory, gtt = _with_kfd(seen, held.kfd_bytes, memory, gtt)
        return GpuProcess(pid=pid, name=self._processes.name(pid), memory_bytes=memory, gtt_bytes=gtt)


def parse_throttling(metrics: bytes) -> dict[str, bool]:
    """Return whether power, heat or something else holds the clocks down, from a gpu_metrics file.

    Empty where the layout has no such field (the newest APUs count residencies instead) or the card
    does not fill it.
    """
    if len(metrics) < 4:
        return {}
    size, layout, content = struct.unpack_from("<HBB", metrics)
    at = _THROTTLE_STATUS_AT.get((layout, content))
    if at is None or min(size, len(metrics)) < at + 8:
        return {}
    (status,) = struct.unpack_from("<Q", metrics, at)
    if status == _NOT_SUPPORTED:
        return {}
    named = {reason: bool(status & bits) for reason, bits in _THROTTLE_BITS.items()}
    return {**named, "other": bool(status & ~sum(_THROTTLE_BITS.values()))}


def _with_kfd(seen: GpuSeen, kfd: int, memory: int | None, gtt: int | None) -> tuple[int | None, int | None]:
    """Return a process's memory of both kinds, given what it took through KFD.

    A file of the DRM device tells of KFD's memory, too, once it is mapped: the larger counts, never the
    sum. On an APU KFD calls VRAM what lies in GTT when that is the larger (amdgpu_ttm.c: apu_prefer_gtt).
    """
    if not seen.unified:
        return max(kfd, memory or 0), gtt
    rest = max(0, kfd - (memory or 0) - (gtt or 0))
    if (seen.gtt_total_bytes or 0) > (seen.memory_total_bytes or 0):
        return memory, (gtt or 0) + rest
    return (memory or 0) + rest, gtt


def _is_apu(device: Path) -> bool:
    """Return whether the GPU shares the system's memory.

    The driver makes board_info for every card but APUs (amdgpu_device.c, since Linux 6.4) and names the
    maker of the memory only where there are memory chips (amdgpu_vram_mgr.c; once "unknown").
    """
    if read_count(device / _MEMORY_FILES["gtt_total_bytes"]) is None:
        return False
    maker = read_text(device / "mem_info_vram_vendor")
    return read_text(device / "board_info") is None and maker in (None, "unknown")


def _uevent(device: Path) -> dict[str, str]:
    lines = (read_text(device / "uevent") or "").splitlines()
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def _driver(root: Path) -> str | None:
    """The version of AMD's own driver package, else of the kernel whose part the driver is."""
    packaged = _label(read_text(root / "sys/module/amdgpu/version"))
    kernel = _label(read_text(root / "proc/sys/kernel/osrelease"))
    return packaged or (f"Linux {kernel}" if kernel else None)


def _product_name(root: Path, device: Path) -> str | None:
    """The name that server cards tell, else the one in libdrm's table where that is installed."""
    name = _label(read_text(device / "product_name"))
    if name:
        return name
    numbers = [(read_text(device / file) or "")[2:].lower() for file in ("device", "revision")]
    for line in (read_text(root / "usr/share/libdrm/amdgpu.ids", 1 << 20) or "").splitlines():
        fields = [field.strip() for field in line.split(",", 2)]
        if len(fields) == 3 and [field.lower() for field in fields[:2]] == numbers:
            return _label(fields[2])
    return None


def _label(text: str | None) -> str | None:
    """A text fit for a label, None where it is none."""
    return text if text and len(text) <= LONGEST_LABEL and text.isprintable() else None


def _free(total: int | None, used: int | None) -> int | None:
    return total - used if total is not None and used is not None and used <= total else None


def _ratio(percent: int | None) -> float | None:
    return percent / 100 if percent is not None and percent <= 100 else None


def _hwmon(device: Path) -> Path | None:
    for name in names_in(device / "hwmon") or ():
        if read_text(device / "hwmon" / name / "name") == "amdgpu":
            return device / "hwmon" / name
    return None


def _clocks(device: Path, hwmon: Path | None) -> dict[str, int]:
    clocks: dict[str, int] = {}
    for clock, (sensor, table) in _CLOCK_FILES.items():
        hertz = read_count(hwmon / sensor) if hwmon else None
        starred = None if hertz is not None else _STARRED_CLOCK.search(read_text(device / table) or "")
        if starred:
            hertz = int(starred[1]) * 1_000_000
        if hertz is not None:
            clocks[clock] = hertz
    return clocks


def _pcie(device: Path) -> dict[str, float]:
    """Packets received and sent in a second that the driver waits for, times their largest size."""
    counts = [count_of(word) for word in (read_text(device / "pcie_bw") or "").split()]
    if len(counts) != 3:
        return {}
    received, sent, size = counts
    if received is None or sent is None or size is None:
        return {}
    return {"rx": float(received * size), "tx": float(sent * size)}


def _errors(device: Path) -> dict[str, int]:
    """Errors of the memory since the driver was loaded; not all cards count them."""
    found = _ERRORS.findall(read_text(device / "ras/umc_err_count") or "")
    counts = {_ERROR_KINDS[kind]: count_of(count) for kind, count in found}
    return {kind: count for kind, count in counts.items() if count is not None}
