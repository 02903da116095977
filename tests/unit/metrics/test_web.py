"""The exporter's pages, asked for as Prometheus, a browser or an orchestrator does."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import replace
from hashlib import sha256

import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer
from fake_snapshots import full_box, unreachable_box
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvscope.metrics.collector import Format
from kvscope.metrics.family import Family, Kind, Reading
from kvscope.metrics.web import accepted_format, application
from kvscope.snapshot import Board, Snapshot

PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_TEXT_FIRST = (
    "text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1"
)
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.fixture
def board() -> Board:
    return Board(("main", "far"))


@pytest.fixture
async def client(board: Board) -> AsyncIterator[TestClient]:
    async with TestClient(TestServer(application(board)), auto_decompress=False) as client:
        yield client


async def get(client: TestClient, path: str, **headers: str) -> ClientResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.get(path, headers={"Accept-Encoding": "identity"} | named)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", Format.TEXT),
        ("*/*", Format.TEXT),
        (FIREFOX, Format.TEXT),
        (PROMETHEUS_2, Format.OPENMETRICS),
        (PROMETHEUS_3, Format.OPENMETRICS),
        (PROMETHEUS_TEXT_FIRST, Format.TEXT),
        ("application/openmetrics-text", Format.OPENMETRICS),
        ("application/openmetrics-text;version=0.0.1", Format.TEXT),
        ("application/openmetrics-text;version=1.0.0;q=0", Format.TEXT),
        ("application/openmetrics-text;version=1.0.0;q=high", Format.TEXT),
    ],
)
def test_the_format_is_the_one_the_client_prefers(accept: str, expected: Format) -> None:
    assert accepted_format(accept) is expected


async def test_metrics_are_text_for_a_person_and_openmetrics_for_prometheus(
    client: TestClient, board: Board
) -> None:
    board.publish(full_box())
    text = await get(client, "/metrics")
    openmetrics = await get(client, "/metrics", Accept=PROMETHEUS_3)
    assert text.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert openmetrics.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert any(family.name == "kvscope_server_up" for family in parse_text(await text.text()))
    assert any(family.name == "kvscope_server_up" for family in parse_openmetrics(await openmetrics.text()))
    assert text.headers["Vary"] == "Accept, Accept-Encoding"


async def test_metrics_are_compressed_only_for_a_client_that_takes_gzip(
    client: TestClient, board: Board
) -> None:
    board.publish(full_box())
    plain = await get(client, "/metrics")
    refused = await get(client, "/metrics", Accept_Encoding="gzip;q=0, deflate")
    packed = await get(client, "/metrics", Accept_Encoding="deflate, gzip")
    assert "Content-Encoding" not in plain.headers
    assert "Content-Encoding" not in refused.headers
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(await packed.read()) == await plain.read() == await refused.read()


async def test_metrics_answer_before_any_server_was_looked_at(client: TestClient) -> None:
    response = await get(client, "/metrics")
    assert response.status == 200
    body = await response.text()
    assert "kvscope_build_info{" in body
    assert "kvscope_server_up" not in body


@pytest.mark.parametrize("path", ["/", "/metrics", "/snapshot.json", "/-/healthy"])
async def test_head_answers_like_get_without_the_body(client: TestClient, board: Board, path: str) -> None:
    board.publish(full_box())
    head = await client.head(path, headers={"Accept-Encoding": "identity"})
    body = await (await get(client, path)).read()
    assert head.status == 200
    assert head.headers["Content-Length"] == str(len(body))
    assert await head.read() == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/metrics", "/snapshot.json", "/-/ready"])
async def test_other_methods_are_refused_by_name(client: TestClient, path: str, method: str) -> None:
    response = await client.request(method, path)
    assert response.status == 405
    assert set(response.headers["Allow"].split(",")) == {"GET", "HEAD"}


class Renderings:
    """A metric that counts how often it was rendered, and can be made to wait."""

    def __init__(self) -> None:
        self.count = 0
        self.started = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def family(self) -> Family:
        def readings(snapshot: Snapshot) -> list[Reading]:
            self.count += 1
            self.started.set()
            assert self.may_go_on.wait(30)
            return [Reading((), len(snapshot.servers))]

        return Family("watched", Kind.GAUGE, "Servers.", (), "nothing", readings)


async def test_metrics_are_rendered_once_for_each_change_of_the_board_and_format(board: Board) -> None:
    renderings = Renderings()
    async with TestClient(TestServer(application(board, [renderings.family()]))) as client:
        for _ in range(3):
            await get(client, "/metrics")
            await get(client, "/metrics", Accept_Encoding="gzip")
        assert renderings.count == 1
        await get(client, "/metrics", Accept=PROMETHEUS_2)
        assert renderings.count == 2
        board.publish(full_box())
        assert "watched 1.0" in await (await get(client, "/metrics")).text()
        assert renderings.count == 3


async def test_a_slow_rendering_holds_up_nothing_else_and_is_shared_by_who_waits(board: Board) -> None:
    renderings = Renderings()
    renderings.may_go_on.clear()
    async with TestClient(TestServer(application(board, [renderings.family()]))) as client:
        scrapes = [asyncio.ensure_future(get(client, "/metrics")) for _ in range(2)]
        await asyncio.to_thread(renderings.started.wait, 30)
        assert (await get(client, "/-/healthy")).status == 200
        board.publish(full_box())
        renderings.may_go_on.set()
        bodies = sorted([await (await scrape).text() for scrape in scrapes])
        assert "watched 0.0" in bodies[0]
        assert "watched 1.0" in bodies[1], "who waited gets what is newest then"


async def test_ready_only_after_every_server_was_looked_at(client: TestClient, board: Board) -> None:
    waiting = await get(client, "/-/ready")
    assert waiting.status == 503
    assert await waiting.text() == "waiting for the first look at: main, far\n"
    board.publish(full_box())
    assert (await get(client, "/-/ready")).status == 503
    board.publish(unreachable_box())
    assert (await get(client, "/-/ready")).status == 200, "a look that found nothing is a look"


async def test_healthy_whatever_the_servers_do(client: TestClient) -> None:
    assert (await get(client, "/-/healthy")).status == 200


async def test_the_snapshot_is_versioned_json_without_unknowns(client: TestClient, board: Board) -> None:
    board.publish(full_box())
    board.publish(unreachable_box())
    response = await get(client, "/snapshot.json")
    assert response.content_type == "application/json"
    content = json.loads(await response.read())
    assert content["version"] == 1
    main, far = content["servers"]
    assert main["slots"][0]["phase"] == "prefill"
    assert main["slots"][0]["last_prompt_tokens"] == {"computed": 482, "unknown": 1730}
    assert "prefill_tokens" not in main["slots"][1]
    assert main["counts"][0]["evictions"]["slot/takeover/unknown"] == {"events": 2, "tokens": 3060}
    assert main["counts"][0]["slots"]["2"]["phase_seconds"]["idle"] == 100.5
    assert far == {
        "name": "far",
        "state": "unreachable",
        "up": False,
        "created_at": 1_700_000_000.25,
        "restarts": 0,
        "slots": [],
        "counts": [],
        "sources": {},
        "tiers": {},
    }


async def test_the_snapshot_is_valid_json_even_with_a_figure_that_is_none(
    client: TestClient, board: Board
) -> None:
    board.publish(replace(full_box(), last_restart_at=float("nan")))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(await (await get(client, "/snapshot.json")).read(), parse_constant=refuse)
    assert "last_restart_at" not in content["servers"][0]


async def test_the_landing_page_says_what_is_watched_and_links_to_every_page(
    client: TestClient, board: Board
) -> None:
    board.publish(full_box())
    page = await (await get(client, "/")).text()
    assert '<th scope="row">main</th><td>ready</td><td>tiny</td><td>1 of 4</td>' in page
    assert '<th scope="row">far</th><td>not looked at yet</td>' in page
    assert '<html lang="en">' in page
    assert "prefers-color-scheme: dark" in page
    for link in ("metrics", "snapshot.json", "-/healthy", "-/ready"):
        assert f'href="{link}"' in page
        assert (await get(client, f"/{link}")).status in (200, 503)


async def test_the_landing_page_escapes_what_servers_call_themselves(
    client: TestClient, board: Board
) -> None:
    board.publish(full_box(model="<script>\"'&\ud800"))
    page = await (await get(client, "/")).text()
    assert "<script" not in page
    assert "&lt;script&gt;&quot;&#x27;&amp;?" in page


async def test_the_landing_page_tells_no_problem_which_may_name_an_address(
    client: TestClient, board: Board
) -> None:
    board.publish(replace(full_box(), problem="http://someone:canary@host/canary refuses"))
    assert "canary" not in await (await get(client, "/")).text()


@pytest.mark.parametrize("path", ["/", "/metrics", "/snapshot.json", "/-/ready", "/nowhere"])
async def test_every_answer_carries_the_security_headers(client: TestClient, path: str) -> None:
    headers = (await get(client, path)).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Server"] == "kvscope"


async def test_the_policy_allows_exactly_the_style_of_the_landing_page(client: TestClient) -> None:
    response = await get(client, "/")
    style = (await response.text()).split("<style>")[1].split("</style>")[0]
    allowed = f"style-src 'sha256-{b64encode(sha256(style.encode()).digest()).decode()}'"
    assert allowed in response.headers["Content-Security-Policy"]
