"""Metrics of a server as a whole."""

from __future__ import annotations

from collections.abc import Iterator

from kvscope.metrics.family import (
    MODEL,
    SERVER,
    Family,
    Kind,
    Reading,
    each_served_model,
    each_server,
    one_of,
)
from kvscope.observed.server import ServerState
from kvscope.snapshot import Snapshot


def _information(snapshot: Snapshot) -> Iterator[Reading]:
    for box in snapshot.servers:
        # The model's name stays known for its counters' sake when the server is away: no sign of what runs.
        if box.build is not None or box.file_type is not None:
            yield Reading((box.name, box.model, box.build, box.file_type, box.architecture), 1)


FAMILIES = (
    Family(
        "kvscope_server_up",
        Kind.GAUGE,
        "Whether the server answers as a llama.cpp server does: 1 in the states ready, loading, sleeping, "
        "stalled and slots_disabled, else 0.",
        SERVER,
        "nothing",
        each_server(lambda box: box.up),
    ),
    Family(
        "kvscope_server_state",
        Kind.STATE_SET,
        "The state the server is in: 1 for the state that holds, 0 for every other.",
        (*SERVER, "state"),
        "nothing",
        each_server(lambda box: one_of(ServerState, box.state)),
    ),
    Family(
        "kvscope_server_metrics_available",
        Kind.GAUGE,
        "Whether the server's own counters can be read: 0 when it runs without --metrics.",
        SERVER,
        "metrics or props",
        each_server(lambda box: box.metrics_available),
    ),
    Family(
        "kvscope_server_info",
        Kind.INFO,
        "What the server runs, always 1: model, architecture, type of weights and llama.cpp's build.",
        (*MODEL, "build", "ftype", "architecture"),
        "props",
        _information,
    ),
    Family(
        "kvscope_server_restarts_total",
        Kind.COUNTER,
        "Restarts of the server that the exporter saw.",
        SERVER,
        "metrics, process or slots",
        each_server(lambda box: box.restarts),
    ),
    Family(
        "kvscope_server_start_time_seconds",
        Kind.GAUGE,
        "When the server's process started, in seconds since 1970.",
        SERVER,
        "process",
        each_server(lambda box: box.started_at),
    ),
    Family(
        "kvscope_server_last_restart_timestamp_seconds",
        Kind.GAUGE,
        "When the exporter last saw the server restarted, in seconds since 1970; absent before.",
        SERVER,
        "metrics, process or slots",
        each_server(lambda box: box.last_restart_at),
    ),
    Family(
        "kvscope_slots",
        Kind.GAUGE,
        "Slots of the server: the number of requests it works on at once.",
        MODEL,
        "slots or props",
        each_served_model(lambda box: box.slots_total),
    ),
    Family(
        "kvscope_slots_busy",
        Kind.GAUGE,
        "Slots that read a prompt or generate now.",
        MODEL,
        "slots",
        each_served_model(lambda box: box.slots_busy),
    ),
    Family(
        "kvscope_requests_deferred",
        Kind.GAUGE,
        "Requests that wait for a free slot.",
        MODEL,
        "slots; besides metrics while every slot is busy",
        each_served_model(lambda box: box.requests_deferred),
    ),
    Family(
        "kvscope_kv_unified",
        Kind.GAUGE,
        "Whether all slots share one pool of KV cache cells (1) or each has its own (0).",
        MODEL,
        "slots or process",
        each_served_model(lambda box: box.kv_unified),
    ),
)
