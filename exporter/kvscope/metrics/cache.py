"""Metrics of what flows through the cache: tokens in, tokens reused, tokens lost."""

from __future__ import annotations

from kvscope.metrics.family import MODEL, SLOT, Family, Kind, each_model_counted, each_slot_counted

FAMILIES = (
    Family(
        "kvscope_requests_total",
        Kind.COUNTER,
        "Tasks that slots finished, by how they ended; a request with n > 1 is n of them.",
        (*MODEL, "outcome"),
        "slots",
        each_model_counted(lambda counts: counts.requests),
    ),
    Family(
        "kvscope_prompt_tokens_total",
        Kind.COUNTER,
        "Prompt tokens by where they came from: computed, or reused from a tier of the cache.",
        (*SLOT, "source"),
        "slots; exact with metrics",
        each_slot_counted(lambda counts: counts.prompt_tokens),
    ),
    Family(
        "kvscope_generated_tokens_total",
        Kind.COUNTER,
        "Tokens that the slot generated.",
        SLOT,
        "slots; exact with metrics",
        each_slot_counted(lambda counts: counts.generated_tokens),
    ),
    Family(
        "kvscope_unattributed_tokens_total",
        Kind.COUNTER,
        "Tokens in the server's own counters that no slot was seen working on.",
        (*MODEL, "source"),
        "metrics",
        each_model_counted(lambda counts: counts.unattributed_tokens),
    ),
    Family(
        "kvscope_prefill_seconds_total",
        Kind.COUNTER,
        "Wall time the server spent reading prompts, counted once when it reads several at a time.",
        MODEL,
        "metrics",
        each_model_counted(lambda counts: counts.prefill_seconds),
    ),
    Family(
        "kvscope_decode_seconds_total",
        Kind.COUNTER,
        "Time the server spent generating, as its own counter tells it.",
        MODEL,
        "metrics",
        each_model_counted(lambda counts: counts.decode_seconds),
    ),
    Family(
        "kvscope_request_prefill_seconds",
        Kind.HISTOGRAM,
        "How long reading a request's prompt took: one observation for each request that is known exactly.",
        MODEL,
        "slots and metrics",
        each_model_counted(lambda counts: counts.request_prefill_seconds),
    ),
    Family(
        "kvscope_observations_total",
        Kind.COUNTER,
        "Finished requests by how well their tokens are known.",
        (*MODEL, "precision"),
        "slots and metrics",
        each_model_counted(lambda counts: counts.observations),
    ),
    Family(
        "kvscope_evictions_total",
        Kind.COUNTER,
        "Times that tokens left a tier of the cache, by reason and by whether a copy was kept.",
        (*MODEL, "tier", "reason", "kept"),
        "slots",
        each_model_counted(
            lambda counts: {key: eviction.events for key, eviction in counts.evictions.items()}
        ),
    ),
    Family(
        "kvscope_evicted_tokens_total",
        Kind.COUNTER,
        "Tokens that left a tier of the cache, by reason and by whether a copy was kept.",
        (*MODEL, "tier", "reason", "kept"),
        "slots",
        each_model_counted(
            lambda counts: {key: eviction.tokens for key, eviction in counts.evictions.items()}
        ),
    ),
    Family(
        "kvscope_draft_tokens_total",
        Kind.COUNTER,
        "Tokens drafted by speculative decoding, by whether the model accepted them.",
        (*MODEL, "result"),
        "metrics",
        each_model_counted(lambda counts: counts.draft_tokens),
    ),
)
