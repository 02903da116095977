"""House style: one function for each kind of panel, with what every panel of that kind shares.

They return the SDK's builders, so that a page adds what only one of its panels needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    statetimeline,
    timeseries,
)
from grafana_foundation_sdk.builders import (
    heatmap as heatmaps,
)
from grafana_foundation_sdk.builders import (
    stat as stats,
)
from grafana_foundation_sdk.builders import (
    table as tables,
)
from grafana_foundation_sdk.models import common as model
from grafana_foundation_sdk.models.dashboard import (
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    GridPos,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMapping,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.palette import IDLE, NEUTRAL, TEXT, TRANSPARENT
from dashboards.queries import Query

DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")

UNKNOWN = "\N{EN DASH}"
BYTES = "bytes"
SECONDS = "s"
SHARE = "percentunit"
COUNT = "short"
TOKENS_PER_SECOND = "suffix: t/s"

# Fits 4 columns at 1200 px; left to itself, each number would have a size of its own.
STAT_SIZE = 34

# Bars count what a counter rose in each step; shorter steps than a few scrapes would be confetti.
BARS_STEP = "15s"
COARSE_STEP = "30s"
SMOOTH_STEP = "10s"

AnyPanel = Any
"""A builder of the SDK; its panels share their methods but no type."""

P = TypeVar("P")


def at(x: int, y: int, w: int, h: int) -> GridPos:
    """Return a place on the grid of 24 columns."""
    return GridPos(x=x, y=y, w=w, h=h)


def steps(base: str, *above: tuple[float, str]) -> dashboard.ThresholdsConfig:
    """Return thresholds: the colour from the bottom on, and from each value on."""
    first = [Threshold(color=base, value=None)]
    rest = [Threshold(color=colour, value=value) for value, colour in above]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(first + rest)


def fixed(colour: str) -> dict[str, Any]:
    """Return the field property that gives one colour."""
    return {"color": {"mode": "fixed", "fixedColor": colour}}


def words(meanings: Mapping[object, tuple[str, str | None]]) -> list[ValueMapping]:
    """Return value mappings: what a value is called, and its colour."""
    return [
        ValueMap(
            options={
                str(value): ValueMappingResult(text=text, color=colour, index=index)
                for index, (value, (text, colour)) in enumerate(meanings.items())
            }
        )
    ]


def properties(values: Mapping[str, Any]) -> list[DynamicConfigValue]:
    """Return field properties by their ids."""
    return [DynamicConfigValue(id_val=name, value=value) for name, value in values.items()]


def coloured(panel: P, colours: Mapping[str, str], **more: Any) -> P:
    """Give the series of these names their colours."""
    for name, colour in colours.items():
        panel.override_by_name(name, properties({**fixed(colour), **more}))  # type: ignore[attr-defined]
    return panel


def coloured_ends(panel: P, ends: Mapping[str, str]) -> P:
    """Give colours to series whose names end so: before it the name may have a server's."""
    for end, colour in ends.items():
        panel.override_by_regexp(f"/(^|\\s){re.escape(end)}$/", properties(fixed(colour)))  # type: ignore[attr-defined]
    return panel


def shaded_slots(panel: P, shades: Sequence[str]) -> P:
    """Give the series that end in `slot N` the shades in turn."""
    for index, shade in enumerate(shades):
        numbers = "|".join(str(slot) for slot in range(index, 32, len(shades)))
        panel.override_by_regexp(f"/(^|\\s)slot ({numbers})$/", properties(fixed(shade)))  # type: ignore[attr-defined]
    return panel


def dashed(panel: P, name: str, colour: str = NEUTRAL) -> P:
    """Draw one series as a limit: a dashed line on no stack."""
    panel.override_by_regexp(  # type: ignore[attr-defined]
        f"/(^|\\s){re.escape(name)}$/",
        properties(
            {
                **fixed(colour),
                "custom.lineStyle": {"fill": "dash", "dash": [8, 6]},
                "custom.lineWidth": 2,
                "custom.fillOpacity": 0,
                "custom.stacking": {"mode": "none", "group": "limit"},
            }
        ),
    )
    return panel


def target(query: Query) -> prometheus.Dataquery:
    """Return what a panel asks Grafana to ask."""
    asked = prometheus.Dataquery().expr(query.expression).datasource(DATASOURCE)
    if query.legend:
        asked.legend_format(query.legend)
    if query.table:
        asked.format(PromQueryFormat.TABLE)
    elif query.heatmap:
        asked.format(PromQueryFormat.HEATMAP)
    return asked.instant() if query.instant else asked.range()


def _framed(panel: P, title: str, place: GridPos, queries: Iterable[Query], description: str) -> P:
    framed: AnyPanel = panel
    framed.title(title).description(description).grid_pos(place).datasource(DATASOURCE)
    for query in queries:
        framed.with_target(target(query))
    return panel


def stat(
    title: str,
    place: GridPos,
    *queries: Query,
    description: str,
    unit: str = COUNT,
    colour: str = TEXT,
    decimals: int | None = None,
) -> stats.Panel:
    """A number of now."""
    panel = _framed(stats.Panel(), title, place, [query.now() for query in queries], description)
    panel.unit(unit).thresholds(steps(colour)).no_value(UNKNOWN)
    panel.graph_mode(model.BigValueGraphMode.NONE).color_mode(model.BigValueColorMode.VALUE)
    panel.justify_mode(model.BigValueJustifyMode.CENTER).text_mode(model.BigValueTextMode.VALUE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    panel.text(common.VizTextDisplayOptions().value_size(STAT_SIZE))
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def column(
    title: str,
    place: GridPos,
    *queries: Query,
    unit: str = COUNT,
    value_size: int = 19,
) -> stats.Panel:
    """A narrow column beside slot_bars: one number a slot, in the same order.

    It has no description, whose sign would cut its title.
    """
    panel = stat(title, place, *[query.rows() for query in queries], description="", unit=unit)
    panel.orientation(model.VizOrientation.HORIZONTAL).text(
        common.VizTextDisplayOptions().value_size(value_size)
    )
    return _one_row_a_slot(panel)


def _one_row_a_slot(panel: P) -> P:
    rows: AnyPanel = panel
    rows.with_transformation(sort_by("slot"))
    rows.with_transformation(hide("Time", "slot", "tier", "model"))
    rows.reduce_options(common.ReduceDataOptions().values(True).calcs(["lastNotNull"]).fields("/^Value/"))
    return panel


def bar_gauge(
    title: str, place: GridPos, *queries: Query, description: str, unit: str = COUNT, colour: str = NEUTRAL
) -> bargauge.Panel:
    """Horizontal bars of now, one a series."""
    panel = _framed(bargauge.Panel(), title, place, [query.now() for query in queries], description)
    panel.unit(unit).min(0).thresholds(steps(colour))
    panel.orientation(model.VizOrientation.HORIZONTAL).display_mode(model.BarGaugeDisplayMode.GRADIENT)
    panel.value_mode(model.BarGaugeValueMode.TEXT).sizing(model.BarGaugeSizing.AUTO).show_unfilled(True)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    return panel


def slot_bars(title: str, place: GridPos, pool: Query, *slots: Query, description: str) -> bargauge.Panel:
    """How full the pool is, where there is one, and each slot, in the order of their numbers."""
    panel = bar_gauge(
        title, place, *[query.rows() for query in (pool, *slots)], description=description, unit=SHARE
    )
    return _one_row_a_slot(panel.max(1).decimals(0).name_placement(model.BarGaugeNamePlacement.LEFT))


def lines(
    title: str, place: GridPos, *queries: Query, description: str, unit: str = COUNT, fill: int = 0
) -> timeseries.Panel:
    """Lines over time, their names below."""
    panel = _framed(timeseries.Panel(), title, place, queries, description)
    panel.unit(unit).min(0).line_width(2).fill_opacity(fill).interval(SMOOTH_STEP)
    panel.line_interpolation(model.LineInterpolation.LINEAR).show_points(model.VisibilityMode.NEVER)
    panel.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.FIXED).fixed_color(NEUTRAL))
    panel.tooltip(
        common.VizTooltipOptions().mode(model.TooltipDisplayMode.MULTI).sort(model.SortOrder.DESCENDING)
    )
    return panel.legend(legend_below())


def levels(
    title: str, place: GridPos, *queries: Query, description: str, unit: str = COUNT
) -> timeseries.Panel:
    """Lines that keep their height until they change."""
    panel = lines(title, place, *queries, description=description, unit=unit)
    return panel.line_interpolation(model.LineInterpolation.STEP_AFTER)


def stack(
    title: str, place: GridPos, *queries: Query, description: str, unit: str = COUNT
) -> timeseries.Panel:
    """Areas on each other; without a line, which would draw spikes where a series begins or ends."""
    panel = levels(title, place, *queries, description=description, unit=unit)
    return panel.stacking(_normal()).line_width(0).fill_opacity(80)


def bars(
    title: str, place: GridPos, *queries: Query, description: str, unit: str = COUNT, step: str = BARS_STEP
) -> timeseries.Panel:
    """Stacked bars that count what happened in each step."""
    panel = lines(title, place, *queries, description=description, unit=unit)
    panel.draw_style(model.GraphDrawStyle.BARS).stacking(_normal()).line_width(0).fill_opacity(85)
    return panel.interval(step).bar_alignment(model.BarAlignment.CENTER)


def _normal() -> common.StackingConfig:
    return common.StackingConfig().mode(model.StackingMode.NORMAL).group("A")


def legend_below() -> common.VizLegendOptions:
    """Return a legend of names below."""
    return (
        common.VizLegendOptions()
        .display_mode(model.LegendDisplayMode.LIST)
        .placement(model.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs([])
    )


def legend_table(*calcs: str) -> common.VizLegendOptions:
    """Return a legend at the right with figures."""
    return (
        common.VizLegendOptions()
        .display_mode(model.LegendDisplayMode.TABLE)
        .placement(model.LegendPlacement.RIGHT)
        .show_legend(True)
        .calcs(list(calcs))
    )


def no_legend() -> common.VizLegendOptions:
    """Return no legend."""
    return (
        common.VizLegendOptions()
        .display_mode(model.LegendDisplayMode.LIST)
        .placement(model.LegendPlacement.BOTTOM)
        .show_legend(False)
        .calcs([])
    )


def timeline(
    title: str,
    place: GridPos,
    *queries: Query,
    description: str,
    meanings: Mapping[object, tuple[str, str | None]],
) -> statetimeline.Panel:
    """What state each row was in; no words in it, short states would cut them."""
    panel = _framed(statetimeline.Panel(), title, place, queries, description)
    panel.mappings(words(meanings)).fill_opacity(85).line_width(0).row_height(0.82)
    # With thresholds as the colour mode the mappings would be ignored.
    panel.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.FIXED).fixed_color(IDLE))
    panel.show_value(model.VisibilityMode.NEVER).merge_values(True).interval("2s")
    panel.tooltip(common.VizTooltipOptions().mode(model.TooltipDisplayMode.SINGLE).sort(model.SortOrder.NONE))
    return panel.legend(legend_below())


def heatmap(title: str, place: GridPos, query: Query, *, description: str, unit: str) -> heatmaps.Panel:
    """How often each range of values was met in each step."""
    panel = _framed(heatmaps.Panel(), title, place, [query], description)
    panel.interval(COARSE_STEP).cell_gap(2).show_value(model.VisibilityMode.NEVER)
    panel.color(
        heatmaps.HeatmapColorOptions()
        .mode(HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .fill("dark-orange")
        .exponent(0.5)
        .scale(HeatmapColorScale.EXPONENTIAL)
        .reverse(False)
        .steps(64)
    )
    panel.filter_values(heatmaps.FilterValueRange().le(0.5))
    panel.y_axis(heatmaps.YAxisConfig().unit(unit).axis_placement(model.AxisPlacement.LEFT))
    panel.hide_legend()
    return panel


def table(title: str, place: GridPos, *queries: Query, description: str) -> tables.Panel:
    """Rows of now, merged where their labels agree."""
    panel = _framed(tables.Panel(), title, place, [query.rows() for query in queries], description)
    # Where a cell has no value, a base colour would light it.
    panel.thresholds(steps(TRANSPARENT)).no_value(UNKNOWN).align(model.FieldTextAlignment.CENTER)
    panel.cell_options(model.TableAutoCellOptions()).cell_height(model.TableCellHeight.SM).min_width(
        60
    ).filterable(False).inspect(False)
    if len(queries) > 1:
        panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    return panel


def sort_by(field: str, *, descending: bool = False) -> DataTransformerConfig:
    """Return the step that sorts rows; ascending puts missing values first."""
    return DataTransformerConfig(
        id_val="sortBy", options={"fields": {}, "sort": [{"field": field, "desc": descending}]}
    )


def hide(*fields: str) -> DataTransformerConfig:
    """Return the step that drops fields."""
    return DataTransformerConfig(
        id_val="organize",
        options={"excludeByName": dict.fromkeys(fields, True), "indexByName": {}, "renameByName": {}},
    )


def columns(names: Mapping[str, str], *dropped: str) -> DataTransformerConfig:
    """Return the step that orders and names a table's columns and drops others."""
    return DataTransformerConfig(
        id_val="organize",
        options={
            "excludeByName": dict.fromkeys(("Time", *dropped), True),
            "indexByName": {name: index for index, name in enumerate(names)},
            "renameByName": dict(names),
        },
    )


def value_columns(*names: str) -> dict[str, str]:
    """Return what the values of a table's queries, in their order, are called."""
    return {f"Value #{letter}": name for letter, name in zip("ABCDEFGHIJ", names, strict=False)}


def pivot(*, column: str, row: str, value: str = "Value") -> DataTransformerConfig:
    """Return the step that makes one column of each value of a label."""
    return DataTransformerConfig(
        id_val="groupingToMatrix",
        options={"columnField": column, "rowField": row, "valueField": value, "emptyValue": "null"},
    )


def cells(panel: P, name: str, **values: Any) -> P:
    """Set properties of one column; underscores stand for the dots of their ids."""
    panel.override_by_name(name, properties(values_by_id(values)))  # type: ignore[attr-defined]
    return panel


def values_by_id(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return properties by id: `width`, `cellOptions` and `align` are a table's own."""
    own = ("width", "cellOptions", "align")
    return {f"custom.{name}" if name in own else name: value for name, value in values.items()}


GAUGE_CELL = {"type": "gauge", "mode": "gradient", "valueDisplayMode": "text"}
COLOURED_CELL = {"type": "color-background", "mode": "basic"}
COLOURED_TEXT = {"type": "color-text"}


def thresholds(base: str, *above: tuple[float, str]) -> dict[str, Any]:
    """Return thresholds as a field property."""
    return {
        "mode": "absolute",
        "steps": [{"color": base, "value": None}, *({"color": c, "value": v} for v, c in above)],
    }


def mapped(meanings: Mapping[object, tuple[str, str | None]]) -> list[dict[str, Any]]:
    """Return value mappings as a field property."""
    return [mapping.to_json() for mapping in words(meanings)]
