"""What one look at AMD's GPUs costs, over made trees of /sys and /proc."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from kvscope.sources.amdgpu_processes import LOOKS_BETWEEN_SEARCHES
from kvscope.sources.gpu.amdgpu import open_backend
from kvscope.sources.gpu.backend import GpuOptions

TREE = Path(__file__).parent.parent / "unit/sources/gpu/trees/rx-9070-xt"
CARD = "sys/class/drm/card1/device"
FILES_OF_A_PROCESS = 30
PROCESSES_ON_A_CARD = 2
LOOKS = 10 * LOOKS_BETWEEN_SEARCHES


def seconds_of_a_look(cards: int = 8, processes: int = 200) -> float:
    """Return the mean CPU seconds of one look over that many cards and processes.

    Two processes hold memory of each card, each has 30 open files. Files of a disk stand for those of
    the kernel, whose own work for each is not in it.
    """
    with tempfile.TemporaryDirectory(prefix="kvscope-bench-") as temporary:
        root = Path(temporary)
        _write_tree(root, cards, processes)
        backend = open_backend(GpuOptions(root=root))
        backend.look()  # the first searches every process and reads what does not change
        spent = []
        for _ in range(LOOKS):
            before = time.process_time()
            reading = backend.look()
            spent.append(time.process_time() - before)
    if [len(seen.processes or ()) for seen in reading.gpus] != [PROCESSES_ON_A_CARD] * cards:
        raise AssertionError("the look did not find what was made")
    return statistics.fmean(spent)


def _write_tree(root: Path, cards: int, processes: int) -> None:
    for number in range(cards):
        device = root / f"sys/class/drm/card{number}/device"
        shutil.copytree(TREE / CARD, device)
        uevent = (device / "uevent").read_text().replace("0000:03:00.0", _pci_id(number))
        (device / "uevent").write_text(uevent)
    shutil.copytree(TREE / "proc/2", root / "proc/2", symlinks=True)
    for pid in range(1000, 1000 + processes):
        directory = root / "proc" / str(pid)
        shutil.copytree(TREE / "proc/3200", directory, symlinks=True)
        for file in range(10, 10 + FILES_OF_A_PROCESS):
            (directory / f"fd/{file}").symlink_to("/dev/null")
            (directory / f"fdinfo/{file}").write_text("pos:\t0\n")
    fdinfo = (TREE / "proc/2117/fdinfo/24").read_text()
    for holder in range(cards * PROCESSES_ON_A_CARD):
        directory = root / "proc" / str(1000 + holder)
        (directory / "fd/99").symlink_to("/dev/dri/renderD128")
        text = fdinfo.replace("0000:03:00.0", _pci_id(holder % cards))
        (directory / "fdinfo/99").write_text(text.replace("57", str(100 + holder)))


def _pci_id(number: int) -> str:
    return f"0000:{number + 1:02x}:00.0"


def main() -> None:
    for cards, processes in ((1, 200), (8, 200), (8, 500)):
        print(f"{cards} cards, {processes} processes: {seconds_of_a_look(cards, processes) * 1e3:.2f} ms CPU")


if __name__ == "__main__":
    main()
