"""What every view renders: one frozen box per server, replaced by one assignment.

Trackers fill these values, views (Prometheus, terminal, /snapshot.json) read them; neither knows
the other. None means unknown and is rendered as absence, never as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvscope.observed.gpu import GpuSeen
from kvscope.observed.host import HostSeen, ProcessMemory
from kvscope.observed.server import Phase, ServerState

SNAPSHOT_VERSION = 1
"""Version of /snapshot.json; it grows when a field is renamed or removed."""


@dataclass(frozen=True, slots=True)
class SlotBox:
    """One slot as it is now; its counters are in `SlotCounts`."""

    id: int
    context_tokens: int | None = None
    context_limit_tokens: int | None = None
    phase: Phase | None = None
    phase_started_at: float | None = None
    prefill_tokens: int | None = None
    last_prefill_seconds: float | None = None
    last_prompt_tokens: Mapping[str, int] | None = None
    last_used_at: float | None = None
    lru_rank: int | None = None
    kv_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class TierBox:
    """One tier of the cache as it is now."""

    held_bytes: int | None = None
    limit_bytes: int | None = None
    tokens: int | None = None
    limit_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """What one slot did under one model since the exporter's first look.

    phase_seconds by phase; prompt_tokens by source (computed, unknown); evictions by reason.
    """

    phase_seconds: Mapping[Phase, float]
    prompt_tokens: Mapping[str, int]
    generated_tokens: int | None
    evictions: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class EvictionCount:
    """Events and tokens that left a tier for one reason."""

    events: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class HistogramCounts:
    """A classic histogram: observations per upper bound (not cumulative), and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """Every counter of one server under one model; counters of a model that left stay.

    created_at: Unix seconds of the first look. evictions by (tier, reason, kept).
    unattributed_tokens by source (computed, reused, generated).
    None, or without an entry, where the source of a counter cannot be read.
    """

    model: str | None
    created_at: float
    slots: Mapping[int, SlotCounts]
    requests: Mapping[str, int]
    observations: Mapping[str, int]
    evictions: Mapping[tuple[str, str, str], EvictionCount]
    request_prefill_seconds: HistogramCounts | None = None
    unattributed_tokens: Mapping[str, int] | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    draft_tokens: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class SourceBox:
    """Health of one source of one server.

    up: None before the first answer. interval_seconds: what the poller waits between two looks.
    """

    up: bool | None = None
    failures: int = 0
    last_success_at: float | None = None
    duration_seconds: float | None = None
    interval_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ServerBox:
    """One server as it is now. slots is empty while none is known.

    created_at: Unix seconds of the first look at it, whatever came of it. kv_allocated: bytes by
    (device, kind of cache), None where one is not known. model_bytes: on disk. kv_sources: by setting,
    where the byte figures' settings were read. kv_disagreement: how far formula and log are apart. tiers
    by name.
    """

    name: str
    state: ServerState
    up: bool
    created_at: float
    model: str | None = None
    build: str | None = None
    file_type: str | None = None
    architecture: str | None = None
    metrics_available: bool | None = None
    restarts: int = 0
    started_at: float | None = None
    last_restart_at: float | None = None
    slots_total: int | None = None
    slots_busy: int | None = None
    requests_deferred: int | None = None
    kv_unified: bool | None = None
    kv_allocated: Mapping[tuple[str | None, str | None], int] | None = None
    kv_bytes_per_token: float | None = None
    kv_sources: Mapping[str, str] | None = None
    kv_disagreement: float | None = None
    model_bytes: int | None = None
    tiers: Mapping[str, TierBox] = field(default_factory=dict)
    slots: tuple[SlotBox, ...] = ()
    counts: tuple[ModelCounts, ...] = ()
    sources: Mapping[str, SourceBox] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class GpuBox:
    """One GPU as it is now, and who holds its memory.

    seen: its readings; None while it is lost. budget: bytes by (kind, server), which sum to its memory;
    the server is None for kinds that are nobody's or others'. server_bytes by server, process_bytes by
    program, the largest. energy_joules and errors are counters: they go on while it is lost.
    """

    gpu: str
    seen: GpuSeen | None = None
    budget: Mapping[tuple[str, str | None], int] | None = None
    server_bytes: Mapping[str, int] = field(default_factory=dict)
    process_bytes: Mapping[str, int] = field(default_factory=dict)
    energy_joules: float | None = None
    errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MachineBox:
    """The GPUs and the memory of the machine that kvscope runs on.

    server_memory by server, of those whose process is in sight. pressure_seconds is a counter.
    """

    created_at: float
    gpus: tuple[GpuBox, ...] = ()
    host: HostSeen | None = None
    pressure_seconds: Mapping[str, float] | None = None
    server_memory: Mapping[str, ProcessMemory] = field(default_factory=dict)
    sources: Mapping[str, SourceBox] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is known at one instant. servers in the order of the settings."""

    servers: tuple[ServerBox, ...] = ()
    machine: MachineBox | None = None


class Board:
    """Where boxes are hung up: each server's poller replaces its own, every view reads all.

    Boxes are frozen and a publish is one assignment, so a reader never sees half of one and no
    server waits for another. `version` grows with each publish: a view that rendered it once can
    serve the same bytes until it changes.
    """

    def __init__(self, server_names: tuple[str, ...]) -> None:
        self._names = server_names
        self._boxes: dict[str, ServerBox] = {}
        self._machine: MachineBox | None = None
        self.version = 0

    def publish(self, box: ServerBox) -> None:
        """Replace the box of one server."""
        self._boxes[box.name] = box
        self.version += 1

    def publish_machine(self, box: MachineBox) -> None:
        """Replace the box of the machine."""
        self._machine = box
        self.version += 1

    def snapshot(self) -> Snapshot:
        """Return every server's newest box, in the order of the settings, and the machine's."""
        servers = tuple(self._boxes[name] for name in self._names if name in self._boxes)
        return Snapshot(servers, self._machine)

    def box(self, name: str) -> ServerBox | None:
        """Return the newest box of one server; None before the first."""
        return self._boxes.get(name)

    def missing(self) -> tuple[str, ...]:
        """Return the names of the servers that were not looked at yet, in the order of the settings."""
        return tuple(name for name in self._names if name not in self._boxes)
