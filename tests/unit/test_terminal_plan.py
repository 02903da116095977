"""A plan's tables for people."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from kvscope.planned import ContextFit, LeftOut, Plan, PlannedContext, PlannedModel, PlannedSettings
from kvscope.terminal.plan import render, size

MIB, GIB = 1 << 20, 1 << 30
KINDS = ("full", "window", "compressed", "indexer", "recurrent", "draft")

# Each figure is as wide as a size can be.
CONTEXT = PlannedContext(
    context_tokens=16777216,
    slot_context_tokens=4194304,
    caches=(),
    bytes_by_kind={kind: 1023 * MIB - number * MIB for number, kind in enumerate(KINDS)},
    kv_bytes=1023 * GIB,
    full_slot_bytes=255 * GIB,
    slot_bytes_by_kind={kind: 1013 * MIB - number * MIB for number, kind in enumerate(KINDS)},
    slot_kv_bytes=254 * GIB,
    needed_bytes=1020 * GIB,
    left_bytes=-255 * GIB,
)
PLAN = Plan(
    model=PlannedModel("a model", "arch", "file", "dsv4", weights_bytes=GIB),
    settings=PlannedSettings(4, False, "f16", "f16", False, True, 2048, 512),
    contexts=(CONTEXT,),
    left_out=(LeftOut("mmproj", GIB // 2, GIB, "words"),),
    notes=("a note",),
    vram_bytes=GIB,
)


def shown(plan: Plan, **console: object) -> str:
    text = io.StringIO()
    Console(file=text, width=80, highlight=False, **console).print(render(plan))  # type: ignore[arg-type]
    return text.getvalue()


@pytest.mark.parametrize("kinds", range(1, 7))
def test_every_kind_of_cache_is_shown_and_no_figure_is_cut(kinds: int) -> None:
    some = dict(list(CONTEXT.bytes_by_kind.items())[:kinds])
    lines = shown(replace(PLAN, contexts=(replace(CONTEXT, bytes_by_kind=some),)))
    assert "…" not in lines
    assert max(map(len, lines.splitlines())) <= 80
    for figure in ("1023.00 GiB", "1020.00 GiB", "-255.00 GiB", "254.00 GiB", "16777216", "4194304"):
        assert figure in lines
    if kinds > 1:
        for number, kind in enumerate(some):
            assert kind in lines
            assert f"{1023 - number}.00 MiB" in lines
            assert f"{1013 - number}.00 MiB" in lines


def test_slots_on_one_pool_have_no_share_of_it_but_a_slot_that_is_full_is_told() -> None:
    pooled = replace(CONTEXT, slot_bytes_by_kind=None, slot_kv_bytes=None)
    lines = shown(replace(PLAN, contexts=(pooled,)))
    assert "each slot" not in lines
    (full,) = [line for line in lines.splitlines() if line.startswith("a full slot")]
    assert full.split()[3:] == ["4194304", "255.00", "GiB"]


def test_a_fit_is_marked_where_the_model_ends_it_and_told_where_it_is_refused() -> None:
    fits = (
        ContextFit("f16", "f16", 1, False, "model", 8192, 8192, GIB),
        ContextFit("q8_0", "q8_0", 1, False, "memory", 0, 0),
        ContextFit("q4_0", "q4_0", 1, False, "refused", problem="the reason"),
    )
    model = replace(PLAN.model, context_length=8192)
    rows = [line.split() for line in shown(replace(PLAN, model=model, fits=fits)).splitlines()]
    assert ["f16", "8192*"] in rows
    assert ["q8_0", "none"] in rows
    assert ["q4_0", "refused"] in rows
    assert ["refused:", "the", "reason"] in rows


def test_colours_are_for_terminals_and_not_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[31m" in shown(PLAN, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in shown(PLAN, force_terminal=True, color_system="standard")
    assert "\x1b" not in shown(PLAN)


def test_no_text_of_a_file_reaches_the_terminal_as_a_command() -> None:
    hostile = "\x1b]0;title\x07[red]\r\n"
    lines = shown(replace(PLAN, model=replace(PLAN.model, name=hostile), notes=(hostile,)))
    assert not {"\x1b", "\x07", "\r"} & set(lines)
    assert lines.count("[red]") == 2


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (300 * MIB, "300.00 MiB"),
        (2860 * MIB, "2.79 GiB"),
        (-54 * MIB, "-54.00 MiB"),
        (5 << 40, "5.00 TiB"),
    ],
)
def test_a_size_has_a_binary_unit_and_two_decimals(count: int, words: str) -> None:
    assert size(count) == words
