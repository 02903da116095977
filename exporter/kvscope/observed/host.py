"""What one look at the host's memory shows, and at that of one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of one process; None where the system does not tell."""

    resident_bytes: int | None = None
    shared_bytes: int | None = None
    swapped_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class HostSeen:
    """Bytes of the host's memory, and the seconds that tasks waited for memory (kernel's PSI).

    pressure_seconds by some (at least one task waited) and full (all did); None without PSI.
    """

    total_bytes: int | None = None
    available_bytes: int | None = None
    swap_used_bytes: int | None = None
    pressure_seconds: Mapping[str, float] | None = None
