"""The terminal's views say what a snapshot says, leave out what is unknown, and obey no server."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from kvscope.observed.server import Phase, ServerState
from kvscope.snapshot import (
    EvictionCount,
    HistogramCounts,
    ModelCounts,
    ServerBox,
    SlotBox,
    SlotCounts,
    Snapshot,
    TierBox,
)
from kvscope.terminal.table import plain_lines, render

READING = SlotBox(
    id=3, context_tokens=3756, context_limit_tokens=16384, phase=Phase.PREFILL, prefill_tokens=3500
)
DONE = SlotBox(
    id=1,
    context_tokens=15899,
    context_limit_tokens=16384,
    phase=Phase.IDLE,
    last_prefill_seconds=1.335,
    last_prompt_tokens={"computed": 1501, "unknown": 14199},
    lru_rank=2,
)
NEVER_USED = SlotBox(id=0)
COUNTS = ModelCounts(
    model="tiny",
    created_at=0.0,
    slots={
        1: SlotCounts({}, {"computed": 900, "unknown": 500}, 40, {"takeover": 1, "diverged": 2}),
        3: SlotCounts({}, {"computed": 100, "unknown": 0}, 2, {"takeover": 0, "diverged": 0}),
    },
    requests={"ok": 0, "unknown": 7},
    observations={"exact": 7, "apportioned": 0},
    evictions={
        ("slot", "takeover", "unknown"): EvictionCount(1, 4899),
        ("slot", "sleep", "no"): EvictionCount(),
    },
    request_prefill_seconds=HistogramCounts((), ()),
    unattributed_tokens={"computed": 0, "reused": 0, "generated": 11},
    prefill_seconds=21.25,
    decode_seconds=3.1,
)
SERVER = ServerBox(
    name="main",
    state=ServerState.READY,
    up=True,
    created_at=0.0,
    model="tiny",
    slots_total=3,
    slots_busy=1,
    kv_unified=False,
    slots=(NEVER_USED, DONE, READING),
    counts=(COUNTS,),
)


def drawn(*servers: ServerBox, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render(Snapshot(servers)))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def plain(*servers: ServerBox) -> list[str]:
    return plain_lines(Snapshot(servers))


def row_of(lines: list[str], slot: int) -> str:
    (row,) = [line for line in lines if f"{line} ".startswith(f"{slot:>4} ")]
    return row


def test_a_row_shows_what_the_slot_holds_and_where_its_last_prompt_came_from() -> None:
    cells = row_of(drawn(SERVER), 1).split()
    assert " ".join(cells[-10:]) == "15899 / 16384 idle 1501 14199 1.33 s 3 2"


def test_a_prefill_shows_how_far_it_is() -> None:
    assert "prefill    3500" in row_of(drawn(SERVER), 3)
    assert "main slot 3: prefill, 3756 of 16384 tokens held, 3500 of its prompt read" in plain(SERVER)


def test_a_fuller_slot_has_a_longer_bar() -> None:
    lines = drawn(SERVER, width=120)
    assert row_of(lines, 1).count("━") > 3 * row_of(lines, 3).count("━") > 0


def test_what_is_unknown_is_blank_and_never_0() -> None:
    assert row_of(drawn(SERVER), 0).split() == ["0"]
    assert "main slot 0: phase unknown" in plain(SERVER)


def test_nothing_is_wider_than_the_terminal_and_no_cell_is_cut() -> None:
    lines = drawn(SERVER)
    assert max(map(len, lines)) <= 80
    assert "…" not in "\n".join(lines)


def test_the_counters_stand_below_without_those_that_never_moved() -> None:
    figures = [line for line in plain(SERVER) if line.startswith("main ") and " slot " not in line]
    assert figures == [
        "main prompt tokens: 1000 computed, 500 reused",
        "main generated tokens: 42",
        "main seen in no slot: 11 generated",
        "main requests: 7 finished",
        "main time: 21.2 s prefill, 3.1 s decode",
        "main evictions: 1 takeover (4899 tokens, copy unknown)",
    ]


def test_a_server_that_is_down_shows_its_state_and_problem_and_the_others_stay() -> None:
    down = ServerBox("other", ServerState.UNREACHABLE, False, 0.0, problem="connection refused")
    lines = drawn(SERVER, down)
    assert "other  unreachable" in lines
    assert "connection refused" in lines
    assert row_of(lines, 1)
    assert plain(down) == ["other: unreachable", "other problem: connection refused"]


def test_names_from_a_server_cannot_steer_the_terminal_or_use_markup() -> None:
    hostile = dataclasses.replace(SERVER, model="\x1b[2Jtiny\nx[red]y[/red]", problem="\x1b]0;title\x07")
    for text in ("\n".join(drawn(hostile)), "\n".join(plain(hostile))):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "tiny x[red]y[/red]" in text


def test_no_server_yet_draws_nothing() -> None:
    assert plain() == []
    assert "".join(drawn()) == ""


def test_the_caches_bytes_are_shown_where_they_are_known_and_nothing_is_where_they_are_not() -> None:
    known = dataclasses.replace(
        SERVER,
        kv_allocated={(None, "full"): 16 * 2**20, (None, "window"): 2**20},
        kv_bytes_per_token=1024.0,
        tiers={"slot": TierBox(held_bytes=3 * 2**19)},
    )
    (line,) = [line for line in plain_lines(Snapshot((known,))) if "KV cache" in line]
    assert line == "main KV cache: 1.50 MiB held, 17.00 MiB allocated, 1.00 KiB a token"
    assert not [line for line in plain_lines(Snapshot((SERVER,))) if "KV cache" in line]
