"""Metrics of memory: what the KV cache was given, what it holds, what a token costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvscope.metrics.family import (
    MODEL,
    SLOT,
    Family,
    Kind,
    Reading,
    Readings,
    each_served_model,
    each_slot,
    spread,
)
from kvscope.snapshot import Snapshot, TierBox

TIER = (*MODEL, "tier")


def _each_tier(value: Callable[[TierBox], float | None]) -> Readings:
    return each_served_model(
        lambda box: {name: known for name, tier in box.tiers.items() if (known := value(tier)) is not None}
    )


def _sources(snapshot: Snapshot) -> Iterator[Reading]:
    for box in snapshot.servers:
        for setting, source in (box.kv_sources or {}).items():
            yield Reading((box.name, box.model, setting, source), 1)


def _server_memory(snapshot: Snapshot) -> Iterator[Reading]:
    for server, memory in snapshot.machine.server_memory.items() if snapshot.machine else ():
        kinds = {
            "resident": memory.resident_bytes,
            "shared": memory.shared_bytes,
            "swapped": memory.swapped_bytes,
        }
        yield from (Reading((server, kind), size) for kind, size in kinds.items() if size is not None)


def _host_memory(snapshot: Snapshot) -> Iterator[Reading]:
    host = snapshot.machine.host if snapshot.machine else None
    if host is None:
        return
    kinds = {
        "total": host.total_bytes,
        "available": host.available_bytes,
        "swap_used": host.swap_used_bytes,
    }
    yield from (Reading((kind,), size) for kind, size in kinds.items() if size is not None)


def _host_pressure(snapshot: Snapshot) -> Iterator[Reading]:
    machine = snapshot.machine
    if machine is not None:
        # The kernel counts since boot: since when is not ours to say.
        yield from spread((), machine.pressure_seconds)


NEEDS = "model_file and process, or settings"

FAMILIES = (
    Family(
        "kvscope_slot_kv_bytes",
        Kind.GAUGE,
        "Bytes of KV cache and recurrent state that the slot's tokens occupy: what its next turn can reuse.",
        SLOT,
        f"slots; {NEEDS}",
        each_slot(lambda slot: slot.kv_bytes),
    ),
    Family(
        "kvscope_kv_allocated_bytes",
        Kind.GAUGE,
        "Bytes that llama.cpp allocated for the cache when it loaded the model, by kind of cache; 0 while "
        "the server sleeps.",
        (*MODEL, "device", "cache"),
        NEEDS,
        each_served_model(lambda box: box.kv_allocated),
    ),
    Family(
        "kvscope_kv_bytes_per_token",
        Kind.GAUGE,
        "Bytes that one more token adds to a sequence that is already longer than every window.",
        MODEL,
        NEEDS,
        each_served_model(lambda box: box.kv_bytes_per_token),
    ),
    Family(
        "kvscope_kv_source_info",
        Kind.INFO,
        "What the byte figures rest on, always 1: each setting of the context and where it was read.",
        (*MODEL, "setting", "source"),
        NEEDS,
        _sources,
    ),
    Family(
        "kvscope_kv_disagreement_ratio",
        Kind.GAUGE,
        "How far the cache that the formula expects is from the one in the server's log, by the log's size.",
        MODEL,
        "log; model_file",
        each_served_model(lambda box: box.kv_disagreement),
    ),
    Family(
        "kvscope_model_bytes",
        Kind.GAUGE,
        "Size of the model's weights: on disk, all parts, without a device.",
        (*MODEL, "device"),
        "model_file",
        each_served_model(lambda box: None if box.model_bytes is None else {None: box.model_bytes}),
    ),
    Family(
        "kvscope_tier_bytes",
        Kind.GAUGE,
        "Bytes that a tier of the cache holds.",
        TIER,
        f"slots; {NEEDS}",
        _each_tier(lambda tier: tier.held_bytes),
    ),
    Family(
        "kvscope_tier_limit_bytes",
        Kind.GAUGE,
        "Bytes that a tier of the cache can hold at most; of the slots, what was allocated.",
        TIER,
        NEEDS,
        _each_tier(lambda tier: tier.limit_bytes),
    ),
    Family(
        "kvscope_tier_tokens",
        Kind.GAUGE,
        "Tokens that a tier of the cache holds.",
        TIER,
        "slots",
        _each_tier(lambda tier: tier.tokens),
    ),
    Family(
        "kvscope_tier_limit_tokens",
        Kind.GAUGE,
        "Tokens that a tier of the cache can hold at most; of the slots, the cells of the pool or pools.",
        TIER,
        NEEDS,
        _each_tier(lambda tier: tier.limit_tokens),
    ),
    Family(
        "kvscope_server_memory_bytes",
        Kind.GAUGE,
        "System memory of the server's process.",
        ("server", "kind"),
        "process and host",
        _server_memory,
    ),
    Family(
        "kvscope_host_memory_bytes",
        Kind.GAUGE,
        "Memory of the host.",
        ("kind",),
        "host",
        _host_memory,
    ),
    Family(
        "kvscope_host_pressure_seconds_total",
        Kind.COUNTER,
        "Time in which some or all tasks of the host waited for memory (as the kernel's PSI has it).",
        ("kind",),
        "host, of a kernel with PSI",
        _host_pressure,
    ),
)
