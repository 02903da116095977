"""`python -m tests.bench.gpu`: what one look at NVIDIA's GPUs costs, the driver's own work left out."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from kvscope.sources.gpu.backend import GpuOptions
from kvscope.sources.gpu.nvml import open_backend
from tests.nvml import stand_in
from tests.nvml.scripts import MIB, driver, gpu

LOOKS = 500
INTERVAL_SECONDS = 2.0
PROCESSES = 4
"""On each GPU; their names are looked up."""


def seconds_of_a_look(gpus: int = 8) -> float:
    """Return the median CPU seconds of one look at that many GPUs, PCIe throughput left out as by default.

    The stand-in answers at once: what a driver takes for an answer comes on top. Raises CompilerMissingError.
    """
    processes = " ".join(f"{pid}:{500 * MIB}" for pid in range(1, 1 + PROCESSES))
    script = dict(driver(gpus))
    for number in range(gpus):
        script |= gpu(number, f"GPU-{number}", processes)
    with (
        tempfile.TemporaryDirectory(prefix="kvscope-bench-") as temporary,
        stand_in.loaded(stand_in.build(Path(temporary))) as nvml,
    ):
        nvml.script(script)
        backend = open_backend(GpuOptions())
        reading = backend.look()  # the first reads what does not change
        spent = []
        for _ in range(LOOKS):
            before = time.process_time()
            backend.look()
            spent.append(time.process_time() - before)
        backend.close()
    if [len(seen.processes or ()) for seen in reading.gpus] != [PROCESSES] * gpus or reading.problems:
        raise AssertionError("the look did not find what was made")
    return statistics.median(spent)


def main() -> None:
    """Print the CPU time of one look, and its share of a core when looked at as often as by default."""
    print(
        f"Python {sys.version.split()[0]}, nvidia-ml-py {version('nvidia-ml-py')}, medians of {LOOKS} looks"
    )
    for gpus in (1, 8):
        seconds = seconds_of_a_look(gpus)
        share = seconds / INTERVAL_SECONDS
        print(f"{gpus} GPUs: {seconds * 1e3:.2f} ms CPU, {share:.3%} of a core every {INTERVAL_SECONDS:g} s")


if __name__ == "__main__":
    main()
