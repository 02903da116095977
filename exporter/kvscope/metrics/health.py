"""Metrics of the exporter itself: its build and the health of its sources."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from importlib.metadata import version

from kvscope.metrics.family import Family, Kind, Reading, Readings, spread
from kvscope.snapshot import SourceBox

SOURCE = ("server", "source")


@cache
def package_version() -> str:
    """Return the version of kvscope that is installed."""
    return version("kvscope")


def _each_source(value: Callable[[SourceBox], float | None]) -> Readings:
    """Readings labelled server and source; those of the machine's sources have no server."""
    return lambda snapshot: (
        reading
        for name, box in (
            *((server.name, server) for server in snapshot.servers),
            *(((None, snapshot.machine),) if snapshot.machine else ()),
        )
        for source, source_box in box.sources.items()
        for reading in spread((name, source), value(source_box), box.created_at)
    )


FAMILIES = (
    Family(
        "kvscope_build_info",
        Kind.INFO,
        "The exporter's version and the Python it runs on, always 1.",
        ("version", "python"),
        "nothing",
        lambda _: (Reading((package_version(), platform.python_version()), 1),),
    ),
    Family(
        "kvscope_source_up",
        Kind.GAUGE,
        "Whether the last look at the source went well.",
        SOURCE,
        "nothing",
        _each_source(lambda source: source.up),
    ),
    Family(
        "kvscope_source_failures_total",
        Kind.COUNTER,
        "Looks at the source that failed.",
        SOURCE,
        "nothing",
        _each_source(lambda source: source.failures),
    ),
    Family(
        "kvscope_source_last_success_timestamp_seconds",
        Kind.GAUGE,
        "When a look at the source last went well, in seconds since 1970.",
        SOURCE,
        "nothing",
        _each_source(lambda source: source.last_success_at),
    ),
    Family(
        "kvscope_source_duration_seconds",
        Kind.GAUGE,
        "How long the last look at the source took; absent after one that failed.",
        SOURCE,
        "nothing",
        _each_source(lambda source: source.duration_seconds),
    ),
    Family(
        "kvscope_poll_interval_seconds",
        Kind.GAUGE,
        "How long the exporter waits at present between two looks at the source.",
        SOURCE,
        "nothing",
        _each_source(lambda source: source.interval_seconds),
    ),
)
