"""docs/METRICS.md says what the exporter exposes, no more and no less."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_snapshots import full_snapshot

from kvscope.metrics.collector import ALL_FAMILIES, SnapshotCollector
from kvscope.metrics.document import LABELS, document
from kvscope.metrics.family import Family, Kind
from kvscope.tracking.history import MOST_MODELS
from kvscope.tracking.slots import Reason

METRICS_MD = Path(__file__).parents[3] / "docs" / "METRICS.md"
DESCRIBED_LABELS = {label: text for names, text in LABELS for label in names.split(", ")}


def test_the_document_in_the_repository_is_up_to_date() -> None:
    assert METRICS_MD.read_text(encoding="utf-8") == document(), "run `make docs`"


def test_every_metric_is_in_the_document_once() -> None:
    assert re.findall(r"^\| `(kvscope_\w+)` \|", document(), re.MULTILINE) == [f.name for f in ALL_FAMILIES]


def test_exactly_the_labels_in_use_are_described() -> None:
    used = {label for family in ALL_FAMILIES for label in family.labels}
    assert set(DESCRIBED_LABELS) == used | {"le"}


@pytest.mark.parametrize(
    "label", ["state", "phase", "source", "outcome", "precision", "tier", "kept", "result"]
)
def test_values_of_closed_label_sets_are_described(label: str) -> None:
    collector = SnapshotCollector(full_snapshot(), ALL_FAMILIES, with_created=False, broken=set())
    values = {s.labels[label] for metric in collector.collect() for s in metric.samples if label in s.labels}
    # The snapshot holds values of later sources too: what polls never give is not promised yet.
    later = {"ok", "cancelled", "failed"}
    assert values
    assert {value for value in values - later if f"`{value}`" not in DESCRIBED_LABELS[label]} == set()


def test_every_reason_that_the_tracker_gives_is_described() -> None:
    assert [reason for reason in Reason if f"`{reason}`" not in DESCRIBED_LABELS["reason"]] == []


@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
def test_names_and_help_follow_the_house_style(family: Family) -> None:
    assert re.fullmatch(r"kvscope_[a-z][a-z0-9_]*[a-z0-9]", family.name)
    assert family.name.endswith("_total") == (family.kind is Kind.COUNTER)
    assert family.name.endswith("_info") == (family.kind is Kind.INFO)
    assert re.fullmatch(r"[A-Z][^\n]*[a-z0-9)]\.", family.help)
    assert ". " not in family.help, "one sentence"
    assert len(set(family.labels)) == len(family.labels)


def test_it_says_how_many_models_keep_their_counters() -> None:
    assert f"with more than {MOST_MODELS} models" in " ".join(document().split())


def test_it_says_what_counts_as_a_request() -> None:
    help_of = {family.name: family.help for family in ALL_FAMILIES}
    assert "n > 1" in help_of["kvscope_requests_total"]


def test_no_two_metrics_share_a_name() -> None:
    names = [family.name for family in ALL_FAMILIES]
    assert len(names) == len(set(names))
