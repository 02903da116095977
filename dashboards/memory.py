"""Memory: who holds the VRAM, how much of the KV cache is used, and whether the host is short."""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.builders import common, dashboard
from grafana_foundation_sdk.models.common import BarGaugeNamePlacement
from grafana_foundation_sdk.models.dashboard import FieldColorModeId, GridPos

from dashboards import palette, shared, style
from dashboards import queries as ask
from dashboards.page import Page, Row
from dashboards.style import AnyPanel, at


def _top() -> list[AnyPanel]:
    others = style.stat(
        "Others hold",
        at(4, 0, 4, 4),
        ask.VRAM_OTHERS,
        unit=style.BYTES,
        colour=palette.VRAM["other_processes"][1],
        description="VRAM that programs hold that are no watched server. kvscope_gpu_memory_by_kind_bytes",
    ).no_value("no GPU")
    room = style.stat(
        "Room for tokens",
        at(12, 0, 4, 4),
        ask.ROOM_FOR_TOKENS,
        colour=palette.KV,
        description="Tokens that the slots can take on. kvscope_tier_limit_tokens, kvscope_tier_tokens",
    )
    ram = style.stat(
        "Host RAM free",
        at(16, 0, 4, 4),
        ask.HOST_AVAILABLE,
        unit=style.BYTES,
        description="Memory of the host that programs can still get. kvscope_host_memory_bytes",
    )
    ram.thresholds(
        style.steps(palette.TEXT, (0, palette.BAD), (2**30, palette.WARNING), (4 * 2**30, palette.HEALTHY))
    )
    hot = style.stat(
        "GPU",
        at(20, 0, 4, 4),
        ask.GPU_TEMPERATURE,
        unit="celsius",
        decimals=0,
        description="Temperature of the hottest GPU. kvscope_gpu_temperature_celsius",
    )
    hot.thresholds(style.steps(palette.TEXT, (85, palette.WARNING), (95, palette.BAD))).no_value("no GPU")
    return [
        shared.vram_free(at(0, 0, 4, 4)),
        others,
        shared.kv_in_use(at(8, 0, 4, 4)),
        room,
        ram,
        hot,
    ]


def _vram() -> list[AnyPanel]:
    holders = style.stack(
        "Who holds the VRAM?",
        at(0, 4, 17, 10),
        *[ask.vram(kind, name) for kind, (name, _) in palette.VRAM.items()],
        unit=style.BYTES,
        description="The memory of all GPUs by who holds it: the parts sum to the total."
        " kvscope_gpu_memory_by_kind_bytes",
    ).no_value(shared.NO_GPU)
    style.coloured(holders, dict(palette.VRAM.values()))
    holders.override_by_name(
        "free", style.properties({**style.fixed(palette.NEUTRAL), "custom.fillOpacity": 8})
    )
    programs = style.bar_gauge(
        "Which programs?",
        at(17, 4, 7, 10),
        ask.VRAM_BY_PROCESS,
        unit=style.BYTES,
        colour=palette.VRAM["other_processes"][1],
        description="The programs that hold the most VRAM. kvscope_gpu_process_memory_bytes",
    )
    programs.text(common.VizTextDisplayOptions().title_size(14).value_size(17))
    programs.name_placement(BarGaugeNamePlacement.TOP).show_unfilled(False).no_value(shared.NO_GPU)
    programs.override_by_regexp("/^llama-server/", style.properties(style.fixed(palette.VRAM["weights"][1])))
    return [holders.legend(style.legend_table("lastNotNull", "max")), programs]


def _host() -> list[AnyPanel]:
    kv = style.stack(
        "How full is the KV cache?",
        at(0, 14, 6, 8),
        ask.KV_HELD,
        ask.KV_ALLOCATED,
        unit=style.BYTES,
        description="Bytes that the tokens in each server's slots occupy, and what was allocated for all."
        " kvscope_tier_bytes, kvscope_kv_allocated_bytes",
    )
    kv.color_scheme(dashboard.FieldColor().mode(FieldColorModeId.FIXED).fixed_color(palette.KV))
    style.dashed(kv, "allocated")
    server = style.levels(
        "What RAM does it hold?",
        at(6, 14, 6, 8),
        ask.SERVER_MEMORY,
        unit=style.BYTES,
        description="Memory of the servers' processes: resident, of that shared, and swapped out."
        " kvscope_server_memory_bytes",
    ).no_value("no process is read")
    style.coloured(server, {"resident": palette.HOST, "shared": palette.NEUTRAL, "swapped": palette.BAD})
    host = style.levels(
        "Is the host short of RAM?",
        at(12, 14, 6, 8),
        ask.HOST_USED,
        ask.HOST_SWAP,
        ask.HOST_TOTAL,
        unit=style.BYTES,
        description="Memory and swap of the host in use, and its memory in all. kvscope_host_memory_bytes",
    ).no_value("no host is read")
    style.coloured(host, {"swap used": palette.BAD})
    host.override_by_name("used", style.properties({**style.fixed(palette.HOST), "custom.fillOpacity": 20}))
    waits = style.lines(
        "Does RAM make it wait?",
        at(18, 14, 6, 8),
        ask.HOST_PRESSURE,
        unit=style.SHARE,
        description="Share of the time in which some or all tasks of the host waited for memory."
        " kvscope_host_pressure_seconds_total",
    ).no_value("this kernel does not tell")
    style.coloured(waits, {"some": palette.WARNING, "full": palette.BAD})
    return [kv, server, style.dashed(host, "total"), waits]


def _figures() -> list[AnyPanel]:
    sources = style.table(
        "What do the byte figures rest on?",
        at(0, 22, 24, 4),
        ask.KV_SOURCES,
        description="Where each setting of the context was read: given to kvscope (setting), the server's"
        " process, its /props, or llama.cpp's default. kvscope_kv_source_info",
    )
    sources.with_transformation(style.pivot(column="setting", row="server", value="source"))
    sources.with_transformation(style.columns({"server\\setting": "server"}))
    models = style.table(
        "What does a token cost?",
        at(0, 26, 14, 4),
        ask.KV_TOTAL,
        ask.BYTES_PER_TOKEN,
        ask.MODEL_BYTES,
        description="Bytes allocated for the cache at load, what one more token adds, and the size of the"
        " weights. kvscope_kv_allocated_bytes, kvscope_kv_bytes_per_token, kvscope_model_bytes",
    )
    names = style.value_columns("KV allocated", "a token adds", "weights")
    models.with_transformation(style.columns({"server": "server", "model": "model", **names}))
    for name in names.values():
        style.cells(models, name, unit=style.BYTES)
    caches = style.table(
        "Which caches were allocated?",
        at(14, 26, 10, 4),
        ask.KV_ALLOCATIONS,
        description="Bytes allocated at load by kind of cache and, where it is known, by device."
        " kvscope_kv_allocated_bytes",
    )
    caches.with_transformation(
        style.columns(
            {"server": "server", "cache": "cache", "device": "device", "Value": "allocated"}, "model"
        )
    )
    style.cells(caches, "allocated", unit=style.BYTES)
    return [sources, models, caches]


def _lines_of_gpus(
    title: str,
    place: GridPos,
    *queries: ask.Query,
    unit: str,
    description: str,
    colours: Mapping[str, str],
    absent: str = shared.NO_GPU,
) -> AnyPanel:
    """Colours are of the words that names begin with: after them comes the GPU."""
    panel = style.lines(title, place, *queries, unit=unit, description=description).no_value(absent)
    for word, colour in colours.items():
        panel.override_by_regexp(f"/^{word}/", style.properties(style.fixed(colour)))
    panel.override_by_regexp(
        "/^(limit|total) /",
        style.properties({**style.fixed(palette.BAD), "custom.lineStyle": {"fill": "dash", "dash": [8, 6]}}),
    )
    return panel


# GPU 0, 2, ... and 1, 3, ... in turn.
_EACH_GPU = {r"GPU .*[02468]$": palette.GPUS[0], r"GPU .*[13579]$": palette.GPUS[1]}


def _gpu() -> Row:
    power = _lines_of_gpus(
        "Power against its limit",
        at(0, 31, 8, 7),
        ask.GPU_POWER,
        ask.GPU_POWER_LIMIT,
        unit="watt",
        colours=_EACH_GPU,
        description="Power that each GPU draws, and may draw."
        " kvscope_gpu_power_watts, kvscope_gpu_power_limit_watts",
    )
    temperature = _lines_of_gpus(
        "Temperature",
        at(8, 31, 8, 7),
        ask.GPU_TEMPERATURES,
        unit="celsius",
        colours=_EACH_GPU,
        description="How hot each GPU is. kvscope_gpu_temperature_celsius",
    ).min(None)
    busy = _lines_of_gpus(
        "How busy is it?",
        at(16, 31, 8, 7),
        ask.GPU_BUSY,
        ask.GPU_BANDWIDTH,
        unit=style.SHARE,
        colours=dict(zip(("compute", "memory"), palette.GPUS, strict=True)),
        description="Share of the time in which the GPU worked, and in which its memory was read or written."
        " kvscope_gpu_utilization_ratio, kvscope_gpu_memory_bandwidth_utilization_ratio",
    ).max(1)
    clocks = _lines_of_gpus(
        "Clocks",
        at(0, 38, 8, 7),
        ask.GPU_CLOCKS,
        unit="hertz",
        colours=dict(zip(("graphics", "memory"), palette.GPUS, strict=True)),
        description="How fast the GPU's clocks run. kvscope_gpu_clock_hertz",
    )
    return Row("GPU (needs a GPU that is read)", 30, [power, temperature, busy, clocks, _cards()])


def _cards() -> AnyPanel:
    panel = style.table(
        "Which GPUs are there?",
        at(8, 38, 16, 7),
        ask.GPU_INFO,
        ask.GPU_TOTAL,
        ask.GPU_USED,
        description="Each GPU, its driver, and its memory in all and in use. kvscope_gpu_info,"
        " kvscope_gpu_memory_total_bytes, kvscope_gpu_memory_used_bytes",
    ).no_value(shared.NO_GPU)
    names = {name: name for name in ("name", "vendor", "driver")}
    values = {"Value #B": "memory", "Value #C": "in use"}
    panel.with_transformation(
        style.columns({"instance": "exporter", "gpu": "GPU", **names, **values}, "Value #A")
    )
    style.cells(panel, "exporter", width=150)
    style.cells(panel, "name", width=240)
    for name in values.values():
        style.cells(panel, name, unit=style.BYTES)
    return panel


def _some_gpus() -> Row:
    # A state timeline would be the picture, but cannot say in words of its own that nothing is known.
    throttled = style.levels(
        "Is it throttled?",
        at(0, 46, 6, 7),
        ask.GPU_THROTTLED,
        description="1 while a GPU is held back, by what holds it. kvscope_gpu_throttled",
    ).no_value("this GPU does not tell")
    throttled.max(1).decimals(0).fill_opacity(40)
    for reason, colour in palette.THROTTLED.items():
        throttled.override_by_regexp(f"/ {reason}$/", style.properties(style.fixed(colour)))
    traffic = _lines_of_gpus(
        "PCIe traffic",
        at(6, 46, 6, 7),
        ask.GPU_PCIE,
        unit="Bps",
        colours=dict(zip(("rx", "tx"), palette.GPUS, strict=True)),
        description="Bytes a second to the GPU (rx) and from it (tx). kvscope_gpu_pcie_bytes_per_second",
        absent="only with --gpu-pcie",
    )
    mapped = _lines_of_gpus(
        "System memory that it maps",
        at(12, 46, 6, 7),
        ask.GPU_GTT,
        ask.GPU_GTT_TOTAL,
        unit=style.BYTES,
        colours=_EACH_GPU,
        description="System memory that the GPU has mapped, and may map (AMD)."
        " kvscope_gpu_gtt_used_bytes, kvscope_gpu_gtt_total_bytes",
        absent="only of AMD's",
    )
    errors = style.bars(
        "Did it have errors?",
        at(18, 46, 6, 7),
        ask.GPU_ERRORS,
        step=style.COARSE_STEP,
        description="Errors that the GPU's driver counted in every 30 s. kvscope_gpu_errors_total",
    ).no_value("none")
    errors.override_by_regexp("/./", style.properties(style.fixed(palette.BAD)))
    title = "What only some GPUs tell: throttling, PCIe traffic, mapped memory, errors"
    return Row(title, 45, [throttled, traffic, mapped, errors], folded=True)


PAGE = Page(
    uid="kvscope-memory",
    title="kvscope: Memory",
    description="Who holds the VRAM, how much of the KV cache is used, and whether the host is short of RAM.",
    panels=[*_top(), *_vram(), *_host(), *_figures(), _gpu(), _some_gpus()],
)
