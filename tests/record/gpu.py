"""`python -m tests.record.gpu FOLDER`: on a machine with NVIDIA GPUs, hold the backend to nvidia-smi.

It looks twice and asks `nvidia-smi -q -x` in between, compares the two field by field, and keeps what both
said, without serial numbers and paths. Best with a llama-server that holds memory of every GPU.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from kvscope.observed.gpu import GpuReading, GpuSeen
from kvscope.sources.gpu.backend import BackendMissingError, GpuOptions
from kvscope.sources.gpu.nvml import open_backend

MIB = 2**20
KEPT = {
    *("driver_version", "gpu", "uuid", "product_name", "fb_memory_usage", "utilization", "temperature"),
    *("gpu_power_readings", "power_readings", "clocks", "ecc_errors", "clocks_event_reasons"),
    *("clocks_throttle_reasons", "mig_mode", "mig_devices", "processes"),
}
"""Parts of nvidia-smi's answer that are compared; a recording keeps no other."""

Value = float | bool | str | None


@dataclass(frozen=True)
class Field:
    """A figure that both tell.

    paths: where nvidia-smi has it, the first that is there (drivers differ), each the sum of its parts.
    unit: what one of nvidia-smi's is in ours. slack: how far, in ours, it may lie outside of what our two
    looks saw: nvidia-smi rounds, and some figures move meanwhile.
    """

    name: str
    ours: Callable[[GpuSeen], Value]
    paths: Sequence[str | Sequence[str]]
    unit: float = 1
    slack: float = 0


@dataclass(frozen=True)
class Row:
    """One figure as each of our looks and nvidia-smi told it."""

    gpu: str
    field: str
    ours: tuple[Value, ...]
    theirs: Value
    agrees: bool


def _of(name: str, key: str | None = None) -> Callable[[GpuSeen], Value]:
    def take(seen: GpuSeen) -> Value:
        value: Value = getattr(seen, name) if key is None else getattr(seen, name).get(key)
        return value

    return take


FACTS = {"uuid": "uuid", "name": "product_name"}
MEMORY = tuple(
    Field(f"memory_{part}_bytes", _of(f"memory_{part}_bytes"), [f"fb_memory_usage/{part}"], MIB, 2 * MIB)
    for part in ("total", "reserved", "used", "free")
)
CARD = (
    Field("utilization_ratio", _of("utilization_ratio"), ["utilization/gpu_util"], 0.01, 0.25),
    Field(
        "memory_bandwidth_utilization_ratio",
        _of("memory_bandwidth_utilization_ratio"),
        ["utilization/memory_util"],
        0.01,
        0.25,
    ),
    Field(
        "power_watts",
        _of("power_watts"),
        [
            "gpu_power_readings/average_power_draw",
            "gpu_power_readings/power_draw",
            "gpu_power_readings/instant_power_draw",
            "power_readings/power_draw",
        ],
        slack=30,
    ),
    Field(
        "power_limit_watts",
        _of("power_limit_watts"),
        [
            "gpu_power_readings/current_power_limit",
            "power_readings/enforced_power_limit",
            "power_readings/power_limit",
        ],
        slack=0.01,
    ),
    Field("temperature_celsius", _of("temperature_celsius"), ["temperature/gpu_temp"], slack=2),
    Field("graphics clock", _of("clocks_hertz", "graphics"), ["clocks/graphics_clock"], 10**6, 300e6),
    Field("memory clock", _of("clocks_hertz", "memory"), ["clocks/mem_clock"], 10**6, 300e6),
    Field(
        "ecc_corrected",
        _of("errors", "ecc_corrected"),
        [
            ["ecc_errors/aggregate/sram_correctable", "ecc_errors/aggregate/dram_correctable"],
            "ecc_errors/aggregate/single_bit/total",
        ],
    ),
    Field(
        "ecc_uncorrected",
        _of("errors", "ecc_uncorrected"),
        [
            [
                "ecc_errors/aggregate/sram_uncorrectable_parity",
                "ecc_errors/aggregate/sram_uncorrectable_secded",
                "ecc_errors/aggregate/dram_uncorrectable",
            ],
            ["ecc_errors/aggregate/sram_uncorrectable", "ecc_errors/aggregate/dram_uncorrectable"],
            "ecc_errors/aggregate/double_bit/total",
        ],
    ),
)
THROTTLED = {
    "power": ("sw_power_cap", "hw_power_brake_slowdown"),
    "thermal": ("sw_thermal_slowdown", "hw_thermal_slowdown"),
}


def compare(looks: Sequence[GpuReading], log: str) -> list[Row]:
    """Return every figure that both tell, of the looks around what nvidia-smi said (its XML)."""
    root = ET.fromstring(log)
    told = {}
    for number, card in enumerate(root.iter("gpu")):
        told[str(number)] = card
        for part in card.iterfind("mig_devices/mig_device"):
            told[f"{number}:{part.findtext('index')}"] = part
    rows: list[Row] = []
    for label in dict.fromkeys([*told, *(seen.gpu for look in looks for seen in look.gpus)]):
        seen = [seen for look in looks for seen in look.gpus if seen.gpu == label]
        if label not in told or len(seen) != len(looks):
            rows.append(Row(label, "there", (bool(seen),), label in told, False))
        elif ":" in label:
            rows.extend(_figures(label, seen, told[label], MEMORY))
        else:
            rows.extend(_card(label, seen, told[label], root.findtext("driver_version")))
    return rows


def _card(label: str, seen: Sequence[GpuSeen], card: ET.Element, driver: str | None) -> Iterator[Row]:
    yield _row(label, "driver", [each.driver for each in seen], driver)
    for fact, path in FACTS.items():
        yield _row(label, fact, [getattr(each, fact) for each in seen], card.findtext(path))
    divided = card.findtext("mig_mode/current_mig") == "Enabled"
    if not divided:
        yield _row(label, "pci_id", [each.pci_id for each in seen], _pci_id(card.get("id", "")))
        yield from _figures(label, seen, card, MEMORY)
        yield from _processes(label, seen, card)
    yield from _figures(label, seen, card, CARD)
    for reason, names in THROTTLED.items():
        ours = [each.throttled.get(reason) for each in seen]
        yield _row(label, f"throttled by {reason}", ours, _active(card, names))


def _figures(label: str, seen: Sequence[GpuSeen], told: ET.Element, fields: Sequence[Field]) -> Iterator[Row]:
    for field in fields:
        yield _row(label, field.name, [field.ours(each) for each in seen], _theirs(told, field), field.slack)


def _processes(label: str, seen: Sequence[GpuSeen], card: ET.Element) -> Iterator[Row]:
    theirs = {
        int(process.findtext("pid", "0")): _number(process.findtext("used_memory", ""))
        for process in card.iterfind("processes/process_info")
    }
    looks = [
        {process.pid: process.memory_bytes for process in each.processes or () if process.pid is not None}
        for each in seen
    ]
    for pid in sorted({*theirs, *set.intersection(*map(set, looks))}):
        megabytes = theirs.get(pid)
        held = None if megabytes is None else megabytes * MIB
        yield _row(label, f"memory of process {pid}", [look.get(pid) for look in looks], held, 2 * MIB)


def _theirs(card: ET.Element, field: Field) -> Value:
    for path in field.paths:
        parts = [path] if isinstance(path, str) else path
        numbers = [_number(card.findtext(part, "")) for part in parts]
        if None not in numbers:
            return sum(number or 0 for number in numbers) * field.unit
    return None


def _number(text: str) -> float | None:
    """Return the number before the unit; None for N/A, [Not Supported] and the like."""
    try:
        return float(text.split()[0])
    except (IndexError, ValueError):
        return None


def _active(card: ET.Element, names: Sequence[str]) -> bool | None:
    told = [
        card.findtext(f"clocks_{kind}_reasons/clocks_{kind}_reason_{name}")
        for kind in ("event", "throttle")
        for name in names
    ]
    known = [text for text in told if text in ("Active", "Not Active")]
    return "Active" in known if known else None


def _pci_id(told: str) -> str:
    return told.lower().removeprefix("0000") if len(told) == len("00000000:01:00.0") else told.lower()


def _row(gpu: str, field: str, ours: Sequence[Value], theirs: Value, slack: float = 0) -> Row:
    if isinstance(theirs, bool | str | None) or any(isinstance(each, str | None) for each in ours):
        agrees = theirs in ours
    else:
        numbers = [float(each) for each in ours if each is not None]
        agrees = min(numbers) - slack <= theirs <= max(numbers) + slack
    return Row(gpu, field, tuple(ours), theirs, agrees)


def without_secrets(log: str) -> str:
    """Return nvidia-smi's answer with only what is compared: no serial numbers, no paths of programs."""
    root = ET.fromstring(log)
    for parent in (root, *root.iter("gpu")):
        for child in [child for child in parent if child.tag not in KEPT]:
            parent.remove(child)
    for process in root.iter("process_info"):
        for child in [child for child in process if child.tag not in ("pid", "type", "used_memory")]:
            process.remove(child)
    return ET.tostring(root, encoding="unicode")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Compare the NVML backend with nvidia-smi on this machine, and keep what both said in FOLDER."""
    try:
        backend = open_backend(GpuOptions(pcie_throughput=True))
    except BackendMissingError as error:
        raise click.ClickException(str(error)) from None
    before = backend.look()
    log = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, check=True).stdout
    looks = (before, backend.look())
    backend.close()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvidia-smi.xml").write_text(without_secrets(log))
    kept = json.dumps([dataclasses.asdict(look) for look in looks], indent=1)
    (folder / "looks.json").write_text(f"{kept}\n")
    rows = compare(looks, log)
    for row in rows:
        ours = " to ".join(dict.fromkeys(str(each) for each in row.ours))
        verdict = "same" if row.agrees else "DIFFERS"
        click.echo(f"{verdict:8}GPU {row.gpu:5} {row.field}: {ours}; nvidia-smi: {row.theirs}")
    for problem in dict.fromkeys(problem for look in looks for problem in look.problems):
        click.echo(problem)
    differing = sum(not row.agrees for row in rows)
    click.echo(f"{len(rows)} figures compared, {differing} differ")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
