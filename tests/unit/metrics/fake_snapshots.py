"""Snapshots with a value for everything, and with almost none."""

from __future__ import annotations

from dataclasses import replace

from kvscope.observed.gpu import GpuSeen
from kvscope.observed.host import HostSeen, ProcessMemory
from kvscope.observed.server import Phase, ServerState, Source
from kvscope.snapshot import (
    EvictionCount,
    GpuBox,
    HistogramCounts,
    MachineBox,
    ModelCounts,
    ServerBox,
    SlotBox,
    SlotCounts,
    Snapshot,
    SourceBox,
    TierBox,
)

FIRST_LOOK = 1_700_000_000.25
REASONS = ("takeover", "diverged", "idle_clear", "context_shift", "erase", "sleep", "restart", "unknown")
BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


def full_slot(number: int) -> SlotBox:
    return SlotBox(
        id=number,
        context_tokens=3000 + number,
        context_limit_tokens=16384,
        phase=Phase.PREFILL if number == 0 else Phase.IDLE,
        phase_started_at=FIRST_LOOK + 60,
        prefill_tokens=512 if number == 0 else None,
        last_prefill_seconds=1.5,
        last_prompt_tokens={"computed": 482, "unknown": 1730},
        last_used_at=FIRST_LOOK + 59.5,
        lru_rank=number or None,
        kv_bytes=(3000 + number) * 4096,
    )


def full_counts(model: str | None, slots: int, created_at: float = FIRST_LOOK) -> ModelCounts:
    return ModelCounts(
        model=model,
        created_at=created_at,
        slots={
            number: SlotCounts(
                phase_seconds={Phase.IDLE: 100.5, Phase.PREFILL: 7.25, Phase.DECODE: 30.0},
                prompt_tokens={"computed": 1000 + number, "unknown": 2000},
                generated_tokens=333,
                evictions=dict.fromkeys(REASONS, 0) | {"takeover": 2},
            )
            for number in range(slots)
        },
        requests={"ok": 9, "cancelled": 0, "failed": 0, "unknown": 1},
        observations={"exact": 8, "apportioned": 2},
        evictions={("slot", reason, "unknown"): EvictionCount() for reason in REASONS}
        | {("slot", "takeover", "unknown"): EvictionCount(2, 3060)},
        request_prefill_seconds=HistogramCounts(BOUNDS, (1, 2, *([0] * 12), 1), 1900.5),
        unattributed_tokens={"computed": 10, "reused": 0, "generated": 5},
        prefill_seconds=7.5,
        decode_seconds=31.25,
        draft_tokens={"accepted": 0, "rejected": 0},
    )


def full_box(name: str = "main", model: str = "tiny", slots: int = 4) -> ServerBox:
    return ServerBox(
        name=name,
        state=ServerState.READY,
        up=True,
        created_at=FIRST_LOOK,
        model=model,
        build="b11549",
        file_type="Q4_K_M",
        architecture="llama",
        metrics_available=True,
        restarts=1,
        started_at=FIRST_LOOK - 1000,
        last_restart_at=FIRST_LOOK + 50,
        slots_total=slots,
        slots_busy=1,
        requests_deferred=0,
        kv_unified=False,
        kv_allocated={("CUDA0", "full"): 16 * 2**20, (None, "recurrent"): 4096},
        kv_bytes_per_token=4096,
        kv_sources={"context": "process", "slots": "default"},
        kv_disagreement=0.001,
        model_bytes=5 * 2**20,
        tiers={"slot": TierBox(held_bytes=4 * 2**20, limit_bytes=16 * 2**20, tokens=1024, limit_tokens=4096)},
        slots=tuple(full_slot(number) for number in range(slots)),
        counts=(full_counts(model, slots),),
        sources={
            source.value: SourceBox(
                up=True,
                failures=0,
                last_success_at=FIRST_LOOK + 60,
                duration_seconds=0.004,
                interval_seconds=2.0,
            )
            for source in Source
        },
    )


def full_snapshot() -> Snapshot:
    """Two servers, one of which served another model before, and one that was never reached."""
    changed = full_box("changed", "large", slots=2)
    return Snapshot(
        (
            full_box(),
            replace(changed, counts=(full_counts("small", 4), full_counts("large", 2, FIRST_LOOK + 500))),
            unreachable_box(),
        ),
        full_machine(),
    )


def full_machine() -> MachineBox:
    """A card with everything, and one that is lost."""
    seen = GpuSeen(
        gpu="0",
        uuid="GPU-1",
        name="RTX 4090",
        vendor="nvidia",
        driver="580.65",
        pci_id="0000:01:00.0",
        memory_total_bytes=24 * 2**30,
        memory_used_bytes=20 * 2**30,
        memory_free_bytes=3 * 2**30,
        memory_reserved_bytes=2**30,
        gtt_total_bytes=8 * 2**30,
        gtt_used_bytes=2**20,
        utilization_ratio=0.5,
        memory_bandwidth_utilization_ratio=0.25,
        power_watts=300.0,
        power_limit_watts=450.0,
        temperature_celsius=61.0,
        clocks_hertz={"graphics": 2_500_000_000},
        pcie_bytes_per_second={"rx": 1e6, "tx": 2e6},
        throttled={"power": True, "thermal": False, "other": False},
    )
    return MachineBox(
        created_at=FIRST_LOOK,
        gpus=(
            GpuBox(
                gpu="0",
                seen=seen,
                budget={
                    ("weights", "main"): 14 * 2**30,
                    ("free", None): 3 * 2**30,
                    ("reserved", None): 2**30,
                },
                server_bytes={"main": 18 * 2**30},
                process_bytes={"llama-server": 18 * 2**30, "firefox": 2 * 2**30},
                energy_joules=1234.5,
                errors={"ecc_corrected": 1, "xid": 0},
            ),
            GpuBox(gpu="1", energy_joules=99.0),
        ),
        host=HostSeen(total_bytes=64 * 2**30, available_bytes=32 * 2**30, swap_used_bytes=0),
        pressure_seconds={"some": 1.5, "full": 0.25},
        server_memory={"main": ProcessMemory(2**30, 2**20, 0)},
        sources={source: SourceBox(True, 0, FIRST_LOOK + 60, 0.01, 2.0) for source in ("gpu", "host")},
    )


def unreachable_box() -> ServerBox:
    """What is known of a server that never answered."""
    return ServerBox("far", ServerState.UNREACHABLE, up=False, created_at=FIRST_LOOK)
