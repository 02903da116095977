"""Which weights lie on a GPU that every layer was put on: what public logs say of known models."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import pytest
from tests.gguf_files import llama, number, split_keys, tensor, write, write_parts

from kvscope.demo.tiny_model import write_tiny_model
from kvscope.sources.gguf_header import read_header

MIB = 2**20
F32, F16, Q4_0, Q4_K, Q6_K, IQ4_NL, I32, TQ1_0 = (
    int(gguf.GGMLQuantizationType[name])
    for name in ("F32", "F16", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "I32", "TQ1_0")
)
Weights = Sequence[tuple[str, Sequence[int], int]]


def finer(layer: int, layers: int) -> bool:
    """Layers of which Q4_K_M keeps two tensors in Q6_K (use_more_bits of llama.cpp's src/llama-quant.cpp)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def layers_of(
    count: int, width: int, heads: int, kv: int, inner: int, norms: Sequence[str], kind: Callable[[int], int]
) -> Weights:
    """Dense layers; kind: the type of the two tensors that a mixture may keep finer, by layer."""
    base = kind(-1)
    return [
        each
        for layer in range(count)
        for each in (
            *((f"blk.{layer}.{name}.weight", (width,), F32) for name in norms),
            (f"blk.{layer}.attn_q.weight", (width, heads), base),
            (f"blk.{layer}.attn_k.weight", (width, kv), base),
            (f"blk.{layer}.attn_v.weight", (width, kv), kind(layer)),
            (f"blk.{layer}.attn_output.weight", (heads, width), base),
            (f"blk.{layer}.ffn_gate.weight", (width, inner), base),
            (f"blk.{layer}.ffn_up.weight", (width, inner), base),
            (f"blk.{layer}.ffn_down.weight", (inner, width), kind(layer)),
        )
    ]


def mixture(layers: int) -> Callable[[int], int]:
    return lambda layer: Q6_K if layer >= 0 and finer(layer, layers) else Q4_K


TWO, FOUR = ("attn_norm", "ffn_norm"), ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
LLAMA_3_1_8B: Weights = [
    ("token_embd.weight", (4096, 128256), Q4_K),
    ("output_norm.weight", (4096,), F32),
    ("rope_freqs.weight", (64,), F32),
    ("output.weight", (4096, 128256), Q6_K),
    *layers_of(32, 4096, 4096, 1024, 14336, TWO, mixture(32)),
]
LLAMA_3_2_3B: Weights = [
    ("token_embd.weight", (3072, 128256), Q6_K),
    ("output_norm.weight", (3072,), F32),
    ("rope_freqs.weight", (64,), F32),
    *layers_of(28, 3072, 3072, 1024, 8192, TWO, mixture(28)),
]
GEMMA_2_2B: Weights = [
    ("token_embd.weight", (2304, 256000), Q6_K),
    ("output_norm.weight", (2304,), F32),
    *layers_of(26, 2304, 2048, 1024, 9216, FOUR, lambda _: Q4_0),
]


def size(lengths: Sequence[int], kind: int) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    count = 1
    for length in lengths:
        count *= length
    return count // block * block_bytes


def model(path: Path, weights: Weights, *keys: bytes) -> Path:
    """A file with these tensors; the weights themselves are a hole in it."""
    described, offset = [], 0
    for name, lengths, kind in weights:
        described.append(tensor(name, lengths, kind, offset))
        offset += -(-size(lengths, kind) // 32) * 32
    header = llama(*keys, tensors=described)
    write(path, header)
    os.truncate(path, -(-len(header) // 32) * 32 + offset)
    return path


@pytest.mark.parametrize(
    ("weights", "tensors_of", "mebibytes"),
    [
        # "llama_model_loader: - type f32: 66 tensors" and so on, and "CUDA0 model buffer size = 4403.49 MiB",
        # beside "CPU_Mapped model buffer size = 281.81 MiB".
        pytest.param(LLAMA_3_1_8B, {F32: 66, Q4_K: 193, Q6_K: 33}, 4403.49, id="Llama-3.1-8B Q4_K_M"),
        # CUDA0 1918.35 beside CPU_Mapped 308.23: the output is a copy of the token embedding.
        pytest.param(LLAMA_3_2_3B, {F32: 58, Q4_K: 168, Q6_K: 29}, 1918.35, id="Llama-3.2-3B Q4_K_M"),
        # ROCm0 1548.29 beside CPU_Mapped 461.43. Rows of 2304 are filled up to whole 512 there.
        pytest.param(GEMMA_2_2B, {F32: 105, Q4_0: 182, Q6_K: 1}, 1548.29, id="gemma-2-2b Q4_0"),
    ],
)
def test_known_models_take_on_a_gpu_what_public_logs_say(
    tmp_path: Path, weights: Weights, tensors_of: dict[int, int], mebibytes: float
) -> None:
    kinds = [kind for _, _, kind in weights]
    assert {kind: kinds.count(kind) for kind in kinds} == tensors_of
    found = read_header(model(tmp_path / "model.gguf", weights)).gpu_weights_bytes
    assert found is not None
    assert found / MIB == pytest.approx(mebibytes, rel=1e-4)


TOKENS = ("token_embd.weight", (32, 10), F16)
OUTPUT = ("output.weight", (32, 10), F16)
LAYER = ("blk.0.ffn_up.weight", (32, 20), F32)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([TOKENS, OUTPUT, LAYER], 640 + 2560),
        ([TOKENS, LAYER], 640 + 2560),
        ([TOKENS, LAYER, ("position_embd.weight", (32, 100), F32), OUTPUT], 640 + 2560),
        ([TOKENS, LAYER, ("per_layer_token_embd.weight", (32, 100), F32)], 640 + 2560),
        ([TOKENS, LAYER, ("output_norm.weight", (32,), F32)], 640 + 2560 + 128),
        ([TOKENS, LAYER, ("blk.1.ffn_gate_exps.weight", (64, 3, 5), IQ4_NL)], 640 + 2560 + 540),
        ([LAYER], None),
        ([], None),
        ([TOKENS, LAYER, ("something_new.weight", (32,), F32)], None),
        ([TOKENS, LAYER, ("blk.1.ffn_up.weight", (256, 2), TQ1_0)], None),
        ([TOKENS, LAYER, ("blk.1.ffn_gate_tid2eid.weight", (32,), I32)], None),
        ([TOKENS, LAYER, ("blk.1.nextn.eh_proj.weight", (32,), F32)], None),
        ([TOKENS, LAYER, ("blk.1.ssm_d", (32,), F32)], None),
        ([TOKENS, LAYER, ("blk.1." + "x" * 58, (32,), F32)], None),  # longer than llama.cpp takes
    ],
)
def test_the_input_stays_on_the_cpu_and_what_is_not_certain_is_not_told(
    tmp_path: Path, weights: Weights, expected: int | None
) -> None:
    assert read_header(model(tmp_path / "model.gguf", weights)).gpu_weights_bytes == expected


def test_lengths_that_are_no_whole_blocks_are_not_believed(tmp_path: Path) -> None:
    odd = llama(tensors=[tensor("token_embd.weight", (33,), Q4_0)])
    assert read_header(write(tmp_path / "odd.gguf", odd + bytes(1000))).gpu_weights_bytes is None
    none = llama(tensors=[tensor("token_embd.weight", (), F32)])
    assert read_header(write(tmp_path / "none.gguf", none + bytes(1000))).gpu_weights_bytes is None


def test_weights_that_the_file_does_not_have_are_not_counted(tmp_path: Path) -> None:
    path = model(tmp_path / "model.gguf", [TOKENS, LAYER])
    whole = path.stat().st_size
    assert read_header(path).gpu_weights_bytes == 3200
    os.truncate(path, whole - 1)
    assert read_header(path).gpu_weights_bytes is None
    huge = llama(tensors=[tensor("token_embd.weight", (2**63, 2**63, 2**63, 2**63))])
    assert read_header(write(path, huge + bytes(1000))).gpu_weights_bytes is None


def test_an_alignment_that_is_none_leaves_them_unknown(tmp_path: Path) -> None:
    for alignment in (0, 2**32 - 1):
        path = model(tmp_path / "model.gguf", [TOKENS], number("general.alignment", "u32", alignment))
        assert read_header(path).gpu_weights_bytes is None


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    held = [tensor(*TOKENS), tensor(*LAYER), tensor(*OUTPUT)]
    contents = [llama(*split_keys(part, 3), tensors=[held[part]]) + bytes(3000) for part in range(3)]
    first, middle, last = write_parts(tmp_path, "model", contents)
    for part in (first, middle, last):
        assert read_header(part).gpu_weights_bytes == 3200
    write(middle, contents[1][:-2000])
    assert read_header(first).gpu_weights_bytes is None
    write(middle, b"no model")
    assert read_header(first).gpu_weights_bytes is None
    middle.unlink()
    assert read_header(first).gpu_weights_bytes is None


def test_the_demos_own_model_by_ggufs_own_reader(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    held = {each.name: int(each.n_bytes) for each in gguf.GGUFReader(path).tensors}
    on_cpu = held["token_embd.weight"] if "output.weight" in held else 0
    assert read_header(path).gpu_weights_bytes == sum(held.values()) - on_cpu
