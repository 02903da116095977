"""Cache: what left it, why, what goes next, and what had to be computed."""

from __future__ import annotations

from grafana_foundation_sdk.builders import common

from dashboards import palette, shared, style
from dashboards import queries as ask
from dashboards.page import Page
from dashboards.style import AnyPanel, at


def _top() -> list[AnyPanel]:
    figures = (
        ("Evictions", ask.EVICTIONS, palette.TEXT, "Times that a slot lost tokens. kvscope_evictions_total"),
        (
            "Tokens evicted",
            ask.EVICTED_TOKENS,
            palette.TEXT,
            "Tokens that left the slots; whether a copy was kept is not known. kvscope_evicted_tokens_total",
        ),
        (
            "Computed",
            ask.COMPUTED_TOKENS,
            palette.COMPUTED,
            "Prompt tokens that were computed. kvscope_prompt_tokens_total",
        ),
        (
            "Reused",
            ask.REUSED_TOKENS,
            palette.REUSED,
            "Prompt tokens that came from the cache. kvscope_prompt_tokens_total",
        ),
    )
    panels = [
        style.stat(
            title, at(4 * index, 0, 4, 4), query, colour=colour, description=f"In the time shown: {meaning}"
        )
        for index, (title, query, colour, meaning) in enumerate(figures)
    ]
    reused = style.stat(
        "Reused share",
        at(16, 0, 4, 4),
        ask.REUSED_SHARE,
        unit=style.SHARE,
        colour=palette.REUSED,
        decimals=0,
        description="Share of the prompt tokens in the time shown that came from the cache."
        " kvscope_prompt_tokens_total",
    )
    return [*panels, reused, shared.kv_in_use(at(20, 0, 4, 4))]


def _goes_next() -> AnyPanel:
    panel = style.table(
        "What is in the slots, and what goes next?",
        at(0, 4, 24, 9),
        ask.SLOT_RANK,
        ask.SLOT_PHASE,
        ask.SLOT_FILL,
        ask.SLOT_TOKENS,
        ask.SLOT_LIMIT,
        ask.SLOT_BYTES,
        ask.SLOT_IDLE_FOR,
        description="Each slot, the longest idle first. Order: which the next unrelated prompt takes, known"
        " with separate slots only; those of one pool are emptied whenever another task starts."
        " kvscope_slot_lru_rank, kvscope_slot_phase, kvscope_slot_context_tokens,"
        " kvscope_slot_context_limit_tokens, kvscope_slot_kv_bytes, kvscope_slot_last_used_timestamp_seconds",
    )
    names = style.value_columns("order", "doing", "fill", "tokens", "limit", "KV", "idle for")
    panel.with_transformation(style.sort_by("Value #G", descending=True))
    panel.with_transformation(
        style.columns(
            {
                "Value #A": "order",
                "server": "server",
                "slot": "slot",
                "Value #B": "doing",
                "Value #C": "fill",
                **{field: names[field] for field in ("Value #D", "Value #E", "Value #F", "Value #G")},
            },
            "instance",
        )
    )
    style.cells(
        panel,
        "order",
        width=60,
        mappings=style.mapped({1: ("next", palette.WARNING)}),
        cellOptions=style.COLOURED_TEXT,
        thresholds=style.thresholds(palette.TEXT),
    )
    style.cells(panel, "server", width=110)
    style.cells(panel, "slot", width=70)
    style.cells(
        panel, "doing", width=100, mappings=style.mapped(shared.PHASE_WORDS), cellOptions=style.COLOURED_CELL
    )
    style.cells(
        panel,
        "fill",
        unit=style.SHARE,
        min=0,
        max=1,
        decimals=0,
        cellOptions=style.GAUGE_CELL,
        thresholds=style.thresholds(palette.KV),
    )
    for name in ("tokens", "limit"):
        style.cells(panel, name, width=100, unit="locale")
    style.cells(panel, "KV", width=110, unit=style.BYTES)
    return style.cells(panel, "idle for", width=110, unit=style.SECONDS, decimals=0)


def _tiers() -> list[AnyPanel]:
    full = style.table(
        "How full are the tiers?",
        at(0, 13, 12, 7),
        ask.TIER_FILL,
        ask.TIER_BYTES,
        ask.TIER_LIMIT,
        ask.TIER_TOKENS,
        description="Each tier of the cache: the slots are the first. Thresholds count for the whole tier."
        " kvscope_tier_tokens, kvscope_tier_limit_tokens, kvscope_tier_bytes, kvscope_tier_limit_bytes",
    )
    names = style.value_columns("fill", "holds", "limit", "tokens")
    full.with_transformation(style.columns({"server": "server", "tier": "tier", **names}, "instance"))
    style.cells(full, "server", width=90)
    style.cells(
        full,
        "tier",
        width=60,
        mappings=style.mapped({"slot": ("slots", palette.KV)}),
        cellOptions=style.COLOURED_TEXT,
    )
    style.cells(
        full,
        "fill",
        unit=style.SHARE,
        min=0,
        max=1,
        decimals=0,
        cellOptions=style.GAUGE_CELL,
        thresholds=style.thresholds(palette.KV, (0.8, palette.WARNING), (0.95, palette.BAD)),
    )
    for name in ("holds", "limit"):
        style.cells(full, name, width=85, unit=style.BYTES)
    style.cells(full, "tokens", width=75, unit="locale")
    held = style.levels(
        "How much do the tiers hold?",
        at(12, 13, 12, 7),
        ask.TIER_BYTES,
        ask.TIER_LIMIT,
        unit=style.BYTES,
        description="Bytes that each tier holds, and can hold. kvscope_tier_bytes, kvscope_tier_limit_bytes",
    )
    style.coloured_ends(held, {"slot": palette.KV})
    return [full, style.dashed(held, "slot limit")]


def _evictions() -> list[AnyPanel]:
    why = style.bars(
        "Why was something evicted?",
        at(0, 20, 12, 8),
        ask.EVICTIONS_BY_REASON,
        step=style.COARSE_STEP,
        description="Times that slots lost tokens in every 30 s, by reason. kvscope_evictions_total",
    ).no_value("nothing was evicted")
    style.coloured(why, palette.REASONS)
    mirror = style.bars(
        "How much was evicted, how much computed?",
        at(12, 20, 12, 8),
        ask.EVICTED_BARS,
        ask.COMPUTED_DOWN,
        step=style.COARSE_STEP,
        description="Up: tokens that left the slots; whether a copy was kept is not known yet. Down: prompt"
        " tokens that were computed. kvscope_evicted_tokens_total, kvscope_prompt_tokens_total",
    ).no_value("nothing was evicted or computed")
    mirror.override_by_name(
        "unknown", style.properties({**style.fixed(palette.NEUTRAL), "displayName": "evicted, copy unknown"})
    )
    style.coloured(mirror, {"computed": palette.COMPUTED})
    mirror.min(None)  # type: ignore[arg-type]
    which = style.bars(
        "Which slot lost tokens?",
        at(0, 28, 12, 8),
        ask.SLOT_LOSSES,
        step=style.COARSE_STEP,
        description="Times that each slot lost tokens in every 30 s. kvscope_slot_evictions_total",
    ).no_value("nothing was evicted")
    style.shaded_slots(which, palette.LINES)
    cost = style.bar_gauge(
        "Which reason cost the most tokens?",
        at(12, 28, 12, 8),
        ask.EVICTED_BY_REASON,
        description="Tokens that left the slots in the time shown, by reason. kvscope_evicted_tokens_total",
    )
    cost.show_unfilled(False).text(common.VizTextDisplayOptions().title_size(15).value_size(18))
    return [why, mirror, which, style.coloured(cost, palette.REASONS)]


PAGE = Page(
    uid="kvscope-cache",
    title="kvscope: Cache",
    description="What left the cache and why, what goes next, and what had to be computed.",
    panels=[*_top(), _goes_next(), *_tiers(), *_evictions()],
)
