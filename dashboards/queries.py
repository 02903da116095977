"""Every query that a panel asks, named once.

`<server>`, `<model>`, `<machine>`, `<each>` and `<who>` stand for selectors and labels that differ between a
page about one server and a page about several: see Scope.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and what its series are called.

    instant: asked for now only. table: one row a series, with its labels as columns.
    """

    expression: str
    legend: str = ""
    instant: bool = False
    table: bool = False
    heatmap: bool = False

    def now(self) -> Query:
        """Return the query for now only: a server that is gone has no value then."""
        return replace(self, instant=True)

    def rows(self) -> Query:
        """Return the query as rows of a table, for now only."""
        return replace(self, instant=True, table=True)

    def named(self, legend: str) -> Query:
        """Return the query with another name for its series."""
        return replace(self, legend=legend)


@dataclass(frozen=True, slots=True)
class Scope:
    """What a page is about: what its placeholders stand for.

    each: labels to group by besides the slot; who: what comes before a slot in a legend.
    """

    server: str
    machine: str
    each: str
    who: str

    def resolve(self, text: str) -> str:
        """Return an expression or a legend with its placeholders filled in."""
        for placeholder, value in (
            ("<model>", f'{self.server}, model=~"$model"'),
            ("<server>", self.server),
            ("<machine>", self.machine),
            ("<each>", self.each),
            ("<who>", self.who),
        ):
            text = text.replace(placeholder, value)
        return text


# Slot 0 of two servers must never become one bar: one value each, compared as it stands.
ONE_SERVER = Scope(
    server='job=~"$job", instance="$instance", server="$server"',
    machine='job=~"$job", instance="$instance"',
    each="",
    who="",
)
SEVERAL_SERVERS = Scope(
    server='job=~"$job", instance=~"$instance", server=~"$server"',
    machine='job=~"$job", instance=~"$instance"',
    each="instance, server, ",
    who="{{server}} ",
)

SAME_MODEL = "on (job, instance, server, model)"
SAME_SLOT = "on (job, instance, server, model, slot)"
UNIFIED = "(kvscope_kv_unified{<model>} == 1)"


def sum_by(labels: str, expression: str) -> str:
    """Return the sum of an expression by labels and by what tells servers apart on the page."""
    return f"sum by (<each>{labels}) ({expression})"


def slot_maximum(expression: str) -> str:
    """Return one series a slot; its model and job are dropped."""
    return f"max by (<each>slot) ({expression})"


def counted(metric: str, selector: str = "<model>", window: str = "$__interval") -> str:
    """Return how much a counter rose in a window.

    Steps tile exactly, and one without a second scrape in it has a value too, which increase has not.
    """
    counter = f"{metric}{{{selector}}}"
    if window == "$__interval":
        return f"clamp_min({counter} - {counter} offset $__interval, 0)"
    return f"increase({counter}[{window}])"


def ratio(part: str, whole: str) -> str:
    """Return part by whole; absent where there is no whole."""
    return f"{part} / ({whole} > 0)"


# The server

SERVER_STATE = Query("kvscope_server_state{<server>} == 1", "{{state}}")
REQUESTS_WAITING = Query("sum(kvscope_requests_deferred{<model>})")
SLOTS_BUSY = Query(
    "sum by (server) (avg_over_time(kvscope_slots_busy{<model>}[$__rate_interval]))", "<who>busy"
)
SLOTS_BUSY_NOW = Query(f"max by (<each>model) (kvscope_slots_busy{{<model>}} and {SAME_MODEL} {UNIFIED})")
SOMEBODY_WAITS = Query(
    "sum by (server) (max_over_time(kvscope_requests_deferred{<model>}[$__interval])) > 0", "<who>waiting"
)
RESTARTS = Query("kvscope_server_last_restart_timestamp_seconds{<server>} * 1000", "{{server}}")
SERVER_INFO = Query("max by (server, model, architecture, ftype, build) (kvscope_server_info{<model>})")
SERVER_SLOTS = Query("max by (server, model) (kvscope_slots{<model>})")
SERVER_UNIFIED = Query("max by (server, model) (kvscope_kv_unified{<model>})")
SERVER_METRICS = Query("max by (server) (kvscope_server_metrics_available{<server>})")
SERVER_UP_FOR = Query("max by (server) (time() - kvscope_server_start_time_seconds{<server>})")
SERVER_RESTARTS = Query(
    "round(sum by (server) (increase(kvscope_server_restarts_total{<server>}[$__range])))"
)

# Slots

_HELD = "kvscope_slot_context_tokens{<model>}"
_LIMIT = "kvscope_slot_context_limit_tokens{<model>}"
_POOL_HELD = 'kvscope_tier_tokens{<model>, tier="slot"}'
_POOL_LIMIT = 'kvscope_tier_limit_tokens{<model>, tier="slot"}'


def _named_slot(expression: str) -> str:
    # A bar gauge reads a name that is a number as a value, and shows slot 1 as 100 %.
    return f'label_replace({slot_maximum(expression)}, "name", "#$1", "slot", "(.+)")'


def _named_pool(expression: str) -> str:
    return f'label_replace({expression}, "name", "pool", "", "")'


SLOT_FILL = Query(slot_maximum(ratio(_HELD, _LIMIT)))
SLOT_FILL_SEPARATE = Query(_named_slot(f"{ratio(_HELD, _LIMIT)} unless {SAME_MODEL} {UNIFIED}"))
SLOT_FILL_UNIFIED = Query(_named_slot(f"{ratio(_HELD, _LIMIT)} and {SAME_MODEL} {UNIFIED}"))
POOL_FILL = Query(
    f"max by (<each>tier) ({ratio(_POOL_HELD, _POOL_LIMIT)} and {SAME_MODEL} {UNIFIED})", "pool"
)
POOL_BAR = Query(_named_pool(POOL_FILL.expression))
POOL_TOKENS = Query(f"max by (<each>tier) ({_POOL_HELD} and {SAME_MODEL} {UNIFIED})")
POOL_BYTES = Query(
    f'max by (<each>tier) (kvscope_tier_bytes{{<model>, tier="slot"}} and {SAME_MODEL} {UNIFIED})'
)
SLOT_TOKENS = Query(slot_maximum(_HELD), "<who>slot {{slot}}")
SLOT_LIMIT = Query(slot_maximum(_LIMIT))
SLOT_BYTES = Query(slot_maximum("kvscope_slot_kv_bytes{<model>}"), "<who>slot {{slot}}")
SLOT_PHASE = Query(
    slot_maximum('kvscope_slot_phase{<model>, phase="prefill"}')
    + " + 2 * "
    + slot_maximum('kvscope_slot_phase{<model>, phase="decode"}'),
    "<who>slot {{slot}}",
)
SLOT_RANK = Query(slot_maximum("kvscope_slot_lru_rank{<model>}"))
SLOT_IDLE_FOR = Query(
    slot_maximum("round(clamp_min(time() - kvscope_slot_last_used_timestamp_seconds{<model>}, 0))")
)
NEXT_TO_GO = Query(
    slot_maximum(f"{_HELD} and {SAME_SLOT} (kvscope_slot_lru_rank{{<model>}} == 1)"), "slot {{slot}}"
)
# 0 where it is known that no slot reads; absent where nothing is known.
PREFILL_SO_FAR = Query(
    "max(clamp_min(time() - kvscope_slot_phase_started_timestamp_seconds{<model>}, 0)"
    f' * {SAME_SLOT} kvscope_slot_phase{{<model>, phase="prefill"}})'
)
BEING_READ = Query(
    'sum(kvscope_slot_prefill_tokens{<model>}) or (sum(kvscope_slot_phase{<model>, phase="prefill"}) == 0)'
)
LAST_COMPUTED = Query(slot_maximum('kvscope_slot_last_prompt_tokens{<model>, source="computed"}'))
LAST_REUSED = Query(
    slot_maximum('sum without (source) (kvscope_slot_last_prompt_tokens{<model>, source!="computed"})')
)
LAST_PREFILL = Query(slot_maximum("kvscope_slot_last_prefill_seconds{<model>}"))
SLOT_LOSSES = Query(
    f"round({sum_by('slot', counted('kvscope_slot_evictions_total'))}) > 0", "<who>slot {{slot}}"
)
PHASE_TIME = Query(
    'sum by (phase) (rate(kvscope_slot_phase_seconds_total{<model>, phase!="idle"}[$__rate_interval]))',
    "{{phase}}",
)

# Tokens

_PROMPTS = "kvscope_prompt_tokens_total"
_COMPUTED = '<model>, source="computed"'
_REUSED = '<model>, source=~"slot|unknown"'
_NOT_COMPUTED = '<model>, source!="computed"'


def _share(selector: str, window: str) -> str:
    return ratio(f"sum({counted(_PROMPTS, selector, window)})", f"sum({counted(_PROMPTS, window=window)})")


COMPUTED_SHARE_5M = Query(_share(_COMPUTED, "5m"), "computed")
REUSED_SHARE_5M = Query(_share(_REUSED, "5m"), "reused")
PROMPT_TOKENS_5M = Query(f"round(sum({counted(_PROMPTS, window='5m')}))", "prompts")
GENERATED_5M = Query(f"round(sum({counted('kvscope_generated_tokens_total', window='5m')}))", "answers")
REUSED_SHARE = Query(_share(_NOT_COMPUTED, "$__range"))
COMPUTED_TOKENS = Query(f"round(sum({counted(_PROMPTS, _COMPUTED, '$__range')}))")
REUSED_TOKENS = Query(f"round(sum({counted(_PROMPTS, _NOT_COMPUTED, '$__range')}))")
GENERATED_TOKENS = Query(f"round(sum({counted('kvscope_generated_tokens_total', window='$__range')}))")
COMPUTED_BARS = Query(f"sum({counted(_PROMPTS, _COMPUTED)}) > 0", "computed")
REUSED_BARS = Query(f"sum({counted(_PROMPTS, _REUSED)}) > 0", "reused")
COMPUTED_DOWN = Query(f"-(sum({counted(_PROMPTS, _COMPUTED)}) > 0)", "computed")
GENERATED_BARS = Query(f"sum({counted('kvscope_generated_tokens_total')}) > 0", "generated")
UNATTRIBUTED_BARS = Query(
    f"sum by (source) ({counted('kvscope_unattributed_tokens_total')}) > 0", "{{source}}"
)
OBSERVATIONS = Query(
    f"round(sum by (precision) ({counted('kvscope_observations_total')})) > 0", "{{precision}}"
)
REQUESTS_IN_RANGE = Query(f"round(sum({counted('kvscope_requests_total', window='$__range')}))")

# Evictions

EVICTIONS = Query(f"round(sum({counted('kvscope_evictions_total', window='$__range')}))")
EVICTED_TOKENS = Query(f"round(sum({counted('kvscope_evicted_tokens_total', window='$__range')}))")
EVICTED_TOKENS_24H = Query(f"round(sum({counted('kvscope_evicted_tokens_total', window='24h')}))")
EVICTIONS_BY_REASON = Query(
    f"round(sum by (reason) ({counted('kvscope_evictions_total')})) > 0", "{{reason}}"
)
EVICTED_BARS = Query(f"sum by (kept) ({counted('kvscope_evicted_tokens_total')}) > 0", "{{kept}}")
EVICTED_BY_REASON = Query(
    f"sort_desc(sum by (reason) ({counted('kvscope_evicted_tokens_total', window='$__range')}) > 0)",
    "{{reason}}",
)

# Tiers

TIER_FILL = Query(
    f"max by (<each>tier) ({ratio('kvscope_tier_tokens{<model>}', 'kvscope_tier_limit_tokens{<model>}')})"
)
TIER_BYTES = Query("max by (<each>tier) (kvscope_tier_bytes{<model>})", "<who>{{tier}}")
TIER_LIMIT = Query("max by (<each>tier) (kvscope_tier_limit_bytes{<model>})", "<who>{{tier}} limit")
TIER_TOKENS = Query("max by (<each>tier) (kvscope_tier_tokens{<model>})")
KV_IN_USE = Query(
    ratio(
        'sum(kvscope_tier_bytes{<model>, tier="slot"})', 'sum(kvscope_tier_limit_bytes{<model>, tier="slot"})'
    )
)
ROOM_FOR_TOKENS = Query(f"sum({_POOL_LIMIT} - {_POOL_HELD})")
KV_HELD = Query('sum by (server) (kvscope_tier_bytes{<model>, tier="slot"})', "{{server}}")
KV_ALLOCATED = Query("sum(kvscope_kv_allocated_bytes{<model>})", "allocated")

# Speed


def _speed(tokens: str, seconds: str, window: str) -> str:
    # The server's seconds are also those of tokens that no slot was seen working on.
    source = {_PROMPTS: "computed", _GENERATED: "generated"}[tokens]
    seen = _rate(tokens, _COMPUTED if tokens == _PROMPTS else "<model>", window)
    unseen = _rate("kvscope_unattributed_tokens_total", f'<model>, source="{source}"', window)
    return ratio(f"({seen} + {unseen})", _rate(seconds, "<model>", window))


def _rate(metric: str, selector: str, window: str) -> str:
    return f"sum by (<each>model) (rate({metric}{{{selector}}}[{window}]))"


_GENERATED = "kvscope_generated_tokens_total"
_READING = "kvscope_prefill_seconds_total"
_GENERATING = "kvscope_decode_seconds_total"
PREFILL_SPEED_NOW = Query(f"max({_speed(_PROMPTS, _READING, '5m')})")
DECODE_SPEED_NOW = Query(f"max({_speed(_GENERATED, _GENERATING, '5m')})")
PREFILL_SPEED = Query(_speed(_PROMPTS, _READING, "$__rate_interval"), "<who>prefill")
DECODE_SPEED = Query(_speed(_GENERATED, _GENERATING, "$__rate_interval"), "<who>decode")


def prefill_quantile(quantile: float) -> Query:
    """Return how long prefill took over the last five minutes, at a quantile."""
    # Of no request at all the quantile is not a number, and a panel would print that.
    return Query(
        f"histogram_quantile({quantile},"
        " sum by (le) (rate(kvscope_request_prefill_seconds_bucket{<model>}[5m]))"
        " and on () (sum(rate(kvscope_request_prefill_seconds_count{<model>}[5m])) > 0))",
        f"p{quantile:.0%}".rstrip("%"),
    )


PREFILL_HEATMAP = Query(
    f"sum by (le) ({counted('kvscope_request_prefill_seconds_bucket')})", "{{le}}", heatmap=True
)
_DRAFTS = "kvscope_draft_tokens_total"
_ACCEPTED = '<model>, result="accepted"'
DRAFTS_ACCEPTED = Query(
    ratio(
        f"sum({counted(_DRAFTS, _ACCEPTED, '$__range')})",
        f"sum({counted(_DRAFTS, window='$__range')})",
    )
)
DRAFT_BARS = Query(f"sum by (result) ({counted(_DRAFTS)}) > 0", "{{result}}")

# Memory of the host and of the model


def _host(kind: str) -> str:
    return f'sum(kvscope_host_memory_bytes{{<machine>, kind="{kind}"}})'


HOST_AVAILABLE = Query(_host("available"))
HOST_USED = Query(f"{_host('total')} - {_host('available')}", "used")
HOST_SWAP = Query(_host("swap_used"), "swap used")
HOST_TOTAL = Query(_host("total"), "total")
HOST_PRESSURE = Query(
    "sum by (kind) (rate(kvscope_host_pressure_seconds_total{<machine>}[$__rate_interval]))", "{{kind}}"
)
SERVER_MEMORY = Query("sum by (kind) (kvscope_server_memory_bytes{<server>})", "{{kind}}")
KV_SOURCES = Query("max by (server, setting, source) (kvscope_kv_source_info{<model>})")
KV_ALLOCATIONS = Query("sum by (server, model, device, cache) (kvscope_kv_allocated_bytes{<model>})")
KV_TOTAL = Query("sum by (server, model) (kvscope_kv_allocated_bytes{<model>})")
BYTES_PER_TOKEN = Query("max by (server, model) (kvscope_kv_bytes_per_token{<model>})")
MODEL_BYTES = Query("sum by (server, model) (kvscope_model_bytes{<model>})")

# GPUs


def vram(kind: str, name: str) -> Query:
    """Return the VRAM that one kind of holder has, on all GPUs."""
    held = f'sum(kvscope_gpu_memory_by_kind_bytes{{<machine>, kind="{kind}"}})'
    # Who holds nothing needs no place in a legend; that nothing is free must be seen.
    return Query(held if kind == "free" else f"{held} > 0", name)


VRAM_FREE = Query("sum(kvscope_gpu_memory_free_bytes{<machine>})")
VRAM_OTHERS = Query('sum(kvscope_gpu_memory_by_kind_bytes{<machine>, kind="other_processes"})')
VRAM_BY_KIND = Query("sum by (gpu, kind) (kvscope_gpu_memory_by_kind_bytes{<machine>})")
VRAM_BY_PROCESS = Query(
    "sort_desc(topk(10, max by (process) (kvscope_gpu_process_memory_bytes{<machine>})))", "{{process}}"
)


def gpu_average(metric: str, by: str = "gpu", legend: str = "GPU {{gpu}}") -> Query:
    """Return a figure of each GPU, averaged so that it draws no comb."""
    return Query(f"max by (instance, {by}) (avg_over_time({metric}{{<machine>}}[$__rate_interval]))", legend)


GPU_TEMPERATURE = Query("max(kvscope_gpu_temperature_celsius{<machine>})")
GPU_TEMPERATURES = gpu_average("kvscope_gpu_temperature_celsius")
GPU_POWER = gpu_average("kvscope_gpu_power_watts")
GPU_POWER_LIMIT = Query("max by (instance, gpu) (kvscope_gpu_power_limit_watts{<machine>})", "limit {{gpu}}")
GPU_BUSY = gpu_average("kvscope_gpu_utilization_ratio", legend="compute {{gpu}}")
GPU_BANDWIDTH = gpu_average("kvscope_gpu_memory_bandwidth_utilization_ratio", legend="memory {{gpu}}")
GPU_CLOCKS = gpu_average("kvscope_gpu_clock_hertz", "gpu, clock", "{{clock}} {{gpu}}")
GPU_PCIE = gpu_average("kvscope_gpu_pcie_bytes_per_second", "gpu, direction", "{{direction}} {{gpu}}")
GPU_THROTTLED = Query(
    "max by (instance, gpu, reason) (kvscope_gpu_throttled{<machine>})", "{{gpu}} {{reason}}"
)
GPU_ERRORS = Query(
    f"round(sum by (instance, gpu, kind) ({counted('kvscope_gpu_errors_total', '<machine>')})) > 0",
    "{{gpu}} {{kind}}",
)
GPU_GTT = Query("max by (instance, gpu) (kvscope_gpu_gtt_used_bytes{<machine>})", "GPU {{gpu}}")
GPU_GTT_TOTAL = Query("max by (instance, gpu) (kvscope_gpu_gtt_total_bytes{<machine>})", "total {{gpu}}")
GPU_INFO = Query("max by (instance, gpu, name, vendor, driver) (kvscope_gpu_info{<machine>})")
GPU_TOTAL = Query("max by (instance, gpu) (kvscope_gpu_memory_total_bytes{<machine>})")
GPU_USED = Query("max by (instance, gpu) (kvscope_gpu_memory_used_bytes{<machine>})")

# The exporter

SOURCES_UP = Query("min by (source) (kvscope_source_up{<server>})", "{{source}}")
