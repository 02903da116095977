"""What every GPU backend offers: `open_backend(options)` in its module, and this protocol."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kvscope.observed.gpu import GpuReading


class BackendMissingError(Exception):
    """This machine has nothing for the backend to read; the message says what is missing in one line."""


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """What a backend may be told.

    root: where the file systems /sys and /proc lie. pcie_throughput: read it too, though it is slow.
    script: of the pretend backend: a built-in script's name or a file. server_pids: by server name, its
    process at present. asleep: the names of those that gave their memory back.
    """

    root: Path = Path("/")
    pcie_throughput: bool = False
    script: str | None = None
    server_pids: Callable[[], Mapping[str, int]] = field(default=dict)
    asleep: Callable[[], Collection[str]] = field(default=frozenset)


class GpuBackend(Protocol):
    """Reads the GPUs of one kind; a thread of its own calls it."""

    name: str

    def look(self) -> GpuReading:
        """Return what can be read now; what cannot is absent. Raises nothing."""
        ...

    def close(self) -> None:
        """Let go of the driver."""
        ...
