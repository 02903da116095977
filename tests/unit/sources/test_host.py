"""The host's memory and pressure, and the memory of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.observed.host import HostSeen, ProcessMemory
from kvscope.sources.host import parse_pressure, parse_status, read_host, read_process_memory

MIB = 1 << 20
# As in Linux Documentation/accounting/psi.rst.
PRESSURE = """some avg10=1.50 avg60=0.40 avg300=0.10 total=2500000
full avg10=0.00 avg60=0.00 avg300=0.00 total=1234
"""


MEMINFO = """MemTotal:       32768000 kB
MemFree:         1024000 kB
MemAvailable:   20480000 kB
Buffers:               0 kB
Cached:          4096000 kB
Active:          4096000 kB
Inactive:        4096000 kB
Shmem:            102400 kB
SwapTotal:       8192000 kB
SwapFree:        6144000 kB
"""


def test_the_hosts_memory_is_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "vmstat").write_text("pswpin 0\npswpout 0\n")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert read_host(tmp_path) == HostSeen(
        total_bytes=32_768_000 * 1024, available_bytes=20_480_000 * 1024, swap_used_bytes=2_048_000 * 1024
    )


def test_pressure_is_told_in_seconds_since_boot(tmp_path: Path) -> None:
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/pressure/memory").write_text(PRESSURE)
    assert read_host(tmp_path).pressure_seconds == {"some": 2.5, "full": 0.001234}


def test_a_kernel_without_pressure_figures_leaves_them_out_and_nothing_else(tmp_path: Path) -> None:
    seen = read_host(tmp_path)
    assert seen.pressure_seconds is None
    assert seen.total_bytes == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", {"some": 0.0}),
        ("some avg10=0.00 total=many\nfull avg10=0.00 total=7\n", {"full": 7e-6}),
        ("some avg10=0.00 total=" + "9" * 30, None),
        ("", None),
        (None, None),
    ],
)
def test_a_line_that_is_missing_or_no_number_costs_that_figure_only(
    text: str | None, seconds: dict[str, float] | None
) -> None:
    assert parse_pressure(text) == seconds


def test_a_host_that_refuses_to_tell_costs_these_figures_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(psutil, "swap_memory", refuse)
    seen = read_host(tmp_path)
    assert seen.swap_used_bytes is None
    assert seen.total_bytes is not None


HELD = """
import mmap, sys
private = bytearray(b"x") * (48 << 20)
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[at] for at in range(0, len(mapped), 4096))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that holds 48 MiB of its own and has read a mapped file of 32 MiB, as a model is."""
    model = tmp_path / "model"
    model.write_bytes(bytes(range(256)) * (32 * MIB // 256))
    command = [sys.executable, "-c", HELD, str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        yield running
        running.kill()


def test_a_processes_memory_tells_its_own_and_what_is_mapped_from_files(
    program: subprocess.Popen[str],
) -> None:
    memory = read_process_memory(program.pid)
    assert memory.resident_bytes is not None
    assert memory.shared_bytes is not None
    # A bare interpreter with its libraries takes some 10 MiB.
    assert 80 * MIB < memory.resident_bytes < 110 * MIB
    assert 32 * MIB < memory.shared_bytes < 48 * MIB
    assert memory.swapped_bytes is not None


def test_a_process_that_is_not_there_has_no_figures() -> None:
    assert read_process_memory(2**22 + 1) == ProcessMemory()


def test_without_proc_the_resident_part_is_still_told(tmp_path: Path) -> None:
    memory = read_process_memory(os.getpid(), tmp_path)
    assert memory.resident_bytes is not None
    assert memory.resident_bytes > MIB
    assert (memory.shared_bytes, memory.swapped_bytes) == (None, None)


STATUS = """Name:\tllama-server
State:\tS (sleeping)
VmPeak:\t 9000000 kB
VmRSS:\t 3145728 kB
RssAnon:\t 1048576 kB
RssFile:\t 2096128 kB
RssShmem:\t 1024 kB
VmSwap:\t 512 kB
Threads:\t8
"""


def test_shared_is_what_files_and_shared_memory_back() -> None:
    assert parse_status(STATUS) == ProcessMemory(
        resident_bytes=3072 * MIB, shared_bytes=2048 * MIB, swapped_bytes=MIB // 2
    )


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("VmSwap", ProcessMemory(3072 * MIB, 2048 * MIB, None)),
        ("RssFile", ProcessMemory(3072 * MIB, None, MIB // 2)),
        ("VmRSS", ProcessMemory(None, 2048 * MIB, MIB // 2)),
    ],
)
def test_a_line_that_the_kernel_does_not_write_costs_its_figure_only(
    without: str, expected: ProcessMemory
) -> None:
    assert parse_status(STATUS.replace(f"{without}:", "Other:")) == expected


@given(st.text(max_size=200))
def test_no_text_breaks_the_reading(text: str) -> None:
    parse_status(text)
    parse_pressure(text)
