"""Whatever a server does and however many polls are lost, the figures add up.

A small model of llama-server (slots, tasks, counters that move when the real ones do) is driven by
random steps; its own sums are the truth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.tracking.looks import Watch, counted, decode, idle, never_used, prefill, printed

from kvscope.observed.server import ServerCounters, ServerState, SlotSeen
from kvscope.snapshot import ModelCounts
from kvscope.tracking.history import looks_restarted
from kvscope.tracking.publish import box

SLOTS = 3


@dataclass
class Slot:
    task: int | None = None
    held: int = 0
    computed: int = 0
    reused: int = 0
    decoded: int = 0
    processing: bool = False


@dataclass
class Server:
    """Counters move as measured: reused at the start of a prompt, computed at its end, generated
    at the end of the task."""

    slots: list[Slot] = field(default_factory=lambda: [Slot() for _ in range(SLOTS)])
    task: int = 0
    process: int = 0
    asleep: bool = False
    computed: int = 0
    reused: int = 0
    generated: int = 0
    requests: int = 0
    earlier: tuple[int, int, int] = (0, 0, 0)

    def start(self, slot: int, prompt: int, share: float) -> None:
        self.asleep = False
        it = self.slots[slot]
        if it.processing:
            return
        self.task += 3
        reused = min(int(it.held * share), max(0, prompt - 1))
        self.slots[slot] = Slot(self.task, reused, 0, reused, 0, True)
        self.slots[slot].held = prompt
        self.reused += reused

    def read(self, slot: int) -> None:
        it = self.slots[slot]
        if it.processing and not it.decoded:
            it.computed = it.held - it.reused
            it.decoded = 1
            self.computed += it.computed

    def end(self, slot: int, more: int) -> None:
        it = self.slots[slot]
        if not it.processing:
            return
        self.read(slot)
        generated = it.decoded + more
        self.generated += generated
        self.requests += 1
        self.slots[slot] = Slot(it.task, it.computed + it.reused + generated - 1)

    def restart(self) -> None:
        before = self.earlier
        now = (self.computed, self.reused, self.generated)
        self.earlier = (before[0] + now[0], before[1] + now[1], before[2] + now[2])
        self.slots = [Slot() for _ in range(SLOTS)]
        self.computed = self.reused = self.generated = self.task = 0
        self.process += 1
        self.asleep = False

    def sleep(self) -> None:
        if not any(slot.processing for slot in self.slots):
            self.slots = [Slot() for _ in range(SLOTS)]
            self.asleep = True

    def seen(self) -> list[SlotSeen]:
        def one(number: int, slot: Slot) -> SlotSeen:
            if slot.task is None:
                return never_used(number)
            if not slot.processing:
                return idle(number, slot.task, slot.held)
            if slot.decoded:
                return decode(number, slot.task, slot.computed, slot.reused, slot.decoded)
            return prefill(number, slot.task, 0, slot.reused, slot.held)

        return [one(number, slot) for number, slot in enumerate(self.slots)]

    def counters(self) -> ServerCounters:
        return printed(counted(self.computed, self.reused, self.generated, identity=str(self.process)))


slot = st.integers(0, SLOTS - 1)
step = st.one_of(
    st.tuples(st.just("start"), slot, st.integers(1, 4000), st.sampled_from([0.0, 0.4, 1.0])),
    st.tuples(st.just("read"), slot),
    st.tuples(st.just("end"), slot, st.integers(0, 50)),
    st.tuples(st.just("look")),
    st.tuples(st.just("look")),
    st.tuples(st.just("look at the counters")),
    st.tuples(st.just("lose a poll")),
    st.tuples(st.just("restart")),
    st.tuples(st.just("sleep")),
)


def sums(counts: ModelCounts) -> tuple[int, int, int]:
    left = counts.unattributed_tokens or {}
    slots = counts.slots.values()
    return (
        sum(slot.prompt_tokens["computed"] for slot in slots) + left.get("computed", 0),
        sum(slot.prompt_tokens["unknown"] for slot in slots) + left.get("reused", 0),
        sum(slot.generated_tokens for slot in slots) + left.get("generated", 0),
    )


def all_counters(counts: ModelCounts) -> list[float]:
    left = counts.unattributed_tokens or {}
    values: list[float] = [*counts.requests.values(), *counts.observations.values(), *left.values()]
    for count in counts.evictions.values():
        values += [count.events, count.tokens]
    for of_slot in counts.slots.values():
        values += [
            of_slot.generated_tokens,
            *of_slot.prompt_tokens.values(),
            *of_slot.evictions.values(),
            *of_slot.phase_seconds.values(),
        ]
    return values


@settings(max_examples=400, deadline=None)
@given(st.lists(step, max_size=40))
def test_sums_equal_the_servers_and_no_counter_goes_back(steps: list[tuple[object, ...]]) -> None:
    server, watch = Server(), Watch()
    watch.see(*server.seen(), counters=server.counters())
    before = all_counters(watch.counts)
    for name, *arguments in [*steps, ("look at the counters",)]:
        if name == "lose a poll":
            watch.lose_a_poll()
        elif name.startswith("look"):  # type: ignore[attr-defined]
            look(server, watch, with_counters=name != "look")
        else:
            getattr(server, str(name))(*arguments)
        after = all_counters(watch.counts)
        assert all(now >= then for then, now in zip(before, after, strict=True))
        before = after
        for slot in box(watch.history, watch.now).slots:
            assert slot.context_tokens is None or slot.context_tokens >= 0
    now = (server.computed, server.reused, server.generated)
    # What a killed process counted after the last look at it is known to nobody.
    ours = sums(watch.counts)
    assert all(mine <= its + old for mine, its, old in zip(ours, now, server.earlier, strict=True))
    if server.process == 0:
        assert ours == now
        assert watch.counts.requests["unknown"] <= server.requests


def look(server: Server, watch: Watch, *, with_counters: bool) -> None:
    """As the poller does it: a look that shows a new process, or an end, reads the counters too."""
    if server.asleep:
        watch.see(state=ServerState.SLEEPING, counters=server.counters())
        return
    seen = server.seen()
    if not with_counters and not looks_restarted(watch.history, seen):
        watch.see(*seen)
        with_counters = watch.history.awaits_counters
    if with_counters or looks_restarted(watch.history, seen):
        watch.see(*seen, counters=server.counters(), after=0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(slot, st.integers(1, 4000), st.sampled_from([0.0, 0.4, 1.0])), max_size=12))
def test_one_request_at_a_time_looked_at_after_each_is_always_exact(
    requests: list[tuple[int, int, float]],
) -> None:
    server, watch = Server(), Watch()
    look(server, watch, with_counters=True)
    for number, prompt, share in requests:
        held = server.slots[number].held
        server.start(number, prompt, share)
        look(server, watch, with_counters=False)
        server.end(number, 7)
        look(server, watch, with_counters=False)
        assert server.slots[number].held >= 0, held
    assert watch.counts.observations == {"exact": len(requests), "apportioned": 0}
    assert watch.counts.requests == {"unknown": len(requests)}
    assert watch.counts.unattributed_tokens == {"computed": 0, "reused": 0, "generated": 0}
    lost = sum(count.tokens for count in watch.counts.evictions.values())
    arrived = sum(sums(watch.counts)) - len(requests)  # the last sampled token is never evaluated
    assert lost <= arrived


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(slot, st.integers(1, 4000), st.sampled_from([0.0, 0.4, 1.0])), max_size=12),
    st.tuples(*[st.integers(0, 40_000_000)] * 3),
)
def test_beyond_a_million_tokens_a_lone_request_seen_generating_is_still_exact(
    requests: list[tuple[int, int, float]], before: tuple[int, int, int]
) -> None:
    """llama.cpp prints its counters with six significant digits."""
    server, watch = Server(), Watch()
    server.computed, server.reused, server.generated = before
    look(server, watch, with_counters=True)
    for number, prompt, share in requests:
        server.start(number, prompt, share)
        look(server, watch, with_counters=False)
        server.read(number)
        look(server, watch, with_counters=False)
        server.end(number, 7)
        look(server, watch, with_counters=False)
    assert watch.counts.observations == {"exact": len(requests), "apportioned": 0}
    now = (server.computed, server.reused, server.generated)
    assert sums(watch.counts) == tuple(its - old for its, old in zip(now, before, strict=True))
    assert watch.counts.evictions["slot", "context_shift", "unknown"].tokens == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(step, max_size=40), st.tuples(*[st.integers(0, 40_000_000)] * 3))
def test_beyond_a_million_tokens_sums_are_as_near_as_the_counters_are_printed(
    steps: list[tuple[object, ...]], before: tuple[int, int, int]
) -> None:
    server, watch = Server(), Watch()
    server.computed, server.reused, server.generated = before
    look(server, watch, with_counters=True)
    counted_before = all_counters(watch.counts)
    for name, *arguments in [*steps, ("look at the counters",)]:
        if name == "restart":
            continue
        if name == "lose a poll":
            watch.lose_a_poll()
        elif str(name).startswith("look"):
            look(server, watch, with_counters=name != "look")
        else:
            getattr(server, str(name))(*arguments)
        after = all_counters(watch.counts)
        assert all(now >= then for then, now in zip(counted_before, after, strict=True))
        counted_before = after
    now = (server.computed, server.reused, server.generated)
    for mine, its, old in zip(sums(watch.counts), now, before, strict=True):
        assert abs(mine - (its - old)) <= 2 * 10 ** max(0, len(str(its)) - 6)
