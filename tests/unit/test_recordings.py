"""Recordings of real servers, replayed through the whole exporter: HTTP to /metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.record.situations import SITUATIONS
from tests.replay.recording import ANSWERS, EXPECTED, RECORDINGS, Recording, load, names
from tests.replay.replay import AnotherOrder, Replayed, replay

LARGEST_BYTES = 200_000
FEWEST_FACTS = 5


@dataclass(frozen=True)
class Fact:
    """A figure that somebody read in the raw answers; facts.toml says where it stands there."""

    recording: str
    says: str
    metric: str
    labels: dict[str, str]
    value: float | None
    after_line: int | None = None
    within: float = 0.0
    wrong_now: str | None = None

    def __str__(self) -> str:
        return f"{self.recording}: {self.says}"


def facts_of(name: str) -> list[Fact]:
    written = tomllib.loads((RECORDINGS / name / "facts.toml").read_text(encoding="utf-8"))["fact"]
    return [
        Fact(name, **{"labels": {}, **fact, "value": None if fact["value"] == "absent" else fact["value"]})
        for fact in written
    ]


FACTS = [fact for name in names() for fact in facts_of(name)]


@cache
def replayed(name: str) -> Replayed:
    lines = {fact.after_line for fact in FACTS if fact.recording == name and fact.after_line}
    return asyncio.run(replay(load(name), lines))


def figure(text: str, fact: Fact) -> float | None:
    """Return the sum of all series with the fact's labels, None where there is none."""
    values = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == fact.metric and fact.labels.items() <= sample.labels.items()
    ]
    return sum(values) if values else None


@pytest.mark.parametrize("name", names())
def test_a_recording_gives_the_expected_bytes(name: str) -> None:
    """After a change that is meant: python -m tests.replay, and read the difference."""
    assert replayed(name).metrics == (EXPECTED / f"{name}.metrics").read_text(encoding="utf-8")


def marked(fact: Fact) -> Any:
    """A figure that the exporter is known to get wrong must fail, until somebody mends it."""
    marks = [pytest.mark.xfail(reason=fact.wrong_now, strict=True)] if fact.wrong_now else []
    return pytest.param(fact, id=str(fact), marks=marks)


@pytest.mark.parametrize("fact", [marked(fact) for fact in FACTS])
def test_a_figure_read_by_hand_is_shown(fact: Fact) -> None:
    shown = replayed(fact.recording)
    value = figure(shown.at[fact.after_line] if fact.after_line else shown.metrics, fact)
    if fact.value is None:
        assert value is None
    else:
        assert value == pytest.approx(fact.value, abs=fact.within, rel=0)


@pytest.mark.parametrize("name", names())
def test_a_recording_is_small_known_and_has_figures_read_by_hand(name: str) -> None:
    assert name in SITUATIONS
    assert load(name).head["situation"] == name
    assert (RECORDINGS / name / ANSWERS).stat().st_size < LARGEST_BYTES
    assert len(facts_of(name)) >= FEWEST_FACTS


def test_every_expected_file_has_its_recording() -> None:
    assert sorted(path.name for path in EXPECTED.iterdir()) == [f"{name}.metrics" for name in names()]


@pytest.mark.parametrize("name", names())
def test_a_recording_tells_nothing_of_where_it_was_made(name: str) -> None:
    for text in all_texts([load(name).head, *load(name).lines]):
        assert not re.search(r"/(home|root|tmp|var|Users)\b|[A-Z]:\\", text)
    for line in load(name).lines:
        if line.get("path") == "/props" and line["status"] == 200:
            assert line["json"]["model_path"] == "models/kvscope-tiny.gguf"


def test_prompt_text_in_the_answers_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """llama-server tells prompts in /slots when LLAMA_SERVER_SLOTS_DEBUG is set."""
    recording = load("b11549__separate_session")
    words = {
        word
        for line in recording.lines
        if line.get("path") == "/slots"
        for slot in line["json"]
        for word in slot.get("prompt", "").split()[:-1]
    }
    assert len(words) > 5
    with caplog.at_level(logging.DEBUG):
        shown = asyncio.run(replay(recording))
    for text in (shown.metrics, *shown.pages.values(), caplog.text):
        assert not [word for word in words if word in text]


@pytest.mark.parametrize(
    ("figure_told", "metric"),
    [
        (r'"n_prompt_tokens": (\d+)', "kvscope_slot_context_tokens"),
        (r"llamacpp:prompt_seconds_total (\S+?)\\n", "kvscope_prefill_seconds_total"),
        (r"llamacpp:tokens_predicted_total (\d+)\\n", "kvscope_generated_tokens_total"),
    ],
)
def test_a_figure_that_a_server_tells_otherwise_is_shown_otherwise(figure_told: str, metric: str) -> None:
    """The replay can fail: the last figure of its kind, changed in every answer, changes the bytes."""
    recording = load("b11549__separate_session")
    text = json.dumps(recording.lines)
    *_, last = re.finditer(figure_told, text)
    text = text.replace(last[0], last[0].replace(last[1], f"1{last[1]}"))
    other = asyncio.run(replay(replace(recording, lines=json.loads(text)))).metrics
    changed = set(other.splitlines()) ^ set(replayed(recording.name).metrics.splitlines())
    assert any(line.startswith(metric) for line in changed)


def test_what_was_not_asked_when_it_was_recorded_is_told_to_be_recorded_anew() -> None:
    recording = load("b11549__no_metrics")
    shorter = Recording(recording.name, recording.head, recording.lines[1:])
    with pytest.raises(AnotherOrder, match=r"line 3: .* asks for /props, .* python -m tests\.record b11549"):
        asyncio.run(replay(shorter))


def test_what_is_asked_less_than_when_it_was_recorded_is_left_out() -> None:
    recording = load("b11549__no_metrics")
    more = [line for line in recording.lines for _ in range(1 + (line.get("path") == "/slots"))]
    shown = asyncio.run(replay(Recording(recording.name, recording.head, more)))
    assert shown.metrics == replayed(recording.name).metrics


def all_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from all_texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from all_texts(part)
