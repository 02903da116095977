"""A small llama-server for tests: scripted slots and counters, any misbehaviour, every request counted."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import trustme
from aiohttp import web

from kvscope.settings import ServerSettings

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PROPS: dict[str, Any] = {
    "default_generation_settings": {"n_ctx": 4096, "params": {"seed": 1}},
    "total_slots": 2,
    "model_alias": "tiny",
    "model_path": "/models/of/somebody/tiny.gguf",
    "model_ftype": "F16",
    "build_info": "b11549-abcdef",
    "is_sleeping": False,
    "endpoint_slots": True,
    "endpoint_metrics": True,
    "chat_template": "{{ messages }}",
}


def never_used(number: int) -> dict[str, Any]:
    return {"id": number, "n_ctx": 4096, "speculative": False, "is_processing": False}


class FakeServer:
    """Use as `async with FakeServer() as server`; `server.settings("main")` leads to it.

    asked: requests by path. slots, props, counters: what the endpoints show; change them at will, or
    play requests with `begin`, `generate` and `end`. answers: by path, what is answered instead.
    """

    def __init__(
        self,
        slots: int = 2,
        *,
        api_key: str | None = None,
        prefix: str = "",
        tls: bool = False,
        unix_socket: Path | None = None,
    ) -> None:
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.props = deepcopy(PROPS) | {"total_slots": slots}
        self.slots = [never_used(number) for number in range(slots)]
        self.counters: dict[str, float] = dict.fromkeys(
            (
                "prompt_tokens_total",
                "prompt_tokens_cached_total",
                "prompt_seconds_total",
                "tokens_predicted_total",
                "tokens_predicted_seconds_total",
                "requests_processing",
                "requests_deferred",
            ),
            0,
        )
        self.identity = "1000001"
        self.answers: dict[str, Handler] = {}
        self.url = ""
        self._tasks = 0
        self._api_key = api_key
        self._prefix = prefix
        self._unix_socket = unix_socket
        self._authority = trustme.CA() if tls else None
        self._runner: web.AppRunner | None = None

    def settings(self, name: str = "main", **more: Any) -> ServerSettings:
        socket = str(self._unix_socket) if self._unix_socket else None
        return ServerSettings(name, self.url, unix_socket=socket, **more)

    def write_authority(self, path: Path) -> str:
        """Write the certificate authority that vouches for this server, for --ca-file."""
        assert self._authority
        self._authority.cert_pem.write_to_path(str(path))
        return str(path)

    def taken(self) -> Counter[str]:
        """Requests by path since the last call."""
        asked, self.asked = self.asked, Counter()
        return asked

    # --- requests that it works on -------------------------------------------------------------

    def begin(self, slot: int, prompt: int, reused: int = 0) -> None:
        """A task begins on a slot and reads its prompt."""
        self.slots[slot] = never_used(slot) | {
            "is_processing": True,
            "id_task": self._tasks,
            "n_prompt_tokens": prompt,
            "n_prompt_tokens_processed": prompt - reused,
            "n_prompt_tokens_cache": reused,
            "params": {"temperature": 0.8},
            "next_token": [{"n_decoded": 0, "has_next_token": True}],
        }
        self._tasks += 1
        self.counters["prompt_tokens_cached_total"] += reused
        self.counters["requests_processing"] += 1

    def generate(self, slot: int, tokens: int) -> None:
        """The task generates; with its first token the prompt is counted."""
        seen = self.slots[slot]
        if not seen["next_token"][0]["n_decoded"]:
            self.counters["prompt_tokens_total"] += seen["n_prompt_tokens_processed"]
            self.counters["prompt_seconds_total"] += seen["n_prompt_tokens_processed"] / 1000
            seen["n_prompt_tokens"] -= 1
        seen["next_token"][0]["n_decoded"] += tokens
        seen["n_prompt_tokens"] += tokens

    def end(self, slot: int) -> None:
        """The task ends and its generated tokens are counted."""
        seen = self.slots[slot]
        generated = seen["next_token"][0]["n_decoded"]
        self.counters["tokens_predicted_total"] += generated
        self.counters["tokens_predicted_seconds_total"] += generated / 100
        self.counters["requests_processing"] -= 1
        seen |= {"is_processing": False, "n_prompt_tokens_processed": 0, "n_prompt_tokens_cache": 0}
        seen["next_token"][0]["n_decoded"] = 0

    def work(self, slot: int, prompt: int, generated: int) -> None:
        """A whole request between two looks."""
        self.begin(slot, prompt)
        self.generate(slot, generated)
        self.end(slot)

    def sleep(self) -> None:
        """It sleeps: slots are gone, counters stay."""
        self.props["is_sleeping"] = True
        self.slots = [never_used(slot["id"]) for slot in self.slots]

    def wake(self) -> None:
        self.props["is_sleeping"] = False

    def restart(self) -> None:
        """Another process, with nothing counted."""
        self.identity += "7"
        self.slots = [never_used(slot["id"]) for slot in self.slots]
        self.counters = dict.fromkeys(self.counters, 0)
        self._tasks = 0

    def without(self, *endpoints: str) -> None:
        """Switch `slots` or `metrics` off: 501, and /props says so."""
        for endpoint in endpoints:
            self.props[f"endpoint_{endpoint}"] = False
            self.answers[f"/{endpoint}"] = status(501)

    # --- serving -------------------------------------------------------------------------------

    async def __aenter__(self) -> FakeServer:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        if self._unix_socket:
            await web.UnixSite(self._runner, str(self._unix_socket)).start()
            self.url = f"http://localhost{self._prefix}"
            return self
        context = None
        if self._authority:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._authority.issue_cert("127.0.0.1").configure_cert(context)
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context).start()
        scheme = "https" if context else "http"
        self.url = f"{scheme}://127.0.0.1:{self._runner.addresses[0][1]}{self._prefix}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop listening: from now on connections are refused."""
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix(self._prefix) if request.path.startswith(self._prefix) else ""
        self.asked[path] += 1
        self.headers.append(dict(request.headers))
        if path in self.answers:
            return await self.answers[path](request)
        if path == "/health":
            return web.json_response({"status": "ok"})
        if self._api_key and request.headers.get("Authorization") != f"Bearer {self._api_key}":
            return web.json_response({"error": {"message": "Invalid API Key"}}, status=401)
        if path == "/props":
            return web.json_response(self.props)
        if path == "/slots":
            return web.json_response(self.slots)
        if path == "/metrics":
            lines = [f"llamacpp:{name} {value}\n" for name, value in self.counters.items()]
            return web.Response(text="".join(lines), headers={"Process-Start-Time-Unix": self.identity})
        return web.Response(status=404)


# --- answers that no llama-server should give ------------------------------------------------------


def status(code: int, text: str = "{}", **headers: str) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=code, text=text, headers=headers)

    return answer


def body(content: bytes | str | Any, **headers: str) -> Handler:
    """Answer 200 with these bytes, this text, or this value as JSON."""
    raw = content if isinstance(content, bytes) else None
    if raw is None:
        raw = (content if isinstance(content, str) else json.dumps(content)).encode()

    async def answer(_: web.Request) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(body=raw, headers=named)

    return answer


async def late(_: web.Request) -> web.StreamResponse:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def cut_off(request: web.Request) -> web.StreamResponse:
    """Promise a kilobyte, send a part, close."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'[{"id": 0, "n_ctx"')
    assert request.transport
    request.transport.close()
    return response


async def hang_up(request: web.Request) -> web.StreamResponse:
    """Close without a word."""
    assert request.transport
    request.transport.abort()
    return web.Response()


async def drip(request: web.Request) -> web.StreamResponse:
    """Send a byte now and then, for ever."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.01)


class Flood:
    """Sends JSON without end in sight; `sent` says how many bytes were taken."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        block = b'{"id": 1},' * 6400
        await response.write(b"[")
        while self.sent < self.size:
            await response.write(block)
            self.sent += len(block)
        await response.write(b"{}]")
        return response
