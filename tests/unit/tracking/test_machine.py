"""The machine over time: whose GPU memory it is, counters that never go back, readings that age out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.observed.gpu import GpuProcess, GpuReading, GpuSeen
from kvscope.observed.host import HostSeen, ProcessMemory
from kvscope.observed.logged_memory import LoggedCache, LoggedContext, LoggedMemory
from kvscope.snapshot import GpuBox, MachineBox
from kvscope.tracking.machine import (
    MachineHistory,
    MachineLook,
    ServerOnMachine,
    advance,
    box,
    expires_at,
)
from kvscope.tracking.vram import ServerLoad

GIB = 2**30


def card(gpu: str = "0", **more: Any) -> GpuSeen:
    return GpuSeen(
        gpu,
        uuid=more.pop("uuid", f"GPU-{gpu}"),
        vendor="nvidia",
        memory_total_bytes=24 * GIB,
        memory_used_bytes=20 * GIB,
        memory_free_bytes=4 * GIB,
        **more,
    )


class Machine:
    def __init__(self, interval: float = 2.0) -> None:
        self.history = MachineHistory(interval)
        self.now = 100.0

    def see(
        self, *gpus: GpuSeen, servers: tuple[ServerOnMachine, ...] = (), after: float = 2.0
    ) -> MachineBox:
        return self.look("gpu", gpus=GpuReading(gpus), servers=servers, after=after)

    def look(self, source: str, after: float = 2.0, **more: Any) -> MachineBox:
        self.now += after
        look = MachineLook(1e9 + self.now, self.now, source, 0.01, **more)
        self.history = advance(self.history, look)
        return box(self.history, self.now)

    def box_after(self, seconds: float) -> MachineBox:
        return box(self.history, self.now + seconds)


def only(machine: MachineBox) -> GpuBox:
    (gpu,) = machine.gpus
    return gpu


def test_a_servers_memory_is_parted_by_what_its_log_says_it_loaded() -> None:
    cache = LoggedCache("full", 4096, 32, 1, 1, 4 * GIB, devices={"CUDA0": 4 * GIB})
    logged = LoggedMemory(
        LoggedContext(caches=(cache,), model_buffers={"CUDA0": 10 * GIB}, compute_buffers={"CUDA0": GIB})
    )
    processes = (GpuProcess(7, "llama-server", 16 * GIB), GpuProcess(8, "firefox", 2 * GIB))
    shown = only(
        Machine().see(
            card(processes=processes, processes_complete=True),
            servers=(ServerOnMachine("main", 7, ServerLoad(logged=logged)),),
        )
    )
    assert shown.budget == {
        ("weights", "main"): 10 * GIB,
        ("kv", "main"): 4 * GIB,
        ("compute", "main"): GIB,
        ("server_rest", "main"): GIB,
        ("other_processes", None): 2 * GIB,
        ("unattributed", None): 2 * GIB,
        ("free", None): 4 * GIB,
    }
    assert shown.server_bytes == {"main": 16 * GIB}
    assert shown.process_bytes == {"llama-server": 16 * GIB, "firefox": 2 * GIB}


def test_without_a_log_a_servers_memory_stays_together() -> None:
    processes = (GpuProcess(7, "llama-server", 16 * GIB),)
    shown = only(
        Machine().see(card(processes=processes), servers=(ServerOnMachine("main", 7, ServerLoad()),))
    )
    assert shown.budget is not None
    assert shown.budget["server_unsplit", "main"] == 16 * GIB


def test_counters_go_on_when_the_driver_begins_anew() -> None:
    machine = Machine()
    machine.see(card(energy_joules=1000.0, errors={"xid": 2}))
    machine.see(card(energy_joules=1500.0, errors={"xid": 3}))
    shown = only(machine.see(card(energy_joules=40.0, errors={"xid": 0})))
    assert shown.energy_joules == 1540.0
    assert shown.errors == {"xid": 3}
    assert only(machine.see(card(energy_joules=50.0, errors={"xid": 1}))).errors == {"xid": 4}


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=20))
def test_no_counter_ever_goes_back(readings: list[float]) -> None:
    machine = Machine()
    shown = [only(machine.see(card(energy_joules=reading))).energy_joules or 0.0 for reading in readings]
    assert shown == sorted(shown)


def test_a_lost_card_loses_its_readings_and_keeps_its_counters() -> None:
    machine = Machine()
    machine.see(card("0"), card("1", energy_joules=5.0))
    shown = {each.gpu: each for each in machine.see(card("0")).gpus}
    assert shown["0"].seen is not None
    assert shown["1"] == GpuBox("1", energy_joules=5.0)


def test_another_card_under_the_same_label_counts_on_from_where_the_old_one_ended() -> None:
    machine = Machine()
    machine.see(card(energy_joules=100.0))
    machine.see(card(uuid="GPU-new"))
    assert only(machine.see(card(uuid="GPU-new", energy_joules=900.0))).energy_joules == 100.0
    assert only(machine.see(card(uuid="GPU-new", energy_joules=950.0))).energy_joules == 150.0


def test_a_uuid_that_is_unknown_for_a_while_is_no_other_card() -> None:
    machine = Machine()
    shown = [
        only(machine.see(card(uuid=uuid, energy_joules=energy))).energy_joules
        for uuid, energy in ((None, 100.0), ("GPU-a", 110.0), (None, 120.0), ("GPU-a", 130.0))
    ]
    assert shown == [100.0, 110.0, 120.0, 130.0]


def test_readings_age_out_and_counters_stay() -> None:
    machine = Machine()
    machine.see(card(energy_joules=5.0), after=0.0)
    machine.look(
        "host",
        after=0.0,
        host=HostSeen(8 * GIB, GIB, 0, {"some": 1.5}),
        server_memory={"main": ProcessMemory(GIB)},
    )
    fresh, old = machine.box_after(10.0), machine.box_after(10.1)
    assert (only(fresh).seen is None, fresh.host is None) == (False, False)
    assert only(old) == GpuBox("0", energy_joules=5.0)
    assert (old.host, old.server_memory, old.pressure_seconds) == (None, {}, {"some": 1.5})


@pytest.mark.parametrize(("interval", "expected"), [(2.0, 10.0), (5.0, 15.0)])
def test_it_is_known_when_the_next_reading_ages_out(interval: float, expected: float) -> None:
    machine = Machine(interval)
    machine.see(card(), after=0.0)
    assert expires_at(machine.history, machine.now) == machine.now + expected
    assert expires_at(machine.history, machine.now + expected + 1) is None


def test_a_late_driver_is_a_source_that_is_down_and_costs_the_host_nothing() -> None:
    machine = Machine()
    machine.see(card())
    shown = machine.look("gpu", problems=("late",), failed=True)
    assert shown.sources["gpu"].up is False
    assert shown.sources["gpu"].failures == 1
    assert only(shown).seen is not None, "the last reading holds for a while"
    host = HostSeen(8 * GIB, GIB, 0)
    shown = machine.look("host", host=host)
    assert (shown.host, shown.sources["host"].up) == (host, True)


def test_an_unknown_uuid_is_no_other_card() -> None:
    machine = Machine()
    machine.see(card(uuid=None, energy_joules=100.0))
    assert only(machine.see(card(uuid=None, energy_joules=110.0))).energy_joules == 110.0


def test_the_first_look_gives_counters_as_the_driver_has_them() -> None:
    assert only(Machine().see(replace(card(), energy_joules=123.0))).energy_joules == 123.0
