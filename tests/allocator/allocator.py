"""Asks the real allocator, in a process of its own that may die, and compares its answer with kvscope's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from kvscope.tracking.kv_memory import CacheKind, KvMemory, ShapeError, kv_memory
from tests.unit.tracking.kv_cases import case_header, case_parameters

MIB = 1024 * 1024
PRINTED_MIB = 0.0051
"""llama.cpp prints two decimals."""


class Allocator:
    """The real llama.cpp; a context manager."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Allocator:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return what it allocates; `caches` also where it ended over the rest of the request (`died`)."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.allocator.llama_cpp"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        caches: list[dict[str, Any]] = []
        for line in self._process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if "cache" not in answer:
                return {**answer, "caches": caches}
            caches.append(answer["cache"])
        self._process.wait()
        return {"died": True, "caches": caches}


def disagreements(request: Mapping[str, Any], truth: Mapping[str, Any]) -> list[str]:
    """Return a line for each figure that llama.cpp and kvscope do not share; nothing where it refused."""
    told = bool(truth["caches"]) or "total" in truth
    header = case_header(request["gguf_metadata"], nextn_tensors=False)
    try:
        memory = kv_memory(header, case_parameters(request["settings"]))
    except ShapeError as error:
        return [f"kvscope refuses: {error}"] if told and "refused" not in truth else []
    if "total" in truth:
        return _compare_all(memory, truth)
    # It died, or refused, after the caches were made: their lines are still true, if all of them are there.
    if "refused" in truth or len(truth["caches"]) >= _printed(memory):
        return _compare_lines(memory, truth) if told else []
    return []


def _printed(memory: KvMemory) -> int:
    return sum(not _is_unprinted(cache.name) for cache in memory.caches)


def _is_unprinted(name: str) -> bool:
    return name in ("csa_state", "hca_state", "lid_state")


def _compare_all(memory: KvMemory, truth: Mapping[str, Any]) -> list[str]:
    figures = {
        "n_ctx": memory.context_tokens,
        "n_ctx_seq": memory.sequence_context_tokens,
        "n_batch": memory.batch_tokens,
        "n_ubatch": memory.micro_batch_tokens,
        "n_rs_seq": memory.rollback_snapshots,
        "total": memory.allocated_bytes,
    }
    wrong = [
        f"{name}: llama.cpp {truth[name]}, kvscope {got}"
        for name, got in figures.items()
        if truth[name] != got
    ]
    wrong += _compare_lines(memory, truth)
    for what, tell in (("state", memory.sequence_state_bytes), ("partial", memory.checkpoint_bytes)):
        for tokens, size in truth[what].items():
            got = tell(int(tokens))
            if got != size:
                wrong.append(f"{what} of {tokens} tokens: llama.cpp {size}, kvscope {got}")
    return wrong


def _compare_lines(memory: KvMemory, truth: Mapping[str, Any]) -> list[str]:
    ours = [
        (cache.cells, cache.streams, cache.layers, [size / MIB for size in _sizes(cache)])
        for cache in memory.caches
        if not _is_unprinted(cache.name)
    ]
    theirs = [
        (line["cells"], line["streams"], tuple(line["layers"]), list(line["mib"].values()))
        for line in truth["caches"]
    ]
    wrong = []
    for mine, their in zip(sorted(ours), sorted(theirs), strict=False):
        near = all(abs(a - b) <= PRINTED_MIB for a, b in zip(mine[3], their[3], strict=False))
        if mine[:3] != their[:3] or not near:
            wrong.append(f"cache: llama.cpp {their}, kvscope {mine}")
    if len(ours) != len(theirs):
        wrong.append(f"caches: llama.cpp {theirs}, kvscope {ours}")
    return wrong


def _sizes(cache: Any) -> tuple[int, ...]:
    return cache.state_parts if cache.kind is CacheKind.RECURRENT else (cache.k_bytes, cache.v_bytes)
