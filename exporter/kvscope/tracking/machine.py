"""The machine's GPUs and memory over time: counters that never go back, readings that age out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvscope.observed.gpu import GpuReading, GpuSeen
from kvscope.observed.host import HostSeen, ProcessMemory
from kvscope.snapshot import GpuBox, MachineBox, SourceBox
from kvscope.tracking.publish import validity_seconds
from kvscope.tracking.vram import (
    ServerClaim,
    ServerLoad,
    budget,
    largest_processes,
    server_bytes,
    server_sizes_on,
)


@dataclass(frozen=True, slots=True)
class ServerOnMachine:
    """A watched server's process and what is known of its load. pid: None where it is out of sight."""

    server: str
    pid: int | None
    load: ServerLoad


@dataclass(frozen=True, slots=True)
class MachineLook:
    """One look at one of the machine's sources, or the news that it is late.

    source: "gpu" or "host"; what belongs to the other one, or could not be read, is None. duration_seconds:
    None while it is late. problems: one line for each thing that could not be read; failed: nothing could.
    """

    at: float
    monotonic: float
    source: str
    duration_seconds: float | None = None
    gpus: GpuReading | None = None
    servers: Sequence[ServerOnMachine] = ()
    host: HostSeen | None = None
    server_memory: Mapping[str, ProcessMemory] = field(default_factory=dict)
    problems: Sequence[str] = ()
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Grown:
    """A counter that somebody else keeps and may begin anew.

    last: what it showed last; None where another one goes on under its name, whose past is not counted.
    total: what it counted in all.
    """

    last: float | None
    total: float

    def after(self, now: float) -> Grown:
        """Return it after it shows another value; a lower one began at 0."""
        if self.last is None:
            return Grown(now, self.total)
        return Grown(now, self.total + (now - self.last if now >= self.last else now))


@dataclass(frozen=True, slots=True)
class MachineHistory:
    """Everything that is known of the machine.

    interval_seconds: how long is waited between two looks at a source. counters by GPU and name: they stay
    when a GPU is lost.
    """

    interval_seconds: float
    created_at: float | None = None
    gpus: tuple[GpuBox, ...] = ()
    gpus_seen: float | None = None
    host: HostSeen | None = None
    server_memory: Mapping[str, ProcessMemory] = field(default_factory=dict)
    host_seen: float | None = None
    counters: Mapping[tuple[str, str], Grown] = field(default_factory=dict)
    identities: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, SourceBox] = field(default_factory=dict)


_ENERGY = "energy"
_HOST = ""


def advance(history: MachineHistory, look: MachineLook) -> MachineHistory:
    """Return the history after one look. Pure: the clock is in the look."""
    history = replace(
        history,
        created_at=look.at if history.created_at is None else history.created_at,
        sources=_sources(history, look),
    )
    if look.gpus is not None:
        history = _with_gpus(history, look, look.gpus)
    if look.host is not None:
        history = _with_host(history, look, look.host)
    return history


def without_source(history: MachineHistory, source: str) -> MachineHistory:
    """Return the history without a source that turned out not to be there."""
    return replace(history, sources={name: each for name, each in history.sources.items() if name != source})


def box(history: MachineHistory, monotonic: float) -> MachineBox:
    """Return what views render at one instant; readings that aged out are absent, counters stay."""
    gpus_valid = _valid(history, history.gpus_seen, monotonic)
    host_valid = _valid(history, history.host_seen, monotonic)
    shown = {each.gpu: each for each in history.gpus} if gpus_valid else {}
    counted = {gpu for gpu, _ in history.counters if gpu != _HOST}
    pressure = {name: grown.total for (gpu, name), grown in history.counters.items() if gpu == _HOST}
    return MachineBox(
        created_at=history.created_at or 0.0,
        gpus=tuple(
            replace(
                shown.get(gpu, GpuBox(gpu)),
                energy_joules=_total(history, gpu, _ENERGY),
                errors={
                    name: int(grown.total)
                    for (of, name), grown in history.counters.items()
                    if of == gpu and name != _ENERGY
                },
            )
            for gpu in sorted(counted | shown.keys())
        ),
        host=history.host if host_valid else None,
        pressure_seconds=pressure or None,
        server_memory=history.server_memory if host_valid else {},
        sources=history.sources,
    )


def expires_at(history: MachineHistory, monotonic: float) -> float | None:
    """Return when (monotonic seconds) the next reading ages out, or None when none will."""
    seen = (history.gpus_seen, history.host_seen)
    times = (each + validity_seconds(history.interval_seconds) for each in seen if each is not None)
    return min((time for time in times if time >= monotonic), default=None)


def _valid(history: MachineHistory, seen: float | None, monotonic: float) -> bool:
    return seen is not None and monotonic <= seen + validity_seconds(history.interval_seconds)


def _sources(history: MachineHistory, look: MachineLook) -> Mapping[str, SourceBox]:
    before = history.sources.get(look.source, SourceBox())
    succeeded = not look.failed
    after = replace(
        before,
        up=succeeded,
        failures=before.failures + (0 if succeeded else 1),
        last_success_at=look.at if succeeded else before.last_success_at,
        duration_seconds=look.duration_seconds if succeeded else None,
        interval_seconds=history.interval_seconds,
    )
    return {**history.sources, look.source: after}


def _with_gpus(history: MachineHistory, look: MachineLook, reading: GpuReading) -> MachineHistory:
    counters = dict(history.counters)
    identities = dict(history.identities)
    for seen in reading.gpus:
        if seen.uuid is not None:
            if identities.get(seen.gpu, seen.uuid) != seen.uuid:
                # Another card under the same label counts from where the old one's counters ended: what it
                # used in its life before is no growth.
                for key in [key for key in counters if key[0] == seen.gpu]:
                    counters[key] = replace(counters[key], last=None)
            identities[seen.gpu] = seen.uuid
        now: dict[str, float] = {name: float(count) for name, count in seen.errors.items()}
        if seen.energy_joules is not None:
            now[_ENERGY] = seen.energy_joules
        for name, value in now.items():
            counters[seen.gpu, name] = _grown(counters, (seen.gpu, name), value)
    boxes = tuple(_gpu_box(seen, reading.gpus, look.servers) for seen in reading.gpus)
    return replace(history, gpus=boxes, gpus_seen=look.monotonic, counters=counters, identities=identities)


def _gpu_box(seen: GpuSeen, gpus: Sequence[GpuSeen], servers: Sequence[ServerOnMachine]) -> GpuBox:
    claims = [
        ServerClaim(each.server, each.pid, server_sizes_on(seen, gpus, each.pid, each.load))
        for each in servers
    ]
    shared = budget(seen, claims)
    return GpuBox(
        gpu=seen.gpu,
        seen=seen,
        budget=None if shared is None else shared.parts,
        server_bytes=server_bytes(seen, claims),
        process_bytes=largest_processes(seen),
    )


def _with_host(history: MachineHistory, look: MachineLook, host: HostSeen) -> MachineHistory:
    counters = dict(history.counters)
    for name, seconds in (host.pressure_seconds or {}).items():
        counters[_HOST, name] = _grown(counters, (_HOST, name), seconds)
    return replace(
        history,
        host=host,
        server_memory=look.server_memory,
        host_seen=look.monotonic,
        counters=counters,
    )


def _grown(counters: Mapping[tuple[str, str], Grown], key: tuple[str, str], value: float) -> Grown:
    return counters[key].after(value) if key in counters else Grown(value, value)


def _total(history: MachineHistory, gpu: str, name: str) -> float | None:
    grown = history.counters.get((gpu, name))
    return None if grown is None else grown.total
