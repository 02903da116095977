"""What a poller asks a server for, how often, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_server import FakeServer, body, late, status
from watching import PATIENT_SECONDS, Watched, process

from kvscope.observed.server import Phase, ServerProcess, ServerState
from kvscope.settings import ServerSettings, Settings
from kvscope.snapshot import Board, ServerBox
from kvscope.sources.llama_server import LlamaServer
from kvscope.sources.server_process import NotReadableError
from kvscope.tracking import publish as published_readings

Watch = Callable[..., Watched]


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as server:
        yield server


@pytest.fixture
async def watch(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Watch]:
    caplog.set_level(logging.DEBUG, logger="kvscope")
    watched: list[Watched] = []

    def start(server: FakeServer | ServerSettings, **how: Any) -> Watched:
        watched.append(Watched(server, **how))
        return watched[-1]

    yield start
    for each in watched:
        await each.client.close()


def lines(caplog: pytest.LogCaptureFixture, word: str = "") -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


# --- /metrics ---------------------------------------------------------------------------------------


async def test_metrics_are_read_twice_a_minute_while_nothing_ends(server: FakeServer, watch: Watch) -> None:
    server.begin(0, 100)
    server.generate(0, 1)
    watched = watch(server, sleep_idle="off")
    await watched.look()
    server.taken()
    await watched.watch(120)
    asked = server.taken()
    assert asked["/metrics"] == 4
    assert asked["/slots"] >= 240


async def test_metrics_are_read_once_when_a_request_ended(server: FakeServer, watch: Watch) -> None:
    server.begin(0, 100)
    watched = watch(server, sleep_idle="off")
    await watched.look()
    server.generate(0, 5)
    await watched.look(3)
    assert server.taken()["/metrics"] == 1, "the first look's"
    server.end(0)
    await watched.look(3)
    assert server.taken()["/metrics"] == 1
    assert watched.box.counts[0].requests == {"unknown": 1}


async def test_metrics_are_read_for_a_request_that_came_and_went_between_two_looks(
    server: FakeServer, watch: Watch
) -> None:
    watched = watch(server, sleep_idle="off")
    await watched.look()
    server.taken()
    server.work(1, 50, 5)
    await watched.look(5)
    assert server.taken()["/metrics"] == 1
    assert watched.box.counts[0].slots[1].prompt_tokens["computed"] == 50


async def test_metrics_are_read_every_five_seconds_while_all_slots_work(
    server: FakeServer, watch: Watch
) -> None:
    for slot in (0, 1):
        server.begin(slot, 100)
        server.generate(slot, 1)
    server.counters["requests_deferred"] = 3
    watched = watch(server, sleep_idle="off")
    await watched.look()
    server.taken()
    await watched.watch(60)
    assert 11 <= server.taken()["/metrics"] <= 12
    assert watched.box.requests_deferred == 3


async def test_while_a_slot_is_free_no_request_waits_and_nobody_has_to_ask(
    server: FakeServer, watch: Watch
) -> None:
    server.begin(0, 100)
    server.counters["requests_deferred"] = 3
    watched = watch(server, sleep_idle="off")
    await watched.look()
    assert watched.box.requests_deferred == 0


async def test_metrics_are_never_read_when_they_are_switched_off(server: FakeServer, watch: Watch) -> None:
    watched = watch(server, server_metrics=False)
    for _ in range(3):
        server.work(0, 50, 5)
        await watched.watch(40)
    assert server.asked["/metrics"] == 0
    assert watched.box.metrics_available, "what the server offers is said, asked or not"
    assert watched.box.counts[0].prefill_seconds is None


async def test_a_server_without_a_single_slot_is_not_asked_for_metrics_at_each_look(
    server: FakeServer, watch: Watch
) -> None:
    server.slots = []
    await watch(server, sleep_idle="off").watch(60)
    assert server.asked["/metrics"] <= 2


async def test_metrics_that_the_server_does_not_offer_are_not_asked_for(
    server: FakeServer, watch: Watch
) -> None:
    server.without("metrics")
    server.work(0, 50, 5)
    await watch(server).watch(60)
    assert server.asked["/metrics"] == 0


async def test_a_build_that_does_not_say_whether_it_has_metrics_is_asked_once(
    server: FakeServer, watch: Watch
) -> None:
    server.without("metrics")
    del server.props["endpoint_metrics"]
    watched = watch(server, sleep_idle="off")
    for _ in range(3):
        server.work(0, 50, 5)
        await watched.watch(40)
    assert server.asked["/metrics"] == 1
    assert watched.box.metrics_available is False


async def test_a_server_started_again_with_metrics_is_asked_again(server: FakeServer, watch: Watch) -> None:
    del server.props["endpoint_metrics"]
    server.answers["/metrics"] = status(501)
    for _ in range(3):
        server.work(0, 50, 5)
    watched = watch(server, sleep_idle="off")
    await watched.look(2)
    server.restart()
    server.work(0, 20, 5)
    del server.answers["/metrics"]
    await watched.watch(31)
    assert watched.box.metrics_available is True


@pytest.mark.parametrize("answer", [status(500), status(401), body("<html>"), late])
async def test_metrics_that_only_fail_are_asked_now_and_then_and_cost_no_slot(
    server: FakeServer, watch: Watch, answer: Any
) -> None:
    server.answers["/metrics"] = answer
    watched = watch(server, sleep_idle="off")
    if answer is late:
        watched.lose_patience()
    for _ in range(4):
        server.work(0, 50, 5)
        await watched.watch(30)
    assert 4 <= server.asked["/metrics"] <= 7
    assert watched.box.state is ServerState.READY
    assert watched.box.slots[0].context_tokens == 54
    del server.answers["/metrics"]
    await watched.watch(40)
    assert watched.box.sources["metrics"].up is True


async def test_slots_of_a_new_process_are_believed_although_its_metrics_fail(
    server: FakeServer, watch: Watch
) -> None:
    for _ in range(3):
        server.work(0, 50, 5)
    watched = watch(server, sleep_idle="off")
    await watched.look()
    server.restart()
    server.work(0, 20, 3)
    server.answers["/metrics"] = status(500)
    await watched.look(3)
    assert watched.box.slots[0].context_tokens == 22


# --- how long is waited -----------------------------------------------------------------------------


def waited(box: ServerBox) -> dict[str, float]:
    """What is published as the interval of each source that is asked at present."""
    return {
        name: source.interval_seconds
        for name, source in box.sources.items()
        if source.interval_seconds is not None
    }


async def test_the_intervals_of_a_server_that_never_sleeps_follow_its_slots(
    server: FakeServer, watch: Watch
) -> None:
    watched = watch(server, sleep_idle="off")
    assert waited(await watched.look()) == {"slots": 2, "props": 30, "metrics": 30}
    server.begin(0, 50)
    assert waited(await watched.look()) == {"slots": 0.5, "props": 30, "metrics": 30}
    server.begin(1, 50)
    assert waited(await watched.look()) == {"slots": 0.5, "props": 30, "metrics": 5}
    server.generate(0, 5)
    server.end(0)
    server.generate(1, 5)
    server.end(1)
    assert waited(await watched.look()) == {"slots": 2, "props": 30, "metrics": 30}


async def test_with_pauses_longer_than_half_a_minute_nothing_is_asked_more_often(
    server: FakeServer, watch: Watch
) -> None:
    watched = watch(server, sleep_idle="off", idle_interval_seconds=60.0)
    assert waited(await watched.look()) == {"slots": 60, "props": 60, "metrics": 60}


async def test_slots_that_are_left_alone_have_no_interval(server: FakeServer, watch: Watch) -> None:
    server.work(0, 50, 5)
    watched = watch(server)
    assert waited(await watched.look(2)) == {"props": 2, "metrics": 2}
    server.begin(0, 50)
    assert waited(await watched.look()) == {"slots": 0.5, "props": 30, "metrics": 30}
    server.generate(0, 5)
    server.end(0)
    server.sleep()
    assert waited(await watched.watch(3)) == {"props": 2, "metrics": 2}
    assert watched.box.state is ServerState.SLEEPING


async def test_without_metrics_to_ask_there_is_no_interval_of_them(server: FakeServer, watch: Watch) -> None:
    server.without("metrics")
    server.work(0, 50, 5)
    nobody_knows = await watch(server).look(2)
    assert waited(nobody_knows) == {"slots": 2, "props": 2}
    assert waited(await watch(server, sleep_idle=4.0).look(2)) == {"props": 2}
    assert waited(await watch(server, sleep_idle="off").look(2)) == {"slots": 2, "props": 30}


async def test_metrics_that_are_gone_after_a_restart_lose_their_interval(
    server: FakeServer, watch: Watch
) -> None:
    for _ in range(3):
        server.work(0, 50, 5)
    watched = watch(server, sleep_idle="off")
    assert "metrics" in waited(await watched.look(2))
    server.restart()
    server.without("metrics")
    server.work(0, 20, 5)
    await watched.look(3)
    assert waited(watched.box) == {"slots": 2, "props": 30}


async def test_metrics_that_only_fail_are_waited_for_longer(server: FakeServer, watch: Watch) -> None:
    server.answers["/metrics"] = status(500)
    server.work(0, 50, 5)
    watched = watch(server)
    await watched.watch(10)
    assert waited(watched.box) == {"slots": 2, "props": 2, "metrics": 30}


@pytest.mark.parametrize("code", [401, 404, 500])
async def test_what_is_published_of_a_server_that_is_left_alone_longer_is_what_is_waited(
    server: FakeServer, watch: Watch, code: int
) -> None:
    watched = watch(server, sleep_idle="off")
    await watched.look()
    server.answers = dict.fromkeys(("/props", "/slots", "/metrics"), status(code))
    await watched.watch(31)
    pauses = set()
    for _ in range(4):
        box = await watched.look()
        assert waited(box) == {"props": watched.poller.pause_seconds()}
        assert watched.poller.pause_seconds() == watched.poller.pause_seconds()
        pauses.add(watched.poller.pause_seconds())
    assert len(pauses) == 4, "each with jitter of its own"


async def test_a_server_that_was_never_reached_has_an_interval_of_props_alone(
    server: FakeServer, watch: Watch
) -> None:
    await server.stop()
    watched = watch(server)
    assert waited(await watched.look()) == {"props": watched.poller.pause_seconds()}


async def test_slots_that_fail_where_props_answer_are_asked_at_each_look_and_published_so(
    server: FakeServer, watch: Watch
) -> None:
    watched = watch(server, sleep_idle="off")
    await watched.look()
    server.answers["/slots"] = status(502)
    box = await watched.look(3)
    assert waited(box).keys() == {"props", "slots"}
    assert len(set(waited(box).values())) == 1


async def test_a_process_that_is_seen_is_looked_at_at_each_look(server: FakeServer, watch: Watch) -> None:
    assert waited(await watch(server, find_process=process()).look())["process"] == 2


# --- slots that are switched off ----------------------------------------------------------------------


@pytest.mark.parametrize("sleep_idle", ["auto", "off", 4.0])
async def test_a_server_that_says_it_has_no_slots_endpoint_is_not_asked_for_slots(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture, sleep_idle: str | float
) -> None:
    server.without("slots")
    watched = watch(server, sleep_idle=sleep_idle)
    box = await watched.look()
    assert box.state is ServerState.SLOTS_DISABLED
    await watched.watch(120)
    assert server.asked["/slots"] == 0
    assert 55 <= server.asked["/props"] <= 65
    assert 4 <= server.asked["/metrics"] <= 5
    assert waited(watched.box) == {"props": 2, "metrics": 30}
    assert watched.box.up
    assert watched.box.problem is None
    assert {name for name, source in watched.box.sources.items() if source.failures} == set()
    assert "slots" not in watched.box.sources
    (line,) = lines(caplog, "slots")
    assert line.startswith("server main is slots_disabled: it does not offer /slots")


async def test_a_server_started_again_with_or_without_slots_is_asked_accordingly(
    server: FakeServer, watch: Watch
) -> None:
    server.work(0, 50, 5)
    watched = watch(server, sleep_idle="off")
    await watched.look()
    server.restart()
    server.without("slots")
    await watched.watch(31)
    server.taken()
    await watched.watch(30)
    assert watched.box.state is ServerState.SLOTS_DISABLED
    assert server.taken()["/slots"] == 0
    assert waited(watched.box) == {"props": 2, "metrics": 30}
    server.restart()
    server.answers = {}
    server.props["endpoint_slots"] = True
    server.begin(1, 30)
    await watched.look()
    assert watched.box.state is ServerState.READY
    assert watched.box.slots[1].context_tokens == 30


async def test_a_server_without_slots_that_sleeps_is_said_to_sleep(server: FakeServer, watch: Watch) -> None:
    server.without("slots")
    watched = watch(server)
    await watched.look()
    server.sleep()
    assert (await watched.look()).state is ServerState.SLEEPING
    server.wake()
    assert (await watched.look()).state is ServerState.SLOTS_DISABLED
    assert server.asked["/slots"] == 0


# --- a model that sleeps ----------------------------------------------------------------------------

MAY_SLEEP = [
    pytest.param({}, id="nobody knows"),
    pytest.param({"find_process": process(sleep_idle_seconds=4.0)}, id="its command line says so"),
    pytest.param({"sleep_idle": 4.0}, id="the settings say so"),
]


async def test_which_process_is_the_server_and_whether_it_gave_its_memory_back_is_known(
    server: FakeServer, watch: Watch
) -> None:
    far, near = watch(server), watch(server, find_process=process())
    await far.look()
    await near.look()
    assert (far.poller.on_machine().pid, near.poller.on_machine().pid) == (None, os.getpid())
    assert near.poller.on_machine().load.asleep is False
    server.sleep()
    await near.watch(60)
    assert near.poller.on_machine().load.asleep is True


async def test_a_process_that_ended_is_no_servers_any_more(server: FakeServer, watch: Watch) -> None:
    lives = True
    watched = watch(server, find_process=process(), process_lives=lambda _: lives)
    await watched.look()
    lives = False
    await server.stop()
    await watched.look()
    assert watched.poller.on_machine().pid is None


async def test_a_sleeping_server_never_gets_a_request_that_wakes_it(server: FakeServer, watch: Watch) -> None:
    server.sleep()
    for how in ({}, {"sleep_idle": 4.0}, {"sleep_idle": "off"}):
        watched = watch(server, **how)
        await watched.watch(60)
        assert watched.box.state is ServerState.SLEEPING
    assert server.asked["/slots"] == 0
    assert set(server.asked) == {"/props", "/metrics"}


@pytest.mark.parametrize("how", MAY_SLEEP)
async def test_an_idle_server_that_may_sleep_is_left_its_timer(
    server: FakeServer, watch: Watch, how: dict[str, Any]
) -> None:
    server.work(0, 50, 5)
    watched = watch(server, **how)
    await watched.look()
    server.taken()
    await watched.watch(60)
    assert server.taken()["/slots"] == 0
    assert watched.box.slots[0].context_tokens == 54, "what is proven unchanged stays valid"
    assert watched.box.slots[0].phase is Phase.IDLE


@pytest.mark.parametrize("how", MAY_SLEEP)
@pytest.mark.parametrize("ended", [False, True])
async def test_work_on_an_idle_server_is_seen_although_slots_were_left_alone(
    server: FakeServer, watch: Watch, how: dict[str, Any], ended: bool
) -> None:
    watched = watch(server, **how)
    await watched.look(3)
    server.taken()
    if ended:
        server.work(1, 50, 5)
    else:
        server.begin(1, 50)
    await watched.look()
    assert server.taken()["/slots"] > 0
    assert watched.box.slots[1].phase is (Phase.IDLE if ended else Phase.PREFILL)
    assert watched.box.slots[1].context_tokens == (54 if ended else 50)


async def test_a_server_that_wakes_for_a_request_is_looked_at(server: FakeServer, watch: Watch) -> None:
    server.work(0, 50, 5)
    watched = watch(server)
    await watched.look(2)
    server.sleep()
    await watched.look(2)
    assert watched.box.state is ServerState.SLEEPING
    assert watched.box.counts[0].evictions["slot", "sleep", "unknown"].tokens == 54
    server.wake()
    server.begin(1, 30)
    await watched.look()
    assert watched.box.state is ServerState.READY
    assert watched.box.slots[1].phase is Phase.PREFILL


async def test_a_server_known_to_sleep_without_metrics_is_left_alone_and_one_line_says_what_is_missed(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    server.without("metrics")
    server.work(0, 50, 5)
    watched = watch(server, sleep_idle=4.0)
    await watched.look()
    server.taken()
    await watched.watch(60)
    assert set(server.taken()) == {"/props"}
    (line,) = lines(caplog, "sleep")
    assert "--metrics" in line
    assert watched.box.slots[0].context_tokens is None, "nobody looks, so nobody knows"
    server.sleep()
    await watched.look()
    server.wake()
    server.begin(0, 40)
    await watched.look()
    assert watched.box.slots[0].context_tokens == 40


async def test_where_nobody_knows_and_no_metrics_tell_slots_are_looked_at_and_one_line_says_so(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    server.without("metrics")
    watched = watch(server)
    await watched.watch(60)
    assert server.asked["/slots"] >= 29
    (line,) = lines(caplog, "may sleep is not known")
    assert "--sleep-idle" in line


@pytest.mark.parametrize(
    "how", [{"sleep_idle": "off"}, {"find_process": process()}], ids=["settings", "command line"]
)
async def test_a_server_that_never_sleeps_is_looked_at_as_usual(
    server: FakeServer, watch: Watch, how: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(server, **how)
    await watched.watch(60)
    asked = server.taken()
    assert asked["/slots"] >= 30
    assert asked["/metrics"] <= 3
    assert asked["/props"] <= 3
    assert not lines(caplog, "may sleep")


async def test_a_build_that_does_not_know_sleep_never_sleeps(server: FakeServer, watch: Watch) -> None:
    del server.props["is_sleeping"]
    await watch(server).watch(60)
    assert server.asked["/slots"] >= 30
    assert server.asked["/props"] <= 3


async def test_with_long_pauses_a_busy_slot_is_no_proof_that_the_server_is_awake(
    server: FakeServer, watch: Watch
) -> None:
    server.begin(0, 50)
    watched = watch(server, busy_interval_seconds=20.0, idle_interval_seconds=20.0)
    await watched.look()
    server.generate(0, 5)
    server.end(0)
    server.sleep()
    server.taken()
    await watched.look()
    assert server.taken()["/slots"] == 0
    assert watched.box.state is ServerState.SLEEPING


async def test_broken_metrics_do_not_hide_the_slots_of_a_server_that_may_sleep(
    server: FakeServer, watch: Watch
) -> None:
    watched = watch(server)
    await watched.look()
    server.answers["/metrics"] = status(500)
    server.begin(0, 50)
    await watched.watch(20)
    assert watched.box.slots[0].context_tokens == 50


# --- which process, which model ---------------------------------------------------------------------


async def test_a_restart_is_seen_at_once_and_its_work_counted_for_the_new_model(
    server: FakeServer, watch: Watch
) -> None:
    for _ in range(3):
        server.work(0, 50, 5)
    watched = watch(server, sleep_idle="off")
    await watched.look(2)
    server.restart()
    server.props["model_alias"] = "other"
    server.work(0, 900, 9)
    await watched.look()
    assert watched.box.model == "other"
    by_model = {counts.model: counts for counts in watched.box.counts}
    assert sum(slot.prompt_tokens["computed"] for slot in by_model["tiny"].slots.values()) == 0
    assert by_model["tiny"].unattributed_tokens == {"computed": 0, "reused": 0, "generated": 0}


@pytest.mark.parametrize("sleep_idle", ["off", "auto"], ids=["seen away", "while slots were left alone"])
async def test_a_process_that_was_replaced_and_did_more_than_the_old_one_is_told_from_it(
    server: FakeServer, watch: Watch, sleep_idle: str
) -> None:
    server.work(0, 50, 5)
    watched = watch(server, sleep_idle=sleep_idle)
    await watched.look(2)
    if sleep_idle == "off":
        server.answers["/slots"] = status(502)
        await watched.look()
        server.answers = {}
    server.restart()
    for slot in (1, 0):
        server.work(slot, 60, 5)
    await watched.look()
    assert watched.box.restarts == 1
    evictions = watched.box.counts[0].evictions
    lost = {reason: count.tokens for (_, reason, _), count in evictions.items() if count.tokens}
    assert lost == {"restart": 54}
    assert sum(slot.prompt_tokens["computed"] for slot in watched.box.counts[0].slots.values()) == 120


async def test_metrics_that_fail_once_after_a_restart_make_nobody_guess_why_slots_are_empty(
    server: FakeServer, watch: Watch
) -> None:
    server.work(0, 50, 5)
    watched = watch(server, sleep_idle="off")
    await watched.look(2)
    server.restart()
    server.answers["/metrics"] = status(500)
    await watched.look()
    del server.answers["/metrics"]
    await watched.look()
    assert watched.box.restarts == 1
    evictions = watched.box.counts[0].evictions
    assert {reason for (_, reason, _), count in evictions.items() if count.events} == {"restart"}


async def test_a_restart_is_told_in_one_line(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    server.work(0, 50, 5)
    watched = watch(server, sleep_idle="off")
    await watched.look(2)
    server.restart()
    await watched.look(5)
    assert watched.box.restarts == 1
    assert len(lines(caplog, "restarted")) == 1


# --- late and unreachable ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/slots", "/props"])
async def test_a_late_answer_while_a_prompt_is_read_means_stalled_not_down(
    server: FakeServer, watch: Watch, path: str
) -> None:
    server.work(1, 20, 2)
    server.begin(0, 3000)
    watched = watch(server)
    await watched.look()
    watched.lose_patience()
    server.answers = {"/slots": late, "/health": late} | ({path: late} if path == "/props" else {})
    watched.clock.seconds += 31  # so that /props is due as well
    box = await watched.look()
    assert box.state is ServerState.STALLED
    assert box.up
    assert box.slots[1].context_tokens == 21, "an idle slot cannot change meanwhile"
    server.answers = {}
    watched.client.deadline_seconds = PATIENT_SECONDS
    assert (await watched.look()).state is ServerState.READY


async def test_an_answer_late_for_another_reason_is_decided_by_health(
    server: FakeServer, watch: Watch
) -> None:
    watched = watch(server, sleep_idle="off")
    await watched.look()
    watched.lose_patience()
    server.answers["/slots"] = late
    assert (await watched.look()).state is ServerState.STALLED
    server.answers["/health"] = server.answers["/props"] = late
    assert (await watched.look()).state is ServerState.UNREACHABLE


async def test_a_server_that_was_never_seen_and_answers_late_is_unreachable(
    server: FakeServer, watch: Watch
) -> None:
    server.answers["/props"] = late
    watched = watch(server)
    watched.lose_patience()
    assert (await watched.look()).state is ServerState.UNREACHABLE
    assert watched.box.up is False


async def test_an_unreachable_server_is_left_alone_longer_and_longer_up_to_half_a_minute(
    server: FakeServer, watch: Watch
) -> None:
    watched = watch(server)
    await server.stop()
    pauses = []
    for _ in range(12):
        await watched.look()
        pauses.append(watched.poller.pause_seconds())
    assert all(1 <= pause <= 2 for pause in pauses[:1])
    assert all(2 <= pause <= 4 for pause in pauses[1:2])
    assert all(15 <= pause <= 30 for pause in pauses[5:])
    assert len(set(pauses[5:])) > 1, "so that several exporters do not come at once"


async def test_a_server_that_answers_again_is_looked_at_as_usual(server: FakeServer, watch: Watch) -> None:
    watched = watch(server)
    server.answers["/props"] = status(502)
    await watched.look(8)
    assert watched.poller.pause_seconds() > 10
    server.answers = {}
    server.begin(0, 10)
    await watched.look()
    assert watched.poller.pause_seconds() == Settings().busy_interval_seconds


async def test_readings_age_out_and_counters_stay(server: FakeServer, watch: Watch) -> None:
    server.work(0, 50, 5)
    watched = watch(server, sleep_idle="off")
    await watched.look()
    server.work(0, 20, 5)
    await watched.look()
    before = watched.box
    assert before.slots[0].context_tokens is not None
    server.answers["/props"] = server.answers["/slots"] = status(500)
    await watched.watch(5)
    assert watched.box.slots[0].context_tokens == 24, "one lost look blanks nothing"
    await watched.watch(60)
    assert watched.box.slots[0].context_tokens is None
    assert watched.box.slots_busy is None
    assert watched.box.counts == before.counts


async def test_one_lost_look_blanks_nothing_and_what_aged_out_does_not_come_back(
    server: FakeServer, watch: Watch
) -> None:
    watched = watch(server, sleep_idle="off")
    await watched.watch(20)
    server.answers = dict.fromkeys(("/props", "/slots"), status(500))
    builds = [(await watched.look()).build for _ in range(12)]
    known = builds.count("b11549-abcdef")
    assert known > 1
    assert builds == ["b11549-abcdef"] * known + [None] * (12 - known)


async def test_slots_that_are_left_alone_stay_valid_however_long_the_pauses_are(
    server: FakeServer, watch: Watch
) -> None:
    server.work(0, 50, 5)
    watched = watch(server, idle_interval_seconds=20.0)
    await watched.look(3)
    watched.clock.seconds -= 1
    assert watched.poller._publish_now().slots[0].context_tokens == 54
    server.sleep()
    await watched.look(2)
    watched.clock.seconds -= 1
    assert watched.poller._publish_now().slots[0].context_tokens == 0


async def test_a_reading_ages_out_on_time_while_a_look_still_waits_for_an_answer(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_readings, "SHORTEST_VALIDITY_SECONDS", 0.3)
    aged = asyncio.Event()
    server.work(0, 50, 5)
    settings = Settings(busy_interval_seconds=0.05, idle_interval_seconds=0.05)
    boxes: list[ServerBox] = []

    def publish(box: ServerBox) -> None:
        if not boxes:
            server.answers["/slots"] = server.answers["/props"] = late
        boxes.append(box)
        if box.slots and box.slots[0].context_tokens is None:
            aged.set()

    target = server.settings(sleep_idle="off")
    watched = Watched(target)
    poller = type(watched.poller)(target, settings, publish, client=LlamaServer(target, 60.0))
    running = asyncio.create_task(poller.run())
    try:
        await asyncio.wait_for(aged.wait(), 30)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert boxes[0].slots[0].context_tokens == 54
    assert boxes[-1].counts == boxes[0].counts


async def test_run_looks_again_and_again_and_closes_its_connections_when_cancelled(
    server: FakeServer,
) -> None:
    seen = asyncio.Event()
    count = 0

    def publish(_: ServerBox) -> None:
        nonlocal count
        count += 1
        if count == 5:
            seen.set()

    target = server.settings(sleep_idle="off")
    client = LlamaServer(target)
    settings = Settings(busy_interval_seconds=0.05, idle_interval_seconds=0.05)
    poller = type(Watched(target).poller)(target, settings, publish, client=client)
    running = asyncio.create_task(poller.run())
    await asyncio.wait_for(seen.wait(), 30)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert client._session is None
    published = count
    await asyncio.sleep(0)
    assert count == published


# --- other servers, proxies, keys -------------------------------------------------------------------


async def test_a_server_that_hangs_costs_no_other_server_its_figures(
    server: FakeServer, watch: Watch
) -> None:
    async with FakeServer() as other:
        board = Board(("main", "other"))
        other.work(0, 50, 5)
        hung = watch(server, board=board)
        well = watch(other.settings("other", sleep_idle="off"), board=board)
        server.answers["/props"] = late
        waiting = asyncio.create_task(hung.look())
        await well.look(3)
        assert not waiting.done()
        (box,) = board.snapshot().servers
        assert box.name == "other"
        assert box.slots[0].context_tokens == 54
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
async def test_a_proxy_in_the_environment_is_not_for_this_machine(
    server: FakeServer, watch: Watch, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert (await watch(server).look()).state is ServerState.READY


async def test_a_proxy_in_the_environment_is_used_for_another_machine_without_what_netrc_holds(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password canary\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with FakeServer(api_key="a-key") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        far = ServerSettings("far", "http://llama.invalid:8080", api_key="a-key", sleep_idle="off")
        assert (await watch(far).look()).state is ServerState.READY
        assert {headers["Host"] for headers in proxy.headers} == {"llama.invalid:8080"}
        assert {headers["Authorization"] for headers in proxy.headers} == {"Bearer a-key"}


async def test_the_api_key_is_sent_as_a_bearer_and_told_nowhere(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeServer(api_key="canary-key") as server:
        target = server.settings(api_key="canary-key", headers={"X-Team": "canary-team"})
        watched = watch(target)
        assert (await watched.look()).state is ServerState.READY
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer canary-key"}
        assert {headers["X-Team"] for headers in server.headers} == {"canary-team"}
        wrong = watch(replace(target, api_key="canary-wrong"))
        assert (await wrong.look(3)).state is ServerState.UNAUTHORIZED
        told = repr(wrong.box) + repr(watched.box) + "".join(lines(caplog))
        assert "canary" not in told
        (line,) = lines(caplog, "unauthorized")
        assert "401" in line
        assert "--api-key-file" in line


async def test_a_prefix_and_a_unix_socket_lead_to_the_server(watch: Watch, tmp_path: Any) -> None:
    async with FakeServer(prefix="/llama", unix_socket=tmp_path / "s") as server:
        assert (await watch(server).look()).state is ServerState.READY
        assert server.headers[0]["Host"] == "localhost"


async def test_a_socket_that_is_not_there_is_told_without_its_path(
    watch: Watch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = ServerSettings("main", "http://localhost", unix_socket=str(tmp_path / "canary"))
    assert (await watch(nowhere).look(3)).state is ServerState.UNREACHABLE
    (line,) = lines(caplog, "No such file")
    assert "canary" not in line


# --- words ------------------------------------------------------------------------------------------


async def test_states_are_told_when_they_begin_and_problems_once(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(server, sleep_idle="off")
    await watched.look(5)
    server.answers["/props"] = server.answers["/slots"] = status(503)
    await watched.look(5)
    server.answers["/props"] = server.answers["/slots"] = status(500)
    await watched.look(5)
    server.answers = {}
    await watched.look(5)
    told = [line for line in lines(caplog, "server main") if "cannot be read" not in line]
    assert told == [
        "server main is ready",
        "server main is loading",
        "server main is unreachable: /props answered with status 500",
        "server main is ready",
    ]


async def test_a_server_that_was_killed_is_told_of_in_one_line_with_the_cause(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    alive = [ServerProcess(7, 1000.0)]
    watched = watch(server, find_process=lambda _: alive[0], process_lives=lambda process: process in alive)
    await watched.look(2)
    alive.clear()
    await server.stop()
    await watched.look(4)
    told = [line for line in lines(caplog, "server main") if "cannot be read" not in line]
    assert told == ["server main is ready", "server main is unreachable: its process ended"]


async def test_every_line_is_a_sentence_with_the_servers_name(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    server.without("metrics")
    watched = watch(server)
    await watched.look()
    server.answers["/slots"] = body("<html>")
    await watched.look()
    assert lines(caplog, "server main") == [
        "server main: its process cannot be read, so its start time and its flags stay unknown: it is not "
        "reached over a port of this machine",
        "server main: whether it may sleep is not known, and no /metrics is read: /slots is looked at as "
        "usual. If it was started with --sleep-idle-seconds, say so with --sleep-idle, or it stays awake",
        "server main is ready",
        "server main: its KV bytes are left out, its model's file and its arguments cannot be read here: "
        "name the file with --model-file, its folder with --model-path-map or its shape with --kv-shape; "
        "give its arguments with --server-args, or run kvscope where it can read the server's process",
        "server main: /slots: the answer is an HTML page",
    ]


async def test_a_source_that_fails_every_other_time_is_told_of_once(
    server: FakeServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(server, sleep_idle="off")
    for _ in range(6):
        server.answers["/slots"] = body("<html>")
        await watched.look()
        server.answers = {}
        await watched.look()
    assert len(lines(caplog, "HTML")) == 1
    await watched.watch(150)
    server.answers["/slots"] = body("<html>")
    await watched.look()
    assert len(lines(caplog, "HTML")) == 2, "after two minutes without it is news again"


async def test_the_process_is_a_source_that_goes_down_with_it_and_is_none_where_it_cannot_be_seen(
    server: FakeServer, watch: Watch
) -> None:
    unseen = await watch(server).look()
    assert "process" not in unseen.sources
    alive = [ServerProcess(7, 1000.0)]

    def find(_: ServerSettings) -> ServerProcess:
        if not alive:
            raise NotReadableError("no process of this machine is seen listening there")
        return alive[0]

    watched = watch(server, find_process=find, process_lives=lambda process: process in alive)
    assert (await watched.look()).sources["process"].up
    alive.clear()
    gone = (await watched.look()).sources["process"]
    assert (gone.up, gone.failures) == (False, 1)


async def test_a_restart_between_two_looks_with_higher_task_numbers_costs_only_what_was_held(
    server: FakeServer, watch: Watch
) -> None:
    """Out of sight of the process, only the counters tell that these are another one's slots."""
    watched = watch(server, sleep_idle="off")
    server.work(0, 50, 5)
    await watched.look(2)
    server.restart()
    for _ in range(3):
        server.work(0, 700, 9)
    await watched.look(2)
    counts = watched.box.counts[0]
    lost = {reason: count.tokens for (_, reason, _), count in counts.evictions.items() if count.tokens}
    assert watched.box.restarts == 1
    assert lost == {"restart": 54}
