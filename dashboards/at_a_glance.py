"""At a glance: one screen, readable from three metres, about one server."""

from __future__ import annotations

from grafana_foundation_sdk.builders import barchart, common, dashboard
from grafana_foundation_sdk.models import common as model
from grafana_foundation_sdk.models.dashboard import DataTransformerConfig, FieldColorModeId

from dashboards import canvas, palette, shared, style
from dashboards import queries as ask
from dashboards.page import Page
from dashboards.style import AnyPanel, at


def _large(panel: AnyPanel, value: int = 44, title: int | None = None) -> AnyPanel:
    text = common.VizTextDisplayOptions().value_size(value)
    return panel.text(text.title_size(title) if title else text)


def _server() -> AnyPanel:
    panel = style.stat(
        "Server",
        at(0, 0, 4, 4),
        ask.SERVER_STATE,
        description="What state the server is in. kvscope_server_state",
    )
    panel.text_mode(model.BigValueTextMode.NAME).color_mode(model.BigValueColorMode.BACKGROUND_SOLID)
    for state, colour in palette.STATES.items():
        panel.override_by_regexp(f"/^{state}$/", style.properties(style.fixed(colour)))
    panel.thresholds(style.steps(palette.IDLE)).no_value("no exporter")
    return _large(panel, 36, 36)


def _evicted() -> AnyPanel:
    panel = style.stat(
        "Evicted, 24 h",
        at(12, 0, 4, 4),
        ask.EVICTED_TOKENS_24H,
        description="Tokens that left the slots in 24 hours; whether a copy was kept is not known."
        " kvscope_evicted_tokens_total",
    )
    return _large(panel)


def _goes_next() -> AnyPanel:
    panel = style.stat(
        "Next / pool",
        at(16, 0, 4, 4),
        ask.NEXT_TO_GO,
        ask.POOL_FILL,
        description="With separate slots: which slot the next unrelated prompt takes, and the tokens it"
        " holds; a dash while all are busy. Where all slots share one pool: how full it is."
        " kvscope_slot_lru_rank, kvscope_tier_tokens",
    )
    panel.text_mode(model.BigValueTextMode.VALUE_AND_NAME).wide_layout(False)
    panel.override_by_query(
        "B",
        style.properties(
            {
                "unit": style.SHARE,
                "decimals": 0,
                "thresholds": style.thresholds(palette.KV, (0.8, palette.WARNING), (0.95, palette.BAD)),
            }
        ),
    )
    return _large(panel, 36, 26)


def _flow() -> AnyPanel:
    panel = dashboard.Panel().type("canvas").title("Where do the prompts come from?")
    panel.grid_pos(at(0, 4, 10, 11)).datasource(style.DATASOURCE).options(canvas.options())
    panel.description(
        "Prompt tokens of the last five minutes: computed, or reused from the cache; and tokens generated."
        " kvscope_prompt_tokens_total, kvscope_generated_tokens_total"
    )
    for query in (ask.COMPUTED_SHARE_5M, ask.REUSED_SHARE_5M, ask.PROMPT_TOKENS_5M, ask.GENERATED_5M):
        panel.with_target(style.target(query.now()))
    for share in ("computed", "reused"):
        panel.override_by_name(
            share, style.properties({"unit": style.SHARE, "min": 0, "max": 1, "decimals": 0})
        )
    return panel.unit(style.COUNT).no_value(style.UNKNOWN)


def _slots() -> list[AnyPanel]:
    """The bars and, one row a bar, what the slot does and holds: a table that is read from three metres."""
    doing = style.column("Doing", at(16, 4, 3, 11), ask.SLOTS_BUSY_NOW, ask.SLOT_PHASE, value_size=22)
    doing.color_mode(model.BigValueColorMode.BACKGROUND_SOLID).thresholds(style.steps(palette.IDLE))
    doing.override_by_query("A", style.properties({"unit": "suffix: busy"}))
    doing.override_by_query("B", style.properties({"mappings": style.mapped(shared.PHASE_WORDS)}))
    tokens = style.column("Holds", at(19, 4, 2, 11), ask.POOL_TOKENS, ask.SLOT_TOKENS)
    size = style.column("KV", at(21, 4, 3, 11), ask.POOL_BYTES, ask.SLOT_BYTES, unit=style.BYTES)
    return [shared.slot_bars(at(10, 4, 6, 11)), doing, tokens, size]


def _ten_minutes() -> AnyPanel:
    panel = style.bars(
        "… and over the last ten minutes",
        at(0, 15, 10, 8),
        ask.COMPUTED_BARS,
        ask.REUSED_BARS,
        description="Prompt tokens in every 15 s, in the colours above. kvscope_prompt_tokens_total",
    )
    style.coloured(panel, {"computed": palette.COMPUTED, "reused": palette.REUSED})
    return panel.time_from("10m").hide_time_override(True).legend(style.no_legend()).no_value("no prompts")


def _vram() -> AnyPanel:
    panel = (
        barchart.Panel().title("Who holds the VRAM?").grid_pos(at(10, 15, 14, 5)).datasource(style.DATASOURCE)
    )
    panel.description("Who holds the memory of each GPU. kvscope_gpu_memory_by_kind_bytes")
    panel.with_target(style.target(ask.VRAM_BY_KIND.rows()))
    panel.with_transformation(style.pivot(column="kind", row="gpu"))
    panel.with_transformation(
        DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": {},
                "renameByName": {},
                "indexByName": {name: i for i, name in enumerate(("gpu\\kind", *palette.VRAM))},
            },
        )
    )
    panel.unit(style.BYTES).orientation(model.VizOrientation.HORIZONTAL).no_value(shared.NO_GPU)
    panel.stacking(model.StackingMode.PERCENT).max(1).show_value(model.VisibilityMode.NEVER)
    panel.bar_width(0.97).group_width(0.9).fill_opacity(100).line_width(0).legend(style.no_legend())
    panel.axis_placement(model.AxisPlacement.HIDDEN)
    panel.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.FIXED).fixed_color(palette.NEUTRAL))
    for kind, (_, colour) in palette.VRAM.items():
        panel.override_by_name(kind, style.properties(style.fixed(colour)))
    # A bar ignores the alpha of its colour.
    panel.override_by_name(
        "free", style.properties({**style.fixed(palette.NEUTRAL), "custom.fillOpacity": 15})
    )
    return panel


def _vram_legend() -> AnyPanel:
    panel = style.stat(
        "",
        at(10, 20, 14, 3),
        *[ask.vram(kind, name) for kind, (name, _) in palette.VRAM.items()],
        unit=style.BYTES,
        description="The legend of who holds the VRAM. kvscope_gpu_memory_by_kind_bytes",
    )
    panel.text_mode(model.BigValueTextMode.VALUE_AND_NAME).wide_layout(False).transparent(True)
    # The panel above says already that there is none.
    panel.no_value(" ")
    style.coloured(panel, dict(palette.VRAM.values()))
    style.coloured(panel, {"free": palette.TEXT})
    return _large(panel, 21, 15)


PAGE = Page(
    uid="kvscope-at-a-glance",
    title="kvscope: At a glance",
    description="One server on one screen: what it does, where its prompts come from, how full its slots are,"
    " who holds the VRAM. Made for ?kiosk at 1600 x 900.",
    panels=[
        _server(),
        _large(shared.requests_waiting(at(4, 0, 4, 4))),
        _large(shared.prefill_so_far(at(8, 0, 4, 4))),
        _evicted(),
        _goes_next(),
        _large(shared.vram_free(at(20, 0, 4, 4))),
        _flow(),
        *_slots(),
        _ten_minutes(),
        _vram(),
        _vram_legend(),
    ],
    one_server=True,
    bare=True,
)
