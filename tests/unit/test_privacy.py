"""A canary planted wherever something private stands appears in nothing that the exporter emits."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from fake_server import FakeServer, body, cut_off, late, status
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
from rich.console import Console
from watching import Watched

from kvscope.logs import start_logging
from kvscope.metrics.web import application
from kvscope.observed.server import ServerState
from kvscope.terminal.table import plain_lines, render

CANARY = "canary"
PAGES = ("/", "/metrics", "/snapshot.json", "/-/healthy", "/-/ready", "/nowhere")


@pytest.fixture(params=["text", "json"])
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What the exporter logs, everything, as it is written."""
    root, ours = logging.getLogger(), logging.getLogger("kvscope")
    before = root.handlers[:], root.level, ours.level
    written = io.StringIO()
    start_logging("debug", request.param, written)
    root.setLevel(logging.DEBUG)
    yield written
    root.handlers[:], root.level, ours.level = before[0], before[1], before[2]


def planted(server: FakeServer) -> None:
    """A server with prompt text wherever LLAMA_SERVER_SLOTS_DEBUG and older builds put it."""
    server.begin(0, 100)
    server.slots[0] |= {
        "prompt": f"{CANARY} prompt",
        "generated": f"{CANARY} answer",
        "params": {"prompt": CANARY, "stop": [CANARY], "grammar": CANARY, "lora": [{"path": CANARY}]},
        CANARY: CANARY,
    }
    server.slots[0]["next_token"][0] |= {"stopping_word": CANARY}
    server.props |= {
        "model_alias": f"/home/{CANARY}/models/tiny-00001-of-00002.gguf",
        "model_path": rf"C:\Users\{CANARY}\tiny.gguf",
        "chat_template": CANARY,
        "default_generation_settings": {"n_ctx": 4096, "params": {"prompt": CANARY}},
        "webui_settings": {"apiKey": CANARY},
    }


async def emitted(watched: Watched, log: io.StringIO) -> str:
    """Everything that comes out: each page in each format, the terminal's table, the log."""
    texts = [log.getvalue()]
    async with TestClient(TestServer(application(watched.board))) as exporter:
        for page in PAGES:
            for accept in ("text/plain", CONTENT_TYPE_LATEST):
                async with exporter.get(page, headers={"Accept": accept}) as answer:
                    texts += [await answer.text(), repr(answer.headers)]
    console = Console(file=io.StringIO(), width=200)
    console.print(render(watched.board.snapshot()), *plain_lines(watched.board.snapshot()))
    assert isinstance(console.file, io.StringIO)
    texts.append(console.file.getvalue())
    return "\n".join(texts)


async def test_no_word_of_a_prompt_no_key_no_header_and_no_directory_comes_out(
    log: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{CANARY}:{CANARY}@127.0.0.1:9")
    monkeypatch.setenv("https_proxy", f"https://{CANARY}:{CANARY}@127.0.0.1:9")
    (tmp_path / CANARY).mkdir()
    socket = tmp_path / CANARY / "s"
    async with FakeServer(api_key=f"{CANARY}-key", prefix=f"/{CANARY}", unix_socket=socket) as server:
        planted(server)
        told = server.settings(
            api_key=f"{CANARY}-key",
            headers={f"X-{CANARY}": CANARY},
            api_key_from=f"/home/{CANARY}/key",
            ca_file=f"/home/{CANARY}/ca.pem",
            sleep_idle="off",
        )
        watched = Watched(told)
        await watched.look(2)
        server.generate(0, 5)
        await watched.look(2)
        server.end(0)
        box = await watched.look(2)
        assert box.state is ServerState.READY
        assert box.model == "tiny"
        assert sum(slot.prompt_tokens["computed"] for slot in box.counts[0].slots.values()) == 100
        out = await emitted(watched, log)
        assert CANARY in repr(server.slots)
        assert CANARY not in out
        await watched.client.close()


FAILURES = {
    "another page": body(f"<html>{CANARY}</html>"),
    "another JSON": body({CANARY: CANARY}),
    "a list of text": body([CANARY]),
    "an error that quotes the key": status(401, f"wrong key {CANARY}"),
    "a redirect": status(302, Location=f"http://{CANARY}.invalid/{CANARY}"),
    "a bad status": status(500, f"Traceback: {CANARY}"),
    "half an answer": cut_off,
    "no answer": late,
    "a wrong kind of text": body({"total_slots": CANARY, "build_info": [CANARY], "is_sleeping": CANARY}),
    "odd counters": body(f"llamacpp:prompt_tokens_total {CANARY}\n"),
}


@pytest.mark.parametrize("path", ["/props", "/slots", "/metrics"])
@pytest.mark.parametrize("answer", FAILURES.values(), ids=FAILURES)
async def test_what_a_server_answers_instead_is_not_quoted(log: io.StringIO, path: str, answer: Any) -> None:
    async with FakeServer(api_key=CANARY) as server:
        watched = Watched(server.settings(api_key=CANARY, sleep_idle="off"))
        server.work(0, 50, 5)
        await watched.look()
        server.answers[path] = answer
        server.work(0, 50, 5)
        watched.clock.seconds += 31
        watched.lose_patience()
        await watched.look(2)
        assert CANARY not in await emitted(watched, log)
        await watched.client.close()
