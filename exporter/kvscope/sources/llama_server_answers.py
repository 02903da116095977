"""What llama-server's answers say: pure parsers, bytes in, observed values out.

Facts about fields come from llama.cpp's tools/server (server-context.cpp, server-task.cpp) at builds
b11434 and b11549; older spellings are accepted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from kvscope.observed.server import Phase, ServerCounters, ServerProps, SlotSeen

LARGEST_COUNT = 2**53
"""Above it a JSON number is no exact integer any more; no server counts that far."""
LONGEST_TEXT = 256
LONGEST_PATH = 4096
MOST_SLOTS = 1024
"""Each slot is some thirty series for ever; llama.cpp itself knows at most 256."""


class ParseError(ValueError):
    """An answer that is not what llama-server sends; the message says what was found."""


def parse_slots(body: bytes) -> tuple[tuple[SlotSeen, ...], tuple[str, ...]]:
    """Return the slots of a /slots answer by id, and one line for each field that was left out.

    Everything but the fields of `SlotSeen` is dropped here: prompt text can be in there
    (LLAMA_SERVER_SLOTS_DEBUG). A field of a wrong type or size costs that field only.
    Raises ParseError when it is not a list of slots at all.
    """
    answer = _json(body)
    if not isinstance(answer, list):
        raise ParseError(f"/slots is not a list but {_kind(answer)}")
    slots: dict[int, SlotSeen] = {}
    notes: list[str] = []
    for entry in answer:
        if not isinstance(entry, dict):
            raise ParseError(f"/slots holds {_kind(entry)} where a slot should be")
        fields = _Fields("slot", entry, notes)
        slot_id = fields.count("id")
        if slot_id is None:
            notes.append("a slot without a usable id is left out")
        elif slot_id >= MOST_SLOTS:
            notes.append(f"a slot has the id {slot_id}, above {MOST_SLOTS - 1}; left out")
        elif slot_id in slots:
            notes.append(f"slot {slot_id} is listed twice; the first is used")
        else:
            slots[slot_id] = _slot(slot_id, entry, fields)
    if answer and not slots:
        raise ParseError("/slots holds no object with an id")
    return tuple(slots[slot_id] for slot_id in sorted(slots)), tuple(notes)


def _slot(slot_id: int, entry: Mapping[str, Any], fields: _Fields) -> SlotSeen:
    processing = entry.get("is_processing")
    if processing is None and isinstance(entry.get("state"), int):  # builds before b4027
        processing = entry["state"] != 0
    next_token = entry.get("next_token")
    if isinstance(next_token, list):
        next_token = next_token[0] if next_token else None
    decoded = None
    if isinstance(next_token, dict):
        decoded = _Fields("slot", next_token, fields.notes).count("n_decoded")
    if processing is True:
        phase = None if decoded is None else Phase.DECODE if decoded > 0 else Phase.PREFILL
        # A task under way whose next_token is missing has not sampled anything in builds that
        # know the token fields; older builds do not tell.
        if decoded is None and "n_prompt_tokens_processed" in entry:
            phase = Phase.PREFILL
    elif processing is False:
        phase = Phase.IDLE
    else:
        phase = None
        fields.notes.append(f"slot {slot_id} does not say whether it is processing; its phase is left out")
    task = entry.get("id_task")
    # A slot that never worked has no task and no parameters yet: it is known to hold nothing.
    never_worked = task is None and "params" not in entry and processing is False
    return SlotSeen(
        id=slot_id,
        context_limit_tokens=fields.count("n_ctx"),
        processing=processing is True,
        phase=phase,
        # -1 stands for "no task yet" in some builds.
        task=None if task == -1 else fields.count("id_task"),
        held_tokens=0 if never_worked else fields.count("n_prompt_tokens"),
        computed_tokens=fields.count("n_prompt_tokens_processed"),
        reused_tokens=fields.count("n_prompt_tokens_cache"),
        decoded_tokens=decoded,
    )


def parse_props(body: bytes) -> tuple[ServerProps, tuple[str, ...]]:
    """Return what /props says and one line for each field that was left out.

    Raises ParseError when it is not an answer of llama-server.
    """
    answer = _json(body)
    if not isinstance(answer, dict):
        raise ParseError(f"/props is not an object but {_kind(answer)}")
    if "default_generation_settings" not in answer and "total_slots" not in answer:
        raise ParseError("/props has neither total_slots nor default_generation_settings")
    notes: list[str] = []
    fields = _Fields("/props", answer, notes)
    defaults = answer.get("default_generation_settings")
    context = None
    if isinstance(defaults, dict):
        context = _Fields("/props", defaults, notes).count("n_ctx")
    path = fields.text("model_path", LONGEST_PATH)
    model = fields.text("model_alias") or path
    return (
        ServerProps(
            model=(model_name(model)[:LONGEST_TEXT] or None) if model else None,
            model_path=path,
            build=fields.text("build_info"),
            file_type=fields.text("model_ftype"),
            total_slots=fields.count("total_slots"),
            context_limit_tokens=context,
            sleeping=fields.truth("is_sleeping"),
            slots_endpoint=fields.truth("endpoint_slots"),
            metrics_endpoint=fields.truth("endpoint_metrics"),
        ),
        tuple(notes),
    )


def model_name(served: str) -> str:
    """Return the name a model is served by, without directories, `.gguf` and shard suffix."""
    name = re.split(r"[\\/]", served.strip())[-1]
    name = re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)
    return re.sub(r"-\d{5}-of-\d{5}$", "", name)


_REQUIRED_COUNTERS = ("prompt_tokens_total", "tokens_predicted_total")
_COUNTER_LINE = re.compile(r"^llamacpp:([a-z_]+)(?:\{\})? (\S+)", re.MULTILINE)


def parse_counters(body: bytes, process_identity: str | None = None) -> ServerCounters:
    """Return the counters of a /metrics answer.

    The two `*_tokens_seconds` gauges are not read: every fetch by anyone resets them.
    Raises ParseError when llama-server's token counters are not in there.
    """
    text = body.decode("utf-8", "replace")
    if text.startswith('"'):  # builds around b7010 sent the text JSON-escaped
        escaped = _json(body)
        text = escaped if isinstance(escaped, str) else text
    values: dict[str, float] = {}
    steps: dict[str, float] = {}
    for name, value in _COUNTER_LINE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        if math.isfinite(number) and 0 <= number < LARGEST_COUNT:
            values[name] = number
            steps[name] = _step(value, number)
    missing = [name for name in _REQUIRED_COUNTERS if name not in values]
    if missing:
        raise ParseError(f"/metrics has no usable llamacpp:{missing[0]}")

    def count(name: str) -> int | None:
        return int(values[name]) if name in values else None

    def step(name: str) -> int:
        return max(1, round(steps.get(name, 1.0)))

    return ServerCounters(
        computed_tokens=int(values["prompt_tokens_total"]),
        generated_tokens=int(values["tokens_predicted_total"]),
        prefill_seconds=values.get("prompt_seconds_total"),
        decode_seconds=values.get("tokens_predicted_seconds_total"),
        reused_tokens=count("prompt_tokens_cached_total"),
        drafted_tokens=count("spec_decode_num_draft_tokens_total"),
        draft_accepted_tokens=count("spec_decode_num_accepted_tokens_total"),
        requests_processing=count("requests_processing"),
        requests_deferred=count("requests_deferred"),
        process_identity=process_identity,
        computed_step=step("prompt_tokens_total"),
        reused_step=step("prompt_tokens_cached_total"),
        generated_step=step("tokens_predicted_total"),
        prefill_seconds_step=steps.get("prompt_seconds_total", 0.0),
    )


PRINTED_DIGITS = 6
"""Significant digits of a number in /metrics: a C++ stream's default (tools/server/server-context.cpp)."""


def _step(text: str, number: float) -> float:
    """Return how far apart two numbers next to each other are printed; trailing zeros are not."""
    if not number:
        return 0.0
    digits = len(re.sub(r"e.*|\.", "", text.lower()).lstrip("0"))
    power = math.floor(math.log10(number))
    return float(10.0 ** (power + 1 - max(PRINTED_DIGITS, digits)))


def _json(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        # The text itself may hold a prompt: only its first sign is told.
        start = body.lstrip()[:1]
        what = "an HTML page" if start == b"<" else "empty" if not start else "cut off or no JSON"
        raise ParseError(f"the answer is {what}") from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


class _Fields:
    """Typed reading of one JSON object; a wrong field is left out with one note, value unseen."""

    def __init__(self, place: str, entry: Mapping[str, Any], notes: list[str]) -> None:
        self._place = place
        self._entry = entry
        self.notes = notes

    def count(self, name: str) -> int | None:
        value = self._entry.get(name)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_COUNT:
            return value
        what = "out of range" if isinstance(value, int | float) else _kind(value)
        self.notes.append(f"{self._place}: {name} is {what}, not a count; left out")
        return None

    def text(self, name: str, longest: int = LONGEST_TEXT) -> str | None:
        value = self._entry.get(name)
        if isinstance(value, str) and value.strip():
            # JSON may hold half a surrogate pair, which no output could encode.
            return value[:longest].encode("utf-8", "replace").decode()
        if value not in (None, "") and not isinstance(value, str):
            self.notes.append(f"{self._place}: {name} is {_kind(value)}, not a text; left out")
        return None

    def truth(self, name: str) -> bool | None:
        value = self._entry.get(name)
        if value is None or isinstance(value, bool):
            return value
        self.notes.append(f"{self._place}: {name} is {_kind(value)}, not true or false; left out")
        return None
