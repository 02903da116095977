"""One row = one metric: its name, its words, and a pure function from what is known to readings.

A reading without a value does not exist: a function that returns None for a slot leaves that slot's
series out. The same holds for a label that is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from kvscope.snapshot import HistogramCounts, ModelCounts, ServerBox, SlotBox, SlotCounts, Snapshot


class Kind(StrEnum):
    """How a metric behaves; a state set is exposed as plain gauges, one series a state."""

    GAUGE = "gauge"
    STATE_SET = "state set"
    INFO = "info"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


class Reading(NamedTuple):
    """One series at one instant.

    labels: values in the order of the family's label names; None leaves a label out.
    created_at: Unix seconds since when a counter or histogram counts.
    """

    labels: tuple[object, ...]
    value: float | HistogramCounts
    created_at: float | None = None


Readings = Callable[[Snapshot], Iterable[Reading]]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric. needs: which sources must be readable for it to appear, in words for its reader."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    needs: str
    readings: Readings


SERVER = ("server",)
MODEL = ("server", "model")
SLOT = ("server", "model", "slot")

Value = float | HistogramCounts | Mapping[Any, float] | None
"""None: unknown, so absent. A mapping: one reading an item, whose key is the value of the last label
(a tuple: of the last labels)."""


def spread(labels: tuple[object, ...], value: Value, created_at: float | None = None) -> Iterator[Reading]:
    """Return the readings of one value: none, one, or one for each item of a mapping."""
    if value is None:
        return
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield Reading((*labels, *key) if isinstance(key, tuple) else (*labels, key), part, created_at)
    else:
        yield Reading(labels, value, created_at)


def each_server(value: Callable[[ServerBox], Value]) -> Readings:
    """Return readings labelled server."""
    return lambda snapshot: (
        reading for box in snapshot.servers for reading in spread((box.name,), value(box), box.created_at)
    )


def each_served_model(value: Callable[[ServerBox], Value]) -> Readings:
    """Return readings labelled server and the model it serves now."""
    return lambda snapshot: (
        reading for box in snapshot.servers for reading in spread((box.name, box.model), value(box))
    )


def each_slot(value: Callable[[SlotBox], Value]) -> Readings:
    """Return readings labelled server, the model it serves now, and slot."""
    return lambda snapshot: (
        reading
        for box in snapshot.servers
        for slot in box.slots
        for reading in spread((box.name, box.model, slot.id), value(slot))
    )


def each_model_counted(value: Callable[[ModelCounts], Value]) -> Readings:
    """Return readings labelled server and model, also of models that are served no longer."""
    return lambda snapshot: (
        reading
        for box in snapshot.servers
        for counts in box.counts
        for reading in spread((box.name, counts.model), value(counts), counts.created_at)
    )


def each_slot_counted(value: Callable[[SlotCounts], Value]) -> Readings:
    """Return readings labelled server, model and slot, also of models that are served no longer."""
    return lambda snapshot: (
        reading
        for box in snapshot.servers
        for counts in box.counts
        for slot, slot_counts in counts.slots.items()
        for reading in spread((box.name, counts.model, slot), value(slot_counts), counts.created_at)
    )


def one_of(states: Iterable[str], state: str | None) -> Mapping[str, float] | None:
    """Return 1 for the state that holds and 0 for every other; None while it is unknown."""
    return None if state is None else {str(each): float(each == state) for each in states}
