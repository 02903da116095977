"""`kvscope demo`: a real server on a tiny model, an agent session against it, and the exporter watching."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from kvscope.app import CannotListen, serve
from kvscope.commands.options import Written
from kvscope.demo import tiny_model
from kvscope.demo.running_server import RunningServer, ServerDidNotStart
from kvscope.demo.screen import Screen
from kvscope.demo.session import CONTEXT_LIMIT, POOL_LIMIT, AgentSession, SessionFailed
from kvscope.poller import Poller
from kvscope.settings import ServerSettings, Settings, listen_address
from kvscope.snapshot import ServerBox

SERVER_NAME = "demo"
ALIVE_EVERY_SECONDS = 0.25
END_IS_TOLD_SECONDS = 2.0
LAST_LOOK_SECONDS = 10.0

# Shorter than the session's pauses, so that each of its requests is seen; kvscope serve takes 2 s.
IDLE_LOOK_SECONDS = 0.5

# One thread and small batches: a prefill then lasts long enough to be watched.
SLOW_FLAGS = ("-t", "1", "-b", "256", "-ub", "128")


class DemoFailed(Exception):
    """A part of the demo died; the text is one line that says which."""


@click.command()
@click.option("--turns", type=click.IntRange(min=1), help="End after so many turns of the main agent.")
@click.option(
    "--mode",
    type=click.Choice(["default", "separate"]),
    default="default",
    show_default=True,
    help="The server's slots: one pool shared by all (llama-server's default), or separate ones (-np 4).",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random words and the model.")
@click.option(
    "--breath",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Pause after each request.",
)
@click.option(
    "--listen",
    envvar="KVSCOPE_LISTEN",
    metavar="HOST:PORT",
    type=Written("listen", listen_address),
    help="Where scrapes are answered.  [default: 127.0.0.1:10188, or a free port where that one is taken]",
)
@click.option(
    "--pages",
    envvar="KVSCOPE_PAGES",
    metavar="URL",
    help="Where dashboards show it: told at the start, for whoever reads the log.",
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the table's fullest moment to this file as SVG, at the end.",
)
def demo(
    turns: int | None,
    mode: str,
    seed: int,
    breath: float,
    listen: tuple[str, int] | None,
    pages: str | None,
    picture: Path | None,
) -> None:
    """Watch a scripted agent session fill the slots of a real llama.cpp server.

    Everything runs on this machine: the server (from the package xllamacpp) on a model of a few MB
    with random weights, the session, and the exporter. Ctrl-C ends it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_demo(turns, mode, seed, breath, picture, listen, pages)
    except KeyboardInterrupt:
        pass
    except DemoFailed as error:
        click.echo(f"kvscope demo: {error}", err=True)
        sys.exit(1)


def run_demo(
    turns: int | None,
    mode: str,
    seed: int,
    breath: float,
    picture: Path | None = None,
    listen: tuple[str, int] | None = None,
    pages: str | None = None,
) -> None:
    """Run the demo until its turns are over or SIGTERM or SIGINT comes.

    Raises DemoFailed when a part of it dies.
    """
    # That its server went away the demo tells itself, in its own words.
    logging.getLogger("kvscope").setLevel(logging.ERROR)
    context = ("-c", str(POOL_LIMIT)) if mode == "default" else ("-np", "4", "-c", str(4 * CONTEXT_LIMIT))
    with Screen(SERVER_NAME) as screen:
        if pages:
            screen.tell(f"its last five minutes, once it runs: {pages}")
        screen.tell("starting a llama.cpp server on a tiny model")
        with RunningServer(
            cached_model(seed), *context, *SLOW_FLAGS, "--metrics", "-a", "kvscope-tiny"
        ) as server:
            try:
                server.wait()
            except ServerDidNotStart as error:
                raise DemoFailed(str(error)) from None
            session = AgentSession(server.url, screen.tell, seed, breath)
            asyncio.run(_play(server, session, screen, turns, listen))
    if picture:
        picture.write_text(screen.picture(f"kvscope demo --mode {mode}"))


def cached_model(seed: int) -> Path:
    """Return the path of the demo's model in the user's cache directory, written there if it is not yet.

    Raises DemoFailed when it cannot be written.
    """
    shape = hashlib.sha256(Path(tiny_model.__file__).read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvscope"
    model = cache / f"kvscope-tiny-{shape}-{seed}.gguf"
    if model.is_file():
        return model
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Under another name first, so that no half model is ever taken for a whole one.
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            tiny_model.write_tiny_model(Path(directory) / "model.gguf", seed).replace(model)
    except OSError as error:
        raise DemoFailed(
            f"cannot write the model to the cache directory ({error.strerror}): set XDG_CACHE_HOME"
        ) from None
    return model


async def _play(
    server: RunningServer,
    session: AgentSession,
    screen: Screen,
    turns: int | None,
    listen: tuple[str, int] | None,
) -> None:
    stop = asyncio.Event()
    exporter = asyncio.create_task(_export(server.url, screen, stop, listen))
    playing = asyncio.create_task(session.run(turns))
    others = [asyncio.create_task(_until_it_ends(server)), asyncio.create_task(screen.draw())]
    await asyncio.wait({exporter, playing, *others}, return_when=asyncio.FIRST_COMPLETED)
    if playing.done() and not playing.exception():
        others.append(asyncio.create_task(_look_after_the_end(screen)))
        await asyncio.wait({exporter, *others}, return_when=asyncio.FIRST_COMPLETED)
    elif playing.done():
        # A server that died is told by its connections a moment before the system tells of its end.
        await asyncio.wait(others[:1], timeout=END_IS_TOLD_SECONDS)
    died = server.exit_code()
    stop.set()
    for task in (playing, *others):
        task.cancel()
    ended = await asyncio.gather(exporter, playing, *others, return_exceptions=True)
    if died is not None:
        raise DemoFailed(f"the llama.cpp server died ({_ending(died)})")
    for error in ended:
        if isinstance(error, SessionFailed | CannotListen):
            raise DemoFailed(str(error)) from None
        if isinstance(error, Exception):
            raise error


async def _look_after_the_end(screen: Screen) -> None:
    """Wait for a look that began after the last request ended: the next box may be of one under way."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_LOOK_SECONDS):
            await screen.next_publish()
            await screen.next_publish()


async def _export(url: str, screen: Screen, stop: asyncio.Event, address: tuple[str, int] | None) -> None:
    settings = Settings(
        servers=(ServerSettings(SERVER_NAME, url=url, sleep_idle="off"),),
        idle_interval_seconds=IDLE_LOOK_SECONDS,
        gpu="pretend",
    )
    if address:
        settings = dataclasses.replace(settings, listen_host=address[0], listen_port=address[1])

    def make_poller(
        server: ServerSettings, settings: Settings, publish: Callable[[ServerBox], None]
    ) -> Poller:
        def publish_and_show(box: ServerBox) -> None:
            publish(box)
            screen.publish(box)

        return Poller(server, settings, publish_and_show)

    async def listen(settings: Settings) -> None:
        await serve(settings, make_poller=make_poller, stop=stop, listening=screen.listening)

    try:
        await listen(settings)
    except CannotListen:
        if address:
            raise
        screen.tell(f"port {settings.listen_port} is taken, so the exporter listens on another one")
        await listen(dataclasses.replace(settings, listen_port=0))


async def _until_it_ends(server: RunningServer) -> None:
    while server.exit_code() is None:  # noqa: ASYNC110 - the system tells it only to who asks
        await asyncio.sleep(ALIVE_EVERY_SECONDS)


def _ending(exit_code: int) -> str:
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
