"""The composition root: starts, answers, ends within a second; one broken poller costs no other anything."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest

from kvscope import cli
from kvscope.app import CannotListen, MakePoller, look_once, serve
from kvscope.observed.server import ServerState
from kvscope.settings import ServerSettings, Settings
from kvscope.snapshot import ServerBox
from kvscope.tracking.machine import ServerOnMachine
from kvscope.tracking.vram import ServerLoad

Publish = Callable[[ServerBox], None]


def box(name: str, restarts: int = 0) -> ServerBox:
    return ServerBox(name, ServerState.READY, True, created_at=1000.0, restarts=restarts)


class SteadyPoller:
    """Publishes one box and then only waits."""

    def __init__(self, server: ServerSettings, settings: Settings, publish: Publish) -> None:
        self.name = server.name
        self.publish = publish
        self.closed = False

    def on_machine(self) -> ServerOnMachine:
        return ServerOnMachine(self.name, None, ServerLoad())

    async def run(self) -> None:
        self.publish(box(self.name))
        try:
            await asyncio.Event().wait()
        finally:
            self.closed = True


class NearPoller(SteadyPoller):
    """Its server's process is this one."""

    def on_machine(self) -> ServerOnMachine:
        return ServerOnMachine(self.name, os.getpid(), ServerLoad())


class CrashingPoller(SteadyPoller):
    """Publishes a box, then meets a bug; the third time it goes on."""

    runs = 0

    async def run(self) -> None:
        self.runs += 1
        self.publish(box(self.name, restarts=self.runs))
        if self.runs < 3:
            raise KeyError("CANARY")
        await asyncio.Event().wait()


class Pollers:
    """Makes pollers and keeps them; `crashing` names those that crash."""

    def __init__(self, *crashing: str) -> None:
        self.crashing = crashing
        self.made: list[SteadyPoller] = []
        self.boxes: asyncio.Queue[ServerBox] = asyncio.Queue()

    def __call__(self, server: ServerSettings, settings: Settings, publish: Publish) -> SteadyPoller:
        def publish_and_tell(each: ServerBox) -> None:
            publish(each)
            self.boxes.put_nowait(each)

        kind = CrashingPoller if server.name in self.crashing else SteadyPoller
        self.made.append(kind(server, settings, publish_and_tell))
        return self.made[-1]


def settings(*names: str, port: int = 0, gpu: str = "none") -> Settings:
    return Settings(servers=tuple(ServerSettings(name) for name in names), listen_port=port, gpu=gpu)


@asynccontextmanager
async def serving(pollers: MakePoller, *names: str, gpu: str = "none") -> AsyncIterator[str]:
    """Serve while inside; gives the base URL."""
    stop = asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    served = asyncio.create_task(
        serve(
            settings(*names, gpu=gpu),
            make_poller=pollers,
            stop=stop,
            listening=url.set_result,
            first_pause_seconds=0.01,
        )
    )
    yield await asyncio.wait_for(url, 10)
    stop.set()
    await asyncio.wait_for(served, 10)


async def text_of(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.status == 200
        return await answer.text()


async def test_every_server_is_polled_and_scraped() -> None:
    pollers = Pollers()
    async with serving(pollers, "a", "b") as url:
        await pollers.boxes.get()
        await pollers.boxes.get()
        scrape = await text_of(f"{url}/metrics")
    assert 'kvscope_server_up{server="a"} 1.0' in scrape
    assert 'kvscope_server_up{server="b"} 1.0' in scrape
    assert [poller.closed for poller in pollers.made] == [True, True]


async def test_gpus_and_memory_are_joined_with_the_process_of_each_server() -> None:
    snapshot = await look_once(settings("a", gpu="pretend"), make_poller=NearPoller)
    assert snapshot.machine is not None
    assert set(snapshot.machine.gpus[0].server_bytes) == set(snapshot.machine.server_memory) == {"a"}
    async with serving(NearPoller, "a", gpu="pretend") as url:
        while 'kvscope_gpu_memory_by_kind_bytes{gpu="pretend0",kind="kv",server="a"}' not in (
            scrape := await text_of(f"{url}/metrics")
        ):
            pass
    assert 'kvscope_server_memory_bytes{kind="resident",server="a"}' in scrape


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_the_healthcheck_finds_a_running_exporter(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that listens on every address, which is none to ask."""
    async with serving(Pollers(), "a") as url:
        address = f"{host}:{url.rpartition(':')[2]}"
        code = await asyncio.to_thread(cli.run, ["healthcheck", "--listen", address])
    assert (code, capsys.readouterr().out) == (0, "healthy\n")


async def test_an_end_does_not_wait_for_connections_that_stay_open() -> None:
    async with serving(Pollers(), "a") as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /-/healthy HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"200" in await reader.readline()
    while await reader.read(1000):
        pass
    writer.close()


async def test_a_crashing_poller_is_started_again_with_what_it_knew(caplog: pytest.LogCaptureFixture) -> None:
    """The same poller goes on, so that its counters do; the other one never stops."""
    pollers = Pollers("bad")
    async with serving(pollers, "bad", "good") as url:
        seen = 0
        while seen < 3:
            published = await asyncio.wait_for(pollers.boxes.get(), 10)
            seen = max(seen, published.restarts)
        scrape = await text_of(f"{url}/metrics")
    assert [poller.name for poller in pollers.made] == ["bad", "good"]
    assert 'kvscope_server_restarts_total{server="bad"} 3.0' in scrape
    assert 'kvscope_server_up{server="bad"} 1.0' in scrape
    assert 'kvscope_server_up{server="good"} 1.0' in scrape
    lines = [record.getMessage() for record in caplog.records if record.name == "kvscope.app"]
    assert len(lines) == 2
    assert "server bad" in lines[0]
    assert "KeyError at test_app.py:" in lines[0]
    assert "CANARY" not in caplog.text


async def test_while_a_poller_is_down_nothing_is_shown_as_current() -> None:
    class Broken(SteadyPoller):
        async def run(self) -> None:
            if not tried.is_set():
                self.publish(box(self.name, restarts=7))
                tried.set()
                raise RuntimeError
            again.set()
            await asyncio.Event().wait()

    tried, again, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    served = asyncio.create_task(
        serve(
            settings("a"), make_poller=Broken, stop=stop, listening=url.set_result, first_pause_seconds=0.01
        )
    )
    await asyncio.wait_for(again.wait(), 10)
    scrape = await text_of(f"{await url}/metrics")
    stop.set()
    await served
    assert 'kvscope_server_up{server="a"} 0.0' in scrape
    assert 'kvscope_server_restarts_total{server="a"} 7.0' in scrape


async def test_a_poller_that_does_not_let_itself_be_cancelled_holds_up_no_end() -> None:
    class Stubborn(SteadyPoller):
        async def run(self) -> None:
            started.set()
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue

    started, let_go, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()
    served = asyncio.create_task(serve(settings("a"), make_poller=Stubborn, stop=stop))
    await started.wait()
    stop.set()
    await asyncio.wait_for(served, 10)
    let_go.set()


async def test_one_look_at_each_server_is_in_the_order_of_the_settings() -> None:
    pollers = Pollers()
    snapshot = await look_once(settings("b", "a"), make_poller=pollers)
    assert [each.name for each in snapshot.servers] == ["b", "a"]
    assert all(poller.closed for poller in pollers.made)


async def test_one_look_that_fails_costs_no_other_server_its_figures() -> None:
    class Half(SteadyPoller):
        async def run(self) -> None:
            if self.name == "bad":
                raise RuntimeError("CANARY")
            await super().run()

    snapshot = await look_once(settings("bad", "good"), make_poller=Half)
    assert [(each.name, each.up) for each in snapshot.servers] == [("bad", False), ("good", True)]


async def test_a_port_in_use_is_said_and_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=f"127.0.0.1:{port} is in use.*--listen"):
            await serve(settings("a", port=port), make_poller=Pollers())


async def test_an_address_of_another_machine_is_said_and_the_way_out() -> None:
    wrong = Settings(listen_host="192.0.2.1", listen_port=0)
    with pytest.raises(CannotListen, match=r"192\.0\.2\.1:0 is no address of this machine.*--listen"):
        await serve(wrong, make_poller=Pollers())


async def test_listening_for_other_machines_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    stop = asyncio.Event()
    stop.set()
    await serve(Settings(listen_host="0.0.0.0", listen_port=0), make_poller=Pollers(), stop=stop)
    assert [record.getMessage() for record in caplog.records if "other machines" in record.getMessage()]
    assert len(caplog.records) == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_cleanly(number: signal.Signals) -> None:
    """A whole process with the real poller, whose server is not there."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = closed.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSCOPE_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvscope", "serve", "--listen", "127.0.0.1:0"),
        *("--server", f"http://127.0.0.1:{dead}", "--log-format", "json"),
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    assert process.stderr
    try:
        line = await asyncio.wait_for(process.stderr.readline(), 60)
        while line and b"metrics at http://127.0.0.1:" not in line:
            line = await asyncio.wait_for(process.stderr.readline(), 60)
        loop = asyncio.get_running_loop()
        process.send_signal(number)
        sent = loop.time()
        rest = await asyncio.wait_for(process.stderr.read(), 60)
        assert await process.wait() == 0
        # A second for kvscope; the rest is for the interpreter to end on a loaded machine.
        assert loop.time() - sent < 5
        assert b"Traceback" not in rest
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
