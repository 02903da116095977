"""What the driver holds in its hands: a real server, the exporter as a user runs it, and their replies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from kvscope.demo.running_server import RunningServer
from tests.truth.oracle import Answer, Tokens

ANSWER_SECONDS = 60.0
START_SECONDS = 30.0
STOP_SECONDS = 5.0
TICK_SECONDS = 0.05


class DidNotHappen(Exception):
    """Something that had to happen did not in time; the text says what."""


async def until(what: str, holds: Any, seconds: float = START_SECONDS) -> Any:
    """Return the first true value of the coroutine function `holds`; raises DidNotHappen with `what`."""
    deadline = time.monotonic() + seconds
    while not (value := await holds()):
        if time.monotonic() > deadline:
            raise DidNotHappen(f"{what}: not within {seconds:.0f} s")
        await asyncio.sleep(TICK_SECONDS)
    return value


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Figures:
    """One answer of a /metrics endpoint in the text format."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def sum(self, name: str, **labels: str | Sequence[str]) -> float | None:
        """Return the sum over all series with these labels (a sequence: any of them); None: no series."""
        values = [
            sample.value
            for sample in self._samples
            if sample.name == name and all(_matches(sample.labels.get(key), labels[key]) for key in labels)
        ]
        return sum(values) if values else None

    def by(self, label: str, name: str, **labels: str | Sequence[str]) -> dict[str, float]:
        """Return the sums by one label's values."""
        values: dict[str, float] = {}
        for sample in self._samples:
            fits = all(_matches(sample.labels.get(key), labels[key]) for key in labels)
            if sample.name == name and fits and label in sample.labels:
                values[sample.labels[label]] = values.get(sample.labels[label], 0.0) + sample.value
        return values


def _matches(value: str | None, wanted: str | Sequence[str]) -> bool:
    return value == wanted if isinstance(wanted, str) else value in wanted


class Server:
    """A real llama.cpp server on one port, which can be killed and started again there."""

    def __init__(self, model: Path, flags: Sequence[str]) -> None:
        self._model = model
        self.port = free_port()
        self._flags = [*flags, "--port", str(self.port)]
        self._running: RunningServer | None = None
        self._http: aiohttp.ClientSession | None = None
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the server that runs now."""
        assert self._running is not None
        return self._running.pid

    async def start(self) -> None:
        """Start it and wait until it is ready; raises ServerDidNotStart."""
        self._running = RunningServer(self._model, *self._flags)
        await asyncio.to_thread(self._running.wait)
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS))

    async def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._running is not None:
            self._running.kill()
        await self.stop()

    async def stop(self) -> None:
        """End it, if it runs."""
        if self._http is not None:
            await self._http.close()
            self._http = None
        if self._running is not None:
            running, self._running = self._running, None
            await asyncio.to_thread(running.stop)

    async def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Return status and JSON of one POST."""
        assert self._http is not None
        async with self._http.post(self.url + path, json=body) as reply:
            return reply.status, await reply.json(content_type=None)

    async def complete(self, prompt: Sequence[int], generate: int, **more: Any) -> list[Answer]:
        """Send a prompt of token ids and return what came of it: one answer, or `n` of them."""
        status, reply = await self.post("/completion", _body(prompt, generate, **more))
        if status != 200:
            raise DidNotHappen(f"/completion answered {status}: {str(reply)[:200]}")
        return [answer_of(tuple(prompt), one) for one in (reply if isinstance(reply, list) else [reply])]

    async def stream(self, prompt: Sequence[int], generate: int, chunks: int) -> None:
        """Read so many chunks of a stream, then leave: the connection is closed."""
        assert self._http is not None
        body = _body(prompt, generate, stream=True)
        async with self._http.post(self.url + "/completion", json=body) as reply:
            async for line in reply.content:
                chunks -= line.startswith(b"data:")
                if chunks <= 0:
                    reply.close()
                    return

    async def slots(self) -> list[dict[str, Any]]:
        """Return /slots; wakes a sleeping server and restarts its timer."""
        assert self._http is not None
        async with self._http.get(self.url + "/slots") as reply:
            slots: list[dict[str, Any]] = await reply.json()
            return slots

    async def held(self) -> dict[int, int]:
        """Return the tokens held by slot, as /slots says; a slot that never worked holds 0."""
        return {slot["id"]: slot.get("n_prompt_tokens", 0) for slot in await self.slots()}

    async def busy(self) -> bool:
        """Return whether a slot works now."""
        return any(slot["is_processing"] for slot in await self.slots())

    async def idle(self) -> bool:
        """Return whether no slot works now."""
        return not await self.busy()

    async def asleep(self) -> bool:
        """Return /props' `is_sleeping`, which does not restart the timer."""
        assert self._http is not None
        async with self._http.get(self.url + "/props") as reply:
            return bool((await reply.json())["is_sleeping"])

    async def counters(self) -> dict[str, float]:
        """Return the server's own counters by their names without `llamacpp:`."""
        assert self._http is not None
        async with self._http.get(self.url + "/metrics") as reply:
            return {
                sample.name.removeprefix("llamacpp:"): sample.value
                for family in text_string_to_metric_families(await reply.text())
                for sample in family.samples
            }


def _body(prompt: Sequence[int], generate: int, **more: Any) -> dict[str, Any]:
    body = {"prompt": list(prompt), "n_predict": generate, "ignore_eos": True, "return_tokens": True}
    return body | more


def answer_of(prompt: Tokens, reply: Mapping[str, Any]) -> Answer:
    """Return what the reply to a completion says of it."""
    timings = reply["timings"]
    return Answer(
        slot=reply["id_slot"],
        prompt=prompt,
        generated=tuple(reply["tokens"]),
        computed=timings["prompt_n"],
        reused=timings["cache_n"],
        predicted=timings["predicted_n"],
        prompt_ms=timings["prompt_ms"],
        predicted_ms=timings["predicted_ms"],
    )


class Exporter:
    """`kvscope serve` in a process of its own, with every setting but addresses left at its default.

    Settings of whoever runs this (KVSCOPE_* and the file in the home directory) do not reach it.
    """

    def __init__(self, servers: Mapping[str, str], log: Path, *flags: str) -> None:
        self.port = free_port()
        self._log = log
        self._command = [sys.executable, "-m", "kvscope", "serve", "--listen", f"127.0.0.1:{self.port}"]
        for name, url in servers.items():
            self._command += ["--server", f"{name}={url}"]
        self._command += flags
        self._environment = {
            key: value for key, value in os.environ.items() if not key.startswith("KVSCOPE_")
        }
        self._environment["XDG_CONFIG_HOME"] = str(log.parent)
        self._process: subprocess.Popen[bytes] | None = None
        self._http: aiohttp.ClientSession | None = None
        self.text = ""

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    async def start(self, *alive: str) -> None:
        """Start it and wait for a whole look at each server named; raises DidNotHappen."""
        with self._log.open("wb") as log:
            # Ctrl-C is for the driver, which then ends it.
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it starts at once
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS))

        async def looked() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                figures = await self.figures()
                return all(
                    figures.sum("kvscope_server_up", server=name) == 1
                    and figures.sum("kvscope_server_metrics_available", server=name) is not None
                    for name in alive
                )
            return False

        await until(f"a first look of the exporter at {', '.join(alive)}", looked)

    async def stop(self) -> None:
        """End it, as a service is ended."""
        if self._http is not None:
            await self._http.close()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    async def figures(self) -> Figures:
        """Return what its /metrics says now; raises DidNotHappen when it has ended or does not say 200."""
        assert self._process is not None
        assert self._http is not None
        if self._process.poll() is not None:
            lines = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise DidNotHappen(f"the exporter ended with {self._process.returncode}: {''.join(lines)}")
        async with self._http.get(f"http://127.0.0.1:{self.port}/metrics") as reply:
            if reply.status != 200:
                raise DidNotHappen(f"the exporter's /metrics answered {reply.status}")
            self.text = await reply.text()
        return Figures(self.text)
