"""Metrics that no panel shows, each with the reason; every other one is shown somewhere."""

from __future__ import annotations

NOT_SHOWN = {
    "kvscope_build_info": "a panel of versions answers no question about the cache",
    "kvscope_gpu_energy_joules_total": "power is shown; energy by token comes from the recording rules",
    "kvscope_gpu_memory_reserved_bytes": "a part of kvscope_gpu_memory_by_kind_bytes, which is shown",
    "kvscope_gpu_server_memory_bytes": "the sum of a server's parts in kvscope_gpu_memory_by_kind_bytes",
    "kvscope_kv_disagreement_ratio": "needs the server's log, which is not read yet",
    "kvscope_poll_interval_seconds": "a setting; that a source does not answer is shown",
    "kvscope_server_up": "kvscope_server_state says more; the variables ask it for servers",
    "kvscope_source_duration_seconds": "of kvscope itself; that a source answers is shown",
    "kvscope_source_failures_total": "kvscope_source_up shows the same over time",
    "kvscope_source_last_success_timestamp_seconds": "kvscope_source_up shows the same over time",
}
