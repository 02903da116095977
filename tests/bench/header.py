"""`python -m tests.bench.header`: what reading a model's header costs; exit 1 where it takes much memory."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import click
import gguf
from rich.console import Console
from rich.table import Table

from kvscope.sources.gguf_header import read_header
from tests.gguf_files import MERGES, VOCABULARY, array, llama, vocabulary, write

MEMORY_WANTED_MB = 20
"""Peak of what Python allocates meanwhile."""
TIMES = 15
GGUF_SHARE = 16
"""gguf reads a vocabulary this much smaller: its time grows with it, and the whole takes a quarter minute."""


@click.command()
def main() -> None:
    """Measure what reading the header of a model with a large vocabulary costs, beside PyPI gguf."""
    click.echo(f"Python {sys.version.split()[0]}, gguf {version('gguf')}, medians of {TIMES}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("header", "bytes", "read", "time", "peak memory"):
        table.add_column(heading)
    with tempfile.TemporaryDirectory(prefix="kvscope-bench-") as temporary:
        directory = Path(temporary)
        peaks = []
        for name, tokens, merges in (
            ("no vocabulary", 0, 0),
            (f"{VOCABULARY} tokens", VOCABULARY, 0),
            (f"{VOCABULARY} tokens, {MERGES} merges", VOCABULARY, MERGES),
        ):
            path = _write(directory / "model.gguf", tokens, merges)
            peaks.append(_peak_megabytes(path))
            table.add_row(
                name,
                f"{path.stat().st_size / 1e6:.1f} MB",
                f"{_read_bytes(path) / 1e6:.1f} MB",
                f"{_milliseconds(lambda path=path: read_header(path)):.2f} ms",
                f"{peaks[-1]:.2f} MB",
            )
        Console(width=None if sys.stdout.isatty() else 160).print(table)
        path = _write(directory / "model.gguf", VOCABULARY // GGUF_SHARE, MERGES // GGUF_SHARE)
        ours = _milliseconds(lambda: read_header(path))
        theirs = _milliseconds(lambda: gguf.GGUFReader(path), 3)
        click.echo(
            f"a {GGUF_SHARE}th of the last: gguf takes {theirs / ours:.0f} times as long"
            f" ({theirs:.0f} ms over {ours:.2f} ms)"
        )
    sys.exit(max(peaks) > MEMORY_WANTED_MB)


def _write(path: Path, tokens: int, merges: int) -> Path:
    keys = vocabulary(tokens, merges) if tokens else ()
    return write(path, llama(*keys, array("llama.attention.head_count_kv", "u32", [8] * 62)))


def _read_bytes(path: Path) -> int:
    """Bytes that this process reads from files meanwhile, as Linux counts them."""
    before = _read_so_far()
    again = _read_so_far() - before
    before = _read_so_far()
    read_header(path)
    return _read_so_far() - before - again


def _read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _peak_megabytes(path: Path) -> float:
    tracemalloc.start()
    read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def _milliseconds(work: Callable[[], object], times: int = TIMES) -> float:
    seconds: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1000


if __name__ == "__main__":
    main()
