"""What a llama-server command line and its environment say; the real parser is asked in tests/server."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.observed.model import ContextSettings
from kvscope.sources.server_arguments import FLAGS, ArgumentsError, context_settings, with_file_left_out


def said(line: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What a line says, without notes."""
    settings = context_settings(shlex.split(line), environment)
    return {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.name != "notes" and getattr(settings, field.name) not in (None, ())
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("-c 4096", {"context_tokens": 4096}),
        ("--ctx-size=4096", {"context_tokens": 4096}),
        ("--ctx_size 4096", {"context_tokens": 4096}),
        ("-m a_b/c_d.gguf", {"model_path": "a_b/c_d.gguf"}),
        ("-m=a=b.gguf", {"model_path": "a=b.gguf"}),
        ("-c 4096 -c 8192", {"context_tokens": 8192}),
        ("-np -1", {"slots": -1}),
        ("-kvu -no-kvu", {"unified": False}),
        ("--no-kv-unified --kv-unified", {"unified": True}),
        ("-nkvo", {"kv_on_gpu": False}),
        ("-ngl all -fit off --swa-full", {"gpu_layers": "all", "fit": False, "swa_full": True}),
        ("--spec-type draft-mtp,ngram-mod", {"draft_kinds": ("draft-mtp", "ngram-mod")}),
        (
            "--spec-type draft-mtp --spec-type none --spec-default",
            {"draft_kinds": ("draft-mtp", "ngram-mod")},
        ),
        ("--cache-type-k-draft q8_0 -md d.gguf", {"draft_cache_type_k": "q8_0", "draft_model": "d.gguf"}),
        ("--sleep-idle-seconds 300", {"sleep_idle_seconds": 300.0}),
        ("--kv-unified-per-slot 1024", {"unified_slot_tokens": 1024}),
        ("-ub 0", {"micro_batch_tokens": 0}),
    ],
)
def test_flags_are_read_in_every_spelling_and_the_last_one_counts(
    line: str, expected: dict[str, Any]
) -> None:
    assert said(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        "--alias -c -np 2",
        "--reverse-prompt '-c 5' -np 2",
        "--control-vector-layer-range -c -kvu -np 2",
        "--chat-template-kwargs '{\"-c\": 5}' --metrics -np 2",
        "--brand-new-flag 5 -np 2",
        "--brand-new-flag -5 -np 2",
        "--brand-new-switch -np 2",
        "--brand-new-flag=-c -np 2",
        "a-stray-word -np 2",
    ],
)
def test_values_of_other_flags_are_not_taken_for_flags(line: str) -> None:
    assert said(line) == {"slots": 2}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-fa -c 5", {"flash_attention": "on", "context_tokens": 5}),
        ("-c 5 -fa", {"flash_attention": "on", "context_tokens": 5}),
        ("-fa -1 -c 5", {"flash_attention": "auto", "context_tokens": 5}),
        ("--flash-attn 0", {"flash_attention": "off"}),
        ("--log-colors -c 5", {"context_tokens": 5}),
        ("--log-colors off -c 5", {"context_tokens": 5}),
        ("--mlock -cpent 9 --draft-max 7 -p hello", {"draft_tokens_max": 7}),
        ("--spec-replace -c -np -np 2", {"slots": 2}),
    ],
)
def test_flags_of_older_builds_are_read_as_these_read_them(line: str, expected: dict[str, Any]) -> None:
    assert said(line) == expected


@pytest.mark.parametrize(
    ("line", "environment", "expected"),
    [
        ("", {"LLAMA_ARG_CTX_SIZE": "4096", "HOME": "/x"}, {"context_tokens": 4096}),
        ("-c 5", {"LLAMA_ARG_CTX_SIZE": "4096"}, {"context_tokens": 5}),
        ("", {"LLAMA_ARG_KV_UNIFIED": "enabled"}, {"unified": True}),
        ("", {"LLAMA_ARG_KV_UNIFIED": "0"}, {"unified": False}),
        ("", {"LLAMA_ARG_KV_UNIFIED": "1", "LLAMA_ARG_NO_KV_UNIFIED": ""}, {"unified": False}),
        ("-kvu", {"LLAMA_ARG_NO_KV_UNIFIED": "1"}, {"unified": True}),
        ("", {"LLAMA_ARG_NO_KV_OFFLOAD": "1"}, {"kv_on_gpu": False}),
        ("", {"LLAMA_ARG_SWA_FULL": "true"}, {"swa_full": True}),
        ("", {"LLAMA_ARG_SWA_FULL": "yes"}, {}),
        ("", {"LLAMA_ARG_MODEL": ""}, {}),
        (
            "--spec-type ngram-mod",
            {"LLAMA_ARG_SPEC_TYPE": "draft-mtp"},
            {"draft_kinds": ("draft-mtp", "ngram-mod")},
        ),
        ("", {"LLAMA_ARG_SLEEP_IDLE_SECONDS": "9"}, {}),
    ],
)
def test_variables_say_what_no_flag_says(
    line: str, environment: dict[str, str], expected: dict[str, Any]
) -> None:
    assert said(line, environment) == expected


@pytest.mark.parametrize(
    ("line", "field", "note"),
    [
        ("-c many", "context_tokens", "-c 'many': no whole number; it is left out"),
        ("-c", "context_tokens", "-c lacks its value; it is left out"),
        ("-c -5", "context_tokens", "-c '-5': below 0; it is left out"),
        ("-c 99999999999", "context_tokens", "between -2147483648 and 2147483647"),
        ("-c " + "9" * 5000, "context_tokens", "-c '999999999999999999999...': not between"),
        ("-np 0", "slots", "-np '0': neither -1"),
        ("-ctk Q8_0", "cache_type_k", "-ctk 'Q8_0': none of f32, f16"),
        ("-fa yes", "flash_attention", "-fa 'yes': none of on, off, auto"),
        ("--kv-unified=1", "unified", "--kv-unified takes no value"),
        ("--spec-type mtp", "draft_kinds", "'mtp' is none of none, draft-simple"),
        ("--sleep-idle-seconds 0", "sleep_idle_seconds", "--sleep-idle-seconds '0': neither -1"),
    ],
)
def test_what_llama_server_refuses_is_left_out_with_a_note_and_refused_where_it_is_typed(
    line: str, field: str, note: str
) -> None:
    settings = context_settings(shlex.split(line))
    assert (getattr(settings, field), settings.unreadable) == (None, (field,))
    assert len(settings.notes) == 1
    assert note in settings.notes[0]
    with pytest.raises(ArgumentsError) as refused:
        context_settings(shlex.split(line), strict=True)
    assert settings.notes[0] == f"{refused.value}; it is left out"


def test_a_later_flag_mends_what_could_not_be_read() -> None:
    settings = context_settings(["-c", "8192"], {"LLAMA_ARG_CTX_SIZE": "many"})
    assert (settings.context_tokens, settings.unreadable) == (8192, ())


def test_a_number_with_something_behind_it_is_read_as_llama_cpp_does_and_said() -> None:
    settings = context_settings(["-c", "64k"], strict=True)
    assert settings == ContextSettings(context_tokens=64, notes=("-c '64k': llama.cpp reads 64",))


def test_presets_are_left_out_where_they_stand() -> None:
    settings = context_settings(shlex.split("-c 5 -np 3 --gpt-oss-20b-default -np 4"))
    assert (settings.slots, settings.context_tokens) == (4, None)
    assert settings.unreadable == ("batch_tokens", "context_tokens", "micro_batch_tokens", "model_path")
    assert settings.notes == ("--gpt-oss-20b-default: a preset of llama.cpp, its settings are left out",)


def test_a_file_of_presets_says_only_what_is_left_unsaid() -> None:
    settings = context_settings(shlex.split("--models-preset x.ini -c 5"))
    assert settings.context_tokens == 5
    assert set(settings.unreadable) == {
        field.name
        for field in fields(settings)
        if field.name not in ("context_tokens", "notes", "unreadable")
    }
    assert context_settings(["-c", "5"], {"LLAMA_ARG_MODELS_PRESET": "x"}).unreadable == settings.unreadable
    beside = with_file_left_out(ContextSettings(context_tokens=5), "config.ini")
    assert beside == replace(settings, notes=("config.ini: settings in this file are left out",))


def test_variables_that_only_other_builds_read_leave_their_setting_open() -> None:
    settings = context_settings([], {"LLAMA_ARG_MODEL_DRAFT": "d.gguf"})
    assert (settings.draft_model, settings.unreadable) == (None, ("draft_model",))


# --- typed by the user ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ctx-siez 5", "llama-server has no flag --ctx-siez; did you mean --ctx-size?"),
        ("-c 5 8", "a word has no flag before it; a value with spaces wants quotes"),
        ("--alias", "--alias lacks its value"),
        ("--metrics=1", "--metrics takes no value"),
    ],
)
def test_typed_arguments_that_llama_server_would_not_take_are_refused(line: str, message: str) -> None:
    with pytest.raises(ArgumentsError) as refused:
        context_settings(shlex.split(line), strict=True)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "line",
    [
        "--api-key sk-secret secret",
        "--api-key=sk-secret --api-kye sk-secret",
        "--api-kye=sk-secret",
        "--api-kye sk-secret",
        "--api-kye -sk-secret",
        "--api-kye -secret",
        "-p 'the secret' secret",
        "'- tell me a secret'",
        "--hf-token secret --api-key",
    ],
)
def test_no_line_repeats_a_key_or_a_prompt(line: str) -> None:
    with pytest.raises(ArgumentsError) as refused:
        context_settings(shlex.split(line), strict=True)
    assert "secret" not in str(refused.value)
    assert "secret" not in str(context_settings(shlex.split(line)))


def test_flags_that_are_not_known_are_named_once_and_not_without_end() -> None:
    line = " ".join(f"--new-{number}-x=1 --new-{number}-x=2" for number in range(8))
    (note,) = context_settings(line.split()).notes
    assert note == (
        "flags that are not known are passed over: "
        "--new-0-x, --new-1-x, --new-2-x, --new-3-x, --new-4-x and 3 more"
    )


@given(st.lists(st.one_of(st.sampled_from(sorted(FLAGS)), st.text(max_size=8)), max_size=12))
def test_any_command_line_is_read_or_refused_with_one_line(arguments: list[str]) -> None:
    settings = context_settings(arguments)
    for field in settings.unreadable:
        assert getattr(settings, field) is None
    assert not any("\n" in note for note in settings.notes)
    with contextlib.suppress(ArgumentsError):
        context_settings(arguments, strict=True)


@pytest.mark.parametrize(
    "line",
    [
        "-ot exps=CPU -ngl all",
        "-ngl all --override-tensor exps=CPU",
        "-cmoe -ngl all",
        "-ncmoe 3 -ngl 99",
        "--n-cpu-ffn 3 -ngl 99",
        "--moe-cache-mib 100 -ngl all",
        "-sm row -ngl all",
        "-ts 3,1 -ngl all",
        "-dev CUDA1 -ngl all",
        "--rpc 10.0.0.2:50052 -ngl all",
    ],
)
def test_flags_that_put_weights_elsewhere_leave_unknown_where_they_lie(line: str) -> None:
    settings = context_settings(line.split())
    assert settings.gpu_layers is not None
    assert "tensor_placement" in settings.unreadable
    assert settings.notes


def test_flags_that_move_no_weights_leave_nothing_unknown() -> None:
    assert context_settings(["-ngl", "all", "-mg", "1", "--lora", "a.gguf"]).unreadable == ()
