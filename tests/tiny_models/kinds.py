"""One row a model: an architecture whose memory is of a kind of its own, as small as it loads.

Keys of the metadata stand without the architecture in front. Figures differ from one another wherever
llama.cpp lets them, so that two that are mixed up do not agree by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Value = bool | int | float | str | list[int] | list[bool]


@dataclass(frozen=True)
class TinyModel:
    """What a model's file says of itself, and the architecture's name in llama.cpp."""

    architecture: str
    metadata: Mapping[str, Value]


EVERY: Mapping[str, Value] = {
    "context_length": 65536,
    "embedding_length": 128,
    "feed_forward_length": 192,
    "block_count": 4,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
"""What each model has unless its row says otherwise."""

EXPERTS: Mapping[str, Value] = {
    "expert_count": 2,
    "expert_used_count": 1,
    "expert_feed_forward_length": 64,
    "expert_shared_count": 1,
    "expert_gating_func": 2,
    "leading_dense_block_count": 1,
}

STATE_SPACE: Mapping[str, Value] = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 256,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 2,
}

LATENT: Mapping[str, Value] = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 48,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 64 + 32,
    "attention.value_length": 64,
    "attention.key_length_mla": 24 + 32,
    "attention.value_length_mla": 24,
    "rope.dimension_count": 32,
}

MODELS: Mapping[str, TinyModel] = {
    "plain": TinyModel("llama", {}),
    "heads_by_layer": TinyModel(
        "openelm",
        {
            "attention.head_count": [4, 4, 8, 8],
            "attention.head_count_kv": [1, 2, 2, 4],
            "feed_forward_length": [64, 96, 128, 192],
            "attention.key_length": 32,
            "attention.value_length": 32,
        },
    ),
    "m_rope": TinyModel("qwen2vl", {"rope.dimension_sections": [4, 6, 6, 0]}),
    "window": TinyModel(
        "gemma3",
        {
            "block_count": 6,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.sliding_window": 96,
            "attention.sliding_window_pattern": 3,
        },
    ),
    "window_every_second": TinyModel(
        "gpt-oss",
        {
            **EXPERTS,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.sliding_window": 128,
        },
    ),
    "window_shared_layers": TinyModel(
        "gemma3n",
        {
            "block_count": 22,
            "embedding_length": 64,
            "attention.head_count": 2,
            "attention.head_count_kv": 1,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.sliding_window": 64,
        },
    ),
    "window_other_heads": TinyModel(
        "gemma4",
        {
            "block_count": 6,
            "attention.head_count_kv": [2, 2, 1, 2, 2, 1],
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.key_length_swa": 32,
            "attention.value_length_swa": 32,
            "attention.sliding_window": 80,
            "attention.sliding_window_pattern": [True, True, False, True, True, False],
            "attention.shared_kv_layers": 0,
            "embedding_length_per_layer_input": 32,
            "rope.dimension_count": 64,
            "rope.dimension_count_swa": 32,
        },
    ),
    "chunked": TinyModel("llama4", {**EXPERTS, "interleave_moe_layer_step": 2}),
    "latent": TinyModel("deepseek2", {**EXPERTS, **LATENT}),
    "latent_indexer": TinyModel(
        "deepseek32",
        {
            **EXPERTS,
            **LATENT,
            "attention.indexer.head_count": 2,
            "attention.indexer.key_length": 64,
            "attention.indexer.top_k": 2048,
        },
    ),
    "indexer": TinyModel(
        "minimax-m3",
        {
            **EXPERTS,
            "attention.indexer.head_count": 2,
            "attention.indexer.key_length": 64,
            "attention.indexer.top_k": 16,
            "attention.indexer.block_size": 128,
            "attention.indexer.local_blocks": 1,
            "expert_weights_scale": 1.0,
            "rope.dimension_count": 32,
        },
    ),
    "latent_window_indexer": TinyModel(
        "dots3note",
        {
            **EXPERTS,
            **LATENT,
            "attention.sliding_window": 112,
            "attention.sliding_window_pattern": [False, True, True, False],
            "attention.kv_lora_rank_swa": 96,
            "attention.key_length_mla_swa": 40 + 32,
            "attention.value_length_mla_swa": 40,
            "attention.key_length_swa": 96 + 32,
            "attention.value_length_swa": 96,
            "attention.indexer.types": [1, 0, 0, 1],
            "attention.indexer.head_count": 2,
            "attention.indexer.key_length": 64,
            "attention.indexer.top_k": 2048,
            "rope.freq_base_swa": 10000.0,
        },
    ),
    "compressed": TinyModel(
        "deepseek4",
        {
            **EXPERTS,
            "block_count": 6,
            "leading_dense_block_count": 0,
            "attention.head_count_kv": 1,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.q_lora_rank": 32,
            "attention.sliding_window": 128,
            "attention.compress_ratios": [0, 4, 128, 4, 0, 128],
            "attention.compress_rope_freq_base": 160000.0,
            "attention.indexer.head_count": 2,
            "attention.indexer.key_length": 128,
            "attention.indexer.top_k": 2048,
            "attention.output_group_count": 4,
            "attention.output_lora_rank": 32,
            "expert_gating_func": 4,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.0,
            "hash_layer_count": 0,
            "hyper_connection.count": 4,
            "hyper_connection.epsilon": 1e-6,
            "hyper_connection.sinkhorn_iterations": 2,
            "rope.dimension_count": 32,
            "swiglu_clamp_exp": 10.0,
        },
    ),
    "hybrid_indexer": TinyModel(
        "glm5-next",
        {
            **EXPERTS,
            **LATENT,
            "attention.head_count_kv": [1, 0, 0, 1],
            "attention.key_length": 64,
            "attention.indexer.head_count": 2,
            "attention.indexer.key_length": 64,
            "attention.indexer.kpool": 4,
            "attention.indexer.top_k": 2048,
            "hyper_connection.count": 4,
            "hyper_connection.epsilon": 1e-6,
            "hyper_connection.sinkhorn_iterations": 2,
            "kda.head_dim": 32,
            "rope.dimension_count": 0,
            "ssm.conv_kernel": 4,
        },
    ),
    "recurrent": TinyModel(
        "mamba2", {**STATE_SPACE, "attention.head_count": 0, "attention.head_count_kv": 0}
    ),
    "recurrent_token_shift": TinyModel(
        "rwkv7",
        {
            "attention.head_count": 0,
            "attention.head_count_kv": 0,
            "wkv.head_size": 32,
            "attention.decay_lora_rank": 16,
            "attention.iclr_lora_rank": 16,
            "attention.value_residual_mix_lora_rank": 16,
            "attention.gate_lora_rank": 32,
        },
    ),
    "hybrid": TinyModel("jamba", {**STATE_SPACE, "attention.head_count_kv": [0, 2, 0, 1]}),
    "hybrid_every_layer": TinyModel(
        "falcon-h1",
        {**STATE_SPACE, "attention.key_length": 32, "attention.value_length": 32},
    ),
    "hybrid_gated": TinyModel(
        "qwen35",
        {
            **STATE_SPACE,
            "ssm.state_size": 32,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "full_attention_interval": 2,
            "rope.dimension_sections": [4, 6, 6, 0],
            "rope.dimension_count": 32,
        },
    ),
    "hybrid_window": TinyModel(
        "lfm2",
        {
            "attention.head_count_kv": [0, 2, 0, 1],
            "shortconv.l_cache": 3,
            "attention.sliding_window": 112,
        },
    ),
}
