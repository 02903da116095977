"""From a page to the JSON that Grafana reads: the same bytes every time."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from dashboards import queries
from dashboards.palette import NEUTRAL
from dashboards.queries import ONE_SERVER, SEVERAL_SERVERS, Scope
from dashboards.style import DATASOURCE, AnyPanel

SCHEMA_VERSION = 42
TAG = "kvscope"
ASKED_ON_IMPORT = {
    "name": "DS_PROMETHEUS",
    "label": "Prometheus",
    "description": "The Prometheus that scrapes kvscope",
    "type": "datasource",
    "pluginId": "prometheus",
    "pluginName": "Prometheus",
}


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading; folded, they are asked for only when somebody opens it."""

    title: str
    y: int
    panels: Sequence[AnyPanel]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """A dashboard. uid: also the name of its file, and what links to it; it never changes.

    one_server: instance and server have one value each, so that no two servers are drawn as one.
    bare: one screen without variables and links, for a monitor at the wall.
    """

    uid: str
    title: str
    description: str
    panels: Sequence[AnyPanel | Row]
    one_server: bool = False
    bare: bool = False

    @property
    def scope(self) -> Scope:
        """What the placeholders of its queries stand for."""
        return ONE_SERVER if self.one_server else SEVERAL_SERVERS


def render(page: Page, *, by_hand: bool = False) -> dict[str, Any]:
    """Return the dashboard as Grafana's classic JSON; by_hand: with the question which Prometheus it is.

    One form cannot do both: from a file nobody is asked, and a data source of an unknown name becomes
    Grafana's first one, not its default.
    """
    built: dict[str, Any] = json.loads(json.dumps(_builder(page).build(), cls=JSONEncoder))
    built["panels"] = [panel for part in page.panels for panel in _panels(part)]
    built["schemaVersion"] = SCHEMA_VERSION
    built["annotations"]["list"] = [_restarts(switch=not page.bare)]
    if page.bare:
        built["timepicker"] = {"hidden": True}
    if by_hand:
        built["__inputs"] = [ASKED_ON_IMPORT]
        answer = "${" + ASKED_ON_IMPORT["name"] + "}"
        built["templating"]["list"][0]["current"] = {"selected": False, "text": answer, "value": answer}
    for variable in built["templating"]["list"]:
        for key in [key for key in variable if key.startswith("auto")]:
            del variable[key]
    for link in built.get("links", ()):
        link.pop("placement", None)
    _resolve(built, page.scope)
    return built


def text(page: Page, *, by_hand: bool = False) -> str:
    """Return the file of a page."""
    return json.dumps(render(page, by_hand=by_hand), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def every_panel(rendered: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the panels of a dashboard in reading order, also those of folded rows, and the rows."""
    for panel in rendered["panels"]:
        yield panel
        yield from panel.get("panels", ())


def _builder(page: Page) -> Any:
    builder = (
        builders.Dashboard(page.title)
        .uid(page.uid)
        .description(page.description)
        .tags([TAG])
        .time("now-15m", "now")
        .refresh("5s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .editable()
    )
    for variable in _variables(page):
        builder.with_variable(variable)
    if not page.bare:
        builder.link(
            builders.DashboardLink(TAG)
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
    return builder


def _variables(page: Page) -> Iterator[Any]:
    yield (
        builders.DatasourceVariable("datasource")
        .label("Data source")
        .type("prometheus")
        .current(VariableOption(text="default", value="default", selected=True))
        .hide(VariableHide.HIDE_VARIABLE)
    )
    yield (
        _variable("job", "Job", "label_values(kvscope_server_up, job)")
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .hide(VariableHide.HIDE_VARIABLE)
    )
    several = not page.one_server
    matcher = "=" if page.one_server else "=~"
    chain = (
        ("instance", "Exporter", 'label_values(kvscope_server_up{job=~"$job"}, instance)', several),
        (
            "server",
            "Server",
            f'label_values(kvscope_server_up{{job=~"$job", instance{matcher}"$instance"}}, server)',
            several,
        ),
        ("model", "Model", "label_values(kvscope_requests_total{<server>}, model)", True),
    )
    for name, label, query, many in chain:
        variable = _variable(name, label, query).multi(many).include_all(many)
        if many:
            variable.all_value(".*")
            variable.current(VariableOption(text=["All"], value=["$__all"], selected=True))
        variable.hide(VariableHide.HIDE_VARIABLE if page.bare else VariableHide.DONT_HIDE)
        yield variable


def _variable(name: str, label: str, query: str) -> Any:
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query({"qryType": 5, "query": query, "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def _restarts(*, switch: bool) -> dict[str, Any]:
    return {
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "enable": True,
        "expr": queries.RESTARTS.expression,
        "hide": not switch,
        "iconColor": NEUTRAL,
        "name": "Restarts",
        "step": "60s",
        "textFormat": "{{server}} was restarted",
        "titleFormat": "restart",
        "useValueForTime": "on",
    }


def _panels(part: AnyPanel | Row) -> Iterator[dict[str, Any]]:
    if not isinstance(part, Row):
        yield _panel(part)
        return
    inside = [_panel(panel) for panel in part.panels]
    yield {
        "type": "row",
        "title": part.title,
        "collapsed": part.folded,
        "gridPos": {"x": 0, "y": part.y, "w": 24, "h": 1},
        "id": _identity("row", part.title),
        "panels": inside if part.folded else [],
    }
    if not part.folded:
        yield from inside


def _panel(builder: AnyPanel) -> dict[str, Any]:
    panel: dict[str, Any] = json.loads(json.dumps(builder.build(), cls=JSONEncoder))
    panel["id"] = _identity(panel["type"], panel.get("title") or panel["description"])
    for letter, target in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", panel.get("targets", ()), strict=False):
        target["refId"] = letter
    for option in ("footer", "perPage"):
        panel.get("options", {}).pop(option, None)
    return panel


def _identity(kind: str, title: str) -> int:
    """Return a panel's id, which stays when panels come and go around it: links name it."""
    return zlib.crc32(f"{kind}: {title}".encode()) % 1_000_000


def _resolve(built: dict[str, Any], scope: Scope) -> None:
    resolve: Callable[[str], str] = scope.resolve
    for panel in every_panel(built):
        for target in panel.get("targets", ()):
            target["expr"] = resolve(target["expr"])
            if "legendFormat" in target:
                target["legendFormat"] = resolve(target["legendFormat"])
    for annotation in built["annotations"]["list"]:
        annotation["expr"] = resolve(annotation["expr"])
    for variable in built["templating"]["list"]:
        if isinstance(variable.get("query"), dict):
            variable["query"]["query"] = resolve(variable["query"]["query"])
