"""Mutants that no test can kill, by rule, and why."""

from __future__ import annotations

from collections.abc import Mapping

_OTHER_SIDE = "both sides are matched on all labels, so the matcher on the other side still selects"

SURVIVORS: Mapping[str, Mapping[str, str]] = {
    "KvPoolNearlyFull": {
        'tier="slot" dropped from kvscope_tier_tokens': _OTHER_SIDE,
        'tier="slot" dropped from kvscope_tier_limit_tokens': _OTHER_SIDE,
    },
    "VramSqueezedByOtherProcess": {
        'kind="other_processes" dropped from kvscope_gpu_memory_by_kind_bytes': _OTHER_SIDE,
    },
    "VramAlmostExhausted": {
        'kind="free" dropped from kvscope_gpu_memory_by_kind_bytes': _OTHER_SIDE,
    },
}
