"""Every query of every dashboard over a real session: it returns data, no NaN, and what really happened."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stack import MODES, Series, Stack, Watched

from kvscope.demo.session import CONTEXT_LIMIT, POOL_LIMIT

DASHBOARDS = Path(__file__).parents[2] / "dashboards" / "generated"
STEP_SECONDS = 1
BYTES_PER_TOKEN = 4 * 2 * (2 * 32) * 2
"""Of the demo's model: layers, K and V, KV heads by their width, f16."""
CELLS = {"default": POOL_LIMIT, "separate": 4 * CONTEXT_LIMIT}

# What Grafana would put in: the data source's interval is that of the shipped prometheus.yml.
GRAFANAS = {"__interval": "15s", "__rate_interval": "1m"}

_UNIFIED = "on (job, instance, server, model) (kvscope_kv_unified"
NO_DATA = {
    ("default", "kvscope_slot_lru_rank"): "one pool: slots are not taken by rank",
    ("default", f"unless {_UNIFIED}"): "asks for separate slots",
    ("separate", f"and {_UNIFIED}"): "asks for a pool",
    ("both", "max_over_time(kvscope_requests_deferred"): "four slots, at most three requests at once",
    ("both", "sum by (source) ("): "nothing is unattributed: each request lasts longer than a look",
    ("both", "kvscope_draft_tokens_total"): "the demo's server drafts nothing",
    ("both", 'kind="server_unsplit"'): "the pretend GPU's servers log their parts",
    ("both", 'kind="unattributed"'): "the pretend GPU tells of each program what it holds",
    ("both", "kvscope_gpu_throttled"): "the pretend GPU is never held back",
    ("both", "kvscope_gpu_gtt"): "the pretend GPU has memory of its own",
    ("both", "kvscope_gpu_errors_total"): "the pretend GPU makes no errors",
    ("both", "kvscope_gpu_pcie_bytes_per_second"): "asked for only with --gpu-pcie",
}
"""Queries with these words need not return data; they must parse, and return no error. Why not."""
if not Path("/proc/pressure/memory").exists():
    NO_DATA["both", "kvscope_host_pressure_seconds_total"] = "this kernel has no PSI"


@dataclass(frozen=True)
class Asked:
    """One query of a page. where: page, panel and letter; interval: the panel's own."""

    where: str
    expression: str
    interval: str | None = None
    variable_label: str | None = None


def asked_by(page: dict[str, Any]) -> Iterator[Asked]:
    """Yield every query of a page: of panels (folded ones too), annotations and variables."""
    name = page["uid"]
    for panel in [*page["panels"], *(inside for row in page["panels"] for inside in row.get("panels", ()))]:
        for target in panel.get("targets", ()):
            where = f"{name}: {panel['title'] or panel['id']} {target['refId']}"
            yield Asked(where, target["expr"], panel.get("interval"))
    for annotation in page["annotations"]["list"]:
        if "expr" in annotation:
            yield Asked(f"{name}: annotation {annotation['name']}", annotation["expr"])
    for variable in page["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(
                r"label_values\((.+),\s*(\w+)\)", variable["query"]["query"]
            ).groups()  # type: ignore[union-attr]
            yield Asked(f"{name}: variable {variable['name']}", selector, variable_label=label)


QUERIES = [
    asked for path in sorted(DASHBOARDS.glob("*.json")) for asked in asked_by(json.loads(path.read_text()))
]


def filled_in(asked: Asked, watched: Watched, **windows: str) -> str:
    """Return a query with its variables replaced as Grafana does for this server alone."""
    values = {
        "job": ".+",
        "instance": watched.instance,
        "server": "demo",
        "model": ".*",
        "__range": milliseconds(watched),
        **GRAFANAS,
        **({"__interval": asked.interval} if asked.interval else {}),
        **windows,
    }
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], found[0]), asked.expression)


def milliseconds(watched: Watched) -> str:
    return f"{(watched.ended - watched.began) * 1000:.0f}ms"


def answer_to(asked: Asked, stack: Stack, watched: Watched) -> list[Series]:
    query = filled_in(asked, watched)
    if asked.variable_label:
        values = stack.prometheus.label_values(asked.variable_label, query, watched.began, watched.ended)
        return [Series({asked.variable_label: value}, [(watched.ended, 1.0)]) for value in values]
    return stack.prometheus.query_range(query, watched.began, watched.ended, STEP_SECONDS)


def excused(asked: Asked, mode: str) -> list[tuple[str, str]]:
    return [key for key in NO_DATA if key[0] in (mode, "both") and key[1] in asked.expression]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", QUERIES, ids=lambda asked: asked.where)
def test_every_query_returns_data_and_no_nan(stack: Stack, asked: Asked, mode: str) -> None:
    answer = answer_to(asked, stack, stack.watched[mode])
    values = [value for series in answer for _, value in series.samples]
    assert not [value for value in values if not math.isfinite(value)]
    assert values or excused(asked, mode)


def test_every_excuse_is_needed(stack: Stack) -> None:
    needed = {
        key
        for mode, watched in stack.watched.items()
        for asked in QUERIES
        for key in excused(asked, mode)
        if not answer_to(asked, stack, watched)
    }
    assert needed == set(NO_DATA)


@dataclass(frozen=True)
class Named:
    """A panel of which the driver knows what it must show at the session's end.

    by: the label that tells its series apart; without it there is one. within: over a window longer than the
    session an increase is not exact, Prometheus goes on with it up to the window's edge.
    """

    page: str
    panel: str
    letter: str
    shows: Callable[[Watched], float | Mapping[str, float]]
    by: str | None = None
    within: float = 1e-4


def cells(watched: Watched) -> int:
    return CELLS[watched.mode]


def all_held(watched: Watched) -> int:
    return sum(watched.held.values())


def reused_share(watched: Watched) -> float:
    return watched.truth.reused / (watched.truth.reused + watched.truth.computed)


NAMED = [
    Named("cache", "Computed", "A", lambda watched: watched.truth.computed),
    Named("cache", "Reused", "A", lambda watched: watched.truth.reused),
    Named("cache", "Reused share", "A", reused_share),
    Named("cache", "Tokens evicted", "A", lambda watched: watched.truth.lost()[1]),
    Named("cache", "Which slot lost tokens?", "A", lambda watched: by_slot(watched.slots_lost), by="slot"),
    Named("speed", "Generated", "A", lambda watched: watched.truth.generated),
    Named("speed", "Requests", "A", lambda watched: watched.truth.requests),
    Named("session", "How does each slot fill?", "A", lambda watched: by_slot(watched.held), by="slot"),
    Named(
        "session",
        "How much KV memory does each slot fill?",
        "A",
        lambda watched: by_slot(watched.held, BYTES_PER_TOKEN),
        by="slot",
    ),
    Named(
        "session",
        "How much KV memory does each slot fill?",
        "B",
        lambda watched: cells(watched) * BYTES_PER_TOKEN,
    ),
    Named("memory", "KV in use", "A", lambda watched: all_held(watched) / cells(watched)),
    Named("memory", "Room for tokens", "A", lambda watched: cells(watched) - all_held(watched)),
    Named("memory", "What does a token cost?", "B", lambda watched: BYTES_PER_TOKEN),
    Named("at-a-glance", "Where do the prompts come from?", "B", reused_share),
    Named(
        "at-a-glance",
        "Where do the prompts come from?",
        "C",
        lambda watched: watched.truth.computed + watched.truth.reused,
        within=0.03,
    ),
]


def by_slot(figures: Mapping[int, int], each: int = 1) -> dict[str, float]:
    return {str(slot): count * each for slot, count in figures.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("named", NAMED, ids=lambda named: f"{named.panel} {named.letter}")
def test_a_panel_shows_what_the_driver_knows_to_be_true(stack: Stack, named: Named, mode: str) -> None:
    watched = stack.watched[mode]
    [asked] = [
        each for each in QUERIES if each.where == f"kvscope-{named.page}: {named.panel} {named.letter}"
    ]
    # One bar as wide as the session, where a panel counts in bars.
    query = filled_in(asked, watched, __interval=milliseconds(watched))
    answer = stack.prometheus.query(query, watched.ended)
    shown = {series.labels[named.by] if named.by else "": series.samples[0][1] for series in answer}
    truth = named.shows(watched)
    assert shown == pytest.approx(truth if named.by else {"": truth}, rel=named.within)


def test_the_session_was_one_in_which_something_happened(stack: Stack) -> None:
    """Nothing above is true only because it is 0."""
    for watched in stack.watched.values():
        assert watched.truth.requests == 14
        assert watched.truth.reused > watched.truth.computed > 0
        assert sum(watched.slots_lost.values()) >= 5
