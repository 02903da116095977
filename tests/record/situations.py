"""What is played while the exporter watches; the name of each is the name of its recording."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from kvscope.observed.server import ServerState
from tests.record.recorder import Situation, Stage, without

SYSTEM = 700


async def session(stage: Stage) -> None:
    """A main agent grows; sub-agents share its system prompt; strangers; the main agent comes back."""
    system = stage.words(SYSTEM)
    main = system + stage.words(200)
    for _ in range(2):
        main = await stage.ask(main, 40) + stage.words(90)
        await stage.seen()
    await stage.ask(system + stage.words(250), 30)
    await stage.seen()
    main = await stage.ask(main, 40) + stage.words(90)
    await stage.seen()
    await asyncio.gather(*(stage.ask(system + stage.words(150), 1000) for _ in range(3)))
    await stage.seen()
    for _ in range(2):
        await stage.ask(stage.words(800), 25)
        await stage.seen()
    await stage.ask(main, 700)
    await stage.seen()


async def sleep(stage: Stage) -> None:
    """Two requests, sleep, a look or two at the sleeper, and a request that wakes it."""
    await stage.ask(stage.words(300), 20)
    await stage.seen()
    await stage.ask(stage.words(500), 30)
    await stage.state(ServerState.SLEEPING)
    await stage.seen()
    await stage.ask(stage.words(400), 10)
    await stage.seen()


async def restart_more_work(stage: Stage) -> None:
    """Killed and started again; when the exporter sees it, it has done more than before."""
    for _ in range(2):
        await stage.ask(stage.words(200), 10)
        await stage.seen()
    await stage.kill()
    await stage.state(ServerState.UNREACHABLE)
    await stage.start()
    for _ in range(3):
        await stage.ask(stage.words(300), 20)
    stage.reachable()
    await stage.state(ServerState.READY)
    await stage.ask(stage.words(100), 10)
    await stage.seen()


async def no_metrics(stage: Stage) -> None:
    """Only /slots tells: requests seen at work, one at its prompt, and short ones between two looks."""
    talk = stage.words(7000)
    for _ in range(2):
        talk = await stage.ask(talk, 300) + stage.words(50)
        await stage.seen()
    for _ in range(3):
        await stage.ask(stage.words(100), 2)
        await stage.seen()


async def context_shift(stage: Stage) -> None:
    """Generation outgrows a small context several times."""
    await stage.ask(stage.words(100), 20)
    await stage.seen()
    await stage.ask(stage.words(600), 4000)
    await stage.seen()


# One thread: a second one waits for the first, and for everybody else on a busy machine.
ONE_THREAD = ("-t", "1", "-tb", "1")
SEPARATE = ("-c", "8192", "-np", "4", "-ub", "128", "--metrics", *ONE_THREAD)

SITUATIONS: Mapping[str, Situation] = {
    "b11549__default_session": Situation(session, ("-c", "8192", "-ub", "128", "--metrics", *ONE_THREAD)),
    "b11549__separate_session": Situation(
        session, SEPARATE, environment={"LLAMA_SERVER_SLOTS_DEBUG": "1"}, process_readable=False
    ),
    "b11549__sleep": Situation(sleep, ("-c", "8192", "--metrics", "--sleep-idle-seconds", "3", *ONE_THREAD)),
    "b11549__restart_more_work": Situation(
        restart_more_work, ("-c", "8192", "--metrics", *ONE_THREAD), process_readable=False
    ),
    "b11549__no_metrics": Situation(
        no_metrics, ("-c", "16384", "-np", "2", "-b", "128", "-ub", "128", *ONE_THREAD)
    ),
    "b11549__context_shift": Situation(
        context_shift,
        ("-c", "2048", "-np", "2", "--context-shift", "--metrics", *ONE_THREAD),
        process_readable=False,
    ),
    "older_derived__no_cached_total_no_token_fields": Situation(
        session,
        SEPARATE,
        process_readable=False,
        change=without(
            fields=("n_prompt_tokens", "n_prompt_tokens_processed", "n_prompt_tokens_cache"),
            counters=("prompt_tokens_cached_total",),
        ),
    ),
}
