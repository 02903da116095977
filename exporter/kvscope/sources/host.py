"""The host's memory, and that of one process."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from kvscope.observed.host import HostSeen, ProcessMemory
from kvscope.sources.small_files import count_of, read_text

Answer = TypeVar("Answer")

_PRESSURE_LINE = re.compile(r"^(some|full) (?:\S+ )*total=(\d+)$", re.MULTILINE)
_STATUS_LINE = re.compile(r"^(VmRSS|RssFile|RssShmem|VmSwap):\s*(\d+) kB$", re.MULTILINE)


def read_host(root: Path = Path("/")) -> HostSeen:
    """Return the host's memory and its pressure; a figure that the system does not tell is None.

    root: where /proc lies. The memory is the machine's, also where a container has a limit of its own.
    """
    memory = _asked(psutil.virtual_memory)
    swap = _asked(psutil.swap_memory)
    return HostSeen(
        total_bytes=memory and memory.total,
        available_bytes=memory and memory.available,
        swap_used_bytes=swap and swap.used,
        pressure_seconds=parse_pressure(read_text(root / "proc/pressure/memory")),
    )


def parse_pressure(text: str | None) -> dict[str, float] | None:
    """Return the seconds that tasks waited for memory since boot, by `some` and `full`.

    Linux Documentation/accounting/psi.rst: `total` counts microseconds. None without a usable line.
    """
    found = {kind: count_of(total) for kind, total in _PRESSURE_LINE.findall(text or "")}
    return {kind: total / 1e6 for kind, total in found.items() if total is not None} or None


def read_process_memory(pid: int, root: Path = Path("/")) -> ProcessMemory:
    """Return the memory of a process; nothing of one that has ended or cannot be seen.

    On Linux from /proc/PID/status, which everybody may read and which costs no walk over the
    process's pages as its smaps does; elsewhere only the resident part is told.
    """
    status = read_text(root / "proc" / str(pid) / "status")
    if status is not None:
        return parse_status(status)
    resident = _asked(lambda: psutil.Process(pid).memory_info())
    return ProcessMemory(resident_bytes=resident and resident.rss)


def parse_status(text: str) -> ProcessMemory:
    """Return what /proc/PID/status says of memory (Linux Documentation/filesystems/proc.rst).

    Shared is what is backed by files and by shared memory: a model's file mapped into memory is in it.
    """
    found = {name: count_of(kib) for name, kib in _STATUS_LINE.findall(text)}
    figures = {name: kib * 1024 for name, kib in found.items() if kib is not None}
    shared = None
    if "RssFile" in figures and "RssShmem" in figures:
        shared = figures["RssFile"] + figures["RssShmem"]
    return ProcessMemory(
        resident_bytes=figures.get("VmRSS"), shared_bytes=shared, swapped_bytes=figures.get("VmSwap")
    )


def _asked(ask: Callable[[], Answer]) -> Answer | None:
    try:
        return ask()
    except (psutil.Error, OSError, ValueError, RuntimeError):
        return None
