"""KV bytes through the whole poller: from the settings, the process and the model's file to the box.

The model takes 4 layers * 2 KV heads * 32 elements * 2 bytes of K and as much of V: 1024 bytes a token.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fake_server import FakeServer, status
from watching import ModelAtHand, Watched, process

from kvscope.observed.model import ContextSettings, ModelHeader, ModelSeen
from kvscope.observed.server import ServerProcess, ServerState
from kvscope.settings import ServerSettings
from kvscope.sources.model_file import ModelFileError, Served
from kvscope.sources.server_process import NotReadableError

TOKEN = 1024
MODEL = ModelSeen(
    ModelHeader(
        "llama",
        {
            "llama.block_count": 4,
            "llama.context_length": 4096,
            "llama.embedding_length": 128,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
        },
        file_bytes=5_000_000,
    )
)
SEPARATE = ContextSettings(slots=2, context_tokens=8192)
Watch = Callable[..., Watched]


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as server:
        yield server


@pytest.fixture
async def watch(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Watch]:
    caplog.set_level(logging.DEBUG, logger="kvscope")
    watched: list[Watched] = []

    def start(server: FakeServer, **how: Any) -> Watched:
        given, sleep_idle = how.pop("arguments", None), how.pop("sleep_idle", "off")
        watched.append(Watched(server.settings(arguments=given, sleep_idle=sleep_idle), **how))
        return watched[-1]

    yield start
    for each in watched:
        await each.client.close()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


async def test_the_first_look_shows_what_each_slot_and_the_cache_take(
    server: FakeServer, watch: Watch
) -> None:
    server.work(0, 99, 2)
    box = await watch(server, model_file=ModelAtHand(MODEL), find_process=process(settings=SEPARATE)).look()
    assert {slot.id: slot.kv_bytes for slot in box.slots} == {0: 100 * TOKEN, 1: 0}
    assert box.kv_allocated == {(None, "full"): 8192 * TOKEN}
    assert box.kv_bytes_per_token == TOKEN
    assert box.model_bytes == 5_000_000
    assert box.architecture == "llama"
    tier = box.tiers["slot"]
    assert (tier.held_bytes, tier.limit_bytes) == (100 * TOKEN, 8192 * TOKEN)
    assert (tier.tokens, tier.limit_tokens) == (100, 8192)
    assert box.sources["model_file"].up
    assert box.kv_sources is not None
    assert box.kv_sources["context"] == "process"


async def test_given_arguments_are_enough_where_the_process_is_out_of_sight(
    server: FakeServer, watch: Watch
) -> None:
    box = await watch(server, model_file=ModelAtHand(MODEL), arguments=SEPARATE).look()
    assert box.kv_allocated == {(None, "full"): 8192 * TOKEN}
    assert box.kv_unified is False
    assert box.kv_sources is not None
    assert box.kv_sources["slots"] == "setting"


async def test_without_model_or_arguments_the_bytes_are_absent_and_one_line_says_how_to_get_them(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    server.work(0, 99, 2)
    watched = watch(server)
    box = await watched.look(5)
    assert [slot.kv_bytes for slot in box.slots] == [None, None]
    assert (box.kv_allocated, box.kv_bytes_per_token, box.kv_sources, box.model_bytes) == (None,) * 4
    tier = box.tiers["slot"]
    assert (tier.held_bytes, tier.limit_bytes, tier.tokens, tier.limit_tokens) == (None, None, 100, None)
    assert len([line for line in told(caplog) if "KV bytes" in line]) == 1


async def test_a_sleeping_server_holds_and_has_allocated_nothing(server: FakeServer, watch: Watch) -> None:
    server.work(0, 99, 2)
    watched = watch(
        server, model_file=ModelAtHand(MODEL), find_process=process(settings=SEPARATE), sleep_idle=4.0
    )
    await watched.look()
    server.sleep()
    box = await watched.watch(10)
    assert box.state is ServerState.SLEEPING
    assert [slot.kv_bytes for slot in box.slots] == [0, 0]
    assert box.kv_allocated == {(None, "full"): 0}
    assert (box.tiers["slot"].limit_bytes, box.tiers["slot"].limit_tokens) == (0, 0)


async def test_figures_leave_with_a_server_that_is_gone_and_return_with_it(
    server: FakeServer, watch: Watch
) -> None:
    watched = watch(server, model_file=ModelAtHand(MODEL), arguments=SEPARATE)
    await watched.look()
    server.answers["/props"] = server.answers["/slots"] = server.answers["/metrics"] = status(500)
    box = await watched.watch(120)
    assert (box.kv_allocated, box.model_bytes, box.architecture) == (None, None, None)
    server.answers = {}
    box = await watched.watch(60)
    assert box.kv_allocated == {(None, "full"): 8192 * TOKEN}


async def test_a_server_that_is_gone_is_no_reason_to_ask_for_settings(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    alive = [ServerProcess(7, 1000.0, settings=SEPARATE)]

    def find(_: ServerSettings) -> ServerProcess:
        if not alive:
            raise NotReadableError("no process of this machine is seen listening there")
        return alive[0]

    model = ModelAtHand(MODEL)
    watched = watch(server, model_file=model, find_process=find, process_lives=lambda each: each in alive)
    await watched.look(2)
    alive.clear()
    model.seen = None
    await server.stop()
    await watched.watch(120)
    assert watched.box.state is ServerState.UNREACHABLE
    assert not [line for line in told(caplog) if "KV bytes" in line]


async def test_arguments_that_speak_of_other_slots_tell_nothing_of_the_pool_either(
    server: FakeServer, watch: Watch
) -> None:
    box = await watch(
        server, model_file=ModelAtHand(MODEL), arguments=ContextSettings(slots=3, context_tokens=8192)
    ).look()
    assert (box.kv_allocated, box.kv_unified) == (None, None)


async def test_the_slots_of_a_new_process_are_looked_at_once_though_it_may_sleep(
    server: FakeServer, watch: Watch
) -> None:
    server.without("metrics")
    alive = [ServerProcess(7, 1000.0, sleep_idle_seconds=60.0)]
    watched = watch(
        server, sleep_idle="auto", find_process=lambda _: alive[0], process_lives=lambda each: each in alive
    )
    await watched.look(3)
    alive[0] = ServerProcess(8, 2000.0, sleep_idle_seconds=60.0)
    server.props["total_slots"] = 3
    server.slots.append({**server.slots[0], "id": 2})
    box = await watched.look(3)
    assert box.restarts == 1
    assert [slot.id for slot in box.slots] == [0, 1, 2]
    server.asked.clear()
    await watched.look(3)
    assert server.asked["/slots"] == 0


class SlowModel(ModelAtHand):
    """Waits to be let go, as a disk that sleeps does."""

    def __init__(self) -> None:
        super().__init__(MODEL)
        self.asked_for = threading.Event()
        self.may_go = threading.Event()

    def read(self, served: Served) -> ModelSeen | None:
        self.asked_for.set()
        self.may_go.wait(60)
        return super().read(served)


async def test_looks_go_on_while_a_slow_disk_reads_the_model(
    server: FakeServer, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvscope.model_watch.MODEL_PATIENCE_SECONDS", 0.01)
    server.work(0, 99, 2)
    slow = SlowModel()
    watched = watch(server, model_file=slow, arguments=SEPARATE)
    try:
        box = await watched.look(3)
        assert box.slots[0].context_tokens == 100
        assert box.slots[0].kv_bytes is None
    finally:
        slow.may_go.set()
    monkeypatch.setattr("kvscope.model_watch.MODEL_PATIENCE_SECONDS", 60.0)
    box = await watched.look()
    assert box.slots[0].kv_bytes == 100 * TOKEN
    assert len(slow.asked) == 1


class BrokenModel(ModelAtHand):
    def read(self, served: Served) -> ModelSeen | None:
        super().read(served)
        raise ModelFileError("the model file that the server names cannot be used: 'tiny.gguf' is empty")


async def test_a_file_that_cannot_be_used_costs_the_bytes_only_and_is_told_once(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    server.work(0, 99, 2)
    watched = watch(server, model_file=BrokenModel(), arguments=SEPARATE)
    box = await watched.watch(70)
    assert box.state is ServerState.READY
    assert box.problem is None
    assert box.slots[0].context_tokens == 100
    assert box.slots[0].kv_bytes is None
    assert (box.sources["model_file"].up, box.sources["model_file"].failures) == (False, 3)
    assert [line for line in told(caplog) if "model file" in line] == [
        "server main: the model file that the server names cannot be used: 'tiny.gguf' is empty"
    ]


async def test_another_model_behind_the_same_address_is_never_shown_with_the_old_shape(
    server: FakeServer, watch: Watch
) -> None:
    model = ModelAtHand(MODEL)
    watched = watch(server, model_file=model, arguments=SEPARATE)
    await watched.look()
    server.props["model_path"] = "/models/of/somebody/other.gguf"
    server.props["model_alias"] = "other"
    model.seen = None
    box = await watched.watch(40)
    assert box.model == "other"
    assert box.kv_allocated is None
    assert [served.path for served in model.asked][-1] == "/models/of/somebody/other.gguf"
    assert all(box.kv_allocated is None for box in watched.boxes if box.model == "other")


async def test_a_file_that_is_read_while_the_server_changes_its_model_tells_nothing_of_the_new_one(
    server: FakeServer, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowModel()
    slow.may_go.set()
    watched = watch(server, model_file=slow, arguments=SEPARATE)
    await watched.look()
    slow.may_go.clear()
    monkeypatch.setattr("kvscope.model_watch.MODEL_PATIENCE_SECONDS", 0.01)
    try:
        box = await watched.watch(31)
        assert box.kv_allocated is not None
        server.props["model_path"] = "/models/other.gguf"
        server.props["model_alias"] = "other"
        await watched.watch(40)
        assert watched.box.model == "other"
        assert all(box.kv_allocated is None for box in watched.boxes if box.model == "other")
    finally:
        slow.may_go.set()


async def test_a_new_process_may_serve_another_file_of_the_same_name(
    server: FakeServer, watch: Watch
) -> None:
    model = ModelAtHand(MODEL)
    watched = watch(server, model_file=model, arguments=SEPARATE)
    await watched.look(2)
    server.restart()
    server.work(0, 9, 2)
    await watched.look(3)
    assert watched.box.restarts == 1
    assert len(model.asked) == 2


async def test_the_model_is_asked_for_twice_a_minute_and_no_more(server: FakeServer, watch: Watch) -> None:
    model = ModelAtHand(MODEL)
    watched = watch(server, model_file=model, arguments=SEPARATE)
    await watched.watch(120)
    assert len(model.asked) in (4, 5)


async def test_a_poller_that_ends_leaves_a_slow_disk_alone(
    server: FakeServer, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvscope.model_watch.MODEL_PATIENCE_SECONDS", 0.01)
    slow = SlowModel()
    watched = watch(server, model_file=slow, arguments=SEPARATE)
    running = asyncio.create_task(watched.poller.run())
    assert await asyncio.to_thread(slow.asked_for.wait, 60)
    running.cancel()
    try:
        with pytest.raises(asyncio.CancelledError):
            await running
    finally:
        slow.may_go.set()


class FaultyModel(ModelAtHand):
    def read(self, served: Served) -> ModelSeen | None:
        raise KeyError("CANARY")


async def test_a_fault_in_reading_a_model_costs_its_bytes_only(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    server.work(0, 99, 2)
    box = await watch(server, model_file=FaultyModel(), arguments=SEPARATE).look()
    assert (box.slots[0].context_tokens, box.slots[0].kv_bytes) == (100, None)
    assert box.sources["model_file"].up is False
    assert "CANARY" not in caplog.text
    assert "a fault of kvscope (KeyError" in caplog.text
