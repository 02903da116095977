"""Where a scenario plays: servers and exporter that end with it, requests, waiting, and its rows."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.truth import report
from tests.truth.driver import TICK_SECONDS, Exporter, Figures, Server
from tests.truth.oracle import Answer, Tokens, Truth
from tests.truth.report import Row, Verdict

SEPARATE_SLOTS = 4
TOKEN_IDS = range(3, 259)
SETTLE_SECONDS = 35.0
"""The exporter may leave counters alone for 30 s, so nothing is called missed before."""
LOOKS = 3
"""Looks that may pass before a figure must be there: one may have begun too early, one may still
find the task under way."""
LOOKS_SECONDS = 12.0

Judge = Callable[[Figures], list[Row]]


class Stage:
    """One scenario in one mode of the server. Everything that varies comes from its random."""

    def __init__(
        self,
        scenario: str,
        mode: str,
        seed: int,
        model: Path,
        directory: Path,
        ending: contextlib.AsyncExitStack,
    ) -> None:
        self.scenario = scenario
        self.mode = mode
        self.random = random.Random(f"{seed}/{scenario}/{mode}")
        self.rows: list[Row] = []
        self.directory = directory
        self.truth = Truth()
        self._model = model
        self._ending = ending
        self._exporter: Exporter | None = None

    @property
    def separate(self) -> bool:
        """Whether each slot has its own share of the context."""
        return self.mode == "separate"

    @property
    def exporter(self) -> Exporter:
        """The exporter under test."""
        assert self._exporter is not None
        return self._exporter

    async def server(self, *flags: str, context: int = 4096, metrics: bool = True) -> Server:
        """Start a server in this mode; context: tokens that one slot can hold at least."""
        # One thread: servers that run at once do not spin against each other on few cores.
        given = ["-t", "1", "-c", str(context * SEPARATE_SLOTS), *flags]
        if self.separate:
            given += ["-np", str(SEPARATE_SLOTS)]
        if metrics:
            given.append("--metrics")
        server = Server(self._model, given)
        self._ending.push_async_callback(server.stop)
        await server.start()
        return server

    async def watch(self, *alive: str, **servers: Server) -> Exporter:
        """Start the exporter on these servers and wait until it has looked at those alive (default: all)."""
        urls = {name: server.url for name, server in servers.items()}
        self._exporter = Exporter(urls, self.directory / f"{self.scenario}-{self.mode}.exporter.log")
        self._ending.push_async_callback(self._exporter.stop)
        await self._exporter.start(*(alive or servers))
        return self._exporter

    def tokens(self, low: int, high: int) -> Tokens:
        """Return a random prompt of low to high tokens."""
        return tuple(self.random.choices(TOKEN_IDS, k=self.random.randint(low, high)))

    async def pause(self, longest: float) -> None:
        """Do nothing for a random while of at most so many seconds."""
        await asyncio.sleep(self.random.uniform(0, longest))

    async def ask(self, server: Server, prompt: Sequence[int], generate: int, **more: Any) -> Answer:
        """Send one request while no other runs, and tell the truth of it."""
        before = await server.held()
        answers = await server.complete(prompt, generate, **more)
        self.truth.add_alone(answers[0], before, await server.held())
        return answers[0]

    async def paced(self, server: Server, prompt: Sequence[int], generate: int, **more: Any) -> Answer:
        """As `ask`, and return when the exporter shows it or had its chance to."""
        answer = await self.ask(server, prompt, generate, **more)
        await self.seen()
        return answer

    async def seen(self, shows: Judge | None = None) -> None:
        """Return when the exporter shows what is wanted (the truth's tokens), or had its chance."""
        wanted = shows or self.token_rows
        await self.looked(lambda figures: not _missed(wanted(figures)))

    async def settle(self, judge: Judge) -> None:
        """Keep the rows of `judge` once the exporter had its chance, or after 35 s what is missed still."""
        began = time.monotonic()
        await self.looked()
        rows = judge(await self.exporter.figures())
        while _missed(rows) and time.monotonic() - began < SETTLE_SECONDS:
            await asyncio.sleep(0.5)
            rows = judge(await self.exporter.figures())
        self._keep(rows)

    async def keep(self, judge: Judge) -> None:
        """Keep the rows of `judge` as they are now."""
        self._keep(judge(await self.exporter.figures()))

    def _keep(self, rows: list[Row]) -> None:
        self.rows += rows
        if _missed(rows):
            kept = self.directory / f"{self.scenario}-{self.mode}.metrics"
            kept.write_text(self.exporter.text)

    async def looked(self, enough: Callable[[Figures], bool] = lambda _: False) -> None:
        """Return when `enough` holds, after LOOKS looks begun after now, or after 12 s."""
        asked = time.time()
        deadline = time.monotonic() + LOOKS_SECONDS
        looks: set[float] = set()
        while len(looks) < LOOKS and time.monotonic() < deadline:
            figures = await self.exporter.figures()
            if enough(figures):
                return
            looks |= _look_begun_after(figures, asked)
            await asyncio.sleep(TICK_SECONDS)

    def token_rows(self, figures: Figures, server: str = "main") -> list[Row]:
        """Computed, reused and generated tokens: slots and unattributed together, against the truth."""
        ours = token_sums(figures, server)
        return [
            report.equal("computed tokens", ours[0], self.truth.computed),
            report.equal("reused tokens", ours[1], self.truth.reused),
            report.equal("generated tokens", ours[2], self.truth.generated),
        ]

    def paced_rows(self, figures: Figures) -> list[Row]:
        """What is wanted besides tokens where one request ran at a time and a poll saw each."""
        truth = self.truth
        prefill = figures.sum("kvscope_prefill_seconds_total", server="main")
        decode = figures.sum("kvscope_decode_seconds_total", server="main")
        seen = figures.sum("kvscope_request_prefill_seconds_count", server="main")
        seconds = figures.sum("kvscope_request_prefill_seconds_sum", server="main")
        return [
            report.equal("requests", requests(figures), truth.requests),
            report.within("prefill seconds", prefill, truth.prefill_seconds, 0.03),
            report.within("decode seconds", decode, truth.decode_seconds, 0.03),
            report.equal("exact observations", observations(figures, "exact"), truth.requests),
            report.equal("prefills in the histogram", seen, truth.requests),
            report.within("histogram's prefill seconds", seconds, truth.prefill_seconds, 0.03),
        ]

    def eviction_rows(self, figures: Figures) -> list[Row]:
        """Every loss counted, once, and none given a reason that it did not have.

        Where what came instead was read from host RAM, polls cannot tell how much of it the slot
        had held already: at least what is surely lost, at most all.
        """
        truth = self.truth
        events, tokens = truth.lost()
        sure = sum(loss.tokens for loss in truth.losses if not loss.from_host)
        return [
            report.equal("evictions", evictions(figures), events),
            report.between("evicted tokens", evicted_tokens(figures), sure, tokens),
            *self.reason_rows(figures),
        ]

    def reason_rows(self, figures: Figures) -> list[Row]:
        """No reason is named more often than it was true; `unknown` claims nothing."""
        named = figures.by("reason", "kvscope_evictions_total", server="main")
        reasons = {reason for reason, count in named.items() if count} | {
            loss.reason for loss in self.truth.losses
        }
        return [
            report.at_most(f"evictions, {reason}", named.get(reason, 0), self.truth.lost(reason)[0])
            for reason in sorted(reasons - {"unknown"})
        ]

    def no_wrong_eviction_rows(self, figures: Figures) -> list[Row]:
        """Where nothing was lost: no eviction. The default mode really clears idle slots for each task."""
        if self.separate:
            return [report.equal("evictions", evictions(figures), 0)]
        named = figures.by("reason", "kvscope_evictions_total", server="main")
        wrong = sum(count for reason, count in named.items() if reason not in ("idle_clear", "unknown"))
        return [report.equal("evictions but idle clearing", wrong, 0)]

    async def held_row(self, server: Server, name: str = "main") -> Judge:
        """Return a judge of the tokens held by slot, against /slots as it is now."""
        truth = await server.held()
        return lambda figures: [held_row(figures, truth, name)]


def held_row(figures: Figures, truth: dict[int, int], server: str = "main") -> Row:
    """Tokens held, slot by slot; one that never worked may be absent or 0."""
    shown = figures.by("slot", "kvscope_slot_context_tokens", server=server)
    ours = {slot: shown.get(str(slot)) for slot in truth}
    spoken = " ".join(
        "-" if held is None and truth[slot] else f"{held or 0:.0f}" for slot, held in ours.items()
    )
    return report.equal("tokens held by slot", spoken, " ".join(f"{held}" for held in truth.values()))


def token_sums(figures: Figures, server: str = "main") -> tuple[float | None, float | None, float | None]:
    """Return (computed, reused, generated) tokens: slots and unattributed together."""
    by_source = figures.by("source", "kvscope_prompt_tokens_total", server=server)
    apart = figures.by("source", "kvscope_unattributed_tokens_total", server=server)
    reused = [count for source, count in by_source.items() if source != "computed"]
    generated = figures.sum("kvscope_generated_tokens_total", server=server)
    return (
        _plus(by_source.get("computed"), apart.get("computed")),
        _plus(sum(reused) if reused else None, apart.get("reused")),
        _plus(generated, apart.get("generated")),
    )


def _plus(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def requests(figures: Figures, server: str = "main") -> float | None:
    """Return the requests of every outcome."""
    return figures.sum("kvscope_requests_total", server=server)


def observations(figures: Figures, precision: str) -> float | None:
    """Return the observations of one precision."""
    return figures.sum("kvscope_observations_total", server="main", precision=precision)


def evictions(figures: Figures, **labels: str) -> float:
    """Return the evictions from slots; a reason that no series names was not counted."""
    return figures.sum("kvscope_evictions_total", server="main", tier="slot", **labels) or 0


def evicted_tokens(figures: Figures, **labels: str) -> float:
    """Return the tokens that left slots."""
    return figures.sum("kvscope_evicted_tokens_total", server="main", tier="slot", **labels) or 0


def _look_begun_after(figures: Figures, instant: float) -> set[float]:
    ends = []
    for source in ("slots", "metrics", "props"):
        ended = figures.sum("kvscope_source_last_success_timestamp_seconds", server="main", source=source)
        took = figures.sum("kvscope_source_duration_seconds", server="main", source=source) or 0
        if ended is not None and ended - took > instant:
            ends.append(ended)
    return {max(ends)} if ends else set()


def _missed(rows: list[Row]) -> bool:
    return any(row.verdict is Verdict.MISSED for row in rows)
