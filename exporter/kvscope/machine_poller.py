"""Looks at the machine's GPUs and memory again and again, and publishes the machine's box."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from kvscope.logs import what_and_where
from kvscope.observed.gpu import GpuReading
from kvscope.observed.host import HostSeen, ProcessMemory
from kvscope.own_thread import in_own_thread
from kvscope.settings import Settings
from kvscope.snapshot import MachineBox
from kvscope.sources.allocation_lines import parse_allocation
from kvscope.sources.gpu import open_backends
from kvscope.sources.gpu.backend import GpuBackend, GpuOptions
from kvscope.sources.host import read_host, read_process_memory
from kvscope.tracking.machine import (
    MachineHistory,
    MachineLook,
    ServerOnMachine,
    advance,
    box,
    expires_at,
    without_source,
)

Answer = TypeVar("Answer")
HostReading = tuple[HostSeen, Mapping[str, ProcessMemory]]

log = logging.getLogger(__name__)

OPEN_AGAIN_EVERY_SECONDS = 60.0
"""A driver that is not there yet may be loaded later."""

CALM_SECONDS = 120.0
"""A problem that comes now and then is told once, not each time; after so long without, it is news."""

CLOSE_WITHIN_SECONDS = 0.2


class MachinePoller:
    """Watches the machine: asynchronous, with each source in a thread of its own.

    publish is called with the machine's box after each look, and again when a reading ages out. servers:
    what is known at present of the processes of watched servers.
    """

    def __init__(
        self,
        settings: Settings,
        publish: Callable[[MachineBox], None],
        servers: Callable[[], Sequence[ServerOnMachine]],
        *,
        open_gpus: Callable[
            [str, GpuOptions, Sequence[GpuBackend]], tuple[Sequence[GpuBackend], str | None]
        ] = open_backends,
        host: Callable[[], HostSeen] = read_host,
        process_memory: Callable[[int], ProcessMemory] = read_process_memory,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._publish = publish
        self._servers = servers
        self._open_gpus = open_gpus
        self._host = host
        self._process_memory = process_memory
        self._clock = clock
        self._monotonic = monotonic
        self._history = MachineHistory(settings.gpu_interval_seconds)
        self._backends: Sequence[GpuBackend] = ()
        self._opened_at: float | None = None
        self._pids: Mapping[str, int] = {}
        self._asleep: Collection[str] = ()
        self._gpu_reading: asyncio.Future[tuple[Sequence[GpuReading], float]] | None = None
        self._host_reading: asyncio.Future[tuple[HostReading, float]] | None = None
        self._missing: str | None = None
        self._told: dict[str, float] = {}
        self._aging: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Look for ever; cancel to stop. Lets go of the drivers at the end."""
        try:
            while True:
                began = self._monotonic()
                await self.look_once()
                spent = self._monotonic() - began
                await asyncio.sleep(max(0.0, self._settings.gpu_interval_seconds - spent))
        finally:
            if self._aging is not None:
                self._aging.cancel()
            if self._gpu_reading is None:
                await self._close()

    async def look_once(self) -> MachineBox:
        """Look once at GPUs and host, publish the machine's box and return it."""
        servers = self._servers()
        self._pids = {each.server: each.pid for each in servers if each.pid is not None}
        self._asleep = {each.server for each in servers if each.load.asleep}
        if self._settings.gpu != "none" and self._gpu_reading is None:
            self._gpu_reading = in_own_thread(lambda: self._timed(self._read_gpus))
        if self._host_reading is None:
            self._host_reading = in_own_thread(lambda: self._timed(self._read_host))
        readings = {each for each in (self._gpu_reading, self._host_reading) if each is not None}
        await asyncio.wait(readings, timeout=self._settings.gpu_interval_seconds)
        if self._gpu_reading is not None:
            self._take_gpus(self._gpu_reading, servers)
        self._take_host(self._host_reading)
        return self._publish_now()

    async def _close(self) -> None:
        """Let go of the drivers, waiting for none that hangs; another run opens them anew."""
        backends, self._backends, self._opened_at = self._backends, (), None
        closings = [in_own_thread(backend.close) for backend in backends]
        if closings:
            await asyncio.wait(closings, timeout=CLOSE_WITHIN_SECONDS)

    # --- in threads of their own ------------------------------------------------------------------

    def _timed(self, read: Callable[[], Answer]) -> tuple[Answer, float]:
        """Return what is read and how long that took, which the other source's look does not change."""
        began = self._monotonic()
        return read(), self._monotonic() - began

    def _read_gpus(self) -> Sequence[GpuReading]:
        if not self._backends or self._missing is not None:
            now = self._monotonic()
            if self._opened_at is None or now - self._opened_at >= OPEN_AGAIN_EVERY_SECONDS:
                self._opened_at = now
                options = GpuOptions(
                    pcie_throughput=self._settings.gpu_pcie_throughput,
                    server_pids=lambda: self._pids,
                    asleep=lambda: self._asleep,
                )
                self._backends, self._missing = self._open_gpus(self._settings.gpu, options, self._backends)
        first, *others = self._backends or (None,)
        readings = [] if first is None else [_looked(first)]
        # Each backend counts its GPUs from 0: those behind the first carry its name too.
        return readings + [_renamed(_looked(backend), backend.name) for backend in others]

    def _read_host(self) -> HostReading:
        return self._host(), {name: self._process_memory(pid) for name, pid in self._pids.items()}

    # --- what became of them ----------------------------------------------------------------------

    def _take_gpus(
        self, reading: asyncio.Future[tuple[Sequence[GpuReading], float]], servers: Sequence[ServerOnMachine]
    ) -> None:
        if not reading.done():
            self._advance(self._late("gpu", "GPUs"))
            return
        self._gpu_reading = None
        readings, took = reading.result()
        problems = [problem for each in readings for problem in each.problems]
        missing = self._missing
        if missing is not None and self._settings.gpu == "auto":
            self._tell(logging.INFO, missing)  # most machines have none: no failure of a source
            if not self._backends:
                self._history = without_source(self._history, "gpu")
                return
        elif missing is not None:
            problems.append(missing)
        lines = {server: lines for each in readings for server, lines in each.load_lines.items()}
        self._advance(
            MachineLook(
                self._clock(),
                self._monotonic(),
                "gpu",
                took,
                gpus=GpuReading(tuple(gpu for each in readings for gpu in each.gpus)),
                servers=[_with_load(each, lines.get(each.server)) for each in servers],
                problems=problems,
                # A card that is lost, or a figure that may not be read, is no failure of the others,
                # however long that lasts.
                failed=any(each.problems and not each.gpus for each in readings) or not readings,
            )
        )

    def _take_host(self, reading: asyncio.Future[tuple[HostReading, float]]) -> None:
        if not reading.done():
            self._advance(self._late("host", "memory"))
            return
        self._host_reading = None
        (host, memory), took = reading.result()
        at, monotonic = self._clock(), self._monotonic()
        self._advance(MachineLook(at, monotonic, "host", took, host=host, server_memory=memory))

    def _late(self, source: str, what: str) -> MachineLook:
        problem = f"the machine's {what} cannot be read in time: figures are left out until it answers"
        return MachineLook(self._clock(), self._monotonic(), source, problems=(problem,), failed=True)

    def _advance(self, look: MachineLook) -> None:
        for problem in look.problems:
            self._tell(logging.WARNING, problem)
        self._history = advance(self._history, look)

    def _tell(self, level: int, words: str) -> None:
        now = self._monotonic()
        self._told = {told: at for told, at in self._told.items() if now - at < CALM_SECONDS}
        if words not in self._told:
            log.log(level, "%s", words)
        self._told[words] = now

    def _publish_now(self) -> MachineBox:
        now = self._monotonic()
        published = box(self._history, now)
        self._publish(published)
        if self._aging is not None:
            self._aging.cancel()
        expiry = expires_at(self._history, now)
        if expiry is not None:
            self._aging = asyncio.get_running_loop().call_later(expiry - now + 0.01, self._publish_now)
        return published


def _looked(backend: GpuBackend) -> GpuReading:
    """Return what a backend reads; a fault in one costs its own GPUs and nothing else."""
    try:
        return backend.look()
    except Exception as error:
        where = what_and_where(error)
        return GpuReading(
            problems=(f"{backend.name} fails by a fault of kvscope ({where}); please report it",)
        )


def _renamed(reading: GpuReading, backend: str) -> GpuReading:
    return replace(reading, gpus=tuple(replace(gpu, gpu=f"{backend}{gpu.gpu}") for gpu in reading.gpus))


def _with_load(server: ServerOnMachine, lines: Sequence[str] | None) -> ServerOnMachine:
    """The pretend backend brings its servers' load lines along."""
    return (
        server
        if lines is None
        else replace(server, load=replace(server.load, logged=parse_allocation(lines)))
    )
