"""Reads the cases that llama.cpp's own allocator answered, and compares one with what kvscope says."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvscope.observed.model import ModelHeader
from kvscope.tracking.kv_memory import CacheKind, ContextParameters, KvMemory, kv_memory

DATA = Path(__file__).parents[2] / "data"
SHARED_CASES = DATA / "kv-memory-cases.jsonl.gz"
KNOWN_MODELS = DATA / "known-models.json"

KINDS = {
    **dict.fromkeys(("kv", "base", "attn", "mla", "raw_base"), CacheKind.FULL),
    **dict.fromkeys(("swa", "raw_swa"), CacheKind.WINDOW),
    **dict.fromkeys(("csa", "hca"), CacheKind.COMPRESSED),
    **dict.fromkeys(("idx", "lid"), CacheKind.INDEXER),
    **dict.fromkeys(("recurrent", "csa_state", "hca_state", "lid_state"), CacheKind.RECURRENT),
}


def read_cases(path: Path) -> list[dict[str, Any]]:
    """Return the cases of a .jsonl or .jsonl.gz file, whatever it is called."""
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    return [json.loads(line) for line in content.splitlines() if line.strip()]


def case_header(metadata: Mapping[str, Any], nextn_tensors: bool | None = None) -> ModelHeader:
    """Return the header of a case. JSON has lists where headers have tuples, and null for NaN."""
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in metadata.items()
        if value is not None
    }
    return ModelHeader(str(metadata["general.architecture"]), values, nextn_tensors=nextn_tensors)


def case_parameters(settings: Mapping[str, Any]) -> ContextParameters:
    """Return what a case asked for; absent means the default of llama_context_default_params."""
    return ContextParameters(
        context_tokens=settings.get("n_ctx", 0),
        sequences=settings.get("n_seq_max", 1),
        unified=settings.get("unified", settings.get("kv_unified", False)),
        batch_tokens=settings.get("n_batch", 2048),
        micro_batch_tokens=settings.get("n_ubatch", 512),
        cache_type_k=settings.get("type_k", "f16"),
        cache_type_v=settings.get("type_v", "f16"),
        swa_full=settings.get("swa_full", False),
        flash_attention=settings.get("flash_attn", "auto") not in ("off", "disabled", False, 0),
        rollback_snapshots=settings.get("n_rs_seq", 0),
        draft=settings.get("mtp", False),
    )


def case_memory(case: Mapping[str, Any]) -> KvMemory:
    """Return what kvscope says of a case."""
    settings = case["settings"]
    with_tensors = case.get("variant") == "nextn1_tensor" or bool(settings.get("mtp"))
    return kv_memory(case_header(case["gguf_metadata"], with_tensors), case_parameters(settings))


def differences(case: Mapping[str, Any]) -> list[str]:
    """Return a line for each figure of a case that kvscope does not say exactly."""
    memory = case_memory(case)
    wrong: list[str] = []

    def compare(what: str, expected: object, got: object) -> None:
        if expected != got:
            wrong.append(f"{what}: expected {expected}, got {got}")

    compare("memory_class", case["memory_class"], memory.memory_class)
    effective = case["effective"]
    compare("n_ctx", effective["n_ctx"], memory.context_tokens)
    compare("n_ctx_seq", effective["n_ctx_seq"], memory.sequence_context_tokens)
    compare("n_batch", effective["n_batch"], memory.batch_tokens)
    compare("n_ubatch", effective["n_ubatch"], memory.micro_batch_tokens)
    compare("n_rs_seq", effective["n_rs_seq"], memory.rollback_snapshots)
    allocated = case["allocated_bytes"]
    recurrent = [cache for cache in memory.caches if cache.name == "recurrent"]
    compare("k", allocated["k"], sum(cache.k_bytes for cache in memory.caches))
    compare("v", allocated["v"], sum(cache.v_bytes for cache in memory.caches))
    for part, name in enumerate(("rs_r", "rs_s", "rs_p")):
        compare(name, allocated[name], sum(cache.state_parts[part] for cache in recurrent))
    states = sum(cache.state_bytes for cache in memory.caches if cache not in recurrent)
    compare("dsv4_state", allocated["dsv4_state"], states)
    compare("total", allocated["total"], memory.allocated_bytes)
    # Views of another model's caches allocate nothing.
    expected = {
        name: cache for name, cache in allocated["per_cache"].items() if not cache.get("shared_other", False)
    }
    caches = {cache.name: cache for cache in memory.caches}
    compare("caches", sorted(expected), sorted(caches))
    for name in expected.keys() & caches.keys():
        _compare_cache(compare, name, expected[name], caches[name], memory)
    for tokens, state in case["sequence_state_bytes"].items():
        compare(f"state of {tokens} tokens", state, memory.sequence_state_bytes(int(tokens)))
    return wrong


def _compare_cache(compare: Any, name: str, expected: Mapping[str, Any], got: Any, memory: KvMemory) -> None:
    compare(f"{name} kind", KINDS[name], got.kind)
    if "k" in expected:
        for figure, value in (
            ("k", got.k_bytes),
            ("v", got.v_bytes),
            ("cells", got.cells),
            ("n_stream", got.streams),
            ("layers", list(got.layers)),
        ):
            compare(f"{name} {figure}", expected[figure], value)
        return
    compare(f"{name} n_layers", expected["n_layers"], len(got.layers))
    if "state" in expected:
        compare(f"{name} state", expected["state"], got.state_bytes)
    else:
        rows = expected["cells"] * (1 + expected["n_rs_seq"])
        compare(f"{name} rows", rows, got.cells)
        compare(f"{name} parts", [expected[part] for part in "rsp"], list(got.state_parts))


def failure_report(cases: list[dict[str, Any]], most: int = 8) -> str:
    """Return nothing where every case is exact, else how many are not, and the first few of them."""
    wrong = []
    for case in cases:
        try:
            lines = differences(case)
        except Exception as error:
            lines = [f"{type(error).__name__}: {error}"]
        if lines:
            wrong.append((case, lines))
    if not wrong:
        return ""
    report = [f"{len(wrong)} of {len(cases)} cases wrong"]
    for case, lines in wrong[:most]:
        report.append(f"{case['arch']} {case.get('variant')} {case['settings']}")
        report += [f"    {line}" for line in lines[:6]]
    return "\n".join(report)
