"""The scripted session: which prompts it asks, that they share what they should, and that it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import takewhile

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvscope.demo.session import (
    ANSWER_TOKENS,
    CONTEXT_LIMIT,
    QUESTION_TOKENS,
    SYSTEM_TOKENS,
    AgentSession,
    SessionFailed,
)


class FakeServer:
    """Answers /completion as llama-server does, and keeps the prompts."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.status = 200

    async def complete(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.prompts.append(asked["prompt"])
        return web.json_response({"tokens": [7] * asked["n_predict"]}, status=self.status)


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
async def url(fake: FakeServer) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/completion", fake.complete)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


async def play(url: str, turns: int, seed: int = 0) -> list[str]:
    told: list[str] = []
    await AgentSession(url, told.append, seed, breath_seconds=0).run(turns)
    return told


def shared(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


async def test_a_turn_goes_on_where_the_main_agent_stopped(fake: FakeServer, url: str) -> None:
    await play(url, turns=1)
    first, sub_agent, back = fake.prompts
    assert len(first) == SYSTEM_TOKENS + QUESTION_TOKENS
    assert shared(first, back) == len(first)
    assert back[len(first) :][:ANSWER_TOKENS] == [7] * ANSWER_TOKENS
    assert shared(first, sub_agent) == pytest.approx(SYSTEM_TOKENS, abs=20)


async def test_three_sub_agents_and_two_strangers_are_asked_in_their_turns(
    fake: FakeServer, url: str
) -> None:
    told = await play(url, turns=3)
    main = fake.prompts[0]
    like_main = [shared(main, prompt) >= SYSTEM_TOKENS for prompt in fake.prompts]
    assert like_main == [True] * 9 + [False] * 2 + [True]
    assert "three sub-agents ask at once, all with the same system prompt" in told
    assert told[-1] == "the session is over"


async def test_contexts_stay_bounded_and_a_new_day_starts_cold(fake: FakeServer, url: str) -> None:
    told = await play(url, turns=9)
    assert max(len(prompt) + ANSWER_TOKENS for prompt in fake.prompts) <= CONTEXT_LIMIT
    days = [line for line in told if line.startswith("day ")]
    assert len(days) == 3
    assert days[1].startswith("day 2")


async def test_a_seed_repeats_a_session_and_another_one_does_not(fake: FakeServer, url: str) -> None:
    await play(url, turns=1, seed=5)
    await play(url, turns=1, seed=5)
    await play(url, turns=1, seed=6)
    first, again, other = fake.prompts[:3], fake.prompts[3:6], fake.prompts[6:]
    assert first == again
    assert first[0] != other[0]


async def test_a_refused_request_is_told_with_who_asked(fake: FakeServer, url: str) -> None:
    fake.status = 500
    with pytest.raises(SessionFailed, match="answered the main agent's request with 500"):
        await play(url, turns=1)


async def test_a_server_that_is_gone_is_told_with_who_asked(unused_tcp_port: int) -> None:
    with pytest.raises(SessionFailed, match="did not answer the main agent's request"):
        await play(f"http://127.0.0.1:{unused_tcp_port}", turns=1)
