"""From a snapshot to a scrape, read back with prometheus_client's own parsers."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import pytest
from fake_snapshots import FIRST_LOOK, full_box, full_counts, full_slot, full_snapshot, unreachable_box
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics_format
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvscope.metrics.collector import ALL_FAMILIES, Exposition, Format, SnapshotCollector
from kvscope.metrics.family import Family, Kind, Reading
from kvscope.observed.server import Phase, ServerState
from kvscope.snapshot import ServerBox, Snapshot

Labels = dict[str, str]


def scrape(snapshot: Snapshot, form: Format = Format.TEXT) -> str:
    return Exposition().render(snapshot, form).decode()


def parsed(snapshot: Snapshot, form: Format = Format.TEXT) -> list[Metric]:
    parse = parse_text if form is Format.TEXT else parse_openmetrics
    return list(parse(scrape(snapshot, form)))


def series(snapshot: Snapshot, name: str, form: Format = Format.TEXT) -> list[tuple[Labels, float]]:
    """Every sample of one name: its labels and value."""
    return [
        (sample.labels, sample.value)
        for metric in parsed(snapshot, form)
        for sample in metric.samples
        if sample.name == name
    ]


def only(box: ServerBox) -> Snapshot:
    return Snapshot((box,))


def test_every_metric_appears_when_everything_is_known() -> None:
    names = {sample.name for metric in parsed(full_snapshot()) for sample in metric.samples}
    expected = {
        f"{family.name}_count" if family.kind is Kind.HISTOGRAM else family.name for family in ALL_FAMILIES
    }
    assert expected <= names


def test_an_unreachable_server_shows_only_what_is_known_of_it() -> None:
    about_it = [
        (sample.name, {name: text for name, text in sample.labels.items() if name != "server"}, sample.value)
        for metric in parsed(only(unreachable_box()))
        for sample in metric.samples
        if sample.labels.get("server") == "far"
    ]
    states = [
        ("kvscope_server_state", {"state": state.value}, float(state is ServerState.UNREACHABLE))
        for state in ServerState
    ]
    assert about_it == [
        ("kvscope_server_up", {}, 0.0),
        *states,
        ("kvscope_server_restarts_total", {}, 0.0),
    ]


def test_a_model_that_is_unknown_is_left_out_of_the_labels() -> None:
    box = replace(full_box(slots=1), model=None, counts=(full_counts(None, 1),))
    assert series(only(box), "kvscope_slot_context_tokens") == [({"server": "main", "slot": "0"}, 3000)]
    assert series(only(box), "kvscope_generated_tokens_total") == [({"server": "main", "slot": "0"}, 333)]
    assert 'model=""' not in scrape(only(box))


@pytest.mark.parametrize("state", ServerState)
def test_exactly_one_server_state_is_1(state: ServerState) -> None:
    states = series(only(replace(full_box(), state=state)), "kvscope_server_state")
    assert {labels["state"]: value for labels, value in states} == {
        each.value: float(each is state) for each in ServerState
    }


def test_exactly_one_phase_is_1_and_none_exists_while_the_phase_is_unknown() -> None:
    box = replace(full_box(), slots=(full_slot(0), replace(full_slot(1), phase=None)))
    phases = series(only(box), "kvscope_slot_phase")
    assert {(labels["slot"], labels["phase"]): value for labels, value in phases} == {
        ("0", Phase.IDLE): 0.0,
        ("0", Phase.PREFILL): 1.0,
        ("0", Phase.DECODE): 0.0,
    }


def test_truths_are_1_and_0_and_unknown_truths_are_absent() -> None:
    def unified(known: bool | None) -> list[float]:
        box = replace(full_box(), kv_unified=known)
        return [value for _, value in series(only(box), "kvscope_kv_unified")]

    assert (unified(True), unified(False), unified(None)) == ([1.0], [0.0], [])


@pytest.mark.parametrize("nothing", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", Format)
def test_what_is_no_number_is_absent(form: Format, nothing: float) -> None:
    box = replace(full_box(), started_at=nothing, requests_deferred=1)
    assert series(only(box), "kvscope_server_start_time_seconds", form) == []
    assert series(only(box), "kvscope_requests_deferred", form) == [({"server": "main", "model": "tiny"}, 1)]


def test_counters_without_a_source_are_absent() -> None:
    counts = replace(
        full_counts("tiny", 1),
        unattributed_tokens=None,
        prefill_seconds=None,
        decode_seconds=None,
        draft_tokens=None,
    )
    text = scrape(only(replace(full_box(slots=1), counts=(counts,))))
    for name in ("unattributed_tokens", "prefill_seconds", "decode_seconds", "draft_tokens"):
        assert f"kvscope_{name}_total" not in text
    assert "kvscope_requests_total" in text


def test_counters_of_an_earlier_model_stay_under_its_own_name() -> None:
    decoded = series(full_snapshot(), "kvscope_decode_seconds_total")
    assert ({"server": "changed", "model": "small"}, 31.25) in decoded
    assert ({"server": "changed", "model": "large"}, 31.25) in decoded
    held = series(full_snapshot(), "kvscope_slot_context_tokens")
    assert {labels["model"] for labels, _ in held if labels["server"] == "changed"} == {"large"}


def test_no_server_is_described_before_anything_is_known_of_what_it_runs() -> None:
    described = series(full_snapshot(), "kvscope_server_info")
    assert {labels["server"] for labels, _ in described} == {"main", "changed"}
    assert described[0] == (
        {"server": "main", "model": "tiny", "build": "b11549", "ftype": "Q4_K_M", "architecture": "llama"},
        1.0,
    )


def test_a_server_that_went_away_is_not_described_by_the_name_of_its_model_alone() -> None:
    gone = replace(full_box(), state=ServerState.UNREACHABLE, up=False, build=None, file_type=None)
    assert series(only(gone), "kvscope_server_info") == []
    assert len(series(only(replace(gone, build="b1")), "kvscope_server_info")) == 1
    assert len(series(only(replace(gone, file_type="F16")), "kvscope_server_info")) == 1


def test_a_histogram_is_cumulative_and_ends_with_its_count() -> None:
    buckets = series(only(full_box()), "kvscope_request_prefill_seconds_bucket")
    by_bound = {labels["le"]: value for labels, value in buckets}
    assert list(by_bound) == [
        "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "30.0", "60.0", "120.0", "300.0", "600.0",
        "1800.0", "+Inf",
    ]  # fmt: skip
    assert (by_bound["0.05"], by_bound["0.1"], by_bound["1800.0"], by_bound["+Inf"]) == (1, 3, 3, 4)
    assert series(only(full_box()), "kvscope_request_prefill_seconds_count")[0][1] == 4
    assert series(only(full_box()), "kvscope_request_prefill_seconds_sum")[0][1] == 1900.5


def test_what_driver_and_kernel_counted_before_kvscope_began_has_no_time_of_creation() -> None:
    text = scrape(full_snapshot(), Format.OPENMETRICS)
    for counter in ("kvscope_gpu_energy_joules", "kvscope_gpu_errors", "kvscope_host_pressure_seconds"):
        assert f"{counter}_total" in text
        assert f"{counter}_created" not in text


def test_the_text_format_has_no_created_series() -> None:
    assert "_created" not in scrape(full_snapshot())


def test_openmetrics_says_since_when_each_counter_counts() -> None:
    created = series(full_snapshot(), "kvscope_generated_tokens_created", Format.OPENMETRICS)
    by_model = {(labels["server"], labels["model"]): value for labels, value in created}
    assert by_model == {
        ("main", "tiny"): FIRST_LOOK,
        ("changed", "small"): FIRST_LOOK,
        ("changed", "large"): FIRST_LOOK + 500,
    }
    restarts = series(full_snapshot(), "kvscope_server_restarts_created", Format.OPENMETRICS)
    assert {value for _, value in restarts} == {FIRST_LOOK}
    assert series(full_snapshot(), "kvscope_request_prefill_seconds_created", Format.OPENMETRICS)


def test_both_formats_tell_the_same_figures() -> None:
    def figures(form: Format) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
        return {
            (sample.name, tuple(sorted(sample.labels.items())), sample.value)
            for metric in parsed(full_snapshot(), form)
            for sample in metric.samples
            if sample.name.startswith("kvscope_") and not sample.name.endswith("_created")
        }

    assert figures(Format.TEXT) == figures(Format.OPENMETRICS)


@pytest.mark.parametrize("form", Format)
def test_no_series_is_told_twice_and_the_series_of_a_metric_stand_together(form: Format) -> None:
    samples = [
        line.rpartition(" ")[0] for line in scrape(full_snapshot(), form).splitlines() if line[0] != "#"
    ]
    assert [name for name, count in Counter(samples).items() if count > 1] == []
    described = [line.split()[2] for line in scrape(full_snapshot(), form).splitlines() if "# TYPE" in line]
    assert len(described) == len(set(described))
    families = [max((d for d in described if s.startswith(d)), key=len) for s in samples]
    assert len([name for name, _ in groupby(families)]) == len(set(families))


def test_openmetrics_bytes_do_not_depend_on_the_escaping_scheme() -> None:
    collector = SnapshotCollector(full_snapshot(), ALL_FAMILIES, with_created=True, broken=set())
    schemes = (openmetrics_format.UNDERSCORES, openmetrics_format.ALLOWUTF8)
    first, second = (openmetrics_format.generate_latest(collector, escaping=scheme) for scheme in schemes)
    assert first == second


def test_a_label_is_escaped_and_made_encodable() -> None:
    box = replace(full_box(slots=1), model='a"b\\c\nd\ud800')
    labels, _ = series(only(box), "kvscope_slot_context_tokens")[0]
    assert labels["model"] == 'a"b\\c\nd?'


def test_the_default_registry_is_left_alone() -> None:
    before = {metric.name for metric in REGISTRY.collect()}
    scrape(full_snapshot())
    assert {metric.name for metric in REGISTRY.collect()} == before
    assert not any(name.startswith("kvscope") for name in before)


def test_the_exporter_tells_its_build_and_its_own_process() -> None:
    text = scrape(Snapshot())
    assert 'kvscope_build_info{python="' in text
    assert "process_resident_memory_bytes" in text


def _breaks(_: Snapshot) -> Iterator[Reading]:
    yield Reading(("main",), 1)
    raise KeyError("canary")


BROKEN_ROWS = {
    "raises": _breaks,
    "has no number": lambda _: [Reading(("main",), "many")],  # type: ignore[arg-type]
    "has a label too many": lambda _: [Reading(("main", "more"), 1)],
    "has no reading": lambda _: [None],
}


@pytest.mark.parametrize("readings", BROKEN_ROWS.values(), ids=BROKEN_ROWS)
@pytest.mark.parametrize("form", Format)
def test_a_broken_row_costs_only_its_own_metric_and_one_line(
    readings, form: Format, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Family("kvscope_broken", Kind.GAUGE, "Broken.", ("server",), "nothing", readings)
    exposition = Exposition((*ALL_FAMILIES[:3], broken, *ALL_FAMILIES[3:]))
    with caplog.at_level(logging.INFO):
        bodies = [exposition.render(full_snapshot(), form).decode() for _ in range(3)]
    without = {line for line in scrape(full_snapshot(), form).splitlines() if "kvscope" in line}
    for body in bodies:
        assert {line for line in body.splitlines() if "kvscope" in line} == without
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("metric kvscope_broken is left out: ")
    assert "canary" not in caplog.text
    assert caplog.records[0].exc_info is None


def test_a_row_that_works_again_is_served_again_and_its_next_fault_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    works = False

    def readings(_: Snapshot) -> list[Reading]:
        if not works:
            raise ValueError
        return [Reading((), 1)]

    family = Family("kvscope_shaky", Kind.GAUGE, "Shaky.", (), "nothing", readings)
    exposition = Exposition([family])
    bodies = []
    for works in (False, True, False):  # noqa: B007 - readings looks at it
        bodies.append(exposition.render(Snapshot(), Format.TEXT).decode())
    assert ["kvscope_shaky 1.0" in body for body in bodies] == [False, True, False]
    assert len(caplog.records) == 2


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH: run `make tools`")
@pytest.mark.parametrize("snapshot", [full_snapshot(), Snapshot()], ids=["full", "empty"])
def test_promtool_finds_nothing_to_say(snapshot: Snapshot) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=scrape(snapshot), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
