"""A real server that may sleep does so while it is watched, and what wakes it is seen."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from kvscope.demo.running_server import RunningServer
from kvscope.observed.server import ServerProcess, ServerState
from kvscope.poller import Poller
from kvscope.settings import ServerSettings, Settings
from kvscope.snapshot import ServerBox
from kvscope.sources.server_process import NotReadableError

StartServer = Callable[..., RunningServer]

pytestmark = pytest.mark.real_server

LIMIT_SECONDS = "4"
PATIENCE_SECONDS = 60.0


async def complete(server: RunningServer, prompt: list[int], tokens: int) -> dict[str, Any]:
    asked = json.dumps({"prompt": prompt, "n_predict": tokens, "cache_prompt": True}).encode()
    request = urllib.request.Request(f"{server.url}/completion", asked, {"Content-Type": "application/json"})

    def send() -> dict[str, Any]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=PATIENCE_SECONDS) as answer:
            return dict(json.load(answer))

    return await asyncio.to_thread(send)


class Watching:
    """A poller with default settings on one server; `until` waits for a box that it published."""

    def __init__(self, server: RunningServer, **how: Any) -> None:
        told = ServerSettings("main", server.url)
        self._boxes: list[ServerBox] = []
        self._published = asyncio.Condition()
        poller = Poller(told, Settings(servers=(told,)), self._publish, **how)
        self._task = asyncio.create_task(poller.run())

    def _publish(self, box: ServerBox) -> None:
        self._boxes.append(box)

        async def tell() -> None:
            async with self._published:
                self._published.notify_all()

        self._telling = asyncio.get_running_loop().create_task(tell())

    async def until(self, true_of: Callable[[ServerBox], bool]) -> ServerBox:
        """Return the newest box as soon as this is true of it."""
        async with self._published:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self._published.wait_for(lambda: bool(self._boxes) and true_of(self._boxes[-1]))
            return self._boxes[-1]

    async def __aenter__(self) -> Watching:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def computed(box: ServerBox) -> int:
    return sum(slot.prompt_tokens["computed"] for counts in box.counts for slot in counts.slots.values())


def out_of_sight(_: ServerSettings) -> ServerProcess:
    raise NotReadableError("it is not reached over a port of this machine")


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        pytest.param(("-c", "2048"), {}, id="default mode"),
        pytest.param(("-np", "2", "-c", "2048"), {"find_process": out_of_sight}, id="nobody knows its flags"),
    ],
)
async def test_a_server_watched_by_default_settings_sleeps_and_its_next_request_is_seen(
    start: StartServer, mode: tuple[str, ...], how: dict[str, Any]
) -> None:
    server = start(*mode, "--metrics", "--sleep-idle-seconds", LIMIT_SECONDS)
    async with Watching(server, **how) as watching:
        await watching.until(lambda box: box.state is ServerState.READY)
        first = await complete(server, list(range(10, 210)), 4)
        box = await watching.until(lambda box: computed(box) == 200)
        held = sum(slot.context_tokens or 0 for slot in box.slots)
        assert held == 200 + first["timings"]["predicted_n"] - 1

        box = await watching.until(lambda box: box.state is ServerState.SLEEPING)
        assert box.up
        slept = box.counts[0].evictions["slot", "sleep", "unknown"]
        assert (slept.events, slept.tokens) == (1, held)
        assert all(slot.context_tokens == 0 for slot in box.slots)
        assert sum(count.events for count in box.counts[0].evictions.values()) == 1

        await complete(server, list(range(209, 59, -1)), 4)
        box = await watching.until(lambda box: computed(box) == 350)
        assert box.state is ServerState.READY
        assert box.restarts == 0
        assert box.counts[0].requests == {"unknown": 2}
        assert box.counts[0].unattributed_tokens == {"computed": 0, "reused": 0, "generated": 0}
        assert box.counts[0].evictions["slot", "sleep", "unknown"].events == 1

        await watching.until(lambda box: box.state is ServerState.SLEEPING)
        await watching.until(lambda box: box.counts[0].evictions["slot", "sleep", "unknown"].events == 2)


async def test_a_server_that_is_known_to_sleep_sleeps_without_metrics_too(start: StartServer) -> None:
    server = start("-np", "2", "-c", "2048", "--sleep-idle-seconds", LIMIT_SECONDS)
    async with Watching(server) as watching:
        await watching.until(lambda box: box.state is ServerState.READY)
        await watching.until(lambda box: box.state is ServerState.SLEEPING)
