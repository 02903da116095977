"""Builds a model of random weights from a header alone, in the real llama.cpp, and measures its memory.

The library is the one inside the package `xllamacpp` (build b11549); its C functions are called through
ctypes. It ends the process where it does not like a header (GGML_ASSERT), so that `python -m
tests.allocator.llama_cpp` runs it apart: one request a line on stdin, one answer a line on stdout.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GGML_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
CONTEXT_TYPE_MTP = 1
GGUF_UINT32, GGUF_INT32, GGUF_FLOAT32, GGUF_BOOL, GGUF_UINT64 = 4, 5, 6, 7, 10
SEQUENCE_PARTIAL_ONLY = 1
GGML_TYPE_F32, GGML_TYPE_F16 = 0, 1

LAYER_LINE = re.compile(r"llama_(?:kv_cache|memory_recurrent)[:,] layer +(\d+): dev = ")
CACHE_LINE = re.compile(
    r"llama_(?:kv_cache|memory_recurrent): size = +[\d.]+ MiB \( *(?P<cells>\d+) cells,"
    r" +\d+ layers, +\d+(?:/(?P<streams>\d+))? seqs(?: +(?P<rollback>\d+) rs_seq)?\), (?P<sizes>.*)"
)
SIZE = re.compile(r"(\w) \(\w+\): +([\d.]+) MiB")


class ModelParameters(ctypes.Structure):
    """llama_model_params of include/llama.h, b11549."""

    _fields_ = [
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32),
        ("load_mode", ctypes.c_int32),
        ("lazy_mode", ctypes.c_int32),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
    ]


class ContextParams(ctypes.Structure):
    """llama_context_params of include/llama.h, b11549."""

    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int32),
        ("rope_scaling_type", ctypes.c_int32),
        ("pooling_type", ctypes.c_int32),
        ("attention_type", ctypes.c_int32),
        ("flash_attn_type", ctypes.c_int32),
        ("floats", ctypes.c_float * 6),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("reserved", ctypes.c_void_p),
        ("embeddings", ctypes.c_bool),
        ("offload_kqv", ctypes.c_bool),
        ("no_perf", ctypes.c_bool),
        ("op_offload", ctypes.c_bool),
        ("swa_full", ctypes.c_bool),
        ("kv_unified", ctypes.c_bool),
        ("samplers", ctypes.c_void_p),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", ctypes.c_void_p),
    ]


class Batch(ctypes.Structure):
    """llama_batch of include/llama.h, b11549."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class StdMap(ctypes.Structure):
    """std::map as libstdc++ lays it out; only the root of its tree is read."""

    _fields_ = [("compare", ctypes.c_void_p), ("color", ctypes.c_void_p), ("root", ctypes.c_void_p)]
    _fields_ += [("left", ctypes.c_void_p), ("right", ctypes.c_void_p), ("count", ctypes.c_size_t)]


class BreakdownNode(ctypes.Structure):
    """A node of the map that llama_get_memory_breakdown returns: buffer type -> three sizes."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("color", "parent", "left", "right", "buffer_type")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("model", "context", "compute")]


SET_TENSOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Refused(Exception):
    """llama.cpp does not take this header or these settings; the message is its own."""


class LlamaCpp:
    """The library, loaded once in a process."""

    def __init__(self, on_cache: Callable[[dict[str, Any]], None]) -> None:
        self.on_cache = on_cache
        self._layers: list[int] = []
        found = importlib.util.find_spec("xllamacpp")
        if found is None or not found.submodule_search_locations:
            raise ImportError("xllamacpp is not installed; pip install 'kvscope[demo]'")
        library = next(Path(found.submodule_search_locations[0]).glob("xllamacpp*.so"))
        self.library = ctypes.CDLL(str(library))
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        returns: dict[str, Any] = {
            "gguf_init_empty": pointer,
            "llama_model_default_params": ModelParameters,
            "llama_context_default_params": ContextParams,
            "llama_model_init_from_user": pointer,
            "llama_init_from_model": pointer,
            "llama_get_memory": pointer,
            "llama_batch_init": Batch,
            "llama_state_seq_get_size": size,
            "llama_state_seq_get_size_ext": size,
            "ggml_nbytes": size,
            "_Z26llama_get_memory_breakdownPK13llama_context": StdMap,
        }
        for name, type_ in returns.items():
            getattr(self.library, name).restype = type_
        self.log: list[str] = []
        self._log_callback = LOG(self._keep_log)
        self.library.llama_log_set(self._log_callback, None)
        self.library.llama_backend_init()
        count = 1 << 16
        floats = [(i * 7919 % 201 - 100) * 1e-4 for i in range(count)]
        # The bits of halves of about 0.004, of both signs.
        halves = [0x1C00 | (i * 7919 % 0x3FF) | (i & 1) << 15 for i in range(count)]
        self._weights = {
            GGML_TYPE_F32: (ctypes.c_float * count)(*floats),
            GGML_TYPE_F16: (ctypes.c_uint16 * count)(*halves),
        }
        self._set_tensor = SET_TENSOR(self._fill)

    def _keep_log(self, _level: int, text: bytes, _data: int) -> None:
        self.log.append(text.decode("utf-8", "replace"))
        if layer := LAYER_LINE.match(self.log[-1]):
            self._layers.append(int(layer[1]))
        elif cache := CACHE_LINE.match(self.log[-1]):
            sizes = {name: float(size) for name, size in SIZE.findall(cache["sizes"])}
            self.on_cache(
                {
                    "cells": int(cache["cells"]) * (1 + int(cache["rollback"] or 0)),
                    "streams": int(cache["streams"] or 1),
                    "layers": self._layers,
                    "mib": sizes,
                }
            )
            self._layers = []
        if os.environ.get("KVSCOPE_ALLOCATOR_LOG"):
            sys.stderr.write(self.log[-1])

    def _fill(self, tensor: int, _data: int) -> None:
        type_ = ctypes.cast(tensor, ctypes.POINTER(ctypes.c_int32))[0]
        weights = self._weights[type_ if type_ in self._weights else GGML_TYPE_F16]
        total = self.library.ggml_nbytes(ctypes.c_void_p(tensor))
        for start in range(0, total, ctypes.sizeof(weights)):
            length = min(ctypes.sizeof(weights), total - start)
            self.library.ggml_backend_tensor_set(
                ctypes.c_void_p(tensor), weights, ctypes.c_size_t(start), ctypes.c_size_t(length)
            )

    @contextmanager
    def model(self, metadata: Mapping[str, Any]) -> Iterator[int]:
        """Yield a model of this header with random weights."""
        gguf = ctypes.c_void_p(self.library.gguf_init_empty())
        for key, value in {**metadata, "tokenizer.ggml.model": "no_vocab"}.items():
            self._set(gguf, key.encode(), value)
        parameters = self.library.llama_model_default_params()
        parameters.load_mtp = True
        self.log.clear()
        model = self.library.llama_model_init_from_user(gguf, self._set_tensor, None, parameters)
        self.library.gguf_free(gguf)
        if not model:
            raise Refused(self._last_error())
        try:
            yield model
        finally:
            self.library.llama_model_free(ctypes.c_void_p(model))

    def _set(self, gguf: ctypes.c_void_p, key: bytes, value: Any) -> None:
        if isinstance(value, bool):
            self.library.gguf_set_val_bool(gguf, key, value)
        elif isinstance(value, str):
            self.library.gguf_set_val_str(gguf, key, value.encode())
        elif isinstance(value, float):
            self.library.gguf_set_val_f32(gguf, key, ctypes.c_float(value))
        elif isinstance(value, int):
            if value < 0:
                self.library.gguf_set_val_i32(gguf, key, ctypes.c_int32(value))
            else:
                self.library.gguf_set_val_u32(gguf, key, ctypes.c_uint32(value))
        elif isinstance(value, list) and value:
            type_, element = GGUF_UINT32, ctypes.c_uint32
            if isinstance(value[0], bool):
                type_, element = GGUF_BOOL, ctypes.c_bool
            elif any(isinstance(item, float) for item in value):
                type_, element = GGUF_FLOAT32, ctypes.c_float
            elif min(value) < 0:
                type_, element = GGUF_INT32, ctypes.c_int32
            elif ".ple." in key.decode() and not key.endswith(b".layers"):
                type_, element = GGUF_UINT64, ctypes.c_uint64
            array = (element * len(value))(*value)
            self.library.gguf_set_arr_data(gguf, key, type_, array, ctypes.c_size_t(len(value)))

    def _last_error(self) -> str:
        lines = "".join(self.log).splitlines()
        errors = [
            line for line in lines if re.search(r"fail|error|invalid|missing|wrong|require|must", line, re.I)
        ]
        return " | ".join((errors or lines)[-2:])

    @contextmanager
    def context(self, model: int, settings: Mapping[str, Any]) -> Iterator[int]:
        """Yield a context; settings as in the shared cases (n_ctx, n_seq_max, type_k ...)."""
        parameters = self.library.llama_context_default_params()
        for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq"):
            if name in settings:
                setattr(parameters, name, settings[name])
        parameters.type_k = GGML_TYPES[settings.get("type_k", "f16")]
        parameters.type_v = GGML_TYPES[settings.get("type_v", "f16")]
        parameters.flash_attn_type = FLASH_ATTENTION[settings.get("flash_attn", "auto")]
        parameters.swa_full = settings.get("swa_full", False)
        parameters.kv_unified = settings.get("unified", settings.get("kv_unified", False))
        parameters.n_threads = parameters.n_threads_batch = 1
        if settings.get("mtp"):
            parameters.ctx_type = CONTEXT_TYPE_MTP
        self.log.clear()
        self._layers = []
        context = self.library.llama_init_from_model(ctypes.c_void_p(model), parameters)
        if not context:
            raise Refused(self._last_error())
        try:
            yield context
        finally:
            self.library.llama_free(ctypes.c_void_p(context))

    def context_bytes(self, context: int) -> int:
        """Return the bytes of the context's memory by llama_get_memory_breakdown."""
        tree = self.library._Z26llama_get_memory_breakdownPK13llama_context(ctypes.c_void_p(context))
        total, waiting = 0, [tree.root]
        while waiting:
            at = waiting.pop()
            if at:
                node = BreakdownNode.from_address(at)
                total += node.context
                waiting += [node.left, node.right]
        return total

    def decode(self, context: int, sequence: int, first: int, count: int, batch_tokens: int) -> None:
        """Decode count random tokens at positions from first on. Raises Refused where that fails."""
        for start in range(first, first + count, batch_tokens):
            size = min(batch_tokens, first + count - start)
            batch = self.library.llama_batch_init(size, 0, 1)
            for i in range(size):
                batch.token[i] = (start + i) * 31 % 97 + 1
                batch.pos[i] = start + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = i == size - 1
            batch.n_tokens = size
            failed = self.library.llama_decode(ctypes.c_void_p(context), batch)
            self.library.llama_batch_free(batch)
            if failed:
                raise Refused(f"llama_decode returns {failed}")

    def measure(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return what one request's model and context allocate, and their sequence states by tokens."""
        settings = request["settings"]
        with (
            self.model(request["gguf_metadata"]) as model,
            self.context(model, settings) as context,
        ):
            pointer = ctypes.c_void_p(context)
            sequence = settings.get("n_seq_max", 1) - 1
            answer: dict[str, Any] = {
                "n_ctx": self.library.llama_n_ctx(pointer),
                "n_ctx_seq": self.library.llama_n_ctx_seq(pointer),
                "n_batch": self.library.llama_n_batch(pointer),
                "n_ubatch": self.library.llama_n_ubatch(pointer),
                "n_rs_seq": self.library.llama_n_rs_seq(pointer),
                "total": self.context_bytes(context),
                "state": {},
                "partial": {},
            }
            try:
                held = 0
                for tokens in [0, *request.get("tokens", ())]:
                    if not self.library.llama_get_memory(pointer):
                        break
                    self.decode(context, sequence, held, tokens - held, answer["n_batch"])
                    held = tokens
                    key = str(tokens)
                    answer["state"][key] = self.library.llama_state_seq_get_size(pointer, sequence)
                    answer["partial"][key] = self.library.llama_state_seq_get_size_ext(
                        pointer, sequence, SEQUENCE_PARTIAL_ONLY
                    )
            except Refused as refused:
                answer["decode"] = str(refused)
            return answer


def main() -> None:
    """Answer requests until stdin closes."""
    # The library writes to stdout now and then; the answers keep a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    # Caches are told at once: the library may yet end the process over this header.
    llama_cpp = LlamaCpp(lambda cache: say({"cache": cache}))
    for line in sys.stdin:
        try:
            answer = llama_cpp.measure(json.loads(line))
        except Refused as refused:
            answer = {"refused": str(refused)}
        say(answer)


if __name__ == "__main__":
    main()
