"""The pretend backend: scripted, the same every time, and never to be mistaken for a real card."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.observed.gpu import GpuReading, GpuSeen
from kvscope.sources.allocation_lines import parse_allocation
from kvscope.sources.gpu.backend import BackendMissingError, GpuBackend, GpuOptions
from kvscope.sources.gpu.pretend import (
    PretendBackend,
    built_in_scripts,
    open_backend,
    parse_script,
    read_script,
)
from kvscope.tracking.vram import ServerClaim, ServerLoad, budget, largest_processes, server_sizes_on

MIB = 2**20
RUNNING = {"main": 4711}
HALF_AN_HOUR = range(0, 1830)


class Clock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(script: str | None, pids: Mapping[str, int] = RUNNING) -> tuple[PretendBackend, Clock]:
    clock = Clock()
    return open_backend(GpuOptions(script=script, server_pids=lambda: pids), clock), clock


def readings(script: str | None, seconds: range, pids: Mapping[str, int] = RUNNING) -> dict[int, GpuReading]:
    backend, clock = opened(script, pids)
    seen = {}
    for second in seconds:
        clock.now = 1000.0 + second
        seen[second] = backend.look()
    return seen


def used(gpu: GpuSeen) -> float:
    assert gpu.memory_used_bytes is not None
    assert gpu.memory_total_bytes
    return gpu.memory_used_bytes / gpu.memory_total_bytes


@pytest.mark.parametrize("script", built_in_scripts())
def test_every_card_says_that_it_is_none(script: str) -> None:
    backend: GpuBackend
    backend, _ = opened(script)
    assert backend.name == "pretend"
    gpus = backend.look().gpus
    assert [gpu.gpu for gpu in gpus] == [f"pretend{number}" for number in range(len(gpus))]
    assert {gpu.vendor for gpu in gpus} == {"pretend"}
    assert {gpu.name for gpu in gpus} == {"Pretend GPU (no real card)"}
    # Domain ffff: no PCI bus of a machine.
    assert {(gpu.pci_id or "")[:5] for gpu in gpus} == {"ffff:"}
    backend.close()


def test_the_built_in_scripts() -> None:
    assert built_in_scripts() == ("default", "game", "leak", "lost", "two")
    assert read_script("default") == open_backend(GpuOptions())._script


@pytest.mark.parametrize("script", built_in_scripts())
def test_the_same_second_shows_the_same(script: str) -> None:
    seconds = range(0, 400, 7)
    assert readings(script, seconds) == readings(script, seconds)


@pytest.mark.parametrize("script", built_in_scripts())
def test_figures_of_every_second_can_be_those_of_a_card(script: str) -> None:
    for reading in readings(script, HALF_AN_HOUR).values():
        for gpu in reading.gpus:
            total = (
                (gpu.memory_used_bytes or 0) + (gpu.memory_free_bytes or 0) + (gpu.memory_reserved_bytes or 0)
            )
            assert total == gpu.memory_total_bytes
            assert sum(each.memory_bytes or 0 for each in gpu.processes or ()) == gpu.memory_used_bytes
            assert (gpu.memory_free_bytes or 0) >= 0
            assert all(each.memory_bytes for each in gpu.processes or ())
            assert 0 <= (gpu.utilization_ratio or 0) <= 1
            assert 0 < (gpu.power_watts or 1) <= (gpu.power_limit_watts or 1)


def test_the_plain_script_moves_and_never_squeezes_memory() -> None:
    seen = [reading.gpus[0] for reading in readings(None, HALF_AN_HOUR).values()]
    assert max(used(gpu) for gpu in seen) < 0.8
    three = readings(None, HALF_AN_HOUR, {"main": 1, "second": 2, "third": 3})
    assert max(used(reading.gpus[0]) for reading in three.values()) < 0.8
    for figure in ("utilization_ratio", "power_watts", "temperature_celsius", "memory_used_bytes"):
        assert len({getattr(gpu, figure) for gpu in seen}) > 10
    assert seen[0] != seen[5]


@pytest.mark.parametrize("pids", [RUNNING, {}], ids=["with the server", "without"])
def test_a_game_pushes_memory_over(pids: Mapping[str, int]) -> None:
    seen = {second: reading.gpus[0] for second, reading in readings("game", range(300), pids).items()}
    assert max(used(seen[second]) for second in range(60)) < 0.6
    assert used(seen[120]) > 0.97
    assert next(iter(largest_processes(seen[120]))) == "game"
    assert used(seen[299]) < 0.6


def test_a_leak_fills_the_card_and_its_program_starts_anew() -> None:
    seen = {second: used(reading.gpus[0]) for second, reading in readings("leak", HALF_AN_HOUR).items()}
    assert seen[0] < 0.5
    assert seen[600] < seen[1200] < seen[1799]
    assert seen[1799] > 0.9
    assert seen[1810] < 0.5


def test_a_lost_card_is_gone_and_comes_back_and_the_other_stays() -> None:
    seen = readings("lost", range(0, 100))
    labels = {second: [gpu.gpu for gpu in reading.gpus] for second, reading in seen.items()}
    assert labels[59] == labels[90] == ["pretend0", "pretend1"]
    assert {tuple(labels[second]) for second in range(60, 90)} == {("pretend0",)}
    assert seen[70].problems == ("pretend1: the script took this card away for a while",)
    assert seen[59].problems == seen[90].problems == ()


# What the load lines of default.toml say, added by hand.
WEIGHTS, KV, COMPUTE, REST = 2375.90, 2304.00, 301.75, 412


def test_the_servers_process_holds_what_its_load_lines_say_and_the_budget_finds_it() -> None:
    backend, _ = opened("default")
    reading = backend.look()
    (gpu,) = reading.gpus
    load = ServerLoad(parse_allocation(reading.load_lines["main"]))
    sizes = server_sizes_on(gpu, reading.gpus, 4711, load)
    seen = budget(gpu, [ServerClaim("main", 4711, sizes)])
    assert seen is not None
    assert seen.total_bytes == 24564 * MIB
    figures = {kind: size / MIB for (kind, _), size in seen.parts.items()}
    assert figures == pytest.approx(
        {
            "weights": WEIGHTS,
            "kv": KV,
            "compute": COMPUTE,
            "server_rest": REST,
            "other_processes": 310 + 420,
            "unattributed": 0,
            "reserved": 402,
            "free": 24564 - 402 - 310 - 420 - WEIGHTS - KV - COMPUTE - REST,
        },
        abs=0.01,
    )


def test_one_model_on_two_cards_lies_where_the_log_says_not_in_the_order_of_names() -> None:
    backend, _ = opened("two")
    reading = backend.look()
    load = ServerLoad(parse_allocation(reading.load_lines["main"]))
    first, second = (server_sizes_on(gpu, reading.gpus, 4711, load) for gpu in reading.gpus)
    assert (first.kv, second.kv) == (1088 * MIB, 1216 * MIB)


def test_only_a_server_with_a_real_process_holds_memory() -> None:
    reading = readings("default", range(1), {})[0]
    assert reading.load_lines == {}
    assert [each.name for each in reading.gpus[0].processes or ()] == ["gnome-shell", "firefox"]
    both = readings("default", range(1), {"main": 1, "same process": 1, "other": 2})[0]
    assert [each.pid for each in both.gpus[0].processes or ()] == [1, 2, None, None]
    assert sorted(both.load_lines) == ["main", "other", "same process"]


def test_a_server_that_sleeps_holds_no_more_than_its_programs_rest() -> None:
    options = GpuOptions(server_pids=lambda: {"main": 1, "other": 2}, asleep=lambda: {"main", "gone"})
    (gpu,) = open_backend(options, Clock()).look().gpus
    rest = 412 * MIB
    assert {each.pid: each.memory_bytes for each in gpu.processes or () if each.pid} == {
        1: rest,
        2: pytest.approx(rest + (WEIGHTS + KV + COMPUTE) * MIB),
    }
    sizes = server_sizes_on(gpu, [gpu], 1, ServerLoad(asleep=True))
    shared = budget(gpu, [ServerClaim("main", 1, sizes)])
    assert shared is not None
    assert [shared.bytes_of(kind, "main") for kind in ("kv", "server_rest")] == [0, rest]


CARD = "[[cards]]\nmemory_total_mib = 100\n"
LINES = "\n".join(read_script("default").actors[0].load_lines)  # type: ignore[union-attr]


def test_a_servers_own_part_goes_before_that_of_every_other() -> None:
    other = LINES.replace("2375.90", "1000.00")
    script = CARD.replace("100", "20000") + "".join(
        f"[[actors]]\nserver = '{server}'\nrest_mib = 0\nload_lines = '''{lines}'''\n"
        for server, lines in (("*", LINES), ("main", other))
    )
    options = GpuOptions(server_pids=lambda: {"main": 1, "second": 2})
    backend = PretendBackend(parse_script(script, "own.toml"), options, Clock())
    held = {each.pid: each.memory_bytes for each in backend.look().gpus[0].processes or ()}
    assert held == {1: round((1000 + KV + COMPUTE) * MIB), 2: pytest.approx((WEIGHTS + KV + COMPUTE) * MIB)}


def test_points_are_joined_by_straight_lines_and_repeat() -> None:
    script = CARD + "temperature_celsius = {points = [[10, 20], [20, 40]], repeat_seconds = 30}"
    curve = parse_script(script, "x.toml").cards[0].figures["temperature_celsius"]
    expected = {0: 20, 10: 20, 15: 30, 20: 40, 29: 40, 30: 20, 45: 30}
    assert {second: curve.at(second) for second in expected} == expected


def test_energy_is_the_power_over_time_and_never_goes_back() -> None:
    script = CARD + "power_watts = {points = [[10, 20], [20, 40]], repeat_seconds = 30}"
    backend = PretendBackend(parse_script(script, "x.toml"), GpuOptions(), clock := Clock())
    # 10 s of 20 W, 10 s of 30 W in the mean, 10 s of 40 W; then anew.
    for second, joules in {0: 0, 10: 200, 15: 325, 20: 500, 30: 900, 40: 1100, 60: 1800}.items():
        clock.now = 1000.0 + second
        assert backend.look().gpus[0].energy_joules == pytest.approx(joules)
    for name in built_in_scripts():
        energy = [reading.gpus[0].energy_joules or 0 for reading in readings(name, range(200)).values()]
        assert energy == sorted(set(energy))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("", "cards is missing"),
        ("cards = []", "cards: 0 of them, not 1 to 16"),
        ("cards = 7", "cards is 7, no list of tables"),
        ("cards = [7]", "cards[0] is no table"),
        ("[[cards]]", "cards[0].memory_total_mib is missing"),
        ("[[cards]]\nmemory_total_mib = 'much'", "cards[0].memory_total_mib is 'much', no number"),
        ("[[cards]]\nmemory_total_mib = true", "cards[0].memory_total_mib is True, no number"),
        ("[[cards]]\nmemory_total_mib = -1", "cards[0].memory_total_mib is -1, not between 0 and"),
        ("[[cards]]\nmemory_total_mib = inf", "cards[0].memory_total_mib is inf, not between 0 and"),
        ("[[cards]]\nmemory_total_mib = nan", "cards[0].memory_total_mib is nan, not between 0 and"),
        (f"[[cards]]\nmemory_total_mib = {'9' * 400}", "cards[0].memory_total_mib is 9999"),
        (f"[[cards]]\nmemory_total_mib = {'9' * 5000}", "is no TOML"),
        (CARD + "memory_reserved_mib = 101", "cards[0].memory_reserved_mib is above memory_total_mib"),
        (CARD + "vendor = 'nvidia'", "cards[0].vendor is not known here: memory_total_mib"),
        (CARD + "utilization_percent = 101", "cards[0].utilization_percent is 101, above 100"),
        (CARD + "power_watts = [[5, 1], [5, 2]]", "cards[0].power_watts is [[5, 1], [5, 2]], points that do"),
        (CARD + "power_watts = [1, 2]", "cards[0].power_watts is [1, 2], no list of pairs [second, value]"),
        (CARD + "power_watts = []", "cards[0].power_watts is [], points that do not go on in time"),
        (CARD + "power_watts = {points = 3}", "cards[0].power_watts is {'points': 3}, a table without both"),
        (
            CARD + "power_watts = {points = [[0, 1], [9, 2]], repeat_seconds = 8}",
            "repeat_seconds of 8, before the last point",
        ),
        (CARD + "power_watts = {points = [[0, 1]], repeat_seconds = 0}", "repeat_seconds of 0"),
        (CARD + "away = [[9, 3]]", "cards[0].away is [[9, 3]], a span that ends before it begins"),
        (CARD + "[[actors]]\nmemory_mib = 3", "actors[0].process is missing"),
        (CARD + "[[actors]]\nprocess = ''\nmemory_mib = 3", "actors[0].process is '', no name of 1 to 64"),
        (
            CARD + "[[actors]]\nprocess = 'a'\nmemory_mib = 3\ncard = 1",
            "actors[0].card is 1, there are 1 cards",
        ),
        (CARD + "[[actors]]\nprocess = 'a'\nmemory_mib = 3\ncard = 0.5", "actors[0].card is 0.5, no whole"),
        (CARD + "[[actors]]\nserver = '*'\nrest_mib = 3", "actors[0].load_lines is missing"),
        (
            CARD + "[[actors]]\nserver = '*'\nrest_mib = 3\nload_lines = 'nothing'",
            "actors[0].load_lines tell of no finished load on a card (ffff:00:00.0 to ffff:00:00.0)",
        ),
        ("[[cards]", "is no TOML"),
        (CARD + "[[actors]]\nserver = '*'\nrest_mib = 3\nload_lines = 7", "load_lines is 7, no text"),
        ("a = " + "[" * 5000, "is no TOML"),
    ],
)
def test_a_bad_script_is_one_line_that_names_file_and_key(tmp_path: Path, script: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(script)
    with pytest.raises(BackendMissingError) as raised:
        open_backend(GpuOptions(script=str(path)))
    message = str(raised.value)
    assert message.startswith("pretend script 'mine.toml'")
    assert says in message
    assert "\n" not in message
    assert str(tmp_path) not in message


def test_a_script_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path, content, says in (
        (tmp_path / "gone.toml", None, "'gone.toml' cannot be read (No such file or directory): give one of"),
        (tmp_path, None, "cannot be read (Is a directory)"),
        (tmp_path / "latin.toml", b"a = '\xe9'", "'latin.toml' is no UTF-8 text"),
        (tmp_path / "large.toml", b"#" * 300_000, "'large.toml' is larger than 262144 bytes"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BackendMissingError) as raised:
            open_backend(GpuOptions(script=str(path)))
        assert says in str(raised.value)
    with pytest.raises(BackendMissingError, match="no path"):
        open_backend(GpuOptions(script="a\0b"))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("points", "repeat_seconds", "x")), inner, max_size=2)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ("memory_total_mib", "memory_reserved_mib", "away", "power_watts", "graphics_clock_mhz")
        ),
        values,
    )
)
def test_whatever_a_card_is_said_to_be_it_is_taken_or_refused_in_one_line(card: dict[str, object]) -> None:
    text = "[[cards]]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in card.items())
    refused = None
    try:
        PretendBackend(parse_script(text, "any.toml"), GpuOptions(), Clock()).look()
    except BackendMissingError as problem:
        refused = str(problem)
    assert refused is None or "\n" not in refused


def toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return "'" + "".join(each for each in value if each.isalnum()) + "'"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
        case _:
            return "''" if value is None else repr(value)


def test_a_clock_that_goes_back_shows_the_beginning() -> None:
    backend, clock = opened("game")
    first = backend.look()
    clock.now -= 500
    assert backend.look() == first


def test_without_a_clock_it_runs_by_the_machines_steady_one() -> None:
    backend = open_backend(GpuOptions())
    assert backend._clock is time.monotonic
    assert backend.look().gpus
