"""Whatever answers in a server's place: a clear state or one clear line, and nobody else's figures suffer."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fake_server import (
    PROPS,
    FakeServer,
    Flood,
    Handler,
    body,
    cut_off,
    drip,
    hang_up,
    late,
    never_used,
    status,
)
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from watching import Clock, Watched

from kvscope.metrics.collector import Exposition, Format
from kvscope.metrics.web import application, as_json
from kvscope.observed.server import ServerLook, ServerState
from kvscope.settings import ServerSettings
from kvscope.snapshot import Board, Snapshot
from kvscope.sources.llama_server import LARGEST_ANSWER_BYTES
from kvscope.sources.llama_server_answers import MOST_SLOTS, ParseError, parse_slots
from kvscope.tracking.history import History, advance
from kvscope.tracking.publish import box

HTML = body("<!DOCTYPE html><html><title>canary</title></html>", Content_Type="text/html")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Scene:
    """A server that misbehaves beside one that does not, both on one board behind one /metrics."""

    def __init__(self, bad: FakeServer, good: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
        self.bad = bad
        self._caplog = caplog
        self.board = Board(("bad", "good"))
        good.work(0, 50, 5)
        self.good = Watched(good.settings("good", sleep_idle="off"), board=self.board)
        self.watched = self.watch_instead(bad.settings("bad", sleep_idle="off"))

    def watch_instead(self, settings: ServerSettings) -> Watched:
        self.watched = Watched(settings, board=self.board)
        return self.watched

    async def look(self, looks: int = 1) -> Samples:
        """Look at both and return what a scrape shows; the good server's figures must be in it."""
        for _ in range(looks):
            await self.watched.look()
            await self.good.look()
        async with (
            TestClient(TestServer(application(self.board))) as exporter,
            exporter.get("/metrics") as answer,
        ):
            assert answer.status == 200
            text = await answer.text()
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        good = (("model", "tiny"), ("server", "good"), ("slot", "0"))
        assert samples["kvscope_slot_context_tokens", good] == 54
        assert samples["kvscope_server_up", (("server", "good"),)] == 1
        assert "canary" not in text
        return samples

    async def close(self) -> None:
        await self.watched.client.close()
        await self.good.client.close()

    def state(self) -> ServerState:
        return self.watched.box.state

    def lines(self) -> list[str]:
        """What was said of the bad server, apart from where its process and its model are."""
        told = [record.getMessage() for record in self._caplog.records]
        apart = ("its process cannot be read", "its KV bytes are left out")
        told = [line for line in told if not any(words in line for words in apart)]
        assert not [
            line for line in told if line.startswith("server good") and line != "server good is ready"
        ]
        return [line.removeprefix("server bad ") for line in told if line.startswith("server bad")]


@pytest.fixture
async def scene(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Scene]:
    caplog.set_level(logging.INFO, logger="kvscope")
    async with FakeServer() as bad, FakeServer() as good:
        scene = Scene(bad, good, caplog)
        yield scene
        await scene.close()


def sample(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted(labels.items()))))


# --- from the first look on: the state says it, one line says why -----------------------------------

NOT_FROM_A_LLAMA_SERVER = [
    ("an HTML page", HTML, ServerState.NOT_LLAMA_SERVER, "an HTML page"),
    ("a list", body([1, 2]), ServerState.NOT_LLAMA_SERVER, "not an object but a list"),
    ("another JSON", body({"message": "canary"}), ServerState.NOT_LLAMA_SERVER, "neither total_slots"),
    ("nothing", body(b""), ServerState.NOT_LLAMA_SERVER, "empty"),
    ("not UTF-8", body(b"\xff\xfe\x00{"), ServerState.NOT_LLAMA_SERVER, "cut off or no JSON"),
    ("half of it", body(b'{"total_slots": 4, "can'), ServerState.NOT_LLAMA_SERVER, "cut off or no JSON"),
    ("401", status(401, "canary"), ServerState.UNAUTHORIZED, "status 401; name its API key"),
    ("403", status(403), ServerState.UNAUTHORIZED, "status 403; name its API key"),
    ("404", status(404), ServerState.NOT_LLAMA_SERVER, "status 404"),
    ("501", status(501), ServerState.NOT_LLAMA_SERVER, "status 501"),
    ("500", status(500), ServerState.UNREACHABLE, "status 500"),
    ("502", status(502), ServerState.UNREACHABLE, "status 502"),
    ("a redirect", status(302, Location="/canary"), ServerState.NOT_LLAMA_SERVER, "status 302; name"),
    ("an answer cut off", cut_off, ServerState.UNREACHABLE, "cut off in the middle"),
    ("a closed connection", hang_up, ServerState.UNREACHABLE, "closed the connection"),
    ("no answer", late, ServerState.UNREACHABLE, "did not answer within 0.3 s"),
    ("an endless slow answer", drip, ServerState.UNREACHABLE, "did not answer within 0.3 s"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "state", "said"), [case[1:] for case in NOT_FROM_A_LLAMA_SERVER],
    ids=[case[0] for case in NOT_FROM_A_LLAMA_SERVER],
)  # fmt: skip
async def test_what_is_no_answer_of_a_llama_server_has_a_state_and_one_line(
    scene: Scene, answer: Handler, state: ServerState, said: str
) -> None:
    scene.bad.answers["/props"] = answer
    if answer in (late, drip):
        scene.watched.lose_patience()
    samples = await scene.look(3)
    assert scene.state() is state
    assert sample(samples, "kvscope_server_state", server="bad", state=state.value) == 1
    assert sample(samples, "kvscope_server_up", server="bad") == 0
    (line,) = scene.lines()
    assert line.startswith(f"is {state.value}: ")
    assert said in line
    assert "canary" not in line
    assert scene.bad.asked["/slots"] == 0


async def test_503_means_loading_and_it_is_up(scene: Scene) -> None:
    scene.bad.answers["/props"] = status(503)
    samples = await scene.look(3)
    assert scene.state() is ServerState.LOADING
    assert sample(samples, "kvscope_server_up", server="bad") == 1
    assert scene.lines() == ["is loading"]
    scene.bad.answers = {}
    await scene.look()
    assert scene.state() is ServerState.READY


async def test_nobody_follows_a_redirect(scene: Scene) -> None:
    async with FakeServer() as elsewhere:
        for path in ("/props", "/slots", "/metrics"):
            scene.bad.answers[path] = status(307, Location=elsewhere.url + path)
        await scene.look(2)
        assert not elsewhere.asked


async def test_a_refused_connection_is_unreachable(scene: Scene) -> None:
    await scene.bad.stop()
    samples = await scene.look(3)
    assert sample(samples, "kvscope_server_state", server="bad", state="unreachable") == 1
    assert scene.lines() == ["is unreachable: cannot connect: Connection refused"]


async def test_a_name_that_does_not_resolve_is_unreachable(scene: Scene) -> None:
    scene.watch_instead(ServerSettings("bad", "http://canary.invalid:8080"))
    await scene.look(3)
    assert scene.state() is ServerState.UNREACHABLE
    assert scene.lines() == ["is unreachable: its host name does not resolve"]


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".invalid", "127.0.0.1.1"])
async def test_a_host_that_is_none_is_unreachable(scene: Scene, host: str) -> None:
    scene.watch_instead(ServerSettings("bad", f"http://{host}:8080"))
    await scene.look(3)
    assert scene.state() is ServerState.UNREACHABLE
    assert len(scene.lines()) == 1


async def test_something_that_does_not_speak_http_is_no_llama_server(scene: Scene) -> None:
    async def answer(reader: Any, writer: Any) -> None:
        await reader.readline()
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        scene.watch_instead(ServerSettings("bad", f"http://127.0.0.1:{port}"))
        await scene.look(3)
    assert scene.state() is ServerState.NOT_LLAMA_SERVER
    assert scene.lines() == ["is not_llama_server: /props: the answer is not HTTP"]


async def test_a_port_that_nobody_takes_is_unreachable_and_not_stalled(scene: Scene) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        scene.watch_instead(ServerSettings("bad", f"http://127.0.0.1:{full.getsockname()[1]}"))
        scene.watched.client.deadline_seconds = 0.5
        await scene.look(1)
        for each in waiting:
            each.close()
    assert scene.state() is ServerState.UNREACHABLE
    assert scene.lines() == ["is unreachable: cannot connect: no answer within 0.25 s"]


# --- TLS --------------------------------------------------------------------------------------------


async def test_a_certificate_that_does_not_verify_is_refused_and_one_whose_authority_is_named_is_taken(
    scene: Scene, tmp_path: Any
) -> None:
    async with FakeServer(tls=True, api_key="canary") as server:
        stranger = FakeServer(tls=True)
        for authority in (None, stranger.write_authority(tmp_path / "other.pem")):
            await scene.watched.client.close()
            scene.watch_instead(server.settings("bad", ca_file=authority, api_key="canary"))
            await scene.look(2)
            assert scene.state() is ServerState.UNREACHABLE
            assert not server.asked, "no key is sent to a stranger"
            assert "certificate does not verify" in scene.lines()[-1]
            assert "--ca-file" in scene.lines()[-1]
        await scene.watched.client.close()
        authority = server.write_authority(tmp_path / "authority.pem")
        scene.watch_instead(server.settings("bad", ca_file=authority, api_key="canary"))
        await scene.look()
        assert scene.state() is ServerState.READY


async def test_https_to_a_server_without_tls_is_told_as_such(scene: Scene) -> None:
    url = scene.bad.url.replace("http://", "https://")
    scene.watch_instead(ServerSettings("bad", url))
    await scene.look(3)
    assert scene.state() is ServerState.UNREACHABLE
    (line,) = scene.lines()
    assert "does not speak TLS" in line


async def test_a_ca_file_that_is_gone_is_told_without_its_path(scene: Scene, tmp_path: Any) -> None:
    url = scene.bad.url.replace("http://", "https://")
    scene.watch_instead(ServerSettings("bad", url, ca_file=str(tmp_path / "canary.pem")))
    await scene.look(3)
    (line,) = scene.lines()
    assert "CA file" in line
    assert "canary" not in line


# --- one endpoint of a real one is broken -----------------------------------------------------------

ONE_SOURCE_BROKEN = [
    ("an HTML page", HTML, "an HTML page"),
    ("another JSON", body({"error": "canary"}), "not a list but an object"),
    ("a list of something", body(["canary"]), "where a slot should be"),
    ("slots without ids", body([{"n_ctx": 1}]), "no object with an id"),
    ("cut off", cut_off, "cut off in the middle"),
    ("not UTF-8", body(b"\x80\x81"), "cut off or no JSON"),
    ("compressed", body(gzip.compress(b"[]"), Content_Encoding="gzip"), "compressed"),
]


@pytest.mark.parametrize(
    ("answer", "said"), [case[1:] for case in ONE_SOURCE_BROKEN], ids=[case[0] for case in ONE_SOURCE_BROKEN]
)
async def test_slots_that_make_no_sense_are_one_line_and_a_source_that_is_down(
    scene: Scene, answer: Handler, said: str
) -> None:
    scene.bad.answers["/slots"] = answer
    samples = await scene.look(4)
    assert scene.state() is ServerState.READY
    assert sample(samples, "kvscope_source_up", server="bad", source="slots") == 0
    assert sample(samples, "kvscope_source_up", server="bad", source="props") == 1
    assert not [
        key for key in samples if key[0] == "kvscope_slot_context_tokens" and ("server", "bad") in key[1]
    ]
    ready, line = scene.lines()
    assert ready == "is ready"
    assert said in line
    assert "canary" not in line
    scene.bad.answers = {}
    samples = await scene.look()
    assert sample(samples, "kvscope_source_up", server="bad", source="slots") == 1


@pytest.mark.parametrize("answer", [HTML, body({}), body("go_goroutines 8\n"), cut_off, status(403)])
async def test_metrics_that_make_no_sense_cost_only_what_they_would_tell(
    scene: Scene, answer: Handler
) -> None:
    scene.bad.answers["/metrics"] = answer
    scene.bad.work(0, 30, 3)
    samples = await scene.look(4)
    assert scene.state() is ServerState.READY
    assert sample(samples, "kvscope_source_up", server="bad", source="metrics") == 0
    assert sample(samples, "kvscope_slot_context_tokens", server="bad", model="tiny", slot="0") == 32
    assert len(scene.lines()) == 2


async def test_501_on_slots_means_slots_disabled_and_counters_go_on(scene: Scene) -> None:
    scene.bad.without("slots")
    samples = await scene.look(2)
    assert scene.state() is ServerState.SLOTS_DISABLED
    assert sample(samples, "kvscope_server_up", server="bad") == 1
    scene.bad.counters["prompt_tokens_total"] += 700
    scene.watched.clock.seconds += 31
    samples = await scene.look()
    assert (
        sample(samples, "kvscope_unattributed_tokens_total", server="bad", model="tiny", source="computed")
        == 700
    )
    assert len(scene.lines()) == 1


async def test_501_on_metrics_means_that_they_are_not_available(scene: Scene) -> None:
    scene.bad.answers["/metrics"] = status(501)
    scene.bad.props.pop("endpoint_metrics")
    samples = await scene.look(3)
    assert sample(samples, "kvscope_server_metrics_available", server="bad") == 0
    assert scene.state() is ServerState.READY


# --- too much ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/props", "/slots", "/metrics"])
async def test_a_hundred_megabytes_are_refused_at_a_bound(scene: Scene, path: str) -> None:
    flood = Flood(100_000_000)
    scene.bad.answers[path] = flood
    tracemalloc.start()
    try:
        await scene.look()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert any("larger than 8 MB" in line for line in scene.lines())
    assert peak < 4 * LARGEST_ANSWER_BYTES
    assert flood.sent < 30_000_000, "the connection is dropped early"
    await scene.look(2)
    assert len([line for line in scene.lines() if "larger" in line]) == 1


async def test_a_size_announced_too_large_is_refused_before_it_is_read(scene: Scene) -> None:
    async def announce(request: Any) -> Any:
        response = web.StreamResponse(headers={"Content-Length": str(10**12)})
        await response.prepare(request)
        return await late(request)

    scene.bad.answers["/slots"] = announce
    await scene.look(2)
    assert scene.state() is ServerState.READY
    assert any("larger than 8 MB" in line for line in scene.lines())


async def test_a_few_kilobytes_that_would_unfold_to_a_gigabyte_are_not_unfolded(scene: Scene) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    scene.bad.answers["/slots"] = body(bomb, Content_Encoding="gzip")
    scene.bad.answers["/metrics"] = body(bomb, Content_Encoding="deflate")
    tracemalloc.start()
    try:
        await scene.look(2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
    assert all(headers["Accept-Encoding"] == "identity" for headers in scene.bad.headers)
    assert len([line for line in scene.lines() if "compressed" in line]) == 2


async def test_slots_without_number_or_with_numbers_beyond_reason_make_no_endless_series(
    scene: Scene,
) -> None:
    scene.bad.slots = [never_used(number) for number in range(5 * MOST_SLOTS)]
    samples = await scene.look()
    shown = {dict(labels)["slot"] for name, labels in samples if name == "kvscope_slot_context_tokens"}
    assert len(shown) <= MOST_SLOTS
    assert len(scene.lines()) < 25


# --- odd values -------------------------------------------------------------------------------------

ODD = [-1, -(10**20), 2**63, 10**400, 1.5, 1e308, True, "12", "canary", [], {}, None]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
async def test_an_odd_number_in_slots_costs_that_figure_only(scene: Scene, value: Any) -> None:
    for slot in (0, 1):
        scene.bad.work(slot, 40, 4)
    await scene.look(2)
    scene.bad.slots[0]["n_prompt_tokens"] = value
    scene.bad.slots[0]["n_ctx"] = value
    scene.bad.slots[0]["surprise"] = {"canary": value}
    samples = await scene.look(3)
    assert scene.state() is ServerState.READY
    assert sample(samples, "kvscope_slot_context_tokens", server="bad", model="tiny", slot="0") is None
    assert sample(samples, "kvscope_slot_context_limit_tokens", server="bad", model="tiny", slot="0") is None
    assert sample(samples, "kvscope_slot_context_tokens", server="bad", model="tiny", slot="1") == 43
    assert len(scene.lines()) <= 3


@pytest.mark.parametrize("value", ["-1", "1e400", "NaN", "canary", '"7"', ""])
async def test_an_odd_number_in_metrics_costs_no_slot_and_no_counter_goes_back(
    scene: Scene, value: str
) -> None:
    scene.bad.work(0, 40, 4)
    await scene.look(2)
    scene.bad.work(0, 10, 2)
    before = await scene.look(2)
    scene.bad.answers["/metrics"] = body(
        f"llamacpp:prompt_tokens_total {value}\nllamacpp:tokens_predicted_total {value}\n"
    )
    scene.bad.work(0, 10, 2)
    after = await scene.look(2)
    assert sample(after, "kvscope_slot_context_tokens", server="bad", model="tiny", slot="0") == 11
    for (name, labels), seen in before.items():
        if name.startswith("kvscope_") and name.endswith("_total"):
            assert after[name, labels] >= seen, name


async def test_slots_in_another_order_are_the_same_slots(scene: Scene) -> None:
    scene.bad.work(0, 40, 4)
    scene.bad.work(1, 70, 4)
    first = await scene.look(2)
    scene.bad.slots.reverse()
    second = await scene.look(2)
    for samples in (first, second):
        assert [
            sample(samples, "kvscope_slot_context_tokens", server="bad", model="tiny", slot=slot)
            for slot in ("0", "1")
        ] == [43, 73]
    assert sample(second, "kvscope_server_restarts_total", server="bad") == 0


async def test_a_slot_that_is_missing_makes_no_counter_go_back(scene: Scene) -> None:
    scene.bad.work(0, 40, 4)
    scene.bad.work(1, 70, 4)
    before = await scene.look(2)
    gone = scene.bad.slots.pop()
    await scene.look(2)
    scene.bad.slots.append(gone)
    after = await scene.look(2)
    for (name, labels), seen in before.items():
        if name.startswith("kvscope_") and name.endswith("_total"):
            assert after[name, labels] >= seen, name
    assert sample(after, "kvscope_slot_context_tokens", server="bad", model="tiny", slot="1") == 73


async def test_odd_props_cost_only_what_is_odd(scene: Scene) -> None:
    for odd in ODD:
        if odd == "canary":
            continue  # a name as good as any
        scene.bad.props = PROPS | {
            "model_alias": odd,
            "model_path": odd,
            "build_info": odd,
            "total_slots": odd,
        }
        scene.bad.props |= {"endpoint_slots": odd, "endpoint_metrics": odd, "is_sleeping": odd and False}
        scene.watched.clock.seconds += 31
        samples = await scene.look()
        assert sample(samples, "kvscope_server_up", server="bad") == 1


async def test_half_a_character_in_a_name_breaks_no_page(scene: Scene) -> None:
    scene.bad.answers["/props"] = body(json.dumps(PROPS).replace('"tiny"', '"ti\\ud800\\nny\\""'))
    await scene.look()
    as_json(scene.board.snapshot())
    Exposition().render(scene.board.snapshot(), Format.OPENMETRICS)
    assert scene.state() is ServerState.READY


counts = st.sampled_from([0, 1, 7, 2**53 - 1, -3, 10**30, 1.5, True, "7", None])
odd_slot = st.fixed_dictionaries(
    {"id": st.sampled_from([0, 1, 2, 1023, 1024, -1])},
    optional={
        "n_ctx": counts,
        "is_processing": st.sampled_from([True, False, None, 1]),
        "state": counts,
        "id_task": counts,
        "n_prompt_tokens": counts,
        "n_prompt_tokens_processed": counts,
        "n_prompt_tokens_cache": counts,
        "next_token": st.lists(st.fixed_dictionaries({"n_decoded": counts}), max_size=2),
        "params": st.just({}),
    },
)


@given(st.lists(st.lists(odd_slot, max_size=3), max_size=6))
def test_whatever_slots_are_seen_one_after_the_other_every_page_can_be_written(answers: list[Any]) -> None:
    history = History("bad")
    clock = Clock()
    for answer in answers:
        try:
            slots, _ = parse_slots(json.dumps(answer).encode())
        except ParseError:
            continue
        clock.seconds += 1
        look = ServerLook(clock.time(), clock.monotonic(), ServerState.READY, slots, metrics_available=False)
        history = advance(history, look)
        snapshot = Snapshot((box(history, clock.monotonic()),))
        assert b"kvscope_server_up" in Exposition().render(snapshot, Format.TEXT)
        as_json(snapshot)
