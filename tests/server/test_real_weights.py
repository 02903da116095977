"""The weights that a real server loads are those that the reader of the header counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from tests.tiny_models.kinds import MODELS

from kvscope.observed.logged_memory import ROUNDED_BY_BYTES
from kvscope.sources.allocation_lines import parse_allocation
from kvscope.sources.gguf_header import read_header

pytestmark = pytest.mark.real_server

ROOT = Path(__file__).parents[2]
ALIGNMENT = 32
NOT_CERTAIN = {
    "compressed",
    "hybrid",
    "hybrid_every_layer",
    "hybrid_indexer",
    "hybrid_window",
    "recurrent",
    "recurrent_token_shift",
}
INPUT = ("token_embd.weight", "per_layer_token_embd.weight")
LOAD = """
import os
import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.verbosity = sys.argv[1], 0, 512, 4
params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE  # mapped, holes would count too
params.no_extra_bufts, params.warmup = True, False
server = xllamacpp.Server(params)
sys.stderr.flush()
os._exit(0)
"""


@pytest.mark.parametrize("kind", MODELS)
def test_on_the_cpu_lies_what_a_gpu_would_hold_and_the_input(kind: str, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    # In processes of their own: llama.cpp aborts on a model that it cannot build.
    writing = [sys.executable, "-m", "tests.tiny_models", kind, str(model)]
    subprocess.run(writing, cwd=ROOT, capture_output=True, check=True)
    loading = subprocess.run([sys.executable, "-c", LOAD, str(model)], capture_output=True, check=True)
    main = parse_allocation(loading.stderr.decode(errors="replace").splitlines()).main
    assert main is not None
    held = {each.name: int(each.n_bytes) for each in gguf.GGUFReader(model).tensors}
    rounding = ROUNDED_BY_BYTES + ALIGNMENT * len(held)
    assert sum(main.model_buffers.values()) == pytest.approx(sum(held.values()), abs=rounding)
    on_gpu = read_header(model).gpu_weights_bytes
    if kind in NOT_CERTAIN:
        assert on_gpu is None
    else:
        input_bytes = sum(held.get(name, 0) for name in INPUT)
        copied = 0 if "output.weight" in held else held["token_embd.weight"]
        assert on_gpu == sum(held.values()) - input_bytes + copied
