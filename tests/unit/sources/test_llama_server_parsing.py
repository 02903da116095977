"""Parsers: bytes of any build in, observed values out; a wrong field costs that field only."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.observed.server import Phase, ServerCounters, ServerProps, SlotSeen
from kvscope.sources.llama_server_answers import (
    LARGEST_COUNT,
    MOST_SLOTS,
    ParseError,
    model_name,
    parse_counters,
    parse_props,
    parse_slots,
)

NOT_COUNTS = [-1, 2**53, 10**400, 1.5, 1e300, True, "12", "", [1], {}]

NEVER_USED = {"id": 0, "n_ctx": 4096, "speculative": False, "is_processing": False}
AT_WORK = {
    "id": 1,
    "n_ctx": 4096,
    "is_processing": True,
    "id_task": 7,
    "n_prompt_tokens": 512,
    "n_prompt_tokens_processed": 300,
    "n_prompt_tokens_cache": 212,
    "params": {"temperature": 0.8},
    "next_token": [{"n_decoded": 3, "has_next_token": True}],
}
METRICS = """# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 1707
llamacpp:prompt_tokens_cached_total 482
llamacpp:prompt_seconds_total 1.25
llamacpp:tokens_predicted_total 64
llamacpp:tokens_predicted_seconds_total 2.5
llamacpp:prompt_tokens_seconds 99999
llamacpp:requests_processing 1
llamacpp:requests_deferred 0
"""


def slots_of(*entries: Any) -> tuple[SlotSeen, ...]:
    return parse_slots(json.dumps(list(entries)).encode())[0]


def notes_of(*entries: Any) -> tuple[str, ...]:
    return parse_slots(json.dumps(list(entries)).encode())[1]


def props_of(**fields: Any) -> ServerProps:
    return parse_props(json.dumps({"total_slots": 4, **fields}).encode())[0]


# --- /slots -----------------------------------------------------------------------------------------


def test_a_slot_that_never_worked_is_idle_and_known_to_hold_nothing() -> None:
    assert slots_of(NEVER_USED) == (
        SlotSeen(0, 4096, processing=False, phase=Phase.IDLE, task=None, held_tokens=0),
    )


def test_a_slot_at_work_shows_its_task_and_tokens() -> None:
    assert slots_of(AT_WORK) == (
        SlotSeen(
            1,
            4096,
            processing=True,
            phase=Phase.DECODE,
            task=7,
            held_tokens=512,
            computed_tokens=300,
            reused_tokens=212,
            decoded_tokens=3,
        ),
    )


def test_a_slot_that_has_not_generated_yet_reads_its_prompt() -> None:
    assert slots_of(AT_WORK | {"next_token": [{"n_decoded": 0}]})[0].phase is Phase.PREFILL
    assert slots_of(AT_WORK | {"next_token": []})[0].phase is Phase.PREFILL


def test_older_builds_have_next_token_as_an_object() -> None:
    assert slots_of(AT_WORK | {"next_token": {"n_decoded": 9}})[0].decoded_tokens == 9


@pytest.mark.parametrize(("state", "processing"), [(0, False), (1, True)])
def test_builds_before_b4027_say_state_for_is_processing(state: int, processing: bool) -> None:
    old = {
        "id": 0,
        "id_task": -1,
        "n_ctx": 512,
        "state": state,
        "prompt": None,
        "next_token": {"n_decoded": 0},
    }
    (slot,) = slots_of(old)
    assert slot.processing is processing
    assert slot.phase is (Phase.PREFILL if processing else Phase.IDLE)


@pytest.mark.parametrize("fields", [{}, {"state": None}, {"state": "busy"}, {"is_processing": "yes"}])
def test_a_slot_that_does_not_say_whether_it_works_has_no_phase(fields: dict[str, Any]) -> None:
    entry = {"id": 0, "n_ctx": 512} | fields
    assert slots_of(entry)[0].phase is None
    assert "its phase is left out" in " ".join(notes_of(entry))


def test_builds_without_token_fields_leave_tokens_unknown() -> None:
    old = {"id": 0, "id_task": 3, "n_ctx": 512, "is_processing": True, "next_token": {"n_decoded": 2}}
    (slot,) = slots_of(old)
    assert (slot.held_tokens, slot.computed_tokens, slot.reused_tokens) == (None, None, None)
    assert slot.phase is Phase.DECODE


def test_work_whose_phase_an_old_build_does_not_tell_has_none() -> None:
    (slot,) = slots_of({"id": 0, "id_task": 3, "n_ctx": 512, "is_processing": True})
    assert slot.processing
    assert slot.phase is None


def test_task_minus_one_means_that_no_task_came_yet() -> None:
    assert slots_of(AT_WORK | {"id_task": -1})[0].task is None
    assert notes_of(AT_WORK | {"id_task": -1}) == ()


def test_slots_come_by_id_whatever_their_order() -> None:
    assert [slot.id for slot in slots_of({**AT_WORK, "id": 3}, NEVER_USED, AT_WORK)] == [0, 1, 3]


def test_of_a_slot_listed_twice_the_first_is_used_and_a_line_says_so() -> None:
    twice = (AT_WORK, AT_WORK | {"n_prompt_tokens": 1})
    assert [slot.held_tokens for slot in slots_of(*twice)] == [512]
    assert notes_of(*twice) == ("slot 1 is listed twice; the first is used",)


@pytest.mark.parametrize("number", [*NOT_COUNTS, None, MOST_SLOTS])
def test_a_slot_without_a_usable_id_costs_no_other_slot(number: Any) -> None:
    assert [slot.id for slot in slots_of(AT_WORK | {"id": number}, NEVER_USED)] == [0]
    assert notes_of(AT_WORK | {"id": number}, NEVER_USED)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("n_ctx", "n_prompt_tokens", "n_prompt_tokens_cache", "id_task")
        for value in NOT_COUNTS
        if (name, value) != ("id_task", -1)  # which says that there is no task
    ],
)
def test_what_is_no_count_is_left_out_alone(name: str, value: Any) -> None:
    (wrong,), (right,) = slots_of(AT_WORK | {name: value}), slots_of(AT_WORK)
    fields = {
        "n_ctx": "context_limit_tokens",
        "n_prompt_tokens": "held_tokens",
        "n_prompt_tokens_cache": "reused_tokens",
        "id_task": "task",
    }
    assert getattr(wrong, fields[name]) is None
    assert wrong.computed_tokens == right.computed_tokens
    (note,) = notes_of(AT_WORK | {name: value})
    assert name in note
    assert "left out" in note


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_numbers_that_are_none_are_left_out(written: str) -> None:
    body = json.dumps([AT_WORK | {"n_prompt_tokens": "?"}]).replace('"?"', written)
    assert parse_slots(body.encode())[0][0].held_tokens is None


def test_a_number_too_long_to_read_is_refused() -> None:
    with pytest.raises(ParseError):
        parse_slots(b'[{"id": ' + b"9" * 10_000 + b"}]")


def test_unknown_fields_change_nothing() -> None:
    more = {"new_field": {"deep": [1, 2]}, "timings": None, "params": {"prompt": "x"}}
    assert slots_of(AT_WORK | more) == slots_of(AT_WORK)
    assert notes_of(AT_WORK | more) == ()


def test_nothing_of_a_prompt_is_kept() -> None:
    secret = "the canary sings"
    entry = AT_WORK | {
        "prompt": secret,
        "generated": secret,
        "params": {"prompt": secret, "stop": [secret]},
        "next_token": [{"n_decoded": 1, "text": secret}],
        "n_ctx": secret,
        "is_processing": secret,
        secret: secret,
    }
    assert secret not in repr(parse_slots(json.dumps([entry]).encode()))


def test_no_slots_at_all_are_no_slots() -> None:
    assert parse_slots(b"[]") == ((), ())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": 1}', "an object"),
        (b'"text"', "a text"),
        (b"null", "null"),
        (b"true", "a truth value"),
        (b"12", "a number"),
        (b"[[1]]", "a list where a slot should be"),
        (b'["canary"]', "a text where a slot should be"),
        (b"[{}]", "no object with an id"),
        (b"<html>canary</html>", "an HTML page"),
        (b"  <!doctype html>", "an HTML page"),
        (b"", "empty"),
        (b"   ", "empty"),
        (b'[{"id": 0, "n_c', "cut off or no JSON"),
        (b"\xff\xfe\x00canary", "cut off or no JSON"),
        (b"[" * 100_000, "cut off or no JSON"),
    ],
)
def test_what_is_no_list_of_slots_is_refused_in_one_line_without_its_text(body: bytes, said: str) -> None:
    with pytest.raises(ParseError, match=said) as refused:
        parse_slots(body)
    assert "canary" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_utf_8_cost_only_the_text_they_stand_in() -> None:
    body = json.dumps([AT_WORK | {"params": {"prompt": "?"}}]).encode().replace(b'"?"', b'"\xff\xc3"')
    assert parse_slots(body)[0] == slots_of(AT_WORK)


# --- /props -----------------------------------------------------------------------------------------


def test_props_of_a_new_build_are_read() -> None:
    assert props_of(
        default_generation_settings={"n_ctx": 4096},
        model_alias="tiny",
        model_path="/models/other.gguf",
        model_ftype="Q4_K",
        build_info="b11549-abc",
        is_sleeping=False,
        endpoint_slots=True,
        endpoint_metrics=False,
    ) == ServerProps("tiny", "b11549-abc", "Q4_K", 4, 4096, False, True, False, "/models/other.gguf")


def test_props_of_an_old_build_leave_unknown_what_they_lack() -> None:
    old, notes = parse_props(b'{"default_generation_settings": {"n_ctx": 512}, "total_slots": 1}')
    assert old == ServerProps(total_slots=1, context_limit_tokens=512)
    assert old.sleeping is None
    assert notes == ()


@pytest.mark.parametrize(
    ("served", "name"),
    [
        ("/home/somebody/models/Qwen3-8B-Q4_K_M.gguf", "Qwen3-8B-Q4_K_M"),
        (r"C:\Users\somebody\big-00001-of-00003.GGUF", "big"),
        ("ggml-org/gemma-3-270m", "gemma-3-270m"),
        ("tiny", "tiny"),
        (" tiny ", "tiny"),
    ],
)
def test_a_model_is_named_without_directories_gguf_and_shard(served: str, name: str) -> None:
    assert model_name(served) == name
    assert props_of(model_path=served).model == name


@pytest.mark.parametrize("alias", ["", "  ", None, "/", "/home/somebody/"])
def test_a_model_without_a_name_is_unknown(alias: str | None) -> None:
    assert props_of(model_alias=alias).model is None


@pytest.mark.parametrize("field", ["build_info", "model_ftype", "model_alias"])
@pytest.mark.parametrize("value", [1, 1.5, True, ["x"], {"a": "canary"}])
def test_what_is_no_text_is_left_out_with_a_line(field: str, value: Any) -> None:
    props, notes = parse_props(json.dumps({"total_slots": 1, field: value}).encode())
    assert props == ServerProps(total_slots=1)
    assert len(notes) == 1
    assert field in notes[0]
    assert "canary" not in notes[0]


@pytest.mark.parametrize("value", [0, 1, "true", []])
def test_what_is_not_true_or_false_is_left_out(value: Any) -> None:
    assert props_of(is_sleeping=value).sleeping is None


def test_half_a_surrogate_pair_and_endless_text_can_be_written_out() -> None:
    props, _ = parse_props(b'{"total_slots": 1, "model_alias": "a\\ud800' + b"b" * 10_000 + b'"}')
    assert props.model
    assert len(props.model.encode()) <= 1024


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"message": "hello"}', b"<html>", b"", b"7", b'{"total_sl'])
def test_what_is_no_props_of_llama_server_is_refused(body: bytes) -> None:
    with pytest.raises(ParseError):
        parse_props(body)


# --- /metrics ---------------------------------------------------------------------------------------


def test_counters_are_read_and_the_averages_that_every_fetch_resets_are_not() -> None:
    assert parse_counters(METRICS.encode(), "123") == ServerCounters(
        computed_tokens=1707,
        generated_tokens=64,
        prefill_seconds=1.25,
        decode_seconds=2.5,
        reused_tokens=482,
        requests_processing=1,
        requests_deferred=0,
        process_identity="123",
        prefill_seconds_step=pytest.approx(1e-05),
    )


def test_builds_around_b7010_sent_the_text_json_escaped() -> None:
    assert parse_counters(json.dumps(METRICS).encode()) == parse_counters(METRICS.encode())


def test_older_builds_count_no_reused_tokens() -> None:
    old = "\n".join(line for line in METRICS.splitlines() if "cached" not in line)
    assert parse_counters(old.encode()).reused_tokens is None


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1", "1e300", "many", '"12"', "0x10"])
def test_a_required_counter_that_is_no_count_is_refused_by_name(value: str) -> None:
    body = METRICS.replace("prompt_tokens_total 1707", f"prompt_tokens_total {value}")
    with pytest.raises(ParseError, match="llamacpp:prompt_tokens_total"):
        parse_counters(body.encode())


@pytest.mark.parametrize("value", ["NaN", "-0.5", "1e300", "soon"])
def test_another_counter_that_is_no_count_is_left_out_alone(value: str) -> None:
    counters = parse_counters(METRICS.replace("seconds_total 1.25", f"seconds_total {value}").encode())
    assert counters.prefill_seconds is None
    assert counters.decode_seconds == 2.5


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"go_goroutines 8\n", b"{}", b'"', b'"\\ud800', b"\xff\xfe\xff", b'{"a": 1}']
)
def test_metrics_of_something_else_are_refused(body: bytes) -> None:
    with pytest.raises(ParseError):
        parse_counters(body)


# --- whatever comes ---------------------------------------------------------------------------------

numbers = st.integers() | st.floats() | st.sampled_from([2**53 - 1, 2**53, -1, 0, 10**30])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
slot_fields = st.sampled_from([*AT_WORK, "state", "prompt"])
entries = st.dictionaries(slot_fields, values | st.sampled_from(list(AT_WORK.values())), max_size=10)
props_fields = st.sampled_from(
    ["total_slots", "default_generation_settings", "model_alias", "model_path", "is_sleeping", "build_info"]
)


@settings(max_examples=200)
@given(st.lists(entries, max_size=4))
def test_whatever_slots_hold_they_are_read_or_refused(answer: list[dict[str, Any]]) -> None:
    try:
        slots, notes = parse_slots(json.dumps(answer).encode())
    except ParseError:
        return
    assert [slot.id for slot in slots] == sorted({slot.id for slot in slots})
    for slot in slots:
        counts = (slot.held_tokens, slot.computed_tokens, slot.reused_tokens, slot.decoded_tokens, slot.task)
        assert all(count is None or (type(count) is int and 0 <= count < LARGEST_COUNT) for count in counts)
        assert slot.processing or slot.phase in (None, Phase.IDLE)
    assert all("\n" not in note for note in notes)


@settings(max_examples=200)
@given(st.dictionaries(props_fields, values, max_size=6))
def test_whatever_props_hold_they_are_read_or_refused(answer: dict[str, Any]) -> None:
    try:
        props, _ = parse_props(json.dumps(answer).encode())
    except ParseError:
        return
    assert props.model is None or (props.model and "/" not in props.model)
    (props.model or "").encode()


@settings(max_examples=200)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_whatever_bytes_come_they_are_read_or_refused(body: bytes) -> None:
    for parse in (parse_slots, parse_props, parse_counters, lambda body: parse_counters(b'"' + body)):
        try:
            parse(body)
        except ParseError as refused:
            assert "\n" not in str(refused)  # noqa: PT017 - most bodies are refused, some are read


@settings(max_examples=100)
@given(st.text(alphabet="0123456789.eE+-NaInf", max_size=8))
def test_whatever_number_a_counter_has_it_is_read_or_refused(number: str) -> None:
    body = METRICS.replace(" 1707", f" {number}").encode()
    with contextlib.suppress(ParseError):
        assert 0 <= parse_counters(body).computed_tokens < LARGEST_COUNT


@pytest.mark.parametrize(
    ("text", "value", "step"),
    [
        ("0", 0, 1),
        ("41", 41, 1),
        ("999999", 999_999, 1),
        ("1.08e+06", 1_080_000, 10),
        ("1.08123e+06", 1_081_230, 10),
        ("2.34568e+07", 23_456_800, 100),
        ("1080001", 1_080_001, 1),
        ("1080000", 1_080_000, 1),
    ],
)
def test_how_finely_a_counter_is_printed_is_read_with_it(text: str, value: int, step: int) -> None:
    """A C++ stream prints six significant digits; builds that print all of them are exact."""
    body = f"llamacpp:prompt_tokens_total {text}\nllamacpp:tokens_predicted_total 5\n".encode()
    counters = parse_counters(body)
    assert (counters.computed_tokens, counters.computed_step) == (value, step)
    assert counters.generated_step == 1
