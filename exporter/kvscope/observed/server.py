"""What one look at a llama.cpp server shows.

A field is None where the server did not tell it: an older build, an endpoint that is off,
a slot that never worked. None is never read as 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from kvscope.observed.logged_memory import LoggedMemory
from kvscope.observed.model import ContextSettings, ModelSeen


class Phase(StrEnum):
    """What a slot does: nothing, reading its prompt, or generating."""

    IDLE = "idle"
    PREFILL = "prefill"
    DECODE = "decode"


class ServerState(StrEnum):
    """How a server answers; the states of the metric `kvscope_server_state`."""

    READY = "ready"
    LOADING = "loading"
    SLEEPING = "sleeping"
    STALLED = "stalled"
    SLOTS_DISABLED = "slots_disabled"
    UNAUTHORIZED = "unauthorized"
    NOT_LLAMA_SERVER = "not_llama_server"
    UNREACHABLE = "unreachable"


class Source(StrEnum):
    """Where figures come from: a label of the source metrics."""

    SLOTS = "slots"
    METRICS = "metrics"
    PROPS = "props"
    PROCESS = "process"
    MODEL_FILE = "model_file"


@dataclass(frozen=True, slots=True)
class SlotSeen:
    """One object of /slots, without prompt, parameters or anything else that is not needed.

    held_tokens: `n_prompt_tokens`, the tokens in the slot's cache now (0 after it is cleared).
    computed_tokens, reused_tokens, decoded_tokens: `n_prompt_tokens_processed`,
    `n_prompt_tokens_cache` and `next_token[0].n_decoded` of the task under way; the server
    sets them to 0 again as soon as the task ends.
    """

    id: int
    context_limit_tokens: int | None = None
    processing: bool = False
    phase: Phase | None = None
    task: int | None = None
    held_tokens: int | None = None
    computed_tokens: int | None = None
    reused_tokens: int | None = None
    decoded_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """What /metrics counted since the server's process started.

    process_identity: the header `Process-Start-Time-Unix`; it differs at each start, whatever
    clock it is. *_step: how finely a counter was printed; llama.cpp prints six significant digits,
    so from 1 000 000 tokens on in steps of 10, from 10 million in steps of 100 (seconds likewise).
    """

    computed_tokens: int
    generated_tokens: int
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    reused_tokens: int | None = None
    drafted_tokens: int | None = None
    draft_accepted_tokens: int | None = None
    requests_processing: int | None = None
    requests_deferred: int | None = None
    process_identity: str | None = None
    computed_step: int = 1
    reused_step: int = 1
    generated_step: int = 1
    prefill_seconds_step: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerProps:
    """What /props says of the server and its model.

    model: the name served, without directories, `.gguf` and shard suffix. model_path: where the server
    found its file; it never leaves the exporter.
    sleeping: None on builds that cannot sleep (they have no `is_sleeping`).
    """

    model: str | None = None
    build: str | None = None
    file_type: str | None = None
    total_slots: int | None = None
    context_limit_tokens: int | None = None
    sleeping: bool | None = None
    slots_endpoint: bool | None = None
    metrics_endpoint: bool | None = None
    model_path: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """The local process that listens on the server's port.

    started_at: Unix seconds. sleep_idle_seconds: None where the server never sleeps.
    settings: what its command line and environment say. working_directory: where relative paths in them
    begin.
    """

    pid: int
    started_at: float
    sleep_idle_seconds: float | None = None
    settings: ContextSettings = field(default_factory=ContextSettings)
    working_directory: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SourceAnswer:
    """How one request to one source went.

    problem: None when it went well, else one line that names the thing and the way out.
    """

    source: Source
    duration_seconds: float
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ServerLook:
    """One look at one server: what a history advances by.

    at: Unix seconds; monotonic: seconds of a clock that never jumps.
    slots: None when /slots was not asked or gave nothing. quiet: /slots was left alone because
    /metrics and /props show that no request ran, so the last slots still hold (a slot that was
    erased or restored meanwhile moves no counter).
    consistent: /slots was the same before and after /metrics was read, so the counters belong to
    exactly these slots. model: the shape of the model, where its file or a setting tells it; logged: what
    the server's log says was allocated for it. metrics_available: the server offers /metrics;
    counters_readable: and we may ask for it.
    """

    at: float
    monotonic: float
    state: ServerState
    slots: tuple[SlotSeen, ...] | None = None
    counters: ServerCounters | None = None
    consistent: bool = True
    quiet: bool = False
    props: ServerProps | None = None
    process: ServerProcess | None = None
    process_readable: bool = False
    model: ModelSeen | None = None
    logged: LoggedMemory | None = None
    metrics_available: bool | None = None
    counters_readable: bool | None = None
    answers: tuple[SourceAnswer, ...] = ()
    intervals: tuple[tuple[Source, float], ...] = ()
