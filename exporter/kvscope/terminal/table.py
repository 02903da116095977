"""The slots as a table for the terminal, and as plain lines where there is none. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvscope.observed.server import Phase, ServerState
from kvscope.snapshot import ModelCounts, ServerBox, SlotBox, Snapshot, TierBox
from kvscope.terminal.plan import size

PHASE_STYLES = {Phase.IDLE: "dim", Phase.PREFILL: "bold yellow", Phase.DECODE: "bold green"}


def render(snapshot: Snapshot) -> RenderableType:
    """Return what is known now: for each server its state, a table of its slots, and its counters.

    What is unknown is left blank. Fits 80 columns; the bars take what a wider terminal has.
    """
    return Group(*(part for server in snapshot.servers for part in _server(server)))


def plain_lines(snapshot: Snapshot) -> list[str]:
    """Return the same in one line for each server and slot, without any escape code or padding."""
    return [line for server in snapshot.servers for line in _plain_server(server)]


def _server(server: ServerBox) -> Iterator[RenderableType]:
    good = server.state in (ServerState.READY, ServerState.SLEEPING)
    heading = Text(_shown(server.name), style="bold")
    heading.append(f"  {_state(server)}", style="green" if good else "red")
    for fact in _facts(server):
        heading.append(f"  {fact}", style="dim")
    yield heading
    if server.problem:
        yield Text(_shown(server.problem), style="red")
    if server.slots:
        yield _slots(server)
    if figures := list(_figures(server)):
        grid = Table.grid(padding=(0, 2))
        for name, value in figures:
            grid.add_row(Text(name, style="dim"), Text(value))
        yield Padding(grid, (1, 0, 0, 0))


def _slots(server: ServerBox) -> Table:
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("slot", justify="right")
    table.add_column("context", ratio=1, min_width=8)
    table.add_column("tokens", no_wrap=True)
    table.add_column("phase", min_width=7)
    table.add_column("reading", justify="right", min_width=7)
    table.add_column("computed", justify="right")
    table.add_column("reused", justify="right")
    table.add_column("prefill", justify="right", min_width=7)
    table.add_column("evicted", justify="right")
    table.add_column("LRU", justify="right")
    for slot in server.slots:
        computed, reused = _last_prompt(slot)
        took = "" if slot.last_prefill_seconds is None else f"{slot.last_prefill_seconds:.2f} s"
        # While the slot works, what is known of its last prompt is no longer of this one.
        last = "" if slot.phase is Phase.IDLE else "dim"
        table.add_row(
            str(slot.id),
            _bar(slot),
            _held(slot),
            Text(slot.phase.value, style=PHASE_STYLES[slot.phase]) if slot.phase else "",
            _number(slot.prefill_tokens),
            Text(_number(computed), style=last),
            Text(_number(reused), style=last),
            Text(took, style=last),
            _number(_evictions(server, slot.id)),
            _number(slot.lru_rank),
        )
    return table


def _bar(slot: SlotBox) -> RenderableType:
    if slot.context_tokens is None or not slot.context_limit_tokens:
        return ""
    share = slot.context_tokens / slot.context_limit_tokens
    style = "red" if share > 0.9 else "yellow" if slot.phase is Phase.PREFILL else "cyan"
    return ProgressBar(
        total=slot.context_limit_tokens,
        completed=slot.context_tokens,
        complete_style=style,
        finished_style=style,
    )


def _held(slot: SlotBox) -> Text:
    if slot.context_limit_tokens is None:
        return Text(_number(slot.context_tokens))
    held = Text(f"{_number(slot.context_tokens):>5}")
    return held.append(f" / {slot.context_limit_tokens}", style="dim")


def _figures(server: ServerBox) -> Iterator[tuple[str, str]]:
    cache = ", ".join(_cache(server))
    if cache:
        yield "KV cache", cache
    if not server.counts:
        return
    yield "prompt tokens", _sums(_prompt_tokens(server.counts))
    slots = [slot for counts in server.counts for slot in counts.slots.values()]
    generated = [slot.generated_tokens for slot in slots if slot.generated_tokens is not None]
    yield "generated tokens", str(sum(generated)) if generated else "not known"
    elsewhere = _total(counts.unattributed_tokens for counts in server.counts)
    if any(elsewhere.values()):
        yield "seen in no slot", _sums(elsewhere)
    yield "requests", _sums(_total(counts.requests for counts in server.counts), unknown="finished")
    seconds = {
        "prefill": [counts.prefill_seconds for counts in server.counts],
        "decode": [counts.decode_seconds for counts in server.counts],
    }
    known = {
        name: [each for each in spent if each is not None]
        for name, spent in seconds.items()
        if any(each is not None for each in spent)
    }
    if known:
        yield "time", ", ".join(f"{sum(spent):.1f} s {name}" for name, spent in known.items())
    yield "evictions", ", ".join(_eviction_texts(server.counts)) or "none"
    if server.requests_deferred is not None:
        yield "requests waiting", str(server.requests_deferred)
    if server.restarts:
        yield "restarts", str(server.restarts)


def _cache(server: ServerBox) -> Iterator[str]:
    tier = server.tiers.get("slot", TierBox())
    if tier.held_bytes is not None:
        yield f"{size(tier.held_bytes)} held"
    if server.kv_allocated is not None:
        yield f"{size(sum(server.kv_allocated.values()))} allocated"
    if server.kv_bytes_per_token:
        yield f"{size(round(server.kv_bytes_per_token))} a token"


def _eviction_texts(models: Iterable[ModelCounts]) -> Iterator[str]:
    events: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for counts in models:
        for (_, reason, _), evicted in counts.evictions.items():
            events[reason] += evicted.events
            tokens[reason] += evicted.tokens
    for reason in sorted(events | tokens):
        if events[reason] or tokens[reason]:
            yield f"{events[reason]} {reason} ({tokens[reason]} tokens, copy unknown)"


def _prompt_tokens(models: Iterable[ModelCounts]) -> Counter[str]:
    return _total(slot.prompt_tokens for counts in models for slot in counts.slots.values())


def _total(parts: Iterable[object]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        if part is not None:
            total.update(part)  # type: ignore[call-overload]
    return total


def _sums(total: Counter[str], unknown: str = "reused") -> str:
    named = (f"{value} {unknown if name == 'unknown' else name}" for name, value in total.items() if value)
    return ", ".join(named) or "none"


def _last_prompt(slot: SlotBox) -> tuple[int | None, int | None]:
    if slot.last_prompt_tokens is None:
        return None, None
    computed = slot.last_prompt_tokens.get("computed")
    return computed, sum(slot.last_prompt_tokens.values()) - (computed or 0)


def _evictions(server: ServerBox, slot: int) -> int | None:
    known = [counts.slots[slot].evictions for counts in server.counts if slot in counts.slots]
    return sum(sum(evictions.values()) for evictions in known) if known else None


def _facts(server: ServerBox) -> Iterator[str]:
    if server.model:
        yield _shown(server.model)
    if server.slots_busy is not None and server.slots_total is not None:
        yield f"{server.slots_busy} of {server.slots_total} slots busy"
    if server.kv_unified is not None:
        yield "one pool for all slots" if server.kv_unified else "separate slots"
    if server.metrics_available is False:
        yield "no --metrics"


def _state(server: ServerBox) -> str:
    return server.state.value.replace("_", " ")


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _shown(text: str) -> str:
    """Return text of a server without what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def _plain_server(server: ServerBox) -> Iterator[str]:
    name = _shown(server.name)
    yield f"{name}: " + ", ".join([_state(server), *_facts(server)])
    if server.problem:
        yield f"{name} problem: {_shown(server.problem)}"
    for slot in server.slots:
        yield f"{name} slot {slot.id}: " + ", ".join(_plain_slot(server, slot))
    for figure, value in _figures(server):
        yield f"{name} {figure}: {value}"


def _plain_slot(server: ServerBox, slot: SlotBox) -> Iterator[str]:
    yield slot.phase.value if slot.phase else "phase unknown"
    if slot.context_tokens is not None:
        limit = "" if slot.context_limit_tokens is None else f" of {slot.context_limit_tokens}"
        yield f"{slot.context_tokens}{limit} tokens held"
    if slot.prefill_tokens is not None:
        yield f"{slot.prefill_tokens} of its prompt read"
    computed, reused = _last_prompt(slot)
    if computed is not None:
        took = "" if slot.last_prefill_seconds is None else f" in {slot.last_prefill_seconds:.2f} s"
        yield f"last prompt {computed} computed{took} and {reused} reused"
    if evictions := _evictions(server, slot.id):
        yield f"evicted {evictions}"
    if slot.lru_rank is not None:
        yield f"LRU rank {slot.lru_rank}"
