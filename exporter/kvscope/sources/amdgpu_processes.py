"""Which process holds how much memory of AMD's GPUs: the kernel's DRM file information and KFD.

Linux Documentation/gpu/drm-usage-stats.rst and amdgpu_fdinfo.c: each open file of a DRM device tells in
/proc/PID/fdinfo/FD what its client holds. The KFD driver under ROCm tells besides what a process took
through it, in /sys/class/kfd/kfd/proc/PID/vram_GPUID (amdkfd/kfd_process.c), to everybody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvscope.sources.small_files import count_of, names_in, read_bytes, read_count, read_text

LOOKS_BETWEEN_SEARCHES = 8
"""Listing every process's files is what costs; a process that opened a GPU is found after 16 s at latest."""
MOST_PROCESSES = 8192
MOST_FILES = 4096
LONGEST_NAME = 64
_UNITS = {"": 1, "KiB": 1 << 10, "kB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_LINE = re.compile(rb"^([a-z-]+(?: mem)?):[ \t]*(\S+)(?: ([kKMG]i?B))?[ \t]*$", re.MULTILINE)
_PCI_ID = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
# The newest spelling first. Resident: what lies there now, not what was asked for. Without `drm-` as
# Linux 5.14 to 5.18 spell it.
_MEMORY_KEYS = {
    "memory_bytes": ("drm-resident-vram", "drm-memory-vram", "vram mem"),
    "gtt_bytes": ("drm-resident-gtt", "drm-memory-gtt", "gtt mem"),
}


@dataclass(frozen=True, slots=True)
class DrmClient:
    """One client of a GPU, as a file that a process has open tells it. Bytes; None: not told."""

    pci_id: str
    client: str
    memory_bytes: int | None = None
    gtt_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds of one GPU; kfd_bytes: what it took through KFD, wherever that lies."""

    memory_bytes: int | None = None
    gtt_bytes: int | None = None
    kfd_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds memory: by GPU (its PCI id) and process. complete: nobody was out of sight."""

    by_gpu: Mapping[str, Mapping[int, Held]] = field(default_factory=dict)
    complete: bool = False


def parse_fdinfo(content: bytes) -> DrmClient | None:
    """Return the amdgpu client that a file of /proc/PID/fdinfo tells of, None where it is no such file."""
    values: dict[str, tuple[str, str]] = {}
    for key, value, unit in _LINE.findall(content):
        values.setdefault(key.decode(), (value.decode("ascii", "replace"), unit.decode()))
    driver, _ = values.get("drm-driver", ("amdgpu", ""))
    pci_id, _ = values.get("drm-pdev") or values.get("pdev") or ("", "")
    client, _ = values.get("drm-client-id") or values.get("pasid") or ("", "")
    pci_id = pci_id.lower()
    if driver != "amdgpu" or not _PCI_ID.fullmatch(pci_id) or count_of(client) is None:
        return None

    def size(name: str) -> int | None:
        for key in _MEMORY_KEYS[name]:
            if key in values:
                number, unit = values[key]
                count = count_of(number)
                return None if count is None else count_of(str(count * _UNITS.get(unit, 1)))
        return None

    return DrmClient(pci_id, client, size("memory_bytes"), size("gtt_bytes"))


def kfd_gpus(root: Path) -> dict[str, str]:
    """Return the PCI id of each GPU that KFD knows, by the number it gives it.

    amdkfd/kfd_topology.c: location_id is bus, device and function, the domain stands beside it; a
    CPU's number is 0.
    """
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    found: dict[str, str] = {}
    for node in names_in(nodes) or ():
        number = read_count(nodes / node / "gpu_id")
        properties = dict(
            line.split(None, 1)
            for line in (read_text(nodes / node / "properties") or "").splitlines()
            if len(line.split()) == 2
        )
        location = count_of(properties.get("location_id"))
        domain = count_of(properties.get("domain", "0"))
        if number and location is not None and domain is not None:
            bus, device, function = location >> 8 & 0xFF, location >> 3 & 0x1F, location & 0x7
            found[str(number)] = f"{domain:04x}:{bus:02x}:{device:02x}.{function}"
    return found


class Processes:
    """Looks for the processes that hold memory of AMD's GPUs."""

    def __init__(self, root: Path) -> None:
        self._proc = f"{root}/proc".replace("//", "/")
        self._root = root
        self._gpu_files: dict[int, tuple[str, ...] | None] = {}
        """By process its open files of a GPU, as found last; None: it may not be seen."""
        self._kfd_gpus: dict[str, str] = {}
        self._looks = 0

    def look(self, watched: Collection[int]) -> Holders | None:
        """Return who holds memory now, None where no process can be seen.

        A client that several processes share (whoever opened the device for another still has it, too)
        counts once: for one of the watched, else for the one started last.
        """
        names = names_in(self._proc)
        pids = sorted(int(name) for name in names or () if count_of(name))
        if not pids:
            return None
        self._search(sorted(pids, key=lambda pid: (pid not in watched, pid))[:MOST_PROCESSES], watched)
        by_gpu: dict[str, dict[int, Held]] = {}
        seen: set[tuple[str, str]] = set()
        for pid in sorted(self._gpu_files, key=lambda pid: (pid not in watched, -pid)):
            for file in self._gpu_files[pid] or ():
                client = parse_fdinfo(read_bytes(f"{self._proc}/{pid}/fdinfo/{file}") or b"")
                if client is None or (client.pci_id, client.client) in seen:
                    continue
                seen.add((client.pci_id, client.client))
                of_gpu = by_gpu.setdefault(client.pci_id, {})
                before = of_gpu.get(pid, Held())
                of_gpu[pid] = Held(
                    memory_bytes=_sum(before.memory_bytes, client.memory_bytes),
                    gtt_bytes=_sum(before.gtt_bytes, client.gtt_bytes),
                )
        # Only the machine's own numbering of processes has the kernel's thread as number 2: elsewhere
        # others are out of sight, and KFD's numbers are not ours. With hidepid nobody is seen to be there.
        all_there = read_text(f"{self._proc}/2/comm") == "kthreadd" and len(pids) <= MOST_PROCESSES
        if all_there:
            self._add_kfd(by_gpu)
        self._looks += 1
        return Holders(by_gpu, complete=all_there and None not in self._gpu_files.values())

    def name(self, pid: int) -> str | None:
        """Return the name of a process's program, without path and arguments."""
        name = read_text(f"{self._proc}/{pid}/comm", LONGEST_NAME)
        return "".join(sign if sign.isprintable() else "?" for sign in name) if name else None

    def _search(self, pids: list[int], watched: Collection[int]) -> None:
        turn = self._looks % LOOKS_BETWEEN_SEARCHES
        self._gpu_files = {
            pid: self._gpu_files[pid]
            if pid in self._gpu_files and pid not in watched and pid % LOOKS_BETWEEN_SEARCHES != turn
            else self._files_of_gpus(pid)
            for pid in pids
        }

    def _files_of_gpus(self, pid: int) -> tuple[str, ...] | None:
        directory = f"{self._proc}/{pid}/fd"
        try:
            files = os.listdir(directory)  # noqa: PTH208 - thousands of names
        except FileNotFoundError:  # it has ended
            return ()
        except OSError:
            return None
        found = []
        for file in files[:MOST_FILES]:
            try:
                if os.readlink(f"{directory}/{file}").startswith("/dev/dri/"):  # noqa: PTH115 - as above
                    found.append(file)
            except OSError:
                continue
        return tuple(found)

    def _add_kfd(self, by_gpu: dict[str, dict[int, Held]]) -> None:
        processes = self._root / "sys/class/kfd/kfd/proc"
        for name in names_in(processes) or ():
            pid = count_of(name)
            for file in names_in(processes / name) or () if pid else ():
                kind, _, gpu = file.partition("_")
                size = read_count(processes / name / file) if kind == "vram" else None
                if size is None or pid is None:
                    continue
                if gpu not in self._kfd_gpus:
                    self._kfd_gpus = kfd_gpus(self._root)
                if gpu in self._kfd_gpus:
                    of_gpu = by_gpu.setdefault(self._kfd_gpus[gpu], {})
                    before = of_gpu.get(pid, Held())
                    of_gpu[pid] = Held(before.memory_bytes, before.gtt_bytes, _sum(before.kfd_bytes, size))


def _sum(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else one + other
