"""`python -m tests.truth`: a table of the exporter's figures against the truth; exit 1 on a row missed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvscope.demo.running_server import ServerDidNotStart
from kvscope.demo.tiny_model import write_tiny_model
from tests.truth import report
from tests.truth.driver import DidNotHappen
from tests.truth.oracle import TruthContradictsItself
from tests.truth.report import Outcome
from tests.truth.scenarios import SCENARIOS
from tests.truth.stage import Stage

MODES = ("default", "separate")
AT_ONCE = 2
"""Scenarios mostly wait for polls; each has its own server and exporter."""


@click.command()
@click.option("--seed", type=int, help="Repeat the run with this seed; a new one each run unless given.")
@click.option("--mode", type=click.Choice([*MODES, "both"]), default="both", show_default=True)
@click.option("--only", "chosen", multiple=True, type=click.Choice(list(SCENARIOS)), help="May be repeated.")
@click.option("--list", "list_them", is_flag=True, help="List the scenarios and end.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep logs, and /metrics of what was missed.")
def main(seed: int | None, mode: str, chosen: Sequence[str], list_them: bool, keep: Path | None) -> None:
    """Drive real llama.cpp servers and compare kvscope's figures with the truth."""
    if list_them:
        for name, play in SCENARIOS.items():
            click.echo(f"{name:12} {(play.__doc__ or '').splitlines()[0]}")
        return
    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    click.echo(f"seed {seed}")
    modes = MODES if mode == "both" else (mode,)
    jobs = [(scenario, one) for scenario in chosen or SCENARIOS for one in modes]
    try:
        outcomes = asyncio.run(_play_all(jobs, seed, keep))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("interrupted: servers and exporters are ended")
    console = Console(width=None if sys.stdout.isatty() else 140)
    report.print_table(outcomes, console)
    missed = sum(outcome.missed for outcome in outcomes)
    if missed:
        click.echo(f"again: python -m tests.truth --seed {seed}")
    sys.exit(1 if missed else 0)


async def _play_all(jobs: Sequence[tuple[str, str]], seed: int, keep: Path | None) -> list[Outcome]:
    this = asyncio.current_task()
    assert this is not None
    for ending in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(ending, this.cancel)
    at_once = asyncio.Semaphore(AT_ONCE)
    with tempfile.TemporaryDirectory(prefix="kvscope-truth-") as temporary, _progress(len(jobs)) as done:
        directory = keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        model = await asyncio.to_thread(write_tiny_model, Path(temporary) / "tiny.gguf")

        async def play(scenario: str, mode: str) -> Outcome:
            async with at_once:
                outcome = await _play(scenario, mode, seed, model, directory)
            done(outcome)
            return outcome

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(play(*job)) for job in jobs]
    return [task.result() for task in tasks]


async def _play(scenario: str, mode: str, seed: int, model: Path, directory: Path) -> Outcome:
    began = time.monotonic()
    async with contextlib.AsyncExitStack() as ending:
        stage = Stage(scenario, mode, seed, model, directory, ending)
        try:
            await SCENARIOS[scenario](stage)
        except (DidNotHappen, ServerDidNotStart, TruthContradictsItself) as problem:
            stage.rows.append(report.equal("played to its end", str(problem), "yes"))
        except Exception as problem:  # one broken scenario must not hide the others' rows
            text = f"{type(problem).__name__}: {problem}"
            stage.rows.append(report.equal("played to its end", text, "yes"))
    return Outcome(scenario, mode, stage.rows, time.monotonic() - began)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Outcome], None]]:
    """Give a function to call with each outcome: a bar on a terminal, else one line each, on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda outcome: click.echo(_line(outcome), err=True)
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.completed}/{task.total} {task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("scenarios", total=total)

        def show(outcome: Outcome) -> None:
            bar.console.print(_line(outcome), style="red" if outcome.missed else None)
            bar.update(task, advance=1)

        yield show


def _line(outcome: Outcome) -> str:
    verdict = f"{outcome.missed} MISSED" if outcome.missed else "ok"
    name = f"{outcome.scenario:12} {outcome.mode:9}"
    return f"{name} {outcome.seconds:5.1f} s  {len(outcome.rows):2} rows  {verdict}"


if __name__ == "__main__":
    main()
