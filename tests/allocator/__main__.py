"""Compares kvscope's figures with the real llama.cpp's, on headers and settings varied at random.

`python -m tests.allocator --seed 1 --cases 500 [--architecture gemma3]`; ends with 1 where they disagree.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from random import Random
from typing import Any

import click

from tests.allocator.allocator import Allocator, disagreements
from tests.allocator.variations import variation
from tests.unit.tracking.kv_cases import SHARED_CASES, read_cases


def cases_by_architecture() -> dict[str, list[dict[str, Any]]]:
    """Return the shared cases to vary; those of public models are too large to load by the hundred."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in read_cases(SHARED_CASES):
        if not case["variant"].startswith("public:"):
            found[case["arch"]].append(case)
    return found


def variations(seed: int, count: int, only: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield requests, the architectures in turn; the same seed gives the same ones."""
    random = Random(seed)
    by_architecture = cases_by_architecture()
    names = [name for name in by_architecture if not only or name in only]
    for number in range(count):
        yield variation(random.choice(by_architecture[names[number % len(names)]]), random)


@click.command()
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--cases", type=int, default=300, show_default=True)
@click.option("--architecture", "only", multiple=True, help="Only this one; may be given several times.")
@click.option("--show", type=int, default=10, show_default=True, help="How many disagreements are shown.")
@click.option("--full", is_flag=True, help="With the whole header of each.")
def main(seed: int, cases: int, only: tuple[str, ...], show: int, full: bool) -> None:
    """Hunt for figures that the real llama.cpp does not share."""
    outcomes: Counter[str] = Counter()
    measured: Counter[str] = Counter()
    refused: dict[str, str] = {}
    with Allocator() as allocator:
        for request in variations(seed, cases, only):
            name = request["gguf_metadata"]["general.architecture"]
            truth = allocator.ask(request)
            wrong = disagreements(request, truth)
            outcome = (
                "wrong"
                if wrong
                else "whole"
                if "total" in truth and "decode" not in truth
                else "allocation"
                if "total" in truth
                else "lines"
                if truth["caches"]
                else "refused"
            )
            outcomes[outcome] += 1
            if outcome in ("refused",):
                refused.setdefault(name, truth.get("refused", "died"))
            else:
                measured[name] += 1
            if wrong and show:
                show -= 1
                click.echo(f"{name} {request['settings']}")
                for line in wrong[:5]:
                    click.echo(f"    {line}")
                if full:
                    click.echo(json.dumps(request["gguf_metadata"]))
    never = sorted(set(refused) - set(measured))
    click.echo(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    for name in never:
        click.echo(f"never measured: {name}: {refused[name]}")
    if outcomes["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
