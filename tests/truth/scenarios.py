"""What is played on a real server, and what is wanted of the exporter's figures then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from tests.truth import report
from tests.truth.driver import DidNotHappen, Figures, Server, free_port, until
from tests.truth.oracle import Tokens
from tests.truth.report import Row
from tests.truth.stage import (
    Stage,
    evicted_tokens,
    evictions,
    held_row,
    observations,
    requests,
    token_sums,
)

Counters = Mapping[str, float]
MILLION = 1_000_000
SURELY_SEEN_MS = 3000.0
"""Longer than the 2 s between two looks at an idle server."""


async def agent(stage: Stage) -> None:
    """A paced agent session: main grows, sub-agents share its system prompt, strangers, main comes back."""
    server = await stage.server()
    await stage.watch(main=server)
    system = stage.tokens(500, 900)
    main = system + stage.tokens(100, 400)

    async def turn(prompt: Tokens) -> Tokens:
        answer = await stage.paced(server, prompt, stage.random.randint(2, 40))
        await stage.pause(0.5)
        return answer.prompt + answer.generated + stage.tokens(60, 250)

    for _ in range(3):
        main = await turn(main)
    for _ in range(2):
        subagent = await turn(system + stage.tokens(150, 350))
        await turn(subagent)
    for _ in range(4):
        await turn(stage.tokens(300, 900))
    for _ in range(2):
        main = await turn(main)
    held = await stage.held_row(server)
    await stage.settle(
        lambda figures: [
            *stage.token_rows(figures),
            *held(figures),
            *stage.paced_rows(figures),
            *stage.eviction_rows(figures),
        ]
    )


async def parallel(stage: Stage) -> None:
    """Three or four conversations at once, on a server that had worked before the exporter came."""
    server = await stage.server()
    talks = [stage.tokens(100, 700) for _ in range(stage.random.choice((3, 4)))]
    for _ in range(2):
        await server.complete(stage.tokens(50, 300), stage.random.randint(1, 20))
    before_us = await server.held()
    await stage.watch(main=server)
    counters = await server.counters()

    async def turn(prompt: Tokens) -> Tokens:
        await stage.pause(0.1)
        [answer] = await server.complete(prompt, stage.random.randint(10, 120))
        stage.truth.add(answer)
        return answer.prompt + answer.generated + stage.tokens(40, 300)

    for _ in range(4):
        talks = list(await asyncio.gather(*(turn(talk) for talk in talks)))
        await stage.pause(1.5)
    held = await stage.held_row(server)
    grown = _increase(counters, await server.counters())
    # New conversations take never-used slots first, then one that worked before.
    taken_over = sum(1 for _ in talks) - 2 if stage.separate else 0
    most = sum(sorted(before_us.values())[-taken_over:]) if taken_over > 0 else 0
    await stage.settle(
        lambda figures: [
            *stage.token_rows(figures),
            *held(figures),
            *_overlapping_rows(stage, figures, grown),
            *_parallel_eviction_rows(stage, figures, taken_over, most),
        ]
    )


def _parallel_eviction_rows(stage: Stage, figures: Figures, takeovers: int, tokens: int) -> list[Row]:
    if not stage.separate:
        return stage.no_wrong_eviction_rows(figures)
    return [
        report.at_most("evictions", evictions(figures), takeovers),
        report.at_most("evicted tokens", evicted_tokens(figures), tokens),
    ]


async def short(stage: Stage) -> None:
    """200 short requests that begin and end between two polls."""
    server = await stage.server()
    await stage.watch(main=server)
    counters = await server.counters()
    bases = [stage.tokens(5, 60) for _ in range(12)]
    for number in range(200):
        prompt = stage.random.choice(bases) + stage.tokens(1, 8)
        [answer] = await server.complete(prompt, stage.random.randint(1, 4))
        stage.truth.replace(answer)
        stage.truth.add(answer)
        if number % 50 == 0:
            await stage.pause(1.0)
    held = await stage.held_row(server)
    grown = _increase(counters, await server.counters())
    await stage.settle(
        lambda figures: [
            *stage.token_rows(figures),
            *held(figures),
            *_overlapping_rows(stage, figures, grown),
            *_short_eviction_rows(stage, figures),
        ]
    )


def _short_eviction_rows(stage: Stage, figures: Figures) -> list[Row]:
    if not stage.separate:
        return stage.no_wrong_eviction_rows(figures)
    events, tokens = stage.truth.lost()
    return [
        report.at_most("evictions", evictions(figures), events),
        report.at_most("evicted tokens", evicted_tokens(figures), tokens),
        *stage.reason_rows(figures),
        report.told("evictions between polls", evictions(figures), events),
    ]


async def leaving(stage: Stage) -> None:
    """A streaming client that leaves: while tokens come, and before the first one."""
    server = await stage.server()
    await stage.watch(main=server)
    counters = await server.counters()
    [stays] = await server.complete(stage.tokens(200, 500), stage.random.randint(5, 40))
    stage.truth.add(stays)
    await stage.seen()

    async def left() -> None:
        await until("the slot's end after its client left", server.idle)
        grown = _increase(counters, await server.counters())
        # No response tells of a request that was left: the server's own counters do.
        stage.truth.computed = round(grown["prompt_tokens_total"])
        stage.truth.reused = round(grown["prompt_tokens_cached_total"])
        stage.truth.generated = round(grown["tokens_predicted_total"])
        stage.truth.requests += 1
        await stage.seen()

    await server.stream(stage.tokens(300, 900), 3000, chunks=stage.random.randint(3, 30))
    await left()
    before_the_first_token = asyncio.create_task(server.stream(stage.tokens(3000, 3500), 400, chunks=1))
    await until("a prompt under way", server.busy)
    before_the_first_token.cancel()
    await asyncio.wait([before_the_first_token])
    await left()
    held = await stage.held_row(server)
    grown = _increase(counters, await server.counters())
    await stage.settle(
        lambda figures: [
            *stage.token_rows(figures),
            *held(figures),
            report.equal("requests", requests(figures), stage.truth.requests),
            *_second_rows(figures, grown),
            *stage.no_wrong_eviction_rows(figures),
            report.told("requests seen as cancelled", _outcome(figures, "cancelled"), 2),
        ]
    )


async def restart(stage: Stage) -> None:
    """A server killed and started again on its port: with less work after it, then with more."""
    server = await stage.server()
    await stage.watch(main=server)
    prefill = decode = 0.0
    restarts = 0

    async def killed() -> None:
        nonlocal prefill, decode, restarts
        await stage.seen()
        counters = await server.counters()
        prefill += counters["prompt_seconds_total"]
        decode += counters["tokens_predicted_seconds_total"]
        stage.truth.lose_everything(await server.held(), "restart")
        await server.kill()
        await stage.pause(1.0)
        await server.start()
        restarts += 1

    for _ in range(3):
        await stage.paced(server, stage.tokens(300, 700), stage.random.randint(2, 20))
    await killed()
    await stage.ask(server, stage.tokens(100, 250), stage.random.randint(2, 10))
    await killed()
    for _ in range(4):
        await stage.ask(server, stage.tokens(400, 900), stage.random.randint(5, 30))
    held = await stage.held_row(server)
    counters = await server.counters()
    prefill += counters["prompt_seconds_total"]
    decode += counters["tokens_predicted_seconds_total"]
    await stage.settle(
        lambda figures: [
            *stage.token_rows(figures),
            *held(figures),
            *_second_rows(
                figures, {"prompt_seconds_total": prefill, "tokens_predicted_seconds_total": decode}
            ),
            report.equal("restarts", figures.sum("kvscope_server_restarts_total", server="main"), restarts),
            *_all_at_once_rows(stage, figures, "restart"),
            report.at_most("evictions", evictions(figures), stage.truth.lost()[0]),
            report.at_most("requests", requests(figures), stage.truth.requests),
            report.told("requests between polls", requests(figures), stage.truth.requests),
        ]
    )


def _all_at_once_rows(stage: Stage, figures: Figures, reason: str) -> list[Row]:
    events, tokens = stage.truth.lost(reason)
    by_slot = figures.sum("kvscope_slot_evictions_total", server="main", reason=reason)
    return [
        report.equal(f"evictions, {reason}", evictions(figures, reason=reason), events),
        report.equal(f"evicted tokens, {reason}", evicted_tokens(figures, reason=reason), tokens),
        report.equal(f"slots' evictions, {reason}", by_slot, stage.truth.slots_lost(reason)),
    ]


async def sleep(stage: Stage) -> None:
    """A server that may sleep after 4 s falls asleep under default polls, and wakes for a request."""
    server = await stage.server("--sleep-idle-seconds", "4")
    await stage.watch(main=server)
    for _ in range(2):
        await stage.paced(server, stage.tokens(200, 600), stage.random.randint(2, 20))
    stage.truth.lose_everything(await server.held(), "sleep")
    await until("the server's sleep under the exporter's default polls", server.asleep, 30)
    evicted = stage.truth.lost()[0]

    def asleep(figures: Figures) -> list[Row]:
        state = "kvscope_server_state"
        return [
            report.equal("state sleeping", figures.sum(state, server="main", state="sleeping"), 1),
            report.equal("up while asleep", figures.sum("kvscope_server_up", server="main"), 1),
            held_row(figures, dict.fromkeys(range(4), 0)),
            *_all_at_once_rows(stage, figures, "sleep"),
            report.equal("evictions", evictions(figures), evicted),
        ]

    await stage.settle(asleep)
    stage.rows.append(report.equal("still asleep after polls", str(await server.asleep()), "True"))
    [answer] = await server.complete(stage.tokens(200, 600), stage.random.randint(2, 20))
    stage.truth.add(answer)
    held = await stage.held_row(server)
    await stage.seen()
    # Judged at once: it may sleep again 4 s later.
    await stage.keep(
        lambda figures: [
            *stage.token_rows(figures),
            *held(figures),
            *stage.paced_rows(figures),
            report.equal("evictions after waking", evictions(figures), evicted),
            report.equal("restarts", figures.sum("kvscope_server_restarts_total", server="main"), 0),
        ]
    )


async def not_lost(stage: Stage) -> None:
    """Computed again on request, several answers to one prompt, refused requests: none is an eviction."""
    server = await stage.server()
    await stage.watch(main=server)
    prompt = stage.tokens(400, 900)
    # One generated token is never evaluated: the slot then holds the prompt and nothing to lose.
    await stage.paced(server, prompt, 1)
    again = await stage.paced(server, prompt, stage.random.randint(2, 20), cache_prompt=False)

    several = await server.complete(stage.tokens(200, 500), stage.random.randint(4, 12), n=2)
    stage.truth.add(several[0])
    # The second answer's slot copies the prompt instead of reading it.
    stage.truth.generated += sum(answer.predicted for answer in several[1:])
    await stage.seen()

    for refused in (stage.tokens(17000, 18000), (5, 999_999)):
        status, _ = await server.post("/completion", {"prompt": list(refused), "n_predict": 4})
        if status == 200:
            raise DidNotHappen("a request that cannot be served was not refused")
        await stage.looked()
    more = again.prompt + again.generated + stage.tokens(50, 200)
    await stage.paced(server, more, stage.random.randint(2, 20))

    held = await stage.held_row(server)
    answered = stage.truth.requests + 1
    await stage.settle(
        lambda figures: [
            *stage.token_rows(figures),
            *held(figures),
            *stage.no_wrong_eviction_rows(figures),
            report.told("requests (a refused one may show)", requests(figures), answered),
            report.told("exact observations", observations(figures, "exact"), answered),
        ]
    )


async def shift(stage: Stage) -> None:
    """Generation outgrows a small context, and the oldest half of it is dropped."""
    context = 1024
    server = await stage.server("--context-shift", context=context)
    await stage.watch(main=server)
    room = context if stage.separate else 4 * context
    before = await stage.paced(server, stage.tokens(50, 200), stage.random.randint(2, 20))
    long = (14_000 if stage.separate else 5000) + stage.random.randint(0, 500)
    [answer] = await server.complete(stage.tokens(room - 300, room - 100), long)
    # Only where a poll found it at work can what it dropped be told from a request in between.
    row = report.equal if answer.prompt_ms + answer.predicted_ms > SURELY_SEEN_MS else report.told
    stage.truth.add(answer)
    after = (await server.held())[answer.slot]
    stage.truth.lose(answer.slot, len(answer.content) - after, "context_shift")
    await stage.seen()
    held = await stage.held_row(server)
    dropped = stage.truth.lost("context_shift")[1]
    cleared = 0 if stage.separate else len(before.content)
    await stage.settle(
        lambda figures: [
            *stage.token_rows(figures),
            *held(figures),
            report.equal("requests", requests(figures), stage.truth.requests),
            report.equal("evictions of another reason", _other_evictions(figures), 0),
            report.at_most("evicted tokens", evicted_tokens(figures), dropped + cleared),
            row("evicted tokens, context_shift", _shifted(figures), dropped),
        ]
    )


async def million(stage: Stage) -> None:
    """Reused tokens beyond a million, where llama.cpp prints its counter in steps of ten."""
    server = await stage.server()
    talk = stage.tokens(3000, 3600)
    while (await server.counters())["prompt_tokens_cached_total"] < MILLION:
        for _ in range(50):
            await server.complete(talk, 1)
    await stage.watch(main=server)
    for _ in range(5):
        await stage.paced(server, talk[: stage.random.randint(500, 2900)] + stage.tokens(20, 90), 12)
        await stage.pause(0.5)
    held = await stage.held_row(server)
    await stage.settle(
        lambda figures: [*stage.token_rows(figures), *held(figures), *stage.paced_rows(figures)]
    )


def _other_evictions(figures: Figures) -> float:
    named = figures.by("reason", "kvscope_evictions_total", server="main")
    right = ("context_shift", "idle_clear", "unknown")
    return sum(count for reason, count in named.items() if reason not in right)


def _shifted(figures: Figures) -> float:
    return evicted_tokens(figures, reason="context_shift")


async def erase(stage: Stage) -> None:
    """A slot saved to a file, erased, and restored: one eviction, no request."""
    server = await stage.server("--slot-save-path", str(stage.directory))
    await stage.watch(main=server)
    for _ in range(3):
        answer = await stage.paced(server, stage.tokens(200, 600), stage.random.randint(2, 20))
    file = {"filename": f"{stage.mode}.slot"}
    await _on_slot(server, answer.slot, "save", file)
    for _ in range(2):  # the second time there is nothing to lose
        await _on_slot(server, answer.slot, "erase", {})
        await stage.pause(0.5)
        await stage.seen(lambda figures: [held_row(figures, dict.fromkeys([answer.slot], 0))])
    stage.truth.lose(answer.slot, len(answer.content), "erase")
    await _on_slot(server, answer.slot, "restore", file)
    held = await stage.held_row(server)
    await stage.settle(
        lambda figures: [
            *stage.token_rows(figures),
            *held(figures),
            *stage.paced_rows(figures),
            *stage.eviction_rows(figures),
        ]
    )


async def _on_slot(server: Server, slot: int, action: str, body: Mapping[str, str]) -> None:
    status, reply = await server.post(f"/slots/{slot}?action={action}", body)
    if status != 200:
        raise DidNotHappen(f"{action} of slot {slot} answered {status}: {str(reply)[:200]}")


async def no_metrics(stage: Stage) -> None:
    """A server without --metrics: what /slots shows in passing, never more than the truth."""
    server = await stage.server(metrics=False)
    await stage.watch(main=server)
    talk = stage.tokens(100, 400)
    for _ in range(3):
        answer = await stage.ask(server, talk, stage.random.randint(300, 900))
        held = await stage.held_row(server)
        await stage.seen(held)
        talk = answer.prompt + answer.generated + stage.tokens(40, 200)
    for _ in range(20):
        [answer] = await server.complete(stage.tokens(20, 80), stage.random.randint(1, 4))
        stage.truth.add(answer)
    held = await stage.held_row(server)
    truth = stage.truth

    def judge(figures: Figures) -> list[Row]:
        computed, reused, generated = token_sums(figures)
        available = figures.sum("kvscope_server_metrics_available", server="main")
        return [
            report.equal("metrics available", available, 0),
            *held(figures),
            report.at_most("computed tokens", computed, truth.computed),
            report.at_most("reused tokens", reused, truth.reused),
            report.at_most("generated tokens", generated, truth.generated),
            # Each of the first three was waited for, and polls find something of the short ones.
            report.between("requests", requests(figures), 4, truth.requests),
            report.equal("prefill seconds", figures.sum("kvscope_prefill_seconds_total"), None),
            report.equal("decode seconds", figures.sum("kvscope_decode_seconds_total"), None),
            report.equal("exact observations", observations(figures, "exact") or 0, 0),
        ]

    await stage.settle(judge)


async def two(stage: Stage) -> None:
    """Two servers and a port where nobody listens; one server dies, the other's figures go on."""
    server, mortal = await stage.server(), await stage.server()
    nobody = Server(stage.directory, [])
    nobody.url = f"http://127.0.0.1:{free_port()}"
    await stage.watch("main", "mortal", main=server, mortal=mortal, nobody=nobody)
    [last] = await mortal.complete(stage.tokens(200, 600), stage.random.randint(2, 20))
    await stage.seen(lambda figures: _sums_of(figures, "mortal", last.computed, last.predicted))
    await mortal.kill()
    for _ in range(3):
        await stage.paced(server, stage.tokens(200, 600), stage.random.randint(2, 20))
    held = await stage.held_row(server)
    await stage.settle(
        lambda figures: [
            *stage.token_rows(figures),
            *held(figures),
            *stage.paced_rows(figures),
            *_sums_of(figures, "mortal", last.computed, last.predicted),
            *_dead_rows(figures, "mortal"),
            *_dead_rows(figures, "nobody"),
            report.equal("up, main", figures.sum("kvscope_server_up", server="main"), 1),
        ]
    )


def _sums_of(figures: Figures, server: str, computed: int, generated: int) -> list[Row]:
    ours = token_sums(figures, server)
    return [
        report.equal(f"computed tokens, {server}", ours[0], computed),
        report.equal(f"generated tokens, {server}", ours[2], generated),
    ]


def _dead_rows(figures: Figures, server: str) -> list[Row]:
    unreachable = figures.sum("kvscope_server_state", server=server, state="unreachable")
    return [
        report.equal(f"up, {server}", figures.sum("kvscope_server_up", server=server), 0),
        report.equal(f"unreachable, {server}", unreachable, 1),
        report.equal(
            f"slots shown, {server}", figures.sum("kvscope_slot_context_tokens", server=server), None
        ),
    ]


def _increase(before: Counters, after: Counters) -> Counters:
    return {name: after[name] - before.get(name, 0) for name in after}


def _second_rows(figures: Figures, grown: Counters) -> list[Row]:
    prefill = figures.sum("kvscope_prefill_seconds_total", server="main")
    decode = figures.sum("kvscope_decode_seconds_total", server="main")
    # The server prints six digits.
    return [
        report.within("prefill seconds, by the server", prefill, grown["prompt_seconds_total"], 1e-4),
        report.within("decode seconds, by the server", decode, grown["tokens_predicted_seconds_total"], 1e-4),
    ]


def _overlapping_rows(stage: Stage, figures: Figures, grown: Counters) -> list[Row]:
    return [
        *_second_rows(figures, grown),
        report.at_most("requests", requests(figures), stage.truth.requests),
        report.told("requests between polls", requests(figures), stage.truth.requests),
        report.told("exact observations", observations(figures, "exact"), stage.truth.requests),
    ]


def _outcome(figures: Figures, outcome: str) -> float | None:
    return figures.sum("kvscope_requests_total", server="main", outcome=outcome)


SCENARIOS: Mapping[str, Callable[[Stage], Awaitable[None]]] = {
    "agent": agent,
    "parallel": parallel,
    "short": short,
    "leaving": leaving,
    "restart": restart,
    "sleep": sleep,
    "not_lost": not_lost,
    "shift": shift,
    "million": million,
    "erase": erase,
    "no_metrics": no_metrics,
    "two": two,
}
