"""Composition root: builds the parts, starts them, and stops them within a second."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Protocol

from aiohttp import web

from kvscope.logs import what_and_where
from kvscope.machine_poller import MachinePoller
from kvscope.metrics.web import application
from kvscope.observed.server import ServerState
from kvscope.poller import Poller
from kvscope.settings import ServerSettings, Settings, host_and_port, is_loopback
from kvscope.snapshot import Board, ServerBox, Snapshot
from kvscope.tracking.machine import ServerOnMachine

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
_END_WITHIN_SECONDS = 0.4


class CannotListen(Exception):
    """The listen address cannot be had; the text is one line that says why and the way out."""


class Watching(Protocol):
    """What app needs of a poller."""

    async def run(self) -> None:
        """Look at one server until cancelled."""

    def on_machine(self) -> ServerOnMachine:
        """Return the server's process and its load, as they are known at present."""


MakePoller = Callable[[ServerSettings, Settings, Callable[[ServerBox], None]], Watching]


async def serve(
    settings: Settings,
    *,
    make_poller: MakePoller = Poller,
    stop: asyncio.Event | None = None,
    listening: Callable[[str], None] | None = None,
    first_pause_seconds: float = FIRST_PAUSE_SECONDS,
) -> None:
    """Watch every server and answer scrapes until SIGTERM, SIGINT or stop.

    listening is called once with the base URL when scrapes are answered. Raises CannotListen.
    """
    stop = stop or asyncio.Event()
    board = Board(tuple(server.name for server in settings.servers))
    runner = web.AppRunner(application(board), access_log=None, shutdown_timeout=_END_WITHIN_SECONDS)
    with _stopped_by_signals(stop):
        await runner.setup()
        watches: list[asyncio.Task[None]] = []
        try:
            url = await _listen(runner, settings)
            pollers = {
                server.name: make_poller(server, settings, board.publish) for server in settings.servers
            }
            machine = MachinePoller(settings, board.publish_machine, lambda: _on_machine(pollers.values()))
            watches = [
                asyncio.create_task(_watch_server(name, poller, board, first_pause_seconds), name=name)
                for name, poller in pollers.items()
            ]
            watches.append(
                asyncio.create_task(_watch("the machine", machine.run, _nothing, first_pause_seconds))
            )
            if listening:
                listening(url)
            await stop.wait()
        finally:
            for watch in watches:
                watch.cancel()
            if watches:
                await asyncio.wait(watches, timeout=_END_WITHIN_SECONDS)
            await runner.cleanup()


async def look_once(settings: Settings, *, make_poller: MakePoller = Poller) -> Snapshot:
    """Look at every server once, all at the same time, then at the machine; return what was seen."""
    board = Board(tuple(server.name for server in settings.servers))
    pollers = await asyncio.gather(
        *(_first_look(server, settings, board, make_poller) for server in settings.servers)
    )
    await MachinePoller(settings, board.publish_machine, lambda: _on_machine(pollers)).look_once()
    return board.snapshot()


def _on_machine(pollers: Iterable[Watching]) -> Sequence[ServerOnMachine]:
    return [poller.on_machine() for poller in pollers]


async def _first_look(
    server: ServerSettings, settings: Settings, board: Board, make_poller: MakePoller
) -> Watching:
    seen: asyncio.Future[ServerBox] = asyncio.get_running_loop().create_future()

    def publish(box: ServerBox) -> None:
        if not seen.done():
            seen.set_result(box)

    # run, not look_once: only run closes its connections.
    poller = make_poller(server, settings, publish)
    watch = asyncio.create_task(poller.run())
    either: set[asyncio.Future[Any]] = {watch, seen}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    watch.cancel()
    (ended,) = await asyncio.gather(watch, return_exceptions=True)
    if not seen.done():
        reason = what_and_where(ended) if isinstance(ended, BaseException) else "it came to an end"
        log.error(
            "server %s: the look failed by a fault of kvscope (%s); please report it",
            server.name,
            reason,
            extra={"server": server.name},
        )
    board.publish(seen.result() if seen.done() else _unwatched(server.name, None))
    return poller


async def _watch_server(name: str, poller: Watching, board: Board, first_pause_seconds: float) -> None:
    def failed() -> None:
        board.publish(_unwatched(name, board.box(name)))

    await _watch(f"server {name}", poller.run, failed, first_pause_seconds, server=name)


async def _watch(
    what: str,
    run: Callable[[], Coroutine[Any, Any, None]],
    failed: Callable[[], None],
    first_pause_seconds: float,
    **extra: str,
) -> None:
    """Run a poller; after a bug in it, run the same one again, so that its counters go on."""
    pause = first_pause_seconds
    while True:
        started = time.monotonic()
        try:
            await run()
        except Exception as error:
            reason = what_and_where(error)
        else:
            reason = "it came to an end"
        if time.monotonic() - started > LONGEST_PAUSE_SECONDS:
            pause = first_pause_seconds
        log.error(
            "%s: its poller stopped by a fault of kvscope (%s), next try in %g s; please report it",
            what,
            reason,
            pause,
            extra=extra,
        )
        failed()
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


def _nothing() -> None:
    """The machine's readings age out by themselves."""


def _unwatched(name: str, last: ServerBox | None) -> ServerBox:
    """Return a box that shows nothing as current and keeps the counters."""
    empty = ServerBox(
        name=name,
        state=ServerState.UNREACHABLE,
        up=False,
        created_at=last.created_at if last else time.time(),
        problem="kvscope's own poller failed and starts again, see the exporter's log",
    )
    if last is None:
        return empty
    return dataclasses.replace(
        empty,
        model=last.model,
        counts=last.counts,
        restarts=last.restarts,
        last_restart_at=last.last_restart_at,
        sources={key: dataclasses.replace(source, up=False) for key, source in last.sources.items()},
    )


async def _listen(runner: web.AppRunner, settings: Settings) -> str:
    wanted = host_and_port(settings.listen_host, settings.listen_port)
    try:
        await web.TCPSite(runner, settings.listen_host, settings.listen_port).start()
    except OSError as error:
        raise CannotListen(_why_not(wanted, error)) from None
    host, port = runner.addresses[0][:2]
    if not is_loopback(settings.listen_host):
        log.warning(
            "listening on %s: other machines can read the figures, nothing asks them for a key", wanted
        )
    return f"http://{host_and_port(host, port)}"


def _why_not(wanted: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"{wanted} is in use: stop what listens there or choose another address with --listen HOST:PORT"
        )
    if error.errno == errno.EACCES:
        return f"{wanted} is not allowed: choose a port above 1023 with --listen HOST:PORT"
    return f"{wanted} is no address of this machine: choose another with --listen HOST:PORT"


@contextlib.contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """Set stop at SIGTERM and SIGINT while inside; only the main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(each) for each in signals]
    for each in signals:
        # Not loop.add_signal_handler: Windows has none.
        signal.signal(each, lambda *_: loop.call_soon_threadsafe(stop.set))
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)
