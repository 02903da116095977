"""Blocking calls in their own threads: what they return and raise, and that nobody has to wait for them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from kvscope.own_thread import in_own_thread


async def test_what_the_call_returns_or_raises_is_the_futures() -> None:
    assert await in_own_thread(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await in_own_thread(lambda: 1 // 0)


async def test_a_call_does_not_hold_up_the_loop_nor_the_end_of_the_program() -> None:
    go = threading.Event()
    waiting = in_own_thread(lambda: (go.wait(60), threading.current_thread().daemon))
    assert await in_own_thread(lambda: "another one") == "another one"
    assert not waiting.done()
    go.set()
    assert await waiting == (True, True)


class Held:
    """A call that ends when it is let go."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go = threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        self.thread = threading.current_thread()
        self.began.set()
        self.go.wait(60)

    def end(self) -> None:
        assert self.began.wait(5)
        assert self.thread is not None
        self.go.set()
        self.thread.join(5)


async def test_a_call_that_ends_when_nobody_waits_any_more_is_no_error() -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    held = Held()
    in_own_thread(held).cancel()
    await asyncio.to_thread(held.end)
    await asyncio.sleep(0)
    assert errors == []


def test_a_call_that_outlives_its_loop_ends_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    held = Held()

    async def leave() -> None:
        in_own_thread(held)

    asyncio.run(leave())
    held.end()
    assert errors == []
