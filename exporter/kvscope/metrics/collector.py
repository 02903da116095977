"""From a snapshot to the bytes of a scrape, through prometheus_client."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import lru_cache
from math import isfinite

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client import exposition as text_format
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics_format
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from kvscope.logs import what_and_where
from kvscope.metrics import cache, gpu, health, memory, server, slots
from kvscope.metrics.family import Family, Kind
from kvscope.snapshot import HistogramCounts, Snapshot

log = logging.getLogger(__name__)

SUBJECTS: tuple[tuple[str, tuple[Family, ...]], ...] = (
    ("Server", server.FAMILIES),
    ("Slots", slots.FAMILIES),
    ("What flows through the cache", cache.FAMILIES),
    ("Memory", memory.FAMILIES),
    ("GPU", gpu.FAMILIES),
    ("The exporter itself", health.FAMILIES),
)
ALL_FAMILIES: tuple[Family, ...] = tuple(family for _, families in SUBJECTS for family in families)


class Format(Enum):
    """The formats of a scrape; the value is the content type."""

    TEXT = text_format.CONTENT_TYPE_PLAIN_0_0_4
    OPENMETRICS = openmetrics_format.CONTENT_TYPE_LATEST


class SnapshotCollector(Collector):
    """prometheus_client's view of one snapshot.

    with_created: give `_created` samples, which only OpenMetrics has.
    broken: names of the families that failed last time; a failure is logged when it begins, not at
    every scrape.
    """

    def __init__(
        self, snapshot: Snapshot, families: Iterable[Family], *, with_created: bool, broken: set[str]
    ) -> None:
        self._snapshot = snapshot
        self._families = families
        self._with_created = with_created
        self._broken = broken

    def collect(self) -> Iterator[Metric]:
        """Yield each family that has a reading; one that fails is left out and costs no other."""
        for family in self._families:
            try:
                metric = _metric(family, self._snapshot, with_created=self._with_created)
            except Exception as error:  # whatever a row raises, the other rows must be served
                if family.name not in self._broken:
                    log.error(  # noqa: TRY400 - one line, without the exception's text
                        "metric %s is left out: a fault of kvscope (%s), please report it",
                        family.name,
                        what_and_where(error),
                    )
                self._broken.add(family.name)
                continue
            self._broken.discard(family.name)
            if metric.samples:
                yield metric


class Exposition:
    """Renders snapshots in either format; keeps nothing of them."""

    def __init__(self, families: Iterable[Family] = ALL_FAMILIES) -> None:
        self._families = tuple(families)
        self._broken: set[str] = set()
        self._process = ProcessCollector(registry=None)

    def render(self, snapshot: Snapshot, form: Format) -> bytes:
        """Return the body of a scrape: every known family, then the exporter's process metrics."""
        registry = CollectorRegistry()
        with_created = form is Format.OPENMETRICS
        registry.register(
            SnapshotCollector(snapshot, self._families, with_created=with_created, broken=self._broken)
        )
        registry.register(self._process)
        if form is Format.TEXT:
            return text_format.generate_latest(registry)
        # No name of ours needs escaping, so every scheme gives the same bytes; the default one walks
        # through each sample's name character by character and takes a third longer.
        body: bytes = openmetrics_format.generate_latest(  # type: ignore[no-untyped-call]
            registry, escaping=openmetrics_format.ALLOWUTF8
        )
        return body


def _metric(family: Family, snapshot: Snapshot, *, with_created: bool) -> Metric:
    counter, information = family.kind is Kind.COUNTER, family.kind is Kind.INFO
    name = family.name.removesuffix("_total" if counter else "_info" if information else "")
    kind = Kind.GAUGE if family.kind is Kind.STATE_SET else family.kind
    metric = Metric(name, family.help, kind)
    add = metric.samples.append
    created = f"{name}_created" if with_created and family.kind in (Kind.COUNTER, Kind.HISTOGRAM) else None
    for reading in family.readings(snapshot):
        labels = {
            label: _text(value)
            for label, value in zip(family.labels, reading.labels, strict=True)
            if value is not None
        }
        if isinstance(reading.value, HistogramCounts):
            metric.samples.extend(_histogram(name, labels, reading.value))
        else:
            value = float(reading.value)
            if not isfinite(value):
                continue
            add(Sample(family.name, labels, value))
        if created and reading.created_at is not None:
            add(Sample(created, labels, reading.created_at))
    return metric


def _histogram(name: str, labels: dict[str, str], histogram: HistogramCounts) -> Iterator[Sample]:
    total = 0
    for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
        total += count
        yield Sample(f"{name}_bucket", {**labels, "le": repr(float(bound))}, total)
    total = sum(histogram.counts)
    yield Sample(f"{name}_bucket", {**labels, "le": "+Inf"}, total)
    yield Sample(f"{name}_count", labels, total)
    yield Sample(f"{name}_sum", labels, histogram.sum)


@lru_cache(maxsize=8192, typed=True)
def _text(value: object) -> str:
    """Return a label's value as text that can be encoded, whatever a server called its model."""
    return str(value).encode("utf-8", "replace").decode("utf-8")
