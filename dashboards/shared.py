"""Panels that several pages show."""

from __future__ import annotations

from grafana_foundation_sdk.models import common as model
from grafana_foundation_sdk.models.dashboard import GridPos

from dashboards import palette, style
from dashboards import queries as ask
from dashboards.style import AnyPanel

PHASE_WORDS: dict[object, tuple[str, str | None]] = {
    number: (phase, palette.PHASES[phase]) for number, phase in enumerate(("idle", "prefill", "decode"))
}
"""What the numbers of SLOT_PHASE stand for."""

NOTHING: dict[object, tuple[str, str | None]] = {0: ("none", palette.TEXT)}

NO_GPU = "no GPU is read"


def requests_waiting(place: GridPos) -> AnyPanel:
    """How many requests wait."""
    panel = style.stat(
        "Waiting",
        place,
        ask.REQUESTS_WAITING,
        description="Requests that wait for a free slot. kvscope_requests_deferred",
    )
    return panel.thresholds(style.steps(palette.TEXT, (1, palette.WARNING), (4, palette.BAD)))


def prefill_so_far(place: GridPos) -> AnyPanel:
    """How long somebody has been waiting for the first token."""
    panel = style.stat(
        "Prefill so far",
        place,
        ask.PREFILL_SO_FAR,
        unit=style.SECONDS,
        decimals=0,
        description="How long the prompt that is read now has taken, the longest where several are."
        " kvscope_slot_phase_started_timestamp_seconds",
    )
    panel.mappings(style.words(NOTHING))
    return panel.thresholds(style.steps(palette.COMPUTED, (60, palette.BAD)))


def kv_in_use(place: GridPos) -> AnyPanel:
    """How much of the KV cache is in use."""
    return style.stat(
        "KV in use",
        place,
        ask.KV_IN_USE,
        unit=style.SHARE,
        colour=palette.KV,
        decimals=0,
        description="Bytes that the slots' tokens occupy, by the bytes that were allocated."
        " kvscope_tier_bytes, kvscope_tier_limit_bytes",
    )


def vram_free(place: GridPos) -> AnyPanel:
    """How much memory the GPUs have left."""
    panel = style.stat(
        "VRAM free",
        place,
        ask.VRAM_FREE,
        unit=style.BYTES,
        description="Memory of the GPUs that is free. kvscope_gpu_memory_free_bytes",
    )
    steps = style.steps(
        palette.TEXT, (0, palette.BAD), (256 * 2**20, palette.WARNING), (2**30, palette.HEALTHY)
    )
    return panel.thresholds(steps).no_value("no GPU")


def slot_bars(place: GridPos) -> AnyPanel:
    """How full the slots are; a slot of a pool is no worry of its own, the pool is."""
    panel = style.slot_bars(
        "How full is each slot?",
        place,
        ask.POOL_BAR,
        ask.SLOT_FILL_UNIFIED,
        ask.SLOT_FILL_SEPARATE,
        description="Tokens that each slot holds, by how many it can hold. Where all share one pool, the"
        " first bar is the pool: it is what can run out. kvscope_slot_context_tokens, kvscope_tier_tokens",
    )
    warned = style.thresholds(palette.KV, (0.8, palette.WARNING), (0.95, palette.BAD))
    for query in ("A", "C"):
        panel.override_by_query(query, style.properties({"thresholds": warned}))
    return panel.thresholds(style.steps(palette.KV))


def prompt_bars(place: GridPos) -> AnyPanel:
    """Where prompt tokens came from, over time."""
    panel = style.bars(
        "Where do the prompt tokens come from?",
        place,
        ask.COMPUTED_BARS,
        ask.REUSED_BARS,
        description="Prompt tokens in every 15 s: computed, or reused from the cache."
        " kvscope_prompt_tokens_total",
    ).no_value("no prompts")
    return style.coloured(panel, {"computed": palette.COMPUTED, "reused": palette.REUSED})


def prefill_quantiles(place: GridPos) -> AnyPanel:
    """How long prefill takes, usually and at worst."""
    panel = style.lines(
        "How long does prefill take?",
        place,
        ask.prefill_quantile(0.5),
        ask.prefill_quantile(0.95),
        unit=style.SECONDS,
        description="Half of the prompts of five minutes took less than p50, all but one in twenty less than"
        " p95. kvscope_request_prefill_seconds",
    ).no_value("no prompts")
    style.coloured(panel, {"p50": palette.COMPUTED})
    panel.override_by_name(
        "p95",
        style.properties(
            {
                **style.fixed(palette.COMPUTED),
                "custom.lineStyle": {"fill": "dash", "dash": [8, 6]},
                "custom.fillBelowTo": "p50",
                "custom.fillOpacity": 15,
            }
        ),
    )
    return panel.show_points(model.VisibilityMode.NEVER)
