"""Plays a recording back over real HTTP to the whole exporter, whose clock is the recording's."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from kvscope.metrics.web import application
from kvscope.observed.model import ModelSeen
from kvscope.observed.server import ServerProcess
from kvscope.poller import Poller
from kvscope.settings import ServerSettings, Settings
from kvscope.snapshot import Board
from kvscope.sources import llama_server
from kvscope.sources.llama_server import LlamaServer
from kvscope.sources.model_file import ModelFile, Served
from kvscope.sources.model_shape import read_shape
from kvscope.sources.server_arguments import context_settings
from kvscope.sources.server_process import NotReadableError
from tests.replay.recording import RECORDINGS, Line, Recording, body_of

BEGAN_AT = 1_800_000_000.0
"""Unix seconds at which every recording begins when it is played back."""
MONOTONIC_BEGAN_AT = 1000.0
NOT_A_PROCESS = 2**31 - 1
_OWN = re.compile(r"(?:# (?:HELP|TYPE) )?(?:process_|kvscope_build_info)")


class AnotherOrder(AssertionError):
    """The exporter asked for something that it did not ask for when the recording was made."""


class Clock:
    """The recording's time; stands in for the module `time` where durations are measured."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self) -> float:
        """Return Unix seconds."""
        return BEGAN_AT + self.seconds

    def monotonic(self) -> float:
        """Return seconds of a clock that never jumps."""
        return MONOTONIC_BEGAN_AT + self.seconds


@dataclass
class Replayed:
    """What the exporter showed: /metrics after the last look and after the looks asked for.

    at: by number of a line of the file, /metrics after the look in which it was answered.
    pages: every other page after the last look, by path.
    """

    metrics: str = ""
    at: dict[int, str] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)


class RecordedModel(ModelFile):
    """The model that was recorded: its shape lies beside the recordings, if it does."""

    def read(self, served: Served) -> ModelSeen | None:
        """Return the shape of a model by the name of its file."""
        if served.path is None or not served.process_seen:
            return None
        shape = RECORDINGS / f"{Path(served.path).stem}.shape.json"
        return ModelSeen(read_shape(shape)) if shape.is_file() else None


class RecordedServer:
    """A web application that gives the recorded answers in their order and sets the clock to theirs.

    It goes from look to look. What the exporter does not ask for any more in a look is left out; what
    was not asked for then cannot be answered.
    """

    def __init__(self, recording: Recording, clock: Clock) -> None:
        self._name = recording.name
        self._left = list(enumerate(recording.lines, 2))
        self._look: list[tuple[int, Line]] = []
        self._clock = clock
        self._process: Line | None = None
        flags = shlex.split(recording.head["flags"])
        self._settings = context_settings(flags, recording.head["environment"])
        self.line = 1
        self.problem: str | None = None

    def next_look(self) -> bool:
        """Return whether there is another look; the clock is where it begins then. Raises AnotherOrder."""
        if self.problem:
            raise AnotherOrder(self.problem)
        if not self._left:
            return False
        first = self._left[0][1]
        self._look = [entry for entry in self._left if entry[1]["look"] == first["look"]]
        del self._left[: len(self._look)]
        self._clock.seconds = first["t"]
        self.line = self._look[-1][0]
        return True

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request as the server did."""
        line = self._take("path", request.path)
        if line is None:
            self.problem = (
                f"{self._name}, look that ends with line {self.line}: the exporter asks for {request.path}, "
                "which it did not when this was recorded. If it is meant to, record anew: "
                f"python -m tests.record {self._name}"
            )
            return web.Response(status=500)
        self._clock.seconds = line["t"] + line["took"]
        if line["status"] is None:
            assert request.transport is not None
            request.transport.abort()
        kind = "application/json" if "json" in line else "text/plain"
        return web.Response(
            status=line["status"] or 500,
            body=body_of(line),
            content_type=kind,
            headers=line.get("headers"),
        )

    def find_process(self, _: ServerSettings) -> ServerProcess:
        """Return what was found out about the server's process, as `find_server_process` does."""
        line = self._take("process")
        if line is not None:
            self._process = line["process"]
        if self._process is None:
            raise NotReadableError("it is not reached over a port of this machine")
        return ServerProcess(
            pid=NOT_A_PROCESS,
            started_at=BEGAN_AT + self._process["started_at_t"],
            sleep_idle_seconds=self._process["sleep_idle_seconds"],
            settings=self._settings,
        )

    def _take(self, key: str, value: str | None = None) -> Line | None:
        for place, (_, line) in enumerate(self._look):
            if key in line and (value is None or line[key] == value):
                del self._look[: place + 1]
                return line
        return None


async def replay(recording: Recording, after_lines: Collection[int] = ()) -> Replayed:
    """Return what the exporter shows of a recording; raises AnotherOrder."""
    clock = Clock()
    recorded = RecordedServer(recording, clock)
    served = web.Application()
    served.router.add_get("/{path:.*}", recorded.answer)
    board = Board(("main",))
    shown = Replayed()
    wanted = sorted(after_lines)
    async with (
        TestServer(served) as server,
        TestClient(TestServer(application(board))) as exporter,
        contextlib.AsyncExitStack() as ending,
    ):
        settings = ServerSettings(
            "main", url=str(server.make_url("")), sleep_idle=recording.head["sleep_idle"]
        )
        client = LlamaServer(settings)
        ending.push_async_callback(client.close)
        poller = Poller(
            settings,
            Settings(
                busy_interval_seconds=recording.head["busy_interval_seconds"],
                idle_interval_seconds=recording.head["idle_interval_seconds"],
            ),
            board.publish,
            client=client,
            find_process=recorded.find_process,
            process_lives=lambda _: True,
            model_file=RecordedModel(settings),
            clock=clock.time,
            monotonic=clock.monotonic,
        )
        with patch.object(llama_server, "time", clock):  # it measures how long each answer took
            while recorded.next_look():
                await poller.look_once()
                if wanted and wanted[0] <= recorded.line:
                    text = await _page(exporter, "/metrics")
                    while wanted and wanted[0] <= recorded.line:
                        shown.at[wanted.pop(0)] = text
        shown.metrics = await _page(exporter, "/metrics")
        for path in ("/snapshot.json", "/"):
            shown.pages[path] = await _page(exporter, path)
    return shown


async def _page(exporter: TestClient[web.Request, web.Application], path: str) -> str:
    async with exporter.get(path) as answer:
        assert answer.status == 200
        text = await answer.text()
    # The exporter's own process and version are of no recording.
    return "".join(line for line in text.splitlines(keepends=True) if not _OWN.match(line))
