"""A scripted agent session against a llama.cpp server: everything that fills and empties slots.

Words are random and come from a seed, one token a byte, so that lengths are as written here. A
main agent grows turn by turn; between its two requests of a turn something else wants the cache.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from itertools import count, islice

import aiohttp

CONTEXT_LIMIT = 16384
"""Tokens that the main agent's context stays below."""

POOL_LIMIT = 2 * CONTEXT_LIMIT
"""Tokens that one pool shared by all slots needs: when three sub-agents start at once, the server
loads the main agent's saved context into a slot of its own before it cuts it to what they share."""

SYSTEM_TOKENS = 3500
QUESTION_TOKENS = 1200
RESULT_TOKENS = 1500
SUB_AGENT_TOKENS = 1200
UNRELATED_TOKENS = 4000
ANSWER_TOKENS = 200
TURN_TOKENS = QUESTION_TOKENS + RESULT_TOKENS + 2 * ANSWER_TOKENS
FIRST_BYTE_TOKEN = 3
REQUEST_SECONDS = 120.0

SYLLABLES = ("ka", "lo", "mi", "ren", "sa", "tu", "vel", "dor", "ne", "shi", "par", "gul", "et", "ya", "bri")


class SessionFailed(Exception):
    """The server did not answer a request of the session; the text says which and why."""


class AgentSession:
    """The session against one server.

    tell: called with one sentence about what happens now. breath_seconds: the pause after each
    request (an idle pause takes five); 0 runs it as fast as the server can.
    """

    def __init__(
        self, url: str, tell: Callable[[str], None], seed: int = 0, breath_seconds: float = 1.0
    ) -> None:
        self._url = url
        self._tell = tell
        self._random = random.Random(seed)
        self._breath_seconds = breath_seconds
        self._day = 0
        self._system: list[int] = []
        self._context: list[int] = []
        self._scenes: tuple[Callable[[], Awaitable[None]], ...] = (
            self._one_sub_agent,
            self._three_sub_agents,
            self._two_others,
            self._idle_pause,
        )

    async def run(self, turns: int | None = None) -> None:
        """Play turns of the main agent, endless with None.

        Raises SessionFailed when the server does not answer.
        """
        # A connection of its own for each request: servers close idle ones, and a restarted one must do.
        connector = aiohttp.TCPConnector(force_close=True)
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._client:
            for turn in islice(count(), turns):
                await self._turn(self._scenes[turn % len(self._scenes)])
        self._tell("the session is over")

    async def _turn(self, scene: Callable[[], Awaitable[None]]) -> None:
        if not self._context or len(self._context) + TURN_TOKENS > CONTEXT_LIMIT:
            self._day += 1
            self._system = self._words(SYSTEM_TOKENS)
            self._context = list(self._system)
            self._tell(f"day {self._day}: the main agent starts with a new system prompt")
        else:
            self._tell("the main agent gets its next question")
        await self._main_agent(QUESTION_TOKENS)
        await scene()
        await self._main_agent(RESULT_TOKENS)

    async def _main_agent(self, new_tokens: int) -> None:
        self._context += self._words(new_tokens)
        self._context += await self._ask("the main agent", self._context)
        await self._breathe()

    async def _one_sub_agent(self) -> None:
        self._tell("a sub-agent asks with the same system prompt")
        await self._ask("a sub-agent", self._system + self._words(SUB_AGENT_TOKENS))
        await self._breathe()
        self._tell("the main agent comes back with the sub-agent's result")

    async def _three_sub_agents(self) -> None:
        self._tell("three sub-agents ask at once, all with the same system prompt")
        await asyncio.gather(
            *(
                self._ask(f"sub-agent {number}", self._system + self._words(SUB_AGENT_TOKENS))
                for number in (1, 2, 3)
            )
        )
        await self._breathe()
        self._tell("the main agent comes back with the results of all three")

    async def _two_others(self) -> None:
        for who in ("someone else", "a second stranger"):
            self._tell(f"{who} asks with an unrelated prompt")
            await self._ask(who, self._words(UNRELATED_TOKENS))
            await self._breathe()
        self._tell("the main agent comes back")

    async def _idle_pause(self) -> None:
        self._tell("coffee: nobody asks for a while")
        await self._breathe(5)
        self._tell("the main agent comes back after the break")

    async def _ask(self, who: str, prompt: list[int]) -> list[int]:
        request = {
            "prompt": prompt,
            "n_predict": ANSWER_TOKENS,
            "ignore_eos": True,
            "return_tokens": True,
            "seed": self._random.randrange(2**31),
        }
        try:
            async with self._client.post(f"{self._url}/completion", json=request) as answer:
                if answer.status != 200:
                    raise SessionFailed(f"the server answered {who}'s request with {answer.status}")
                tokens: list[int] = (await answer.json())["tokens"]
                return tokens
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            problem = type(error).__name__
            raise SessionFailed(f"the server did not answer {who}'s request ({problem})") from error

    async def _breathe(self, times: int = 1) -> None:
        await asyncio.sleep(self._breath_seconds * times)

    def _words(self, tokens: int) -> list[int]:
        text = ""
        while len(text) < tokens:
            text += "".join(self._random.choices(SYLLABLES, k=self._random.randint(1, 4))) + " "
        return [FIRST_BYTE_TOKEN + byte for byte in text[:tokens].encode()]
