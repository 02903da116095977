"""A tiny llama model with random weights, written with ggml-org's own `gguf` package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

LAYERS = 4
EMBEDDING = 128
HEADS = 4
KV_HEADS = 2
FEED_FORWARD = 512
CONTEXT = 65536
SPECIAL = ("<unk>", "<s>", "</s>")
BYTE_TOKENS = 256
VOCABULARY = len(SPECIAL) + BYTE_TOKENS


def write_tiny_model(path: Path, seed: int = 0) -> Path:
    """Write a GGUF file of about 4 MB and return its path.

    The same seed gives the same bytes. The vocabulary is one token a byte, so a text of
    n bytes is n tokens. The weights are random: the text it generates means nothing, but
    every slot, prefill and eviction of the server that loads it is real.

    Raises OSError when the file cannot be written.
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("kvscope-tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(EMBEDDING // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_vocabulary(writer)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)

    kv_width = EMBEDDING // HEADS * KV_HEADS
    writer.add_tensor("token_embd.weight", matrix(VOCABULARY, EMBEDDING))
    writer.add_tensor("output.weight", matrix(VOCABULARY, EMBEDDING))
    writer.add_tensor("output_norm.weight", np.ones(EMBEDDING, dtype=np.float32))
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        writer.add_tensor(f"{prefix}.attn_norm.weight", np.ones(EMBEDDING, dtype=np.float32))
        writer.add_tensor(f"{prefix}.attn_q.weight", matrix(EMBEDDING, EMBEDDING))
        writer.add_tensor(f"{prefix}.attn_k.weight", matrix(kv_width, EMBEDDING))
        writer.add_tensor(f"{prefix}.attn_v.weight", matrix(kv_width, EMBEDDING))
        writer.add_tensor(f"{prefix}.attn_output.weight", matrix(EMBEDDING, EMBEDDING))
        writer.add_tensor(f"{prefix}.ffn_norm.weight", np.ones(EMBEDDING, dtype=np.float32))
        writer.add_tensor(f"{prefix}.ffn_gate.weight", matrix(FEED_FORWARD, EMBEDDING))
        writer.add_tensor(f"{prefix}.ffn_up.weight", matrix(FEED_FORWARD, EMBEDDING))
        writer.add_tensor(f"{prefix}.ffn_down.weight", matrix(EMBEDDING, FEED_FORWARD))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(BYTE_TOKENS))]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * BYTE_TOKENS
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
