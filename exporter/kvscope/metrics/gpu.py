"""Metrics of GPUs: what they hold, for whom, and how hard they work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from kvscope.metrics.family import Family, Kind, Reading, Readings, Value, spread
from kvscope.observed.gpu import GpuSeen
from kvscope.snapshot import GpuBox, Snapshot

GPU = ("gpu",)


def _each_gpu(value: Callable[[GpuBox], Value]) -> Readings:
    """Readings labelled gpu, without a time of creation: what a driver counts began before kvscope did."""
    return lambda snapshot: (
        reading
        for machine in (snapshot.machine,)
        if machine is not None
        for box in machine.gpus
        for reading in spread((box.gpu,), value(box))
    )


def _seen(value: Callable[[GpuSeen], Value]) -> Readings:
    """Readings of a GPU that answers."""
    return _each_gpu(lambda box: None if box.seen is None else value(box.seen))


def _information(snapshot: Snapshot) -> Iterator[Reading]:
    for box in snapshot.machine.gpus if snapshot.machine else ():
        if box.seen is not None:
            seen = box.seen
            yield Reading((box.gpu, seen.uuid, seen.name, seen.vendor, seen.driver), 1)


def _throttled(seen: GpuSeen) -> Mapping[str, float]:
    return {reason: float(active) for reason, active in seen.throttled.items()}


FAMILIES = (
    Family(
        "kvscope_gpu_info",
        Kind.INFO,
        "What the GPU is, always 1.",
        ("gpu", "uuid", "name", "vendor", "driver"),
        "gpu",
        _information,
    ),
    Family(
        "kvscope_gpu_memory_total_bytes",
        Kind.GAUGE,
        "Bytes of memory that the GPU has.",
        GPU,
        "gpu",
        _seen(lambda seen: seen.memory_total_bytes),
    ),
    Family(
        "kvscope_gpu_memory_used_bytes",
        Kind.GAUGE,
        "Memory of the GPU that is in use.",
        GPU,
        "gpu",
        _seen(lambda seen: seen.memory_used_bytes),
    ),
    Family(
        "kvscope_gpu_memory_free_bytes",
        Kind.GAUGE,
        "Memory of the GPU that is free.",
        GPU,
        "gpu",
        _seen(lambda seen: seen.memory_free_bytes),
    ),
    Family(
        "kvscope_gpu_memory_reserved_bytes",
        Kind.GAUGE,
        "Memory of the GPU that driver and firmware keep back.",
        GPU,
        "gpu",
        _seen(lambda seen: seen.memory_reserved_bytes),
    ),
    Family(
        "kvscope_gpu_gtt_total_bytes",
        Kind.GAUGE,
        "System memory that the GPU may map (AMD).",
        GPU,
        "gpu",
        _seen(lambda seen: seen.gtt_total_bytes),
    ),
    Family(
        "kvscope_gpu_gtt_used_bytes",
        Kind.GAUGE,
        "System memory that the GPU has mapped (AMD).",
        GPU,
        "gpu",
        _seen(lambda seen: seen.gtt_used_bytes),
    ),
    Family(
        "kvscope_gpu_memory_by_kind_bytes",
        Kind.GAUGE,
        "Who holds the GPU's memory, in parts that sum to its total (where it is unified, VRAM and GTT).",
        ("gpu", "kind", "server"),
        "gpu; process and model_file or log for a server's parts",
        _each_gpu(lambda box: box.budget),
    ),
    Family(
        "kvscope_gpu_server_memory_bytes",
        Kind.GAUGE,
        "Memory of the GPU that a watched server's process holds.",
        ("gpu", "server"),
        "gpu and process",
        _each_gpu(lambda box: box.server_bytes),
    ),
    Family(
        "kvscope_gpu_process_memory_bytes",
        Kind.GAUGE,
        "Memory of the GPU by program, the ten largest.",
        ("gpu", "process"),
        "gpu",
        _each_gpu(lambda box: box.process_bytes),
    ),
    Family(
        "kvscope_gpu_utilization_ratio",
        Kind.GAUGE,
        "Share of the time in which the GPU worked at all.",
        GPU,
        "gpu",
        _seen(lambda seen: seen.utilization_ratio),
    ),
    Family(
        "kvscope_gpu_memory_bandwidth_utilization_ratio",
        Kind.GAUGE,
        "Share of the time in which the GPU's memory was read or written.",
        GPU,
        "gpu",
        _seen(lambda seen: seen.memory_bandwidth_utilization_ratio),
    ),
    Family(
        "kvscope_gpu_power_watts",
        Kind.GAUGE,
        "Power that the GPU draws.",
        GPU,
        "gpu",
        _seen(lambda seen: seen.power_watts),
    ),
    Family(
        "kvscope_gpu_power_limit_watts",
        Kind.GAUGE,
        "Power that the GPU may draw.",
        GPU,
        "gpu",
        _seen(lambda seen: seen.power_limit_watts),
    ),
    Family(
        "kvscope_gpu_energy_joules_total",
        Kind.COUNTER,
        "Energy that the GPU used, counted by its driver.",
        GPU,
        "gpu",
        _each_gpu(lambda box: box.energy_joules),
    ),
    Family(
        "kvscope_gpu_temperature_celsius",
        Kind.GAUGE,
        "How hot the GPU is, in degrees.",
        GPU,
        "gpu",
        _seen(lambda seen: seen.temperature_celsius),
    ),
    Family(
        "kvscope_gpu_clock_hertz",
        Kind.GAUGE,
        "How fast the GPU's clocks run.",
        ("gpu", "clock"),
        "gpu",
        _seen(lambda seen: seen.clocks_hertz),
    ),
    Family(
        "kvscope_gpu_pcie_bytes_per_second",
        Kind.GAUGE,
        "Bytes a second between host and GPU; only with --gpu-pcie.",
        ("gpu", "direction"),
        "gpu",
        _seen(lambda seen: seen.pcie_bytes_per_second),
    ),
    Family(
        "kvscope_gpu_throttled",
        Kind.GAUGE,
        "Whether the GPU is held back now, by reason.",
        ("gpu", "reason"),
        "gpu",
        _seen(_throttled),
    ),
    Family(
        "kvscope_gpu_errors_total",
        Kind.COUNTER,
        "Errors that the GPU's driver counted.",
        ("gpu", "kind"),
        "gpu",
        _each_gpu(lambda box: box.errors or None),
    ),
)
