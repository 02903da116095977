"""AMD's GPUs as trees of /sys and /proc tell them, whole, damaged and changing between two looks."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.observed.gpu import GpuProcess, GpuReading, GpuSeen
from kvscope.sources import amdgpu_processes
from kvscope.sources.amdgpu_processes import LOOKS_BETWEEN_SEARCHES, DrmClient, kfd_gpus, parse_fdinfo
from kvscope.sources.gpu.amdgpu import AmdGpu, open_backend, parse_throttling
from kvscope.sources.gpu.backend import BackendMissingError, GpuOptions

TREES = Path(__file__).parent / "trees"
CARD = "sys/class/drm/card1/device"
APU = "sys/class/drm/card0/device"
HWMON = f"{CARD}/hwmon/hwmon4"
GIB = 1 << 30
MIB = 1 << 20
KIB = 1 << 10


def copied(tree: str, to: Path) -> Path:
    return Path(shutil.copytree(TREES / tree, to / tree, symlinks=True))


@pytest.fixture
def discrete(tmp_path: Path) -> Path:
    return copied("rx-9070-xt", tmp_path)


@pytest.fixture
def apu(tmp_path: Path) -> Path:
    return copied("strix-halo", tmp_path)


def opened(root: Path, **options: Any) -> AmdGpu:
    return open_backend(GpuOptions(root=root, **options))


def only_gpu(reading: GpuReading) -> GpuSeen:
    [seen] = reading.gpus
    return seen


def held(seen: GpuSeen) -> dict[int | None, GpuProcess]:
    assert seen.processes is not None
    return {process.pid: process for process in seen.processes}


def second_card(root: Path, pci_id: str = "0000:83:00.0", number: int = 2) -> Path:
    """Another card of the same kind beside the first."""
    device = root / f"sys/class/drm/card{number}/device"
    shutil.copytree(root / CARD, device)
    uevent = (device / "uevent").read_text().replace("0000:03:00.0", pci_id)
    (device / "uevent").write_text(uevent)
    return device


def process(root: Path, pid: int, name: str, fdinfo: str | None = None, node: str = "renderD129") -> Path:
    """Another process, with one file of a GPU where fdinfo is given."""
    directory = root / "proc" / str(pid)
    for kind in ("fd", "fdinfo"):
        (directory / kind).mkdir(parents=True, exist_ok=True)
    (directory / "comm").write_text(f"{name}\n")
    if fdinfo is not None:
        (directory / "fd/3").symlink_to(f"/dev/dri/{node}")
        (directory / "fdinfo/3").write_text(fdinfo)
    return directory


def client(number: int, vram_kib: int, gtt_kib: int = 0, pci_id: str = "0000:03:00.0") -> str:
    return (
        f"drm-driver:\tamdgpu\ndrm-client-id:\t{number}\ndrm-pdev:\t{pci_id}\n"
        f"drm-memory-vram:\t{vram_kib} KiB\ndrm-memory-gtt: \t{gtt_kib} KiB\n"
    )


# --- whole trees ------------------------------------------------------------------------------------


def test_a_discrete_card_tells_everything_that_its_files_say(discrete: Path) -> None:
    assert opened(discrete).look() == GpuReading(
        gpus=(
            GpuSeen(
                gpu="0",
                uuid="8f3a5c2d71e0b946",
                name="AMD Radeon RX 9070 XT",
                vendor="AMD",
                driver="Linux 6.16.3-arch1-1",
                pci_id="0000:03:00.0",
                memory_total_bytes=16304 * MIB,
                memory_used_bytes=13624 * MIB,
                memory_free_bytes=2680 * MIB,
                gtt_total_bytes=32000 * MIB,
                gtt_used_bytes=256 * MIB,
                unified=False,
                processes=(
                    GpuProcess(1450, "gnome-shell", 384 * MIB, 20 * MIB),
                    GpuProcess(2117, "llama-server", 8 * GIB + 2 * MIB, 20 * MIB),
                    GpuProcess(3001, "llama-server", 4100 * MIB, 8 * MIB),
                ),
                processes_complete=True,
                utilization_ratio=0.97,
                memory_bandwidth_utilization_ratio=0.61,
                power_watts=287.0,
                power_limit_watts=304.0,
                temperature_celsius=58.0,
                clocks_hertz={"graphics": 2_932_000_000, "memory": 1_258_000_000},
            ),
        )
    )


def test_an_apu_is_unified_and_its_memory_lies_in_gtt(apu: Path) -> None:
    assert opened(apu).look() == GpuReading(
        gpus=(
            GpuSeen(
                gpu="0",
                vendor="AMD",
                driver="Linux 6.14.0-29-generic",
                pci_id="0000:c5:00.0",
                memory_total_bytes=512 * MIB,
                memory_used_bytes=384 * MIB,
                memory_free_bytes=128 * MIB,
                gtt_total_bytes=110 * GIB,
                gtt_used_bytes=63 * GIB,
                unified=True,
                processes=(
                    GpuProcess(1300, "kwin_wayland", 256 * MIB, 128 * MIB),
                    GpuProcess(4242, "llama-server", 0, 50 * GIB),
                    GpuProcess(4300, "llama-server", 64 * MIB, 12 * GIB),
                ),
                processes_complete=True,
                utilization_ratio=0.44,
                power_watts=71.0,
                temperature_celsius=63.0,
                clocks_hertz={"graphics": 1_844_000_000, "memory": 1_000_000_000},
            ),
        )
    )


def test_links_in_place_of_folders_as_real_machines_have_them_change_nothing(discrete: Path) -> None:
    whole = opened(TREES / "rx-9070-xt").look()
    bus = discrete / "sys/devices/pci0000:00/0000:03:00.0"
    bus.parent.mkdir(parents=True)
    (discrete / CARD).rename(bus)
    (discrete / CARD).parent.rmdir()
    (bus / "drm/card1").mkdir(parents=True)
    (bus / "drm/card1/device").symlink_to("../../../0000:03:00.0")
    (discrete / "sys/class/drm/card1").symlink_to("../../devices/pci0000:00/0000:03:00.0/drm/card1")
    assert opened(discrete).look() == whole


def test_a_machine_without_a_card_of_this_driver_has_no_such_backend(discrete: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendMissingError, match="amdgpu"):
        opened(tmp_path / "empty")
    shutil.rmtree(discrete / "sys/class/drm/card1")
    with pytest.raises(BackendMissingError, match="amdgpu"):  # another maker's card is there
        opened(discrete)


# --- single fields ----------------------------------------------------------------------------------

FIELDS_OF_FILE = {
    f"{CARD}/unique_id": {"uuid"},
    f"{CARD}/mem_info_vram_total": {"memory_total_bytes", "memory_free_bytes"},
    f"{CARD}/mem_info_vram_used": {"memory_used_bytes", "memory_free_bytes"},
    f"{CARD}/mem_info_gtt_total": {"gtt_total_bytes"},
    f"{CARD}/mem_info_gtt_used": {"gtt_used_bytes"},
    f"{CARD}/gpu_busy_percent": {"utilization_ratio"},
    f"{CARD}/mem_busy_percent": {"memory_bandwidth_utilization_ratio"},
    f"{CARD}/device": {"name"},
    f"{CARD}/revision": {"name"},
    f"{HWMON}/name": {"power_watts", "power_limit_watts", "temperature_celsius"},
    f"{HWMON}/power1_average": {"power_watts"},
    f"{HWMON}/power1_cap": {"power_limit_watts"},
    f"{HWMON}/freq1_input": set(),
    f"{HWMON}/freq2_input": set(),
    f"{CARD}/board_info": set(),
    f"{CARD}/mem_info_vram_vendor": set(),
    f"{CARD}/mem_info_vis_vram_total": set(),
    f"{CARD}/vendor": set(),
    "usr/share/libdrm/amdgpu.ids": {"name"},
    "proc/sys/kernel/osrelease": {"driver"},
}


def without(path: Path) -> None:
    path.unlink()


def text_in_it(path: Path) -> None:
    path.write_text("not available\n")


def nothing_in_it(path: Path) -> None:
    path.write_text("")


def huge_number_in_it(path: Path) -> None:
    path.write_text("9" * 30)


def negative_number_in_it(path: Path) -> None:
    path.write_text("-3")


def binary_in_it(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def folder_of_that_name(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def pipe_nobody_writes_to(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (without, binary_in_it, folder_of_that_name, link_to_itself, pipe_nobody_writes_to, nothing_in_it)
NO_NUMBERS = (text_in_it, huge_number_in_it, negative_number_in_it)
NUMBER_FILES = [
    file
    for file, fields in FIELDS_OF_FILE.items()
    if fields and not file.endswith(("unique_id", "/name", "/device", "/revision", "amdgpu.ids", "osrelease"))
]


@pytest.mark.parametrize(
    ("file", "damage"),
    [(file, damage) for file in FIELDS_OF_FILE for damage in DAMAGES]
    + [(file, damage) for file in NUMBER_FILES for damage in NO_NUMBERS],
)
def test_a_damaged_file_costs_its_own_fields_only(
    discrete: Path, file: str, damage: Callable[[Path], None]
) -> None:
    whole = dataclasses.asdict(only_gpu(opened(discrete).look()))
    damage(discrete / file)
    seen = dataclasses.asdict(only_gpu(opened(discrete).look()))
    lost = FIELDS_OF_FILE[file]
    assert {name for name in whole if seen[name] != whole[name]} == lost
    assert all(seen[name] is None for name in lost)


def test_without_a_sensor_of_the_clock_the_starred_line_of_the_table_counts(discrete: Path) -> None:
    (discrete / HWMON / "freq1_input").unlink()
    (discrete / HWMON / "freq2_input").unlink()
    (discrete / CARD / "pp_dpm_sclk").write_text("S: 19Mhz *\n0: 500Mhz\n1: 3450Mhz\n")
    (discrete / CARD / "pp_dpm_mclk").write_text("0: 96Mhz\n1: 1258Mhz\n")  # none starred
    assert only_gpu(opened(discrete).look()).clocks_hertz == {"graphics": 19_000_000}


def test_an_empty_id_and_a_name_that_is_no_name_are_left_out(discrete: Path) -> None:
    (discrete / CARD / "unique_id").write_text("0000000000000000\n")
    (discrete / CARD / "product_name").write_text("x" * 1000)
    seen = only_gpu(opened(discrete).look())
    assert (seen.uuid, seen.name) == (None, "AMD Radeon RX 9070 XT")


def test_power_and_temperature_come_from_the_second_file_where_only_that_is_there(discrete: Path) -> None:
    (discrete / HWMON / "power1_average").rename(discrete / HWMON / "power1_input")
    (discrete / HWMON / "temp1_input").unlink()
    seen = only_gpu(opened(discrete).look())
    assert (seen.power_watts, seen.temperature_celsius) == (287.0, 81.0)


def test_more_than_a_hundred_percent_is_no_reading(discrete: Path) -> None:
    (discrete / CARD / "gpu_busy_percent").write_text("65535\n")
    assert only_gpu(opened(discrete).look()).utilization_ratio is None


def test_more_used_than_there_is_leaves_no_free_figure(discrete: Path) -> None:
    (discrete / CARD / "mem_info_vram_used").write_text(str(17 * GIB))
    assert only_gpu(opened(discrete).look()).memory_free_bytes is None


def test_energy_and_the_package_version_are_told_where_the_driver_has_them(discrete: Path) -> None:
    (discrete / HWMON / "energy1_input").write_text("123456789\n")
    (discrete / "sys/module/amdgpu").mkdir(parents=True)
    (discrete / "sys/module/amdgpu/version").write_text("6.12.12\n")
    (discrete / CARD / "product_name").write_text("AMD Instinct MI210\n")
    seen = only_gpu(opened(discrete).look())
    assert (seen.energy_joules, seen.driver, seen.name) == (123.456789, "6.12.12", "AMD Instinct MI210")


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("ue: 0\nce: 3\n", {"ecc_corrected": 3, "ecc_uncorrected": 0}),
        ("Query currently inaccessible\n", {}),
        ("ue: many\nce: 3\n", {"ecc_corrected": 3}),
    ],
)
def test_memory_errors_are_counted_where_the_card_counts_them(
    discrete: Path, text: str, errors: dict[str, int]
) -> None:
    (discrete / CARD / "ras").mkdir()
    (discrete / CARD / "ras/umc_err_count").write_text(text)
    assert only_gpu(opened(discrete).look()).errors == errors


def test_throughput_is_read_only_when_asked_for(discrete: Path) -> None:
    (discrete / CARD / "pcie_bw").write_text("1000 250 256\n")
    assert only_gpu(opened(discrete).look()).pcie_bytes_per_second == {}
    seen = only_gpu(opened(discrete, pcie_throughput=True).look())
    assert seen.pcie_bytes_per_second == {"rx": 256_000.0, "tx": 64_000.0}


def test_a_sleeping_card_is_not_woken_up_and_still_tells_its_memory(discrete: Path) -> None:
    (discrete / CARD / "power/runtime_status").write_text("suspended\n")
    awake = only_gpu(opened(TREES / "rx-9070-xt").look())
    seen = only_gpu(opened(discrete).look())
    sensors = ("utilization_ratio", "power_watts", "power_limit_watts", "temperature_celsius")
    assert [getattr(seen, name) for name in sensors] == [None] * 4
    assert seen.clocks_hertz == {}
    assert seen.memory_used_bytes == 13624 * MIB
    assert seen.processes == awake.processes


@pytest.mark.parametrize(
    ("board", "maker", "unified"),
    [
        ("type : cem", "samsung", False),
        (None, "hynix", False),  # before Linux 6.4
        ("type : cem", None, False),
        (None, "unknown", True),  # an APU before Linux 6.8
        (None, None, True),
    ],
)
def test_a_gpu_without_board_and_memory_chips_is_an_apu(
    discrete: Path, board: str | None, maker: str | None, unified: bool
) -> None:
    for file, text in (("board_info", board), ("mem_info_vram_vendor", maker)):
        if text is None:
            (discrete / CARD / file).unlink()
        else:
            (discrete / CARD / file).write_text(f"{text}\n")
    assert only_gpu(opened(discrete).look()).unified is unified


# --- why the clocks are held down -------------------------------------------------------------------


class MetricsV13(ctypes.Structure):
    """struct gpu_metrics_v1_3 of Linux drivers/gpu/drm/amd/include/kgd_pp_interface.h."""

    _fields_ = (
        ("structure_size", ctypes.c_uint16),
        ("format_revision", ctypes.c_uint8),
        ("content_revision", ctypes.c_uint8),
        ("temperatures", ctypes.c_uint16 * 6),
        ("activities", ctypes.c_uint16 * 3),
        ("average_socket_power", ctypes.c_uint16),
        ("energy_accumulator", ctypes.c_uint64),
        ("system_clock_counter", ctypes.c_uint64),
        ("average_clocks", ctypes.c_uint16 * 7),
        ("current_clocks", ctypes.c_uint16 * 7),
        ("throttle_status", ctypes.c_uint32),
        ("current_fan_speed", ctypes.c_uint16),
        ("pcie_link", ctypes.c_uint16 * 2),
        ("padding", ctypes.c_uint16),
        ("activity_accumulators", ctypes.c_uint32 * 2),
        ("temperature_hbm", ctypes.c_uint16 * 4),
        ("firmware_timestamp", ctypes.c_uint64),
        ("voltages", ctypes.c_uint16 * 3),
        ("padding1", ctypes.c_uint16),
        ("indep_throttle_status", ctypes.c_uint64),
    )


class MetricsV22(ctypes.Structure):
    """struct gpu_metrics_v2_2 of the same header."""

    _fields_ = (
        ("structure_size", ctypes.c_uint16),
        ("format_revision", ctypes.c_uint8),
        ("content_revision", ctypes.c_uint8),
        ("temperatures", ctypes.c_uint16 * 12),
        ("activities", ctypes.c_uint16 * 2),
        ("system_clock_counter", ctypes.c_uint64),
        ("powers", ctypes.c_uint16 * 12),
        ("average_clocks", ctypes.c_uint16 * 6),
        ("current_clocks", ctypes.c_uint16 * 6),
        ("current_coreclk", ctypes.c_uint16 * 8),
        ("current_l3clk", ctypes.c_uint16 * 2),
        ("throttle_status", ctypes.c_uint32),
        ("fan_pwm", ctypes.c_uint16),
        ("padding", ctypes.c_uint16 * 3),
        ("indep_throttle_status", ctypes.c_uint64),
    )


def metrics(kind: type[Any], layout: tuple[int, int], status: int, rest: int = 0xFF) -> bytes:
    """A file of that layout; what the card does not fill is all ones (smu_cmn.c)."""
    made = kind.from_buffer_copy(bytes([rest]) * ctypes.sizeof(kind))
    made.structure_size = ctypes.sizeof(kind)
    made.format_revision, made.content_revision = layout
    made.indep_throttle_status = status
    return bytes(made)


# Bits by their names in Linux drivers/gpu/drm/amd/pm/swsmu/inc/amdgpu_smu.h.
PPT0, TDC_GFX, TEMP_HOTSPOT, PROCHOT_GFX, FIT = 0, 16, 36, 47, 57


@pytest.mark.parametrize(("kind", "layout"), [(MetricsV13, (1, 3)), (MetricsV22, (2, 2))])
@pytest.mark.parametrize(
    ("bits", "reasons"),
    [
        ((), set()),
        ((PPT0,), {"power"}),
        ((TDC_GFX,), {"power"}),
        ((TEMP_HOTSPOT,), {"thermal"}),
        ((PROCHOT_GFX, PPT0), {"thermal", "power"}),
        ((FIT,), {"other"}),
    ],
)
def test_throttling_is_told_by_reason(
    discrete: Path, kind: type[Any], layout: tuple[int, int], bits: tuple[int, ...], reasons: set[str]
) -> None:
    content = metrics(kind, layout, sum(1 << bit for bit in bits))
    (discrete / CARD / "gpu_metrics").write_bytes(content)
    throttled = only_gpu(opened(discrete).look()).throttled
    assert set(throttled) == {"power", "thermal", "other"}
    assert {reason for reason, now in throttled.items() if now} == reasons


def test_throttling_is_unknown_where_the_layout_has_none_or_the_card_fills_none() -> None:
    assert parse_throttling(metrics(MetricsV13, (3, 0), 1)) == {}
    assert parse_throttling(metrics(MetricsV13, (1, 4), 1)) == {}
    assert parse_throttling(metrics(MetricsV13, (1, 3), 2**64 - 1)) == {}
    assert parse_throttling(metrics(MetricsV13, (1, 3), 1)[:-1]) == {}
    assert parse_throttling(b"") == {}


@given(st.binary(max_size=200))
def test_no_content_of_the_metrics_file_breaks_a_look(content: bytes) -> None:
    assert set(parse_throttling(content)) <= {"power", "thermal", "other"}


# --- who holds memory -------------------------------------------------------------------------------

OLDEST = "pos:\t0\npdev:\t0000:03:00.0\npasid:\t32770\nvram mem:\t100 kB\ngtt mem:\t20 kB\ncpu mem:\t0 kB\n"
OLD = (
    "pasid:\t32770\ndrm-driver:\tamdgpu\ndrm-pdev:\t0000:03:00.0\ndrm-client-id:\t7\n"
    "drm-memory-vram:\t100 KiB\ndrm-memory-gtt: \t20 KiB\ndrm-memory-cpu: \t0 KiB\n"
)
NEW = (
    "drm-driver:\tamdgpu\ndrm-client-id:\t7\ndrm-pdev:\t0000:03:00.0\ndrm-total-vram:\t900 KiB\n"
    "drm-resident-vram:\t100 KiB\ndrm-resident-gtt:\t20 KiB\ndrm-memory-vram:\t900 KiB\n"
)
WITH_UNITS = "drm-driver: amdgpu\ndrm-client-id: 7\ndrm-pdev: 0000:03:00.0\ndrm-memory-vram: {}\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param(OLDEST, DrmClient("0000:03:00.0", "32770", 102_400, 20_480), id="Linux 5.14"),
        pytest.param(OLD, DrmClient("0000:03:00.0", "7", 102_400, 20_480), id="Linux 5.19"),
        pytest.param(NEW, DrmClient("0000:03:00.0", "7", 102_400, 20_480), id="Linux 6.14"),
        (WITH_UNITS.format("3 MiB"), DrmClient("0000:03:00.0", "7", 3 * MIB)),
        (WITH_UNITS.format("4096"), DrmClient("0000:03:00.0", "7", 4096)),
        (WITH_UNITS.format("0"), DrmClient("0000:03:00.0", "7", 0)),
        (WITH_UNITS.format("many KiB"), DrmClient("0000:03:00.0", "7")),
        (WITH_UNITS.format("-4 KiB"), DrmClient("0000:03:00.0", "7")),
        (WITH_UNITS.format("9007199254740991 MiB"), DrmClient("0000:03:00.0", "7")),
        (OLD.replace("amdgpu", "i915"), None),
        (OLD.replace("drm-pdev:\t0000:03:00.0\n", ""), None),
        (OLD.replace("0000:03:00.0", "../../etc"), None),
        (OLD.replace("drm-client-id:\t7", "drm-client-id:\tseven"), None),
        ("pos:\t0\nflags:\t02\nmnt_id:\t16\nino:\t2082\n", None),
        ("", None),
    ],
)
def test_a_file_of_a_gpu_is_understood_as_each_kernel_writes_it(text: str, found: DrmClient | None) -> None:
    assert parse_fdinfo(text.encode()) == found


@given(st.binary(max_size=400) | st.text(max_size=400).map(str.encode))
def test_no_content_of_fdinfo_breaks_a_look(content: bytes) -> None:
    found = parse_fdinfo(content)
    assert found is None or found.client.isdigit()


def test_a_client_shared_by_processes_counts_once_and_for_the_watched_server(discrete: Path) -> None:
    process(discrete, 5000, "helper", client(57, 8 * MIB))  # the server's own client, inherited
    seen = only_gpu(opened(discrete, server_pids=lambda: {"main": 2117}).look())
    assert held(seen)[2117].memory_bytes == 8 * GIB + 2 * MIB
    assert 5000 not in held(seen)
    assert 710 not in held(seen)  # the login service that opened the device for the desktop


def test_what_one_process_holds_of_two_cards_is_told_apart(discrete: Path) -> None:
    second_card(discrete)
    (discrete / "proc/2117/fd/40").symlink_to("/dev/dri/renderD130")
    (discrete / "proc/2117/fdinfo/40").write_text(client(57, 1024, pci_id="0000:83:00.0"))
    first, second = opened(discrete).look().gpus
    assert held(first)[2117].memory_bytes == 8 * GIB + 2 * MIB
    assert held(second) == {2117: GpuProcess(2117, "llama-server", MIB, 0)}


def test_only_files_of_the_gpus_own_folder_are_looked_into(discrete: Path) -> None:
    (discrete / "proc/3200/fdinfo/0").write_text(client(77, 1024))  # open on /dev/null
    assert 3200 not in held(only_gpu(opened(discrete).look()))


def test_memory_that_kfd_and_the_file_both_tell_counts_once(discrete: Path) -> None:
    # KFD says 4096 MiB, the file 4100 MiB with it.
    assert held(only_gpu(opened(discrete).look()))[3001].memory_bytes == 4100 * MIB


def test_memory_that_only_kfd_tells_counts_even_of_a_process_whose_files_are_out_of_sight(
    discrete: Path,
) -> None:
    shutil.rmtree(discrete / "proc/3001/fd")
    (discrete / "proc/3001/fd").symlink_to("fd")  # cannot be listed
    seen = only_gpu(opened(discrete).look())
    assert held(seen)[3001] == GpuProcess(3001, "llama-server", 4 * GIB, None)
    assert seen.processes_complete is False


def test_on_an_apu_whose_own_share_is_the_larger_kfd_memory_lies_there(apu: Path) -> None:
    (apu / APU / "mem_info_vram_total").write_text(str(96 * GIB))
    (apu / APU / "mem_info_gtt_total").write_text(str(16 * GIB))
    process = held(only_gpu(opened(apu).look()))[4242]
    assert (process.memory_bytes, process.gtt_bytes) == (50 * GIB - 16 * MIB, 16 * MIB)


def test_kfd_numbers_are_led_to_pci_ids(tmp_path: Path) -> None:
    node = tmp_path / "sys/class/kfd/kfd/topology/nodes/1"
    node.mkdir(parents=True)
    (node / "gpu_id").write_text("4711\n")
    # AMD's own example: bus 0xc1, device 2, function 1 in domain 1.
    (node / "properties").write_text(f"simd_count 4\nlocation_id {0xC1 << 8 | 2 << 3 | 1}\ndomain 1\n")
    assert kfd_gpus(tmp_path) == {"4711": "0001:c1:02.1"}


def test_in_a_container_with_numbers_of_its_own_the_look_is_incomplete_and_kfd_numbers_are_not_believed(
    discrete: Path,
) -> None:
    (discrete / "proc/2/comm").write_text("sh\n")
    (discrete / "sys/class/kfd/kfd/proc/3001").rename(discrete / "sys/class/kfd/kfd/proc/3200")
    seen = only_gpu(opened(discrete).look())
    assert seen.processes_complete is False
    assert set(held(seen)) == {1450, 2117, 3001}


def test_without_proc_nothing_is_said_about_processes(discrete: Path) -> None:
    shutil.rmtree(discrete / "proc")
    seen = only_gpu(opened(discrete).look())
    assert (seen.processes, seen.processes_complete) == (None, False)
    assert seen.memory_used_bytes == 13624 * MIB


def test_more_processes_than_are_looked_at_make_the_look_incomplete_but_never_leave_out_a_server(
    discrete: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amdgpu_processes, "MOST_PROCESSES", 2)
    seen = only_gpu(opened(discrete, server_pids=lambda: {"main": 3001}).look())
    assert set(held(seen)) == {3001}
    assert seen.processes_complete is False


def test_a_watched_server_is_found_at_the_next_look_and_others_within_eight(discrete: Path) -> None:
    for pid in (6000, 6001):
        process(discrete, pid, "starting")
    backend = opened(discrete, server_pids=lambda: {"main": 6000})
    backend.look()
    process(discrete, 6000, "llama-server", client(90, 2048))
    process(discrete, 6001, "game", client(91, 1024))
    found = [held(only_gpu(backend.look())) for _ in range(LOOKS_BETWEEN_SEARCHES)]
    assert found[0][6000].memory_bytes == 2 * MIB
    assert found[-1][6001].memory_bytes == MIB


def test_a_process_that_ended_or_closed_the_gpu_holds_nothing_at_the_next_look(discrete: Path) -> None:
    backend = opened(discrete)
    backend.look()
    shutil.rmtree(discrete / "proc/2117")
    (discrete / "proc/1450/fd/14").unlink()
    (discrete / "proc/1450/fdinfo/14").unlink()
    shutil.rmtree(discrete / "proc/710")
    shutil.rmtree(discrete / "sys/class/kfd/kfd/proc/3001")
    seen = only_gpu(backend.look())
    assert set(held(seen)) == {3001}
    assert seen.processes_complete is True


def test_only_names_of_programs_come_out(discrete: Path) -> None:
    for file in ("cmdline", "environ"):
        (discrete / "proc/2117" / file).write_text("canary")
    (discrete / "proc/2117/fd/99").symlink_to("/home/canary/model.gguf")
    (discrete / "proc/2117/fdinfo/99").write_text("canary")
    (discrete / "proc/3001/comm").write_bytes(b"a\x1b[31m\nb\xff" + b"x" * 200)
    reading = opened(discrete).look()
    assert "canary" not in repr(reading)
    name = held(only_gpu(reading))[3001].name
    assert name is not None
    assert name.isprintable()
    assert len(name) <= 64


# --- cards that come and go -------------------------------------------------------------------------


def test_a_card_that_is_gone_is_named_and_the_rest_stays_under_its_own_number(discrete: Path) -> None:
    second_card(discrete)
    backend = opened(discrete)
    first, second = backend.look().gpus
    away = discrete / "card1-away"
    (discrete / "sys/class/drm/card1").rename(away)
    reading = backend.look()
    assert reading.gpus == (second,)
    assert reading.problems == ("amdgpu: GPU 0 (0000:03:00.0) is gone",)
    away.rename(discrete / "sys/class/drm/card1")
    assert backend.look() == GpuReading(gpus=(first, second))


def test_a_card_that_comes_later_takes_no_other_cards_number(discrete: Path) -> None:
    backend = opened(discrete)
    second_card(discrete, "0000:01:00.0", number=5)
    assert {seen.pci_id: seen.gpu for seen in backend.look().gpus} == {
        "0000:01:00.0": "1",
        "0000:03:00.0": "0",
    }


def test_cards_are_numbered_by_their_place_on_the_bus(discrete: Path) -> None:
    second_card(discrete, "0000:01:00.0", number=5)
    assert {seen.pci_id: seen.gpu for seen in opened(discrete).look().gpus} == {
        "0000:01:00.0": "0",
        "0000:03:00.0": "1",
    }


def test_a_card_that_dies_between_two_files_keeps_its_name_and_costs_nobody_else_anything(
    discrete: Path,
) -> None:
    second = second_card(discrete)
    backend = opened(discrete)
    before = backend.look().gpus[0]
    for file in second.rglob("*"):
        if file.is_file() and file.name != "uevent":
            file.unlink()
    reading = backend.look()
    assert reading.gpus[0] == before
    assert reading.gpus[1] == GpuSeen(
        gpu="1",
        uuid="8f3a5c2d71e0b946",
        name="AMD Radeon RX 9070 XT",
        vendor="AMD",
        driver="Linux 6.16.3-arch1-1",
        pci_id="0000:83:00.0",
        processes=(),
        processes_complete=True,
    )
    assert reading.problems == ("amdgpu: GPU 1 (0000:83:00.0) does not tell its memory",)


# --- anything at all in any file --------------------------------------------------------------------

FILES = sorted(
    str(file.relative_to(TREES / "rx-9070-xt"))
    for file in (TREES / "rx-9070-xt").rglob("*")
    if file.is_file() and not file.is_symlink()
)
CONTENTS = (
    st.binary(max_size=300)
    | st.text(max_size=60).map(str.encode)
    | st.integers(-(2**70), 2**70).map(lambda number: str(number).encode())
    | st.sampled_from([b"nan", b"inf", b"1e5", b"0x10", "٣".encode(), b"1\n2\n3", b"\0"])
)


@settings(max_examples=150, deadline=None)
@given(damaged=st.dictionaries(st.sampled_from(FILES), CONTENTS | st.none(), min_size=1, max_size=6))
def test_whatever_stands_in_the_files_a_look_gives_usable_figures_or_none(
    damaged: dict[str, bytes | None],
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = copied("rx-9070-xt", Path(temporary))
        for file, content in damaged.items():
            if content is None:
                (root / file).unlink()
            else:
                (root / file).write_bytes(content)
        reading = AmdGpu(GpuOptions(root=root, pcie_throughput=True)).look()
    for seen in reading.gpus:
        numbers = [
            value
            for field in dataclasses.fields(seen)
            for value in figures(getattr(seen, field.name))
            if not isinstance(value, bool)
        ]
        assert all(math.isfinite(number) and 0 <= number < 2**53 for number in numbers)
        assert all(
            text.isprintable()
            for text in (seen.name, seen.uuid, seen.driver, seen.pci_id)
            if text is not None
        )


def figures(value: object) -> list[float]:
    if isinstance(value, int | float):
        return [value]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, tuple):
        return [
            figure for held in value for figure in (held.memory_bytes, held.gtt_bytes) if figure is not None
        ]
    return []
