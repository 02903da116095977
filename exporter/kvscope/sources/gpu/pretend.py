"""GPUs that do not exist: what a script says of them, second by second, for demos, dashboards and tests.

A script is a TOML file. `[[cards]]`: memory_total_mib, memory_reserved_mib and the figures of `_FIGURES`
and `_CLOCKS`; away: spans [from, to] of seconds in which the card is lost. `[[actors]]`: either a process
(its name, card and memory_mib), or a server (a watched server's name, `*` for every other one) with the
load_lines that llama.cpp's log would print: what they allocate on a card, and rest_mib beside it, is what
the server's process holds of it; rest_mib alone while it sleeps. A figure is a number, points [second, value]
with straight lines between them, or {points, repeat_seconds}. Seconds count from the opening of the backend.

Card n is `pretendn`, at PCI id ffff:0n:00.0, where no real card can be.
"""

from __future__ import annotations

import math
import time
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvscope.observed.gpu import GpuProcess, GpuReading, GpuSeen
from kvscope.sources.allocation_lines import parse_allocation
from kvscope.sources.gpu.backend import BackendMissingError, GpuOptions

NAME = "Pretend GPU (no real card)"
VENDOR = "pretend"
MIB = 2**20

_SCRIPTS = "pretend_scripts"
_DEFAULT = "default"
_EVERY_SERVER = "*"
_SERVER_PROGRAM = "llama-server"
_MOST_CARDS = 16
_MOST_BYTES = 256 * 1024
_LARGEST_NUMBER = 1e9
_LONGEST_NAME = 64


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure over time: straight lines between points, level before the first and after the last."""

    points: tuple[tuple[float, float], ...]
    repeat_seconds: float | None = None

    def at(self, second: float) -> float:
        """Return the figure at a second since the start."""
        return self._level(second if self.repeat_seconds is None else second % self.repeat_seconds)

    def until(self, second: float) -> float:
        """Return the figure's sum over time since the start: watts give joules."""
        if self.repeat_seconds is None:
            return self._area(second)
        rounds, rest = divmod(second, self.repeat_seconds)
        return rounds * self._area(self.repeat_seconds) + self._area(rest)

    def _level(self, second: float) -> float:
        after = bisect_right(self.points, second, key=lambda point: point[0])
        if after == 0:
            return self.points[0][1]
        if after == len(self.points):
            return self.points[-1][1]
        (begin, low), (end, high) = self.points[after - 1], self.points[after]
        return low + (high - low) * (second - begin) / (end - begin)

    def _area(self, until: float) -> float:
        corners = [0.0, *(second for second, _ in self.points if 0 < second < until), until]
        return sum(
            (end - begin) * (self._level(begin) + self._level(end)) / 2 for begin, end in pairwise(corners)
        )


@dataclass(frozen=True, slots=True)
class Card:
    """One card of a script. figures and clocks_hertz: by the name that `GpuSeen` has for them."""

    total_bytes: int
    reserved_bytes: int
    figures: Mapping[str, Curve]
    clocks_hertz: Mapping[str, Curve]
    away: tuple[tuple[float, float], ...]

    def is_away(self, second: float) -> bool:
        """Whether the card is lost at a second since the start."""
        return any(begin <= second < end for begin, end in self.away)


@dataclass(frozen=True, slots=True)
class Program:
    """A process of a script that is no watched server."""

    name: str
    card: int
    memory_bytes: Curve


@dataclass(frozen=True, slots=True)
class Server:
    """What a watched server's process holds, by card, and what its log says of its load.

    rest_bytes: what it holds of each of these cards while it sleeps.
    """

    server: str
    load_lines: tuple[str, ...]
    memory_bytes: Mapping[int, int]
    rest_bytes: int


@dataclass(frozen=True, slots=True)
class Script:
    """Cards and who holds their memory, in the order in which they come by it."""

    cards: tuple[Card, ...]
    actors: tuple[Program | Server, ...] = ()


class PretendBackend:
    """Plays a script by a clock that gives seconds."""

    name = "pretend"

    def __init__(self, script: Script, options: GpuOptions, clock: Callable[[], float]) -> None:
        self._script = script
        self._server_pids = options.server_pids
        self._asleep = options.asleep
        self._clock = clock
        self._started = clock()

    def look(self) -> GpuReading:
        """Return what the script says of this second."""
        second = max(0.0, self._clock() - self._started)
        servers = self._servers()
        gpus, problems = [], []
        for number, card in enumerate(self._script.cards):
            if card.is_away(second):
                problems.append(f"{_label(number)}: the script took this card away for a while")
            else:
                gpus.append(self._card(number, card, second, servers))
        lines = {name: actor.load_lines for name, (_, actor) in servers.items()}
        return GpuReading(tuple(gpus), tuple(problems), lines)

    def close(self) -> None:
        """Nothing is held."""

    def _servers(self) -> Mapping[str, tuple[int, Server]]:
        """The watched servers that run and have a part in the script."""
        parts = {actor.server: actor for actor in self._script.actors if isinstance(actor, Server)}
        found = {}
        for name, pid in self._server_pids().items():
            actor = parts.get(name, parts.get(_EVERY_SERVER))
            if actor is not None:
                found[name] = (pid, actor)
        return found

    def _card(
        self, number: int, card: Card, second: float, servers: Mapping[str, tuple[int, Server]]
    ) -> GpuSeen:
        left = card.total_bytes - card.reserved_bytes
        processes = []
        for process in self._processes(number, second, servers):
            # Nobody gets more than there is.
            held = min(process.memory_bytes or 0, left)
            left -= held
            if held:
                processes.append(GpuProcess(process.pid, process.name, held))
        figures: dict[str, Any] = {name: curve.at(second) for name, curve in card.figures.items()}
        power = card.figures.get("power_watts")
        return GpuSeen(
            gpu=_label(number),
            uuid=f"pretend-{number}",
            name=NAME,
            vendor=VENDOR,
            driver=VENDOR,
            pci_id=_pci_id(number),
            memory_total_bytes=card.total_bytes,
            memory_used_bytes=card.total_bytes - card.reserved_bytes - left,
            memory_free_bytes=left,
            memory_reserved_bytes=card.reserved_bytes,
            processes=tuple(processes),
            processes_complete=True,
            energy_joules=None if power is None else power.until(second),
            clocks_hertz={name: round(curve.at(second)) for name, curve in card.clocks_hertz.items()},
            **figures,
        )

    def _processes(
        self, number: int, second: float, servers: Mapping[str, tuple[int, Server]]
    ) -> Sequence[GpuProcess]:
        wanted = []
        asleep = {servers[name][0] for name in self._asleep() if name in servers}
        for actor in self._script.actors:
            if isinstance(actor, Server):
                pids = {pid for pid, each in servers.values() if each is actor}
                size = actor.memory_bytes.get(number, 0)
                rest = min(size, actor.rest_bytes)
                wanted += [
                    GpuProcess(pid, _SERVER_PROGRAM, rest if pid in asleep else size) for pid in sorted(pids)
                ]
            elif actor.card == number:
                wanted.append(GpuProcess(None, actor.name, round(actor.memory_bytes.at(second))))
        return wanted


def open_backend(options: GpuOptions, clock: Callable[[], float] = time.monotonic) -> PretendBackend:
    """Return a backend that plays `options.script`: a built-in script's name, or the path of a file.

    Raises BackendMissingError, naming file and key, for a script that is not there or says nonsense.
    """
    return PretendBackend(read_script(options.script or _DEFAULT), options, clock)


def built_in_scripts() -> tuple[str, ...]:
    """Return the names of the scripts that kvscope carries."""
    folder = files(__package__).joinpath(_SCRIPTS)
    return tuple(sorted(each.name.removesuffix(".toml") for each in folder.iterdir()))


def read_script(name_or_path: str) -> Script:
    """Return a built-in script, or that of a file; raises BackendMissingError in one line."""
    built_in = built_in_scripts()
    if name_or_path in built_in:
        text = files(__package__).joinpath(_SCRIPTS, f"{name_or_path}.toml").read_text(encoding="utf-8")
        return parse_script(text, f"{name_or_path}.toml")
    name = Path(name_or_path).name
    try:
        with Path(name_or_path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else "no path"
        raise BackendMissingError(
            f"pretend script {name!r} cannot be read ({why}): give one of {', '.join(built_in)}, or a file"
        ) from None
    if len(content) > _MOST_BYTES:
        raise BackendMissingError(f"pretend script {name!r} is larger than {_MOST_BYTES} bytes: shorten it")
    try:
        return parse_script(content.decode("utf-8"), name)
    except UnicodeDecodeError:
        raise BackendMissingError(f"pretend script {name!r} is no UTF-8 text: save it as such") from None


def parse_script(text: str, name: str) -> Script:
    """Return the script of a TOML text; raises BackendMissingError that names file and key."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        raise BackendMissingError(f"pretend script {name!r} is no TOML: {_one_line(problem)}") from None
    try:
        return _script(document)
    except _ScriptError as problem:
        raise BackendMissingError(f"pretend script {name!r}: {_one_line(problem)}") from None


class _ScriptError(ValueError):
    """What is wrong with a script, with the key in front."""


_Read = Callable[[Any], Any]
"""From a value to what it says; raises ValueError or TypeError with what is wrong with it."""


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("no number")
    if not 0 <= value <= _LARGEST_NUMBER:
        raise ValueError(f"not between 0 and {_LARGEST_NUMBER:.0f}")
    return float(value)


def _pairs(value: Any, what: str) -> tuple[tuple[float, float], ...]:
    if not isinstance(value, list) or not all(isinstance(each, list) and len(each) == 2 for each in value):
        raise ValueError(f"no list of pairs [{what}]")
    return tuple((_number(first), _number(second)) for first, second in value)


def _curve(value: Any) -> Curve:
    repeat = None
    if isinstance(value, dict):
        if set(value) != {"points", "repeat_seconds"}:
            raise ValueError("a table without both of points and repeat_seconds, or with more")
        repeat = _number(value["repeat_seconds"])
        value = value["points"]
    if isinstance(value, int | float):
        return Curve(((0.0, _number(value)),), None)
    points = _pairs(value, "second, value")
    seconds = [second for second, _ in points]
    if not points or any(later <= earlier for earlier, later in pairwise(seconds)):
        raise ValueError("points that do not go on in time")
    if repeat is not None and (repeat < seconds[-1] or not repeat):
        raise ValueError(f"repeat_seconds of {repeat:g}, before the last point")
    return Curve(points, repeat)


def _scaled(factor: float, most: float = math.inf) -> _Read:
    def read(value: Any) -> Curve:
        curve = _curve(value)
        if max(figure for _, figure in curve.points) > most:
            raise ValueError(f"above {most:g}")
        return Curve(
            tuple((second, figure * factor) for second, figure in curve.points), curve.repeat_seconds
        )

    return read


def _mebibytes(value: Any) -> int:
    return round(_number(value) * MIB)


def _spans(value: Any) -> tuple[tuple[float, float], ...]:
    spans = _pairs(value, "from, to")
    if any(end <= begin for begin, end in spans):
        raise ValueError("a span that ends before it begins")
    return spans


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _LONGEST_NAME:
        raise ValueError(f"no name of 1 to {_LONGEST_NAME} characters")
    return value


def _lines(value: Any) -> tuple[str, ...]:
    if not isinstance(value, str):
        raise TypeError("no text")
    return tuple(value.strip().splitlines())


def _tables(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("no list of tables")
    return value


def _position(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError("no whole number")
    return int(number)


_FIGURES: Mapping[str, tuple[str, _Read]] = {
    "utilization_percent": ("utilization_ratio", _scaled(0.01, 100)),
    "memory_bandwidth_utilization_percent": ("memory_bandwidth_utilization_ratio", _scaled(0.01, 100)),
    "power_watts": ("power_watts", _scaled(1)),
    "power_limit_watts": ("power_limit_watts", _scaled(1)),
    "temperature_celsius": ("temperature_celsius", _scaled(1)),
}
_CLOCKS: Mapping[str, tuple[str, _Read]] = {
    "graphics_clock_mhz": ("graphics", _scaled(1e6)),
    "memory_clock_mhz": ("memory", _scaled(1e6)),
}
_CARD: Mapping[str, _Read] = {
    "memory_total_mib": _mebibytes,
    "memory_reserved_mib": _mebibytes,
    "away": _spans,
    **{key: read for key, (_, read) in (_FIGURES | _CLOCKS).items()},  # type: ignore[operator]
}
_PROGRAM: Mapping[str, _Read] = {"process": _name, "card": _position, "memory_mib": _scaled(MIB)}
_SERVER: Mapping[str, _Read] = {"server": _name, "rest_mib": _mebibytes, "load_lines": _lines}
_SCRIPT: Mapping[str, _Read] = {"cards": _tables, "actors": _tables}


def _script(document: Mapping[str, Any]) -> Script:
    told = _read("", document, _SCRIPT, {"cards"})
    if not 0 < len(told["cards"]) <= _MOST_CARDS:
        raise _ScriptError(f"cards: {len(told['cards'])} of them, not 1 to {_MOST_CARDS}")
    cards = tuple(_card(f"cards[{number}].", table) for number, table in enumerate(told["cards"]))
    actors = tuple(
        _actor(f"actors[{number}].", table, len(cards)) for number, table in enumerate(told.get("actors", ()))
    )
    return Script(cards, actors)


def _read(where: str, table: Any, keys: Mapping[str, _Read], needed: set[str]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise _ScriptError(f"{where.rstrip('.')} is no table")
    for key in (*table, *sorted(needed)):
        if key not in keys:
            raise _ScriptError(f"{where}{key} is not known here: {', '.join(keys)} are")
        if key not in table:
            raise _ScriptError(f"{where}{key} is missing")
    values = {}
    for key, value in table.items():
        try:
            values[key] = keys[key](value)
        except (ValueError, TypeError) as problem:
            raise _ScriptError(f"{where}{key} is {_shown(value)}, {_one_line(problem)}") from None
    return values


def _card(where: str, table: Any) -> Card:
    told = _read(where, table, _CARD, {"memory_total_mib"})
    total, reserved = told["memory_total_mib"], told.get("memory_reserved_mib", 0)
    if reserved > total:
        raise _ScriptError(f"{where}memory_reserved_mib is above memory_total_mib")
    figures = {name: told[key] for key, (name, _) in _FIGURES.items() if key in told}
    clocks = {name: told[key] for key, (name, _) in _CLOCKS.items() if key in told}
    return Card(total, reserved, figures, clocks, told.get("away", ()))


def _actor(where: str, table: Any, cards: int) -> Program | Server:
    if isinstance(table, dict) and "server" in table:
        told = _read(where, table, _SERVER, set(_SERVER))
        sizes = _allocated(told["load_lines"], cards)
        if not sizes:
            raise _ScriptError(
                f"{where}load_lines tell of no finished load on a card ({_pci_id(0)} to {_pci_id(cards - 1)})"
            )
        held = {card: size + told["rest_mib"] for card, size in sizes.items()}
        return Server(told["server"], told["load_lines"], held, told["rest_mib"])
    told = _read(where, table, _PROGRAM, {"process", "memory_mib"})
    card = told.get("card", 0)
    if card >= cards:
        raise _ScriptError(f"{where}card is {card}, there are {cards} cards: count from 0")
    return Program(told["process"], card, told["memory_mib"])


def _allocated(lines: Sequence[str], cards: int) -> Mapping[int, int]:
    """The bytes that load lines allocate on each card that they name."""
    memory = parse_allocation(lines)
    sizes: dict[int, int] = {}
    for context in (memory.main, *memory.drafts):
        if context is None:
            continue
        numbers = {_pci_id(number): number for number in range(cards)}
        places = {device: numbers[pci_id] for device, pci_id in context.devices.items() if pci_id in numbers}
        for buffers in (
            context.model_buffers,
            context.compute_buffers,
            *(cache.devices for cache in context.caches),
        ):
            for device, size in buffers.items():
                if device in places:
                    sizes[places[device]] = sizes.get(places[device], 0) + size
    return sizes


def _label(number: int) -> str:
    return f"pretend{number}"


def _pci_id(number: int) -> str:
    return f"ffff:{number:02x}:00.0"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())
