"""Reads what llama.cpp logs when it allocates a model and its caches: lines in, observed values out.

The lines are those of build b11549 at verbosity 4 and above (src/llama.cpp, llama-context.cpp,
llama-kv-cache*.cpp, llama-memory-recurrent.cpp, llama-model.cpp); what older builds spell otherwise is
accepted too. Text in front of them (a time, a level, a container's name) does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from kvscope.observed.logged_memory import LoggedCache, LoggedContext, LoggedMemory

LONGEST_LINE = 1000
MIB = 2**20


def parse_allocation(lines: Iterable[str]) -> LoggedMemory:
    """Return the contexts of the last load that came to its end.

    What was only measured to fit a model into memory, and a load that is still under way or failed, do
    not count. Lines that are not known, cut or none of llama.cpp's are passed over; nothing of a line is
    kept but numbers, types and names of devices.
    """
    reading = _Reading()
    for line in lines:
        # What somebody wrote or a model generated is printed behind a quote only.
        text = line[:LONGEST_LINE].partition("'")[0]
        for mark, pattern, take in _LINES:
            if mark in text and (found := pattern.search(text)):
                take(reading, found)
                break
    return reading.result()


@dataclass
class _Load:
    """A model that was loaded, and the contexts that were made since."""

    measured_only: bool = False
    contexts: list[_Context] = field(default_factory=list)


@dataclass
class _Context:
    settings: dict[str, Any] = field(default_factory=dict)
    caches: list[LoggedCache] = field(default_factory=list)
    model_buffers: dict[str, int] = field(default_factory=dict)
    compute_buffers: dict[str, int] = field(default_factory=dict)
    devices: dict[str, str | None] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        # The compute buffers are reserved last.
        return bool(self.compute_buffers)

    def frozen(self) -> LoggedContext:
        return LoggedContext(
            **self.settings,
            caches=tuple(self.caches),
            model_buffers=self.model_buffers,
            compute_buffers=self.compute_buffers,
            devices=self.devices,
        )


class _Reading:
    def __init__(self) -> None:
        self._loads = [_Load()]
        self._draft_announced = False
        self._begin_cache(None)
        self._model_buffers: dict[str, int] = {}
        self._model_devices: dict[str, str | None] = {}
        self._devices_taken = False

    def result(self) -> LoggedMemory:
        for load in reversed(self._loads):
            if load.contexts and load.contexts[0].complete and not load.measured_only:
                main, *drafts = [context.frozen() for context in load.contexts if context.complete]
                return LoggedMemory(main, tuple(drafts))
        return LoggedMemory()

    def draft_follows(self, _: re.Match[str]) -> None:
        self._draft_announced = True

    def model(self, _: re.Match[str]) -> None:
        if not self._draft_announced:
            self._loads.append(_Load())
        self._draft_announced = False
        self._model_buffers = {}

    def measures_only(self, _: re.Match[str]) -> None:
        self._loads[-1].measured_only = True

    def model_device(self, found: re.Match[str]) -> None:
        # Older builds name the devices before the model's header, newer ones after it.
        if self._devices_taken:
            self._model_devices, self._devices_taken = {}, False
        self._model_devices[found["device"]] = found["id"] and found["id"].lower()

    def context(self, _: re.Match[str]) -> None:
        self._loads[-1].contexts.append(
            _Context(model_buffers=self._model_buffers, devices=self._model_devices)
        )
        self._model_buffers = {}
        self._devices_taken = True
        self._begin_cache(None)

    def setting(self, found: re.Match[str]) -> None:
        name, read = _SETTINGS[found["name"]]
        value = read(found["value"])
        if value is not None:
            self._now().settings[name] = value

    def flash_attention(self, found: re.Match[str]) -> None:
        self._now().settings["flash_attention"] = _switch(found["value"])

    def cache_announced(self, found: re.Match[str]) -> None:
        self._begin_cache(next((kind for name, kind in _ANNOUNCED if name in found["name"]), None))

    def buffer(self, found: re.Match[str]) -> None:
        match found["what"]:
            case "model":
                kept = self._model_buffers
            case "compute":
                kept = self._now().compute_buffers
            case _:
                kept = self._devices
        kept[found["device"]] = _bytes(found["size"])

    def attention_cache(self, found: re.Match[str]) -> None:
        streams = found["streams"]
        self._add(self._kind(), found, int(streams) if streams else None)

    def recurrent_state(self, found: re.Match[str]) -> None:
        self._add("recurrent", found, None)

    def compressor_state(self, found: re.Match[str]) -> None:
        self._add("recurrent", found, int(found["streams"]))

    def _now(self) -> _Context:
        contexts = self._loads[-1].contexts
        if not contexts:  # the log's head is missing
            contexts.append(_Context())
        return contexts[-1]

    def _begin_cache(self, kind: str | None) -> None:
        self._announced = kind
        self._devices: dict[str, int] = {}

    def _kind(self) -> str | None:
        if self._announced:
            return self._announced
        before = self._now().caches
        if not before:
            return "full"
        # llama-memory-hybrid-idx.cpp alone adds a cache behind the recurrent state, and announces none.
        return "indexer" if before[-1].kind == "recurrent" else None

    def _add(self, kind: str | None, found: re.Match[str], streams: int | None) -> None:
        told = found.groupdict()
        parts = list(_PART.finditer(told.get("parts") or ""))
        self._now().caches.append(
            LoggedCache(
                kind=kind,
                cells=int(told["cells"]),
                layers=int(told["layers"]),
                sequences=int(told["sequences"]) if told.get("sequences") else None,
                streams=streams,
                total_bytes=_bytes(told["size"]),
                parts={part["name"]: _bytes(part["size"]) for part in parts},
                types={part["name"]: part["type"] for part in parts},
                devices=self._devices,
            )
        )
        self._begin_cache(None)


def _bytes(mebibytes: str) -> int:
    return round(float(mebibytes) * MIB)


def _switch(value: str) -> bool | None:
    return {"true": True, "1": True, "enabled": True, "false": False, "0": False, "disabled": False}.get(
        value
    )


def _count(value: str) -> int | None:
    return int(value) if value.isdecimal() else None


_SETTINGS: dict[str, tuple[str, Callable[[str], int | bool | None]]] = {
    "n_ctx": ("context_tokens", _count),
    "n_ctx_seq": ("sequence_context_tokens", _count),
    "n_ctx_per_seq": ("sequence_context_tokens", _count),
    "n_seq_max": ("sequences", _count),
    "n_batch": ("batch_tokens", _count),
    "n_ubatch": ("micro_batch_tokens", _count),
    "n_rs_seq": ("rollback_snapshots", _count),
    "kv_unified": ("unified", _switch),
    "flash_attn": ("flash_attention", _switch),
}
"""llama_context's own names, the field each is kept in, and how its value is read ("auto": not told)."""

_ANNOUNCED = (
    ("non-SWA", "full"),
    ("SWA", "window"),
    ("indexer", "indexer"),
    ("compressed", "compressed"),
    ("main", "full"),
    ("DSA", "full"),
)
"""What stands in "creating ... KV cache" and the kind it means; the first that fits."""

_SIZE = r"\s*=?\s*(?P<size>[0-9]{1,9}\.[0-9]{2}) MiB"
_NUMBER = "[0-9]{1,12}"
_ROWS = rf"\(\s*(?P<cells>{_NUMBER}) cells,\s*(?P<layers>{_NUMBER}) layers,\s*(?P<sequences>{_NUMBER})"
_STATE = "DSV4 [a-z]+ state"
_PARTS = r"(?P<parts>(?:,? [A-Z] \([a-z0-9_]+\):\s*[0-9]{1,9}\.[0-9]{2} MiB)+)"
_PART = re.compile(r"(?P<name>[A-Z]) \((?P<type>[a-z0-9_]+)\):" + _SIZE)

_LINES: tuple[tuple[str, re.Pattern[str], Callable[[_Reading, re.Match[str]], None]], ...] = (
    (
        "buffer size",
        re.compile(
            # Not alloc_compute_meta: that is the projector of pictures.
            r"(?:load_tensors|reserve|llama_\w+):\s+(?P<device>\S{1,64}) "
            rf"(?P<what>model|compute|KV|RS|{_STATE}) buffer size{_SIZE}"
        ),
        _Reading.buffer,
    ),
    (
        "llama_kv_cache",
        re.compile(
            rf"llama_kv_cache\w*: size{_SIZE} {_ROWS}(?:/\s*(?P<streams>{_NUMBER}))? seqs\s*\),{_PARTS}"
        ),
        _Reading.attention_cache,
    ),
    (
        "llama_memory_recurrent",
        re.compile(rf"llama_memory_recurrent: size{_SIZE} {_ROWS} seqs[^)]{{0,40}}\),{_PARTS}"),
        _Reading.recurrent_state,
    ),
    (
        "llama_dsv4_comp_state",
        re.compile(
            rf"state = (?P<cells>{_NUMBER}) x {_NUMBER}, streams = (?P<streams>{_NUMBER}),"
            rf".{{0,40}}layers = (?P<layers>{_NUMBER}), size{_SIZE}"
        ),
        _Reading.compressor_state,
    ),
    (
        "creating",
        re.compile(r"llama_kv_cache\w*: creating\s+(?P<name>.{1,60}) KV cache"),
        _Reading.cache_announced,
    ),
    ("constructing llama_context", re.compile("constructing llama_context"), _Reading.context),
    (
        "llama_context",
        re.compile(rf"llama_context: (?P<name>{'|'.join(_SETTINGS)})\s*= (?P<value>[a-z0-9]{{1,12}})\b"),
        _Reading.setting,
    ),
    (
        "Flash Attention",
        re.compile(r"Flash Attention (?:was auto, set to )?(?P<value>enabled|disabled)"),
        _Reading.flash_attention,
    ),
    (
        "using device",
        re.compile(
            r"using device (?P<device>\S{1,64}) \(.*?"
            r"(?:\((?P<id>[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7])\))? - [0-9]{1,12} MiB free"
        ),
        _Reading.model_device,
    ),
    ("loading draft model", re.compile("loading draft model"), _Reading.draft_follows),
    ("loaded meta data", re.compile("llama_model_loader: loaded meta data"), _Reading.model),
    ("no_alloc", re.compile(r"no_alloc\s*= 1"), _Reading.measures_only),
)
"""A part of the line that is cheap to look for, the line, and what it changes; the first that fits."""
