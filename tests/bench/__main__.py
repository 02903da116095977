"""`python -m tests.bench`: what watching costs, as a table; exit 1 where a wanted figure is missed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import click
import psutil
from aiohttp import web
from rich.console import Console
from rich.table import Table

from kvscope.demo.tiny_model import write_tiny_model
from kvscope.metrics.collector import Exposition, Format
from kvscope.observed.server import Phase, ServerState
from kvscope.settings import Settings
from kvscope.snapshot import (
    EvictionCount,
    HistogramCounts,
    ModelCounts,
    ServerBox,
    SlotBox,
    SlotCounts,
    Snapshot,
    SourceBox,
)
from tests.truth.driver import Exporter, Server

SERVER_SHARE_WANTED = 0.002
"""Of one core, at default intervals."""
MEMORY_WANTED_MB = 80
WINDOW_SECONDS = 30.0
PAIRS = 12
PROMPT = tuple(range(3, 203))
ENDPOINTS = ("/slots", "/metrics", "/props")
REQUESTS = 2000
POLLS = 1000
POLL_INTERVAL = "0.05"
"""The shortest that kvscope takes."""
COUNTERS_SECONDS_ALL_BUSY = 5.0
"""How often /metrics is read besides while every slot works (docs/METRICS.md)."""


@dataclass(frozen=True)
class Row:
    """One figure. good: None where there is no pass mark."""

    name: str
    wanted: str
    measured: str
    good: bool | None = None


@click.command()
def main() -> None:
    """Measure what watching a llama.cpp server costs, with real servers on this machine."""
    cores = psutil.cpu_count() or 1
    click.echo(f"{cores} cores, Python {sys.version.split()[0]}")
    rows = asyncio.run(_measure())
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("figure", "wanted", "measured", ""):
        table.add_column(heading)
    for row in rows:
        verdict = "no pass mark" if row.good is None else "ok" if row.good else "MISSED"
        table.add_row(row.name, row.wanted, row.measured, verdict)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    sys.exit(1 if any(row.good is False for row in rows) else 0)


async def _measure() -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="kvscope-bench-") as temporary:
        directory = Path(temporary)
        model = write_tiny_model(directory / "tiny.gguf")
        server = Server(model, ["-c", "16384", "--metrics"])
        try:
            await server.start()
            await _work(server, 200)
            rows += await _exporter(server, directory)
            rows += await _server_idle(server, directory)
            rows += await _server_busy(server)
            rows += await _generation_speed(server, directory)
        finally:
            await server.stop()
    rows += _rendering()
    return rows


# --- the server -------------------------------------------------------------------------------------


async def _server_idle(server: Server, directory: Path) -> list[Row]:
    """CPU time of an idle server's process, in turns with the exporter at its defaults and halted."""
    async with _exporter_on(server, directory) as exporter:
        watcher = psutil.Process(exporter.pid)
        spent = {True: 0.0, False: 0.0}
        for watched in (False, True, True, False):
            _tell(f"idle server, {'watched' if watched else 'alone'}")
            with _halted(watcher, not watched):
                spent[watched] += await _cpu_seconds(server.pid, lambda: asyncio.sleep(WINDOW_SECONDS))
    window = 2 * WINDOW_SECONDS
    share = (spent[True] - spent[False]) / window
    tick = 0.02 / window
    return [
        Row(
            "idle server's CPU for the default polls",
            f"< {SERVER_SHARE_WANTED:.1%} of a core",
            f"{share:.3%} ± {tick:.3%} ({spent[True]:.2f} s watched, {spent[False]:.2f} s alone,"
            f" {window:.0f} s each)",
            share + tick < SERVER_SHARE_WANTED,
        )
    ]


async def _server_busy(server: Server) -> list[Row]:
    """CPU time that a request costs a server that generates on all slots, times the default rate.

    Two polls a second drown in the noise of generating, so /slots is asked as fast as it answers,
    in turns with none, over the same work.
    """
    settings = Settings()
    cost = {endpoint: await _cost_of(server, endpoint) for endpoint in ENDPOINTS}
    costs: list[float] = []
    for pair in range(PAIRS):
        _tell(f"busy server, pair {pair + 1} of {PAIRS}")
        spent: dict[bool, float] = {}
        asked = 0
        for polled in _in_random_order():
            async with _asking(server, "/slots", polled) as count:
                spent[polled] = await _cpu_seconds(server.pid, lambda: _work_on_all_slots(server))
            asked = max(asked, count())
        costs.append((spent[True] - spent[False]) / asked)
    low, middle, high = _interval(costs)
    counters = cost["/metrics"] / COUNTERS_SECONDS_ALL_BUSY

    def share(seconds: float) -> float:
        return seconds / settings.busy_interval_seconds + counters

    micro = 1e6
    return [
        Row(
            "busy server's CPU for the default polls",
            f"< {SERVER_SHARE_WANTED:.1%} of a core",
            f"{share(middle):.3%} (95 %: {share(low):.3%} to {share(high):.3%})",
            share(middle) < SERVER_SHARE_WANTED,
        ),
        Row(
            "one /slots, server busy",
            "",
            f"{middle * micro:.0f} µs (95 %: {low * micro:.0f} to {high * micro:.0f})",
        ),
        *(Row(f"one {path}, server idle", "", f"{cost[path] * micro:.0f} µs") for path in ENDPOINTS),
    ]


async def _generation_speed(server: Server, directory: Path) -> list[Row]:
    """Generated tokens a second with the exporter at its defaults, over those with it halted."""
    ratios: list[float] = []
    async with _exporter_on(server, directory) as exporter:
        watcher = psutil.Process(exporter.pid)
        for pair in range(PAIRS):
            _tell(f"generation speed, pair {pair + 1} of {PAIRS}")
            speed: dict[bool, float] = {}
            for watched in _in_random_order():
                with _halted(watcher, not watched):
                    [answer] = await server.complete(PROMPT, 2500)
                speed[watched] = answer.predicted / answer.predicted_ms
            ratios.append(speed[True] / speed[False])
    low, middle, high = _interval(ratios)
    return [
        Row(
            "generation speed, watched over alone",
            "",
            f"{middle:.3f} (95 %: {low:.3f} to {high:.3f};"
            f" {PAIRS} pairs, {min(ratios):.3f} to {max(ratios):.3f})",
        )
    ]


async def _cost_of(server: Server, path: str) -> float:
    """CPU seconds of an idle server for one request."""
    _tell(f"{REQUESTS} times {path}")
    async with aiohttp.ClientSession() as http:

        async def ask() -> None:
            for _ in range(REQUESTS):
                async with http.get(server.url + path) as reply:
                    await reply.read()

        return await _cpu_seconds(server.pid, ask) / REQUESTS


@contextlib.asynccontextmanager
async def _asking(server: Server, path: str, really: bool) -> AsyncIterator[Callable[[], int]]:
    """Ask for path again and again meanwhile; gives a function that says how often."""
    answers = 0

    async def ask() -> None:
        nonlocal answers
        async with aiohttp.ClientSession() as http:
            while really:
                async with http.get(server.url + path) as reply:
                    await reply.read()
                answers += 1

    asking = asyncio.create_task(ask())
    try:
        yield lambda: answers
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def _work(server: Server, tokens: int) -> None:
    await server.complete(PROMPT, tokens)


async def _work_on_all_slots(server: Server) -> None:
    prompts = [PROMPT[number:] for number in (0, 50, 100, 150)]
    await asyncio.gather(*(server.complete(prompt, 400) for prompt in prompts))


# --- the exporter -----------------------------------------------------------------------------------


async def _exporter(server: Server, directory: Path) -> list[Row]:
    """CPU time and memory of the exporter over many polls of a real server's replies."""
    _tell(f"{POLLS} polls of the exporter")
    replies: dict[str, tuple[bytes, str]] = {}
    async with aiohttp.ClientSession() as http:
        for path in (*ENDPOINTS, "/health"):
            async with http.get(server.url + path) as reply:
                replies[path] = (await reply.read(), reply.content_type)
    async with _replaying(replies) as (url, polls):
        intervals = ["--idle-interval", POLL_INTERVAL, "--busy-interval", POLL_INTERVAL]
        exporter = Exporter({"main": url}, directory / "exporter.log", *intervals, "--sleep-idle", "off")
        try:
            await exporter.start("main")
            first = polls()

            async def enough() -> None:
                while polls() - first < POLLS:  # noqa: ASYNC110 - a hundredth of a second is close enough
                    await asyncio.sleep(0.01)

            spent = await _cpu_seconds(exporter.pid, enough)
            done = polls() - first
            memory = psutil.Process(exporter.pid).memory_info().rss / 1e6
        finally:
            await exporter.stop()
    share = spent / done / Settings().idle_interval_seconds
    return [
        Row(
            "exporter's CPU per 1 000 polls",
            "",
            f"{spent / done * 1000:.2f} s (idle server, every 2 s: {share:.2%} of a core)",
        ),
        Row(
            "exporter's resident memory",
            f"< {MEMORY_WANTED_MB} MB",
            f"{memory:.0f} MB after {done} polls",
            memory < MEMORY_WANTED_MB,
        ),
    ]


@contextlib.asynccontextmanager
async def _replaying(
    replies: dict[str, tuple[bytes, str]],
) -> AsyncIterator[tuple[str, Callable[[], int]]]:
    """Serve these bytes; gives the address and a function that says how often /slots was asked."""
    polls = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal polls
        polls += request.path == "/slots"
        if request.path not in replies:
            return web.Response(status=404)
        body, content_type = replies[request.path]
        return web.Response(body=body, content_type=content_type)

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", lambda: polls
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _exporter_on(server: Server, directory: Path) -> AsyncIterator[Exporter]:
    exporter = Exporter({"main": server.url}, directory / "exporter.log")
    try:
        await exporter.start("main")
        yield exporter
    finally:
        await exporter.stop()


# --- a scrape ---------------------------------------------------------------------------------------


def _rendering(servers: int = 64, slots: int = 8, times: int = 20) -> list[Row]:
    """Time to render a large snapshot; a scrape itself serves ready bytes."""
    _tell(f"rendering {servers} servers of {slots} slots")
    snapshot = Snapshot(tuple(_server_box(f"server{number}", slots) for number in range(servers)))
    exposition = Exposition()
    rows = []
    for form in Format:
        seconds = []
        size = 0
        for _ in range(times):
            began = time.perf_counter()
            size = len(exposition.render(snapshot, form))
            seconds.append(time.perf_counter() - began)
        rows.append(
            Row(
                f"rendering {servers} servers x {slots} slots, {form.name.lower()}",
                "",
                f"{statistics.median(seconds) * 1000:.0f} ms ({min(seconds) * 1000:.0f} to"
                f" {max(seconds) * 1000:.0f}; {size / 1e6:.1f} MB)",
            )
        )
    return rows


def _server_box(name: str, slots: int) -> ServerBox:
    reasons = ("takeover", "diverged", "idle_clear", "context_shift", "erase", "sleep", "restart", "unknown")
    bounds = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
    sources = ("slots", "metrics", "props")
    counts = ModelCounts(
        model="tiny",
        created_at=1.7e9,
        slots={
            slot: SlotCounts(
                phase_seconds=dict.fromkeys(Phase, 12.5),
                prompt_tokens={"computed": 123456, "unknown": 654321},
                generated_tokens=98765,
                evictions=dict.fromkeys(reasons, 3),
            )
            for slot in range(slots)
        },
        requests={"unknown": 1234},
        observations={"exact": 1200, "apportioned": 34},
        evictions={("slot", reason, "unknown"): EvictionCount(3, 4567) for reason in reasons},
        request_prefill_seconds=HistogramCounts(bounds, (7,) * (len(bounds) + 1), 99.5),
        unattributed_tokens={"computed": 1, "reused": 2, "generated": 3},
        prefill_seconds=1234.5,
        decode_seconds=2345.6,
    )
    return ServerBox(
        name=name,
        state=ServerState.READY,
        up=True,
        created_at=1.7e9,
        model="tiny",
        build="b1",
        metrics_available=True,
        slots_total=slots,
        slots_busy=1,
        requests_deferred=0,
        kv_unified=False,
        slots=tuple(
            SlotBox(slot, 4321, 16384, Phase.IDLE, 1.7e9, None, 1.5, {"computed": 12}, 1.7e9, slot + 1)
            for slot in range(slots)
        ),
        counts=(counts,),
        sources={source: SourceBox(True, 0, 1.7e9, 0.01, 2.0) for source in sources},
    )


# --- measuring --------------------------------------------------------------------------------------


async def _cpu_seconds(pid: int, work: Callable[[], Awaitable[object]]) -> float:
    """CPU time, user and system, that a process spends while work goes on."""
    process = psutil.Process(pid)
    before = process.cpu_times()
    await work()
    after = process.cpu_times()
    return (after.user + after.system) - (before.user + before.system)


@contextlib.contextmanager
def _halted(process: psutil.Process, really: bool) -> Iterator[None]:
    """Halt a process meanwhile, so that nothing but its polls is missing."""
    if really:
        process.suspend()
    try:
        yield
    finally:
        if really:
            process.resume()


def _in_random_order() -> list[bool]:
    return random.sample([True, False], 2)


def _interval(values: Sequence[float], draws: int = 5000) -> tuple[float, float, float]:
    """Return (low, median, high): the bootstrap's 95 % interval of the median."""
    medians = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], statistics.median(values), medians[int(0.975 * draws)]


def _tell(what: str) -> None:
    click.echo(what, err=True)


if __name__ == "__main__":
    main()
