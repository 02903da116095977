"""A real demo session in both modes of the server, watched by kvscope serve, scraped by a real Prometheus.

What really happened is told by the completions' own timings and token lists (tests/truth/oracle.py): the
session's requests pass through a listener that notes each reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

from aiohttp import web
from tests.truth.driver import DidNotHappen, Exporter, Server, answer_of, free_port, until
from tests.truth.oracle import Answer, Truth
from tests.truth.stage import token_sums

from kvscope.commands.demo import SLOW_FLAGS
from kvscope.demo.session import CONTEXT_LIMIT, POOL_LIMIT, AgentSession
from kvscope.demo.tiny_model import write_tiny_model

MODES = {
    "default": ("-c", str(POOL_LIMIT)),
    "separate": ("-np", "4", "-c", str(4 * CONTEXT_LIMIT)),
}
TURNS = 4
"""Each scene of the session once."""
SCRAPE_SECONDS = 1
SERVER_NAME = "demo"
WAIT_SECONDS = 90.0
"""Other tests may need the processors too."""

Samples = list[tuple[float, float]]


class QueryFailed(Exception):
    """Prometheus answered an error; the text is its own."""


@dataclass(frozen=True)
class Series:
    """One series of an answer: its labels, and (time, value) pairs."""

    labels: Mapping[str, str]
    samples: Samples


@dataclass
class Watched:
    """One server with its exporter, and what the driver knows of it."""

    mode: str
    instance: str
    server: Server
    exporter: Exporter
    truth: Truth = field(default_factory=Truth)
    held: dict[int, int] = field(default_factory=dict)
    slots_lost: dict[int, int] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0


@dataclass
class Prometheus:
    """A Prometheus server in a process of its own, on a folder of its own."""

    folder: Path
    targets: Sequence[str]
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it and wait until it has scraped every target; raises DidNotHappen."""
        settings = self.folder / "prometheus.yml"
        # JSON is YAML too.
        settings.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": f"{SCRAPE_SECONDS}s"},
                    "scrape_configs": [
                        {"job_name": "kvscope", "static_configs": [{"targets": list(self.targets)}]}
                    ],
                }
            )
        )
        with (self.folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it starts at once
                [
                    "prometheus",
                    f"--config.file={settings}",
                    f"--storage.tsdb.path={self.folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        async def scraped() -> bool:
            with contextlib.suppress(OSError, QueryFailed):
                up = self.query("up == 1", time.time())
                return {series.labels["instance"] for series in up} == set(self.targets)
            return False

        await until("a first scrape of every exporter", scraped, WAIT_SECONDS)

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def query(self, expression: str, at: float) -> list[Series]:
        """Return what an expression is at a time. Raises QueryFailed."""
        result = self._ask("query", query=expression, time=at)["result"]
        return [Series(each["metric"], [_sample(each["value"])]) for each in result]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """Return what an expression is from start to end. Raises QueryFailed."""
        result = self._ask("query_range", query=expression, start=start, end=end, step=step)["result"]
        return [Series(each["metric"], [_sample(value) for value in each["values"]]) for each in result]

    def label_values(self, label: str, selector: str, start: float, end: float) -> list[str]:
        """Return the values of a label. Raises QueryFailed."""
        values: list[str] = self._ask(
            f"label/{label}/values", **{"match[]": selector, "start": start, "end": end}
        )
        return values

    def _ask(self, path: str, **parameters: object) -> Any:
        address = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urlencode(parameters)}"
        try:
            with urlopen(address, timeout=30) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            raise QueryFailed(f"{error.code}: {error.read().decode(errors='replace')}") from None


def _sample(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


class Listener:
    """Stands between the session and its server: passes each completion on, and notes what it came to."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._running = 0
        self._before: dict[int, int] = {}
        self._answers: list[Answer] = []
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Give the address to send completions to."""
        application = web.Application(client_max_size=2**26)
        application.router.add_post("/completion", self._pass_on)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.Response:
        body = await request.json()
        async with self._lock:
            if not self._running:
                self._before = await self._watched.server.held()
            self._running += 1
        status, reply = await self._watched.server.post("/completion", body)
        async with self._lock:
            self._running -= 1
            if status == 200:
                self._answers.append(answer_of(tuple(body["prompt"]), reply))
            if not self._running:
                self._tell(await self._watched.server.held())
        return web.json_response(reply, status=status)

    def _tell(self, after: Mapping[int, int]) -> None:
        truth, lost_before = self._watched.truth, len(self._watched.truth.losses)
        answers, self._answers = self._answers, []
        if len(answers) == 1:
            truth.add_alone(answers[0], self._before, after)
        else:
            # Requests at once take a slot each.
            taken = {answer.slot for answer in answers}
            for slot, held in self._before.items():
                if slot not in taken and after[slot] < held:
                    truth.lose(slot, held - after[slot], "idle_clear")
                    truth.content.pop(slot, None)
            for answer in answers:
                if truth.content.get(answer.slot):
                    truth.replace(answer)
                truth.add(answer)
        for loss in truth.losses[lost_before:]:
            for slot in loss.slots:
                self._watched.slots_lost[slot] = self._watched.slots_lost.get(slot, 0) + 1


class Stack:
    """Both servers with their exporters and the Prometheus that scrapes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ending = contextlib.AsyncExitStack()
        self.watched: dict[str, Watched] = {}
        self.prometheus = Prometheus(folder, ())

    async def play(self) -> None:
        """Start everything, play the session on both servers, and wait until Prometheus knows its end."""
        model = await asyncio.to_thread(write_tiny_model, self._folder / "tiny.gguf")
        for mode, context in MODES.items():
            self.watched[mode] = await self._watch(mode, model, context)
        self.prometheus = Prometheus(self._folder, [each.instance for each in self.watched.values()])
        self._ending.callback(self.prometheus.stop)
        await self.prometheus.start()
        await asyncio.gather(*(self._session(each) for each in self.watched.values()))

    async def stop(self) -> None:
        """End everything."""
        await self._ending.aclose()

    async def _watch(self, mode: str, model: Path, context: Iterable[str]) -> Watched:
        server = Server(model, [*context, *SLOW_FLAGS, "--metrics", "-a", "kvscope-tiny"])
        self._ending.push_async_callback(server.stop)
        await server.start()
        exporter = Exporter(
            {SERVER_NAME: server.url},
            self._folder / f"{mode}.exporter.log",
            *("--gpu", "pretend", "--sleep-idle", "off", "--idle-interval", "0.5"),
        )
        self._ending.push_async_callback(exporter.stop)
        await exporter.start(SERVER_NAME)
        return Watched(mode, f"127.0.0.1:{exporter.port}", server, exporter)

    async def _session(self, watched: Watched) -> None:
        await self._restart(watched)
        watched.began = await self._next_scrape(watched)
        async with Listener(watched).listening() as url:
            await AgentSession(url, lambda story: None).run(TURNS)
        watched.held = await watched.server.held()
        truth = (watched.truth.computed, watched.truth.reused, watched.truth.generated)

        async def told() -> bool:
            return token_sums(await watched.exporter.figures(), SERVER_NAME) == truth

        # Where it never tells the truth, the tests say by how much.
        with contextlib.suppress(DidNotHappen):
            await until("the exporter's figures of the whole session", told, WAIT_SECONDS)
        # A look begun before may still end in a scrape.
        await self._next_scrape(watched)
        watched.ended = await self._next_scrape(watched)

    async def _next_scrape(self, watched: Watched) -> float:
        """Return the time of the next whole scrape: increases between two such times are exact."""
        query, now = f'timestamp(up{{instance="{watched.instance}"}})', time.time()

        async def scraped() -> float:
            [series] = self.prometheus.query(query, time.time())
            return series.samples[0][1] if series.samples[0][1] > now else 0.0

        return float(await until("a scrape", scraped, WAIT_SECONDS))

    async def _restart(self, watched: Watched) -> None:
        """Let the exporter see the server restarted, before anything is held: pages mark it."""
        await watched.server.kill()
        await watched.server.start()

        async def seen() -> bool:
            figures = await watched.exporter.figures()
            return (
                figures.sum("kvscope_server_restarts_total", server=SERVER_NAME) == 1
                and figures.sum("kvscope_server_up", server=SERVER_NAME) == 1
                and figures.sum("kvscope_kv_unified", server=SERVER_NAME) is not None
            )

        await until("the exporter's look at the restarted server", seen, WAIT_SECONDS)
