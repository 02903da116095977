"""Pollers on a clock that tests move, against fake servers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psutil
from fake_server import FakeServer

from kvscope.observed.model import ModelSeen
from kvscope.observed.server import ServerProcess
from kvscope.poller import Poller
from kvscope.settings import ServerSettings, Settings
from kvscope.snapshot import Board, ServerBox
from kvscope.sources.llama_server import LlamaServer
from kvscope.sources.model_file import Served
from kvscope.sources.server_process import NotReadableError, is_alive

PATIENT_SECONDS = 60.0
"""So that a slow machine is not mistaken for a slow server."""
IMPATIENT_SECONDS = 0.3


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def time(self) -> float:
        return 1_800_000_000.0 + self.seconds

    def monotonic(self) -> float:
        return self.seconds


def no_process(_: ServerSettings) -> ServerProcess:
    raise NotReadableError("it is not reached over a port of this machine")


def process(**flags: Any) -> Callable[[ServerSettings], ServerProcess]:
    """Finds a process that lives, with these flags."""
    found = ServerProcess(os.getpid(), psutil.Process().create_time(), **flags)
    return lambda _: found


class ModelAtHand:
    """A model whose shape is known without a file; without one, no file is in sight."""

    def __init__(self, seen: ModelSeen | None = None) -> None:
        self.seen = seen
        self.asked: list[Served] = []

    def read(self, served: Served) -> ModelSeen | None:
        self.asked.append(served)
        return self.seen


class Watched:
    """One server watched by one poller; `box` is what it published last."""

    def __init__(
        self,
        server: FakeServer | ServerSettings,
        *,
        find_process: Callable[[ServerSettings], ServerProcess] = no_process,
        process_lives: Callable[[ServerProcess], bool] = is_alive,
        board: Board | None = None,
        clock: Clock | None = None,
        sleep_idle: str | float = "auto",
        model_file: Any = None,
        **settings: Any,
    ) -> None:
        told = server if isinstance(server, ServerSettings) else server.settings(sleep_idle=sleep_idle)
        self.clock = clock or Clock()
        self.board = board or Board((told.name,))
        self.boxes: list[ServerBox] = []
        self.client = LlamaServer(told, PATIENT_SECONDS)
        self.poller = Poller(
            told,
            Settings(servers=(told,), **settings),
            self._publish,
            client=self.client,
            find_process=find_process,
            process_lives=process_lives,
            model_file=model_file or ModelAtHand(),
            clock=self.clock.time,
            monotonic=self.clock.monotonic,
        )

    def _publish(self, box: ServerBox) -> None:
        self.boxes.append(box)
        self.board.publish(box)

    @property
    def box(self) -> ServerBox:
        return self.boxes[-1]

    def lose_patience(self) -> None:
        """From now on an answer that takes longer than a moment is late."""
        self.client.deadline_seconds = IMPATIENT_SECONDS

    async def look(self, looks: int = 1) -> ServerBox:
        """Look, and let as much time pass as the poller would wait."""
        for _ in range(looks):
            await self.poller.look_once()
            self.clock.seconds += self.poller.pause_seconds()
        return self.box

    async def watch(self, seconds: float) -> ServerBox:
        """Look as often as the poller would in so many seconds."""
        until = self.clock.seconds + seconds
        while self.clock.seconds < until:
            await self.look()
        return self.box
