"""A real server, the exporter's own poller on it, and a proxy between them that writes all answers down."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvscope.demo.running_server import RunningServer
from kvscope.observed.server import ServerProcess, ServerState
from kvscope.poller import Poller
from kvscope.settings import ServerSettings, Settings
from kvscope.snapshot import ServerBox
from kvscope.sources.server_process import NotReadableError, find_server_process
from tests.replay.recording import Line, Recording

BUSY_INTERVAL_SECONDS = 0.1
IDLE_INTERVAL_SECONDS = 0.5
WAIT_SECONDS = 60.0
KEPT_TEXT = 48
KEPT_PARAMETERS = ("temperature", "n_predict", "stop")
HEADERS = ("Process-Start-Time-Unix",)
FIRST_BYTE_TOKEN = 3
WORDS = (
    "kettle",
    "orchid",
    "harbour",
    "lantern",
    "pebble",
    "meadow",
    "violin",
    "copper",
    "saffron",
    "willow",
)

Tokens = list[int]


@dataclass(frozen=True)
class Situation:
    """One recording to be: how the server is started, what happens to it, what the exporter may see.

    change: takes fields out of an answer before anybody sees it, for builds that did not have them.
    """

    play: Callable[[Stage], Awaitable[None]]
    flags: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    process_readable: bool = True
    change: Callable[[str, Any], Any] | None = None
    seed: int = 1


class Stage:
    """Where a situation plays. The prompts come from its seed: one token a byte of made-up text."""

    def __init__(self, situation: Situation, model: Path) -> None:
        self._situation = situation
        self._model = model
        self._random = random.Random(situation.seed)
        self._server: RunningServer | None = None
        self._upstream: str | None = None
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True),
            timeout=aiohttp.ClientTimeout(total=WAIT_SECONDS),
        )
        self._began = time.monotonic()
        self._box: ServerBox | None = None
        self._published = asyncio.Condition()
        self._looks = 0
        self._full_metrics_kept = False
        self.lines: list[Line] = []

    # --- what a situation can do --------------------------------------------------------------------

    def words(self, tokens: int) -> Tokens:
        """Return so many tokens of made-up prompt text."""
        text = ""
        while len(text) < tokens:
            text += self._random.choice(WORDS) + " "
        return [FIRST_BYTE_TOKEN + byte for byte in text[:tokens].encode()]

    async def ask(self, prompt: Tokens, generate: int, **more: Any) -> Tokens:
        """Send one request to the server and return prompt and answer, as the next turn repeats them."""
        assert self._server is not None
        body = {"prompt": prompt, "n_predict": generate, "ignore_eos": True, "return_tokens": True, "seed": 1}
        async with self._http.post(self._server.url + "/completion", json=body | more) as answer:
            answer.raise_for_status()
            tokens: Tokens = (await answer.json())["tokens"]
            return prompt + tokens

    async def seen(self, looks: int = 2) -> None:
        """Return when the exporter has looked so often since now; of two, the second began after now."""
        until = self._looks + looks
        await self._wait(lambda _: self._looks >= until)

    async def state(self, state: ServerState) -> None:
        """Return when the exporter shows this state."""
        await self._wait(lambda box: box is not None and box.state is state)

    async def start(self) -> None:
        """Start the server and let the exporter reach it."""
        self._server = RunningServer(
            self._model, *self._situation.flags, environment=self._situation.environment
        )
        await asyncio.to_thread(self._server.wait)

    def reachable(self) -> None:
        """Let the exporter reach the server that runs now."""
        assert self._server is not None
        self._upstream = self._server.url

    async def kill(self) -> None:
        """End the server at once, as a crash would."""
        assert self._server is not None
        await asyncio.to_thread(self._server.kill)
        await asyncio.to_thread(self._server.stop)

    # --- between server and exporter ------------------------------------------------------------------

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        began = time.monotonic()
        try:
            async with self._http.get(f"{self._upstream}{request.path_qs}") as answer:
                body = await answer.read()
        except aiohttp.ClientConnectionError:
            self._write(began, {"path": request.path, "status": None})
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        content = self._content(request.path, body)
        headers = {name: answer.headers[name] for name in HEADERS if name in answer.headers}
        line = {
            "path": request.path,
            "status": answer.status,
            **content,
            **({"headers": headers} if headers else {}),
        }
        self._write(began, line)
        text = json.dumps(content["json"]) if "json" in content else content["text"]
        return web.Response(status=answer.status, text=text, headers=headers)

    def _content(self, path: str, body: bytes) -> dict[str, Any]:
        change = self._situation.change or (lambda _, content: content)
        try:
            return {"json": change(path, trimmed(json.loads(body)))}
        except ValueError:
            pass
        text = change(path, body.decode())
        if self._full_metrics_kept:
            text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
        self._full_metrics_kept = True
        return {"text": text}

    def _write(self, began: float, line: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self.lines.append(
            {"look": self._looks, "t": self._since(began), "took": round(now - began, 4), **line}
        )

    def _since(self, instant: float) -> float:
        return round(instant - self._began, 3)

    def _find_process(self, settings: ServerSettings) -> ServerProcess:
        found: ServerProcess | None = None
        if self._situation.process_readable and self._upstream is not None:
            with contextlib.suppress(NotReadableError):
                found = find_server_process(dataclasses.replace(settings, url=self._upstream))
        seen: dict[str, Any] | None = None
        if found is not None:
            # What its flags say is told by the head of the recording; its paths are nobody's business.
            started = self._since(time.monotonic() - time.time() + found.started_at)
            seen = {"sleep_idle_seconds": found.sleep_idle_seconds, "started_at_t": started}
        self.lines.append({"look": self._looks, "t": self._since(time.monotonic()), "process": seen})
        if found is None:
            raise NotReadableError("it is not reached over a port of this machine")
        return found

    # --- the whole of it ----------------------------------------------------------------------------------

    async def record(self, name: str, head: Line) -> Recording:
        """Play the situation and return what the exporter got to see."""
        proxy = web.Application()
        proxy.router.add_get("/{path:.*}", self._pass_on)
        settings = Settings(
            busy_interval_seconds=BUSY_INTERVAL_SECONDS, idle_interval_seconds=IDLE_INTERVAL_SECONDS
        )
        async with self._http, TestServer(proxy) as address:
            await self.start()
            self.reachable()
            self._began = time.monotonic()
            poller = Poller(
                ServerSettings("main", url=str(address.make_url(""))),
                settings,
                self._publish,
                find_process=self._find_process,
            )
            watch = asyncio.create_task(poller.run())
            try:
                await self.seen(1)
                await self._situation.play(self)
                # Between two looks, so that none is cut off.
                await self.seen()
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
                if self._server is not None:
                    await asyncio.to_thread(self._server.stop)
        head = {
            **head,
            "flags": " ".join(self._situation.flags),
            "environment": dict(self._situation.environment),
            "sleep_idle": "auto",
            "busy_interval_seconds": BUSY_INTERVAL_SECONDS,
            "idle_interval_seconds": IDLE_INTERVAL_SECONDS,
        }
        return Recording(name, head, self.lines)

    def _publish(self, box: ServerBox) -> None:
        self._box = box
        self._looks += 1
        self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        async with self._published:
            self._published.notify_all()

    async def _wait(self, holds: Callable[[ServerBox | None], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS), self._published:
            await self._published.wait_for(lambda: holds(self._box))


def trimmed(content: Any) -> Any:
    """Return a JSON answer without what is large and of no use here; a beginning of each text stays."""
    if isinstance(content, list):
        return [trimmed(entry) for entry in content]
    if not isinstance(content, dict):
        return content
    kept = {key: value for key, value in content.items() if key not in ("chat_template_caps", "media_marker")}
    for key in ("chat_template", "prompt", "generated"):
        if key in kept:
            kept[key] = kept[key][:KEPT_TEXT]
    if "params" in kept:
        kept["params"] = {key: kept["params"][key] for key in KEPT_PARAMETERS if key in kept["params"]}
    if "default_generation_settings" in kept:
        kept["default_generation_settings"] = trimmed(kept["default_generation_settings"])
    return kept


def without(fields: Sequence[str], counters: Sequence[str]) -> Callable[[str, Any], Any]:
    """Return a change that takes fields out of /slots and counters out of /metrics."""

    def change(path: str, content: Any) -> Any:
        if path == "/slots":
            return [{key: value for key, value in slot.items() if key not in fields} for slot in content]
        if path == "/metrics" and isinstance(content, str):
            lines = content.splitlines(keepends=True)
            return "".join(line for line in lines if not any(counter in line for counter in counters))
        return content

    return change
