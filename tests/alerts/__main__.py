"""`python -m tests.alerts`: breaks each rule in every way of `mutants`; exit 1 when tests do not notice."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import click

from tests.alerts.mutants import Mutant, mutants
from tests.alerts.rules import Rule, rules, tests_hold
from tests.alerts.survivors import SURVIVORS


@click.command()
@click.option(
    "--only", multiple=True, type=click.Choice([rule.name for rule in rules()]), help="May be repeated."
)
def main(only: Sequence[str]) -> None:
    """Break every rule of alerts/ in every way and see that promtool's tests notice."""
    if shutil.which("promtool") is None:
        sys.exit("promtool is not on PATH: run `make tools`")
    began = time.monotonic()
    chosen = [rule for rule in rules() if not only or rule.name in only]
    whole = [rule.name for rule in chosen if not tests_hold(rule, rule.fields)]
    if whole:
        sys.exit(f"the tests of the unchanged rule do not hold: {', '.join(whole)}")
    jobs = [(rule, mutant) for rule in chosen for mutant in mutants(rule.fields)]
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        survived = [job for job, lives in zip(jobs, workers.map(_survives, jobs), strict=True) if lives]
    found = {(rule.name, mutant.change) for rule, mutant in survived}
    listed = {(rule.name, change) for rule in chosen for change in SURVIVORS.get(rule.name, {})}
    for name, change in sorted(found - listed):
        click.echo(f"no test notices: {name}: {change}")
    for name, change in sorted(listed - found):
        click.echo(f"listed as a survivor, but a test notices: {name}: {change}")
    seconds = time.monotonic() - began
    killed = len(jobs) - len(survived)
    click.echo(
        f"{len(chosen)} rules, {len(jobs)} mutants: {killed} killed, {len(survived)} live, "
        f"{len(found - listed)} without a reason ({seconds:.0f} s)"
    )
    sys.exit(1 if found != listed else 0)


def _survives(job: tuple[Rule, Mutant]) -> bool:
    rule, mutant = job
    return tests_hold(rule, mutant.fields)


if __name__ == "__main__":
    main()
