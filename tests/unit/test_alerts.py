"""The rules in alerts/: what they ask for exists, each is tested, and each alert has a page that helps."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from tests.alerts.mutants import expressions, mutants
from tests.alerts.rules import ALERTS, RULE_FILES, TESTS, Rule, rules
from tests.alerts.survivors import SURVIVORS

from kvscope.metrics.collector import ALL_FAMILIES
from kvscope.metrics.document import LABELS

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
RULES = list(rules())
RULE_NAMES = [rule.name for rule in RULES]
ALERTING = [rule for rule in RULES if rule.alerts]
METRICS = {family.name: set(family.labels) for family in ALL_FAMILIES}
TARGET_LABELS = {"job", "instance"}
"""Labels that Prometheus gives to what it scrapes."""

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on PATH: run `make tools`"
)
each_rule = pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
each_alert = pytest.mark.parametrize("rule", ALERTING, ids=[rule.name for rule in ALERTING])


def selectors(node: Any) -> Iterator[Any]:
    if isinstance(node, promql.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "args"):
        child = getattr(node, name, None)
        for each in child if isinstance(child, list) else [child]:
            if isinstance(each, promql.Expr):
                yield from selectors(each)


def joins(node: Any) -> Iterator[list[str]]:
    if isinstance(node, promql.BinaryExpr) and node.modifier and node.modifier.matching:
        yield list(node.modifier.matching.labels)
    for name in ("lhs", "rhs", "expr", "args"):
        child = getattr(node, name, None)
        for each in child if isinstance(child, list) else [child]:
            if isinstance(each, promql.Expr):
                yield from joins(each)


@each_rule
def test_every_metric_and_label_that_a_rule_asks_for_exists(rule: Rule) -> None:
    known = METRICS | {"up": set()} | {each.name: None for each in RULES if not each.alerts}
    for selector in selectors(promql.parse(rule.expr)):
        assert selector.name in known
        labels = known[selector.name]
        for matcher in selector.matchers.matchers:
            assert labels is not None
            assert matcher.name in labels | TARGET_LABELS, str(selector)


@each_rule
def test_every_value_that_a_rule_selects_is_a_documented_one(rule: Rule) -> None:
    described = {label: text for names, text in LABELS for label in names.split(", ")}
    for selector in selectors(promql.parse(rule.expr)):
        for matcher in selector.matchers.matchers:
            for value in filter(None, matcher.value.split("|")):
                assert f"`{value}`" in described[matcher.name], str(selector)


@each_rule
def test_every_join_tells_exporters_apart(rule: Rule) -> None:
    """Two exporters may both name a server `main`."""
    for labels in joins(promql.parse(rule.expr)):
        assert set(labels) >= TARGET_LABELS


@each_rule
def test_every_rule_has_tests(rule: Rule) -> None:
    assert rule.tests.is_file()


def test_every_test_is_of_a_rule_that_exists() -> None:
    """promtool passes a test of an alert that does not exist."""
    assert set(TESTS.iterdir()) == {rule.tests for rule in RULES}
    for rule in ALERTING:
        tests = yaml.safe_load(rule.tests.read_text(encoding="utf-8"))["tests"]
        asked = [test for group in tests for test in group["alert_rule_test"]]
        assert {test["alertname"] for test in asked} == {rule.name}
        assert any(test.get("exp_alerts") for test in asked), "fires"
        assert any(not test.get("exp_alerts") for test in asked), "does not fire"


@each_alert
def test_every_alert_says_how_bad_it_is_and_what_to_do(rule: Rule) -> None:
    assert rule.fields["labels"]["severity"] in ("warning", "critical")
    assert set(rule.fields["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule.fields["annotations"]["runbook_url"] == f"docs/runbooks/{rule.name}.md"
    assert rule.fields["for"]


@each_alert
def test_every_alert_has_a_page(rule: Rule) -> None:
    page = (RUNBOOKS / f"{rule.name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {rule.name}\n")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == [
        "What it means",
        "How to look",
        "What to do",
        "What makes it false",
    ]


def test_there_is_no_page_without_an_alert_and_each_is_listed() -> None:
    pages = {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == {rule.name for rule in ALERTING}
    listed = re.findall(r"\]\((\w+)\.md\)", (RUNBOOKS / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(pages)


@each_alert
def test_the_list_says_how_long_and_how_bad_as_the_rule_does(rule: Rule) -> None:
    text = (RUNBOOKS / "README.md").read_text(encoding="utf-8")
    [row] = re.findall(rf"^\| \[{rule.name}\].+$", text, re.MULTILINE)
    said = [cell.strip() for cell in row.strip("|").split("|")[-2:]]
    assert said == [rule.fields["for"], rule.fields["labels"]["severity"]]


@pytest.mark.parametrize("path", sorted(RUNBOOKS.glob("*.md")), ids=lambda path: path.stem)
def test_every_metric_that_a_page_names_exists(path: Path) -> None:
    named = re.findall(r"\b(?:\w+:)?kvscope_\w+(?::\w+)?", path.read_text(encoding="utf-8"))
    assert set(named) <= METRICS.keys() | set(RULE_NAMES)


def test_no_rule_has_two_names() -> None:
    assert len(RULE_NAMES) == len(set(RULE_NAMES))


@needs_promtool
def test_promtool_finds_nothing_to_say() -> None:
    files = [str(file) for file in RULE_FILES]
    checked = subprocess.run(
        ["promtool", "check", "rules", "--lint-fatal", *files], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
def test_the_rules_pass_their_tests() -> None:
    """Each fires when it should and not when it should not; `make alerts` breaks each to see them fail."""
    files = [path.name for path in sorted(TESTS.iterdir())]
    tested = subprocess.run(
        ["promtool", "test", "rules", *files], cwd=TESTS, capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_a_rule_is_broken_in_every_way() -> None:
    expr = 'a{x="1",y=~"b|c"} / (d > 0) < 0.5 unless on (job, z) changes(e[10s]) == 1'
    assert [text.replace(" ", "") for _, text in expressions(promql.parse(expr))] == [
        each.replace(" ", "")
        for each in (
            'a{x="1",y=~"b|c"} / (d{} > 0) < 0.5',
            'a{x="1",y=~"b|c"} / (d{} > 0) < 0.5 unless on (z) changes(e{}[10s]) == 1',
            'a{x="1",y=~"b|c"} / (d{} > 0) < 0.5 unless on (job) changes(e{}[10s]) == 1',
            'a{x="1",y=~"b|c"} / (d{} > 0) > 0.5 unless on (job, z) changes(e{}[10s]) == 1',
            'a{y=~"b|c"} / (d{} > 0) < 0.5 unless on (job, z) changes(e{}[10s]) == 1',
            'a{x="1"} / (d{} > 0) < 0.5 unless on (job, z) changes(e{}[10s]) == 1',
            'a{x="1",y=~"c"} / (d{} > 0) < 0.5 unless on (job, z) changes(e{}[10s]) == 1',
            'a{x="1",y=~"b"} / (d{} > 0) < 0.5 unless on (job, z) changes(e{}[10s]) == 1',
            'a{x="1",y=~"b|c"} / (d{} < 0) < 0.5 unless on (job, z) changes(e{}[10s]) == 1',
            'a{x="1",y=~"b|c"} / (d{} > 0) < 0.05 unless on (job, z) changes(e{}[10s]) == 1',
            'a{x="1",y=~"b|c"} / (d{} > 0) < 5.0 unless on (job, z) changes(e{}[10s]) == 1',
            'a{x="1",y=~"b|c"} / (d{} > 0) < 0.5 unless on (job, z) changes(e{}[10s]) != 1',
            'a{x="1",y=~"b|c"} / (d{} > 0) < 0.5 unless on (job, z) changes(e{}[1000ms]) == 1',
            'a{x="1",y=~"b|c"} / (d{} > 0) < 0.5 unless on (job, z) changes(e{}[100000ms]) == 1',
            'a{x="1",y=~"b|c"} / (d{} > 0) < 0.5 unless on (job, z) changes(e{}[10s]) == 0.1',
            'a{x="1",y=~"b|c"} / (d{} > 0) < 0.5 unless on (job, z) changes(e{}[10s]) == 10.0',
        )
    ]
    changes = [mutant.change for mutant in mutants({"alert": "A", "expr": "a > 0", "for": "1m"})]
    assert changes[-4:] == ["never", "always", "for dropped", "for x10"]


@each_rule
def test_every_mutant_can_be_evaluated_and_every_survivor_is_one(rule: Rule) -> None:
    changes = set()
    for mutant in mutants(rule.fields):
        promql.parse(mutant.fields["expr"])
        changes.add(mutant.change)
    assert SURVIVORS.get(rule.name, {}).keys() <= changes


def test_the_rules_stand_where_they_are_looked_for() -> None:
    assert sorted(path.name for path in ALERTS.glob("*.yml")) == sorted(file.name for file in RULE_FILES)
