"""Session: what one server's slots hold and do, and what the last prompts cost."""

from __future__ import annotations

from dashboards import palette, shared, style
from dashboards import queries as ask
from dashboards.page import Page, Row
from dashboards.style import AnyPanel, at


def _top() -> list[AnyPanel]:
    reused = style.stat(
        "Reused",
        at(0, 0, 4, 4),
        ask.REUSED_SHARE_5M,
        unit=style.SHARE,
        colour=palette.REUSED,
        decimals=0,
        description="Share of the prompt tokens of the last five minutes that came from the cache."
        " kvscope_prompt_tokens_total",
    )
    reading = style.stat(
        "Being read now",
        at(8, 0, 4, 4),
        ask.BEING_READ,
        description="Tokens read so far of the prompts that are read now. kvscope_slot_prefill_tokens",
    ).mappings(style.words(shared.NOTHING))
    evictions = style.stat(
        "Evictions",
        at(16, 0, 4, 4),
        ask.EVICTIONS,
        description="Times that a slot lost tokens, in the time shown. kvscope_evictions_total",
    )
    return [
        reused,
        shared.prefill_so_far(at(4, 0, 4, 4)),
        reading,
        shared.requests_waiting(at(12, 0, 4, 4)),
        evictions,
        shared.kv_in_use(at(20, 0, 4, 4)),
    ]


def _slots() -> list[AnyPanel]:
    grow = style.levels(
        "How does each slot fill?",
        at(7, 4, 17, 8),
        ask.SLOT_TOKENS,
        description="Tokens that each slot holds. kvscope_slot_context_tokens",
    )
    style.shaded_slots(grow, palette.LINES)
    doing = style.timeline(
        "What is each slot doing?",
        at(0, 12, 12, 7),
        ask.SLOT_PHASE,
        description="Reading a prompt, generating, or idle. kvscope_slot_phase",
        meanings=shared.PHASE_WORDS,
    )
    return [
        shared.slot_bars(at(0, 4, 7, 8)),
        grow.legend(style.legend_table("lastNotNull", "max")),
        doing,
        _last_prompts(),
    ]


def _last_prompts() -> AnyPanel:
    panel = style.table(
        "What did each slot's last prompt cost?",
        at(12, 12, 12, 7),
        ask.SLOT_TOKENS.named(""),
        ask.LAST_COMPUTED,
        ask.LAST_REUSED,
        ask.LAST_PREFILL,
        ask.SLOT_IDLE_FOR,
        description="Of the last request that each slot finished, where it is known exactly: tokens computed"
        " and reused, and how long reading took. kvscope_slot_last_prompt_tokens,"
        " kvscope_slot_last_prefill_seconds",
    )
    names = style.value_columns("holds", "computed", "reused", "prefill", "idle for")
    panel.with_transformation(style.sort_by("slot"))
    panel.with_transformation(style.columns({"slot": "slot", **names}))
    for name in ("holds", "computed", "reused"):
        style.cells(panel, name, unit="locale")
    style.cells(panel, "slot", width=70)
    style.cells(panel, "prefill", unit=style.SECONDS)
    style.cells(panel, "idle for", unit=style.SECONDS, decimals=0)
    for name, colour in (("computed", palette.COMPUTED), ("reused", palette.REUSED)):
        style.cells(panel, name, cellOptions=style.COLOURED_TEXT, **style.fixed(colour))
    return panel


def _memory_and_tokens() -> list[AnyPanel]:
    memory = style.stack(
        "How much KV memory does each slot fill?",
        at(0, 19, 12, 8),
        ask.SLOT_BYTES,
        ask.KV_ALLOCATED,
        unit=style.BYTES,
        description="Bytes that each slot's tokens occupy, and what was allocated for all."
        " kvscope_slot_kv_bytes, kvscope_kv_allocated_bytes",
    )
    style.shaded_slots(memory, palette.SLOTS)
    return [style.dashed(memory, "allocated"), shared.prompt_bars(at(12, 19, 12, 8))]


def _prefill() -> list[AnyPanel]:
    spread = style.heatmap(
        "How long does a prompt take?",
        at(0, 27, 12, 8),
        ask.PREFILL_HEATMAP,
        unit=style.SECONDS,
        description="How many prompts took how long to be read. kvscope_request_prefill_seconds",
    )
    return [spread, shared.prefill_quantiles(at(12, 27, 12, 8))]


def _trust() -> Row:
    precision = style.bars(
        "Are requests known exactly?",
        at(0, 36, 8, 7),
        ask.OBSERVATIONS,
        step=style.COARSE_STEP,
        description="Finished requests: known exactly, or shared out among the slots that worked."
        " kvscope_observations_total",
    )
    style.coloured(precision, {"exact": palette.HEALTHY, "apportioned": palette.WARNING})
    unseen = style.bars(
        "What did no slot show?",
        at(8, 36, 8, 7),
        ask.UNATTRIBUTED_BARS,
        step=style.COARSE_STEP,
        description="Tokens in the server's own counters that no slot was seen working on."
        " kvscope_unattributed_tokens_total",
    ).no_value("everything was seen")
    style.coloured(
        unseen, {"computed": palette.COMPUTED, "reused": palette.REUSED, "generated": palette.DECODE}
    )
    answered = style.timeline(
        "Do the sources answer?",
        at(16, 36, 8, 7),
        ask.SOURCES_UP,
        description="Whether the last look at each source went well. kvscope_source_up",
        meanings={1: ("yes", palette.HEALTHY), 0: ("no", palette.BAD)},
    )
    server = style.table(
        "What runs there?",
        at(0, 43, 24, 4),
        ask.SERVER_INFO,
        ask.SERVER_SLOTS,
        ask.SERVER_UNIFIED,
        ask.SERVER_UP_FOR,
        ask.SERVER_RESTARTS,
        ask.SERVER_METRICS,
        description="The server, its model and its build. kvscope_server_info, kvscope_slots,"
        " kvscope_kv_unified, kvscope_server_start_time_seconds, kvscope_server_restarts_total,"
        " kvscope_server_metrics_available",
    )
    values = style.value_columns("", "slots", "one pool", "up for", "restarts", "/metrics")
    server.with_transformation(
        style.columns(
            {
                "server": "server",
                "model": "model",
                "architecture": "architecture",
                "ftype": "weights",
                "build": "build",
                **{field: name for field, name in values.items() if name},
            },
            "Value #A",
        )
    )
    style.cells(server, "up for", unit="dtdurations")
    for name in ("one pool", "/metrics"):
        style.cells(server, name, mappings=style.mapped({1: ("yes", None), 0: ("no", None)}))
    return Row("How sure are these numbers?", 35, [precision, unseen, answered, server], folded=True)


PAGE = Page(
    uid="kvscope-session",
    title="kvscope: Session",
    description="What one server's slots hold and do, where its prompts come from, and how long they take.",
    panels=[*_top(), *_slots(), *_memory_and_tokens(), *_prefill(), _trust()],
    one_server=True,
)
