"""Our reading of flags and variables against llama.cpp's own parser, and against servers it started.

The library that runs the demo's server has common/arg.cpp in it. Its common_params_parse fills the C++
structure that the Python object CommonParams wraps, so what it made of each flag can be read there.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from kvscope.observed.model import ContextSettings
from kvscope.settings import ServerSettings
from kvscope.sources.server_arguments import FLAGS, ArgumentsError, context_settings
from kvscope.sources.server_process import find_server_process
from kvscope.tracking.context import unified

pytestmark = pytest.mark.real_server

PARSE = """
import ctypes
import xllamacpp

LLAMA_EXAMPLE_SERVER, OBJECT_HEADER, N_CTX = 12, 16, 4
common_params_parse = ctypes.CDLL(
    xllamacpp.xllamacpp.__file__
)._Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E
common_params_parse.restype = ctypes.c_bool


def parse(arguments):
    params = xllamacpp.CommonParams()
    params.n_ctx = 1234
    structure = id(params) + OBJECT_HEADER
    assert ctypes.c_int32.from_address(structure + N_CTX).value == 1234, "the structure lies elsewhere"
    params.n_ctx = 0
    words = [b"llama-server", *(argument.encode() for argument in arguments)]
    argv = (ctypes.c_char_p * (len(words) + 1))(*words)
    taken = common_params_parse(len(words), argv, ctypes.c_void_p(structure), LLAMA_EXAMPLE_SERVER, None)
    return params if taken else None
"""

ANSWER = (
    PARSE
    + """
import json
import sys

libc = ctypes.CDLL(None)


def name(member, prefix):
    return member.name.removeprefix(prefix).lower()


def shown(params):
    layers, draft = params.n_gpu_layers, params.speculative.draft
    kinds = [name(kind, "COMMON_SPECULATIVE_TYPE_").replace("_", "-") for kind in params.speculative.types]
    flash = name(params.flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_")
    return {
        "context_tokens": params.n_ctx,
        "slots": params.n_parallel,
        "unified": params.kv_unified,
        "cache_type_k": name(params.cache_type_k, "GGML_TYPE_"),
        "cache_type_v": name(params.cache_type_v, "GGML_TYPE_"),
        "swa_full": params.swa_full,
        "flash_attention": {"enabled": "on", "disabled": "off"}.get(flash, flash),
        "batch_tokens": params.n_batch,
        "micro_batch_tokens": params.n_ubatch,
        "fit": params.fit_params,
        "draft_kinds": [kind for kind in kinds if kind != "none"],
        "draft_tokens_max": draft.n_max,
        "draft_cache_type_k": name(xllamacpp.ggml_type(draft.cache_type_k), "GGML_TYPE_"),
        "draft_cache_type_v": name(xllamacpp.ggml_type(draft.cache_type_v), "GGML_TYPE_"),
        "draft_model": draft.mparams.path or None,
        "gpu_layers": "auto" if layers == -1 else "all" if layers < -1 else str(layers),
        "kv_on_gpu": not params.no_kv_offload,
        "model_path": params.model.path or None,
        "sleep_idle_seconds": params.sleep_idle_seconds,
        "unified_slot_tokens": params.kv_unified_per_slot,
    }


for arguments, variables in json.load(sys.stdin):
    for variable, value in variables.items():
        libc.setenv(variable.encode(), value.encode(), 1)
    params = parse(arguments)
    for variable in variables:
        libc.unsetenv(variable.encode())
    print("ANSWER", json.dumps(params and shown(params)), flush=True)
"""
)

SERVE = (
    PARSE
    + """
import sys
import threading

server = xllamacpp.Server(parse(sys.argv[1:]))
print(server.listening_address, flush=True)
threading.Event().wait()
"""
)

Case = tuple[Sequence[str], Mapping[str, str]]
Answer = dict[str, Any] | None


def surroundings(home: Path) -> dict[str, str]:
    """Our environment without settings of a llama-server, in variables or files."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "XDG_"))}
    return {**kept, "HOME": str(home)}


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[Case]], list[Answer]]:
    """Asks the real parser: its reading of each case, None where it refuses."""
    environment = surroundings(tmp_path_factory.mktemp("home"))

    def ask_all(cases: Sequence[Case]) -> list[Answer]:
        done = subprocess.run(
            [sys.executable, "-c", ANSWER],
            input=json.dumps(cases),
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        answers = [
            json.loads(line.removeprefix("ANSWER "))
            for line in done.stdout.splitlines()
            if line.startswith("ANSWER ")
        ]
        assert len(answers) == len(cases), done.stderr[-2000:]
        return answers

    return ask_all


@dataclass(frozen=True)
class Option:
    """One option of llama-server's help."""

    flags: tuple[str, ...]
    values: int
    variable: str | None


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[Option]:
    """Every option that the real `llama-server --help` lists."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE + "parse(['--help'])"],
        capture_output=True,
        text=True,
        env=surroundings(tmp_path_factory.mktemp("home")),
        timeout=60,
    )
    listed = []
    for entry in re.split(r"\n(?=-)", done.stdout):
        head = re.match(r"((?:-[^\s,]+,\s*)*-[^\s,]+)(?: (\S.*?))?(?:\s{2,}|\n|$)", entry)
        if head is None or entry.startswith("-----"):
            continue
        values = 0 if head[2] is None else 2 if re.fullmatch("[A-Z]+ [A-Z]+", head[2]) else 1
        variable = re.search(r"\(env: (\w+)\)", entry)
        listed.append(Option(tuple(re.split(r",\s*", head[1])), values, variable[1] if variable else None))
    return listed


def said(settings: ContextSettings) -> dict[str, Any]:
    return {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.name not in ("notes", "unreadable") and getattr(settings, field.name) is not None
    }


# --- the table of flags -----------------------------------------------------------------------------


def test_every_flag_of_the_real_help_is_known_with_the_number_of_its_values(options: list[Option]) -> None:
    assert len(options) > 200
    real = {flag: option.values for option in options for flag in option.flags}
    assert {flag: FLAGS.get(flag) for flag in real} == real


def test_flags_of_older_builds_are_none_of_this_one(
    ask: Callable[[Sequence[Case]], list[Answer]], options: list[Option]
) -> None:
    real = {flag for option in options for flag in option.flags}
    older = sorted(set(FLAGS) - real)
    assert older
    assert ask([([flag, "1", "1"][: FLAGS[flag] + 1], {}) for flag in older]) == [None] * len(older)


def test_every_variable_of_the_real_help_says_what_its_flag_says(options: list[Option]) -> None:
    compared = 0
    for option in options:
        if option.variable is None:
            continue
        for value in ("1", "on", "q8_0", "draft-mtp"):
            by_flag = context_settings([option.flags[0], *([value] * option.values)])
            by_variable = context_settings([], {option.variable: value if option.values else "on"})
            assert said(by_variable) == said(by_flag), option
            assert by_variable.unreadable == by_flag.unreadable, option
            compared += bool(said(by_flag))
    assert compared > 20


def test_presets_change_nothing_that_is_not_left_out(
    ask: Callable[[Sequence[Case]], list[Answer]], options: list[Option]
) -> None:
    presets = [
        flag
        for option in options
        for flag in option.flags
        if re.search("-(default|spec)$", flag) and flag != "--spec-default"
    ]
    assert len(presets) > 8
    untouched, *answers = ask([((), {}), *(([flag], {}) for flag in presets)])
    assert untouched is not None
    for flag, answer in zip(presets, answers, strict=True):
        assert answer is not None
        changed = {field for field, value in answer.items() if value != untouched[field]}
        assert changed <= set(context_settings([flag]).unreadable), flag
        assert context_settings([flag]).notes


# --- values -----------------------------------------------------------------------------------------

WORDS = ("on", "off", "auto", "1", "0", "-1", "true", "false", "enabled", "disabled", "yes", "ON")
CASES: list[tuple[str, dict[str, str]]] = [
    ("", {}),
    ("-c 4096", {}),
    ("--ctx_size 4096", {}),
    ("-c 4096abc", {}),
    ("-c 1e3 -np 2x", {}),
    ("-c many", {}),
    ("-c 2147483647", {}),
    ("-c 2147483648", {}),
    ("-c", {}),
    ("-c 5 -c 6", {}),
    ("--alias -c -c 77", {}),
    ("--alias --kv-unified -np 3", {}),
    ("-np 0", {}),
    ("-np -1", {}),
    ("-np -3", {}),
    ("--parallel 3 --kv-unified", {}),
    ("-kvu -no-kvu", {}),
    ("-no-kvu --kv_unified", {}),
    ("--kv-unified-per-slot 512", {}),
    ("-ctk q8_0 --cache-type-v iq4_nl", {}),
    ("-ctk Q8_0", {}),
    ("-ctv q6_0", {}),
    *((f"-fa {word}", {}) for word in WORDS),
    *((f"-fit {word}", {}) for word in WORDS),
    ("--swa-full", {}),
    ("--swa_full", {}),
    ("--no-swa-full", {}),
    ("-b 64 -ub 32", {}),
    ("-ub 0", {}),
    ("-nkvo", {}),
    ("-nkvo -kvo", {}),
    *((f"-ngl {count}", {}) for count in ("all", "auto", "99", "0", "-1", "-2", "-5", "many", "ALL", "9x")),
    ("--spec-type draft-mtp,ngram-mod", {}),
    ("--spec-type draft-mtp --spec-type ngram-mod", {}),
    ("--spec-type none", {}),
    ("--spec-type ngram-mod,none,bogus", {}),
    ("--spec-type bogus,none", {}),
    ("--spec-type mtp", {}),
    ("--spec-type draft-mtp,", {}),
    ("--spec-type draft-mtp --spec-default", {}),
    ("--spec-draft-n-max 7", {}),
    ("--spec-draft-n-max -1", {}),
    ("-md d.gguf -ctkd q4_0 --cache-type-v-draft q8_0", {}),
    ("--spec-draft-model d.gguf --spec-draft-type-k bf16 --spec-draft-type-v f32", {}),
    ("-m a_b.gguf --n-gpu-layers 3 --gpu-layers 4", {}),
    *((f"--sleep-idle-seconds {seconds}", {}) for seconds in ("300", "0", "-1", "-2", "3.7", "soon")),
    ("a-stray-word", {}),
    ("--brand-new-flag 5", {}),
    ("", {"LLAMA_ARG_CTX_SIZE": "4096"}),
    ("-c 5", {"LLAMA_ARG_CTX_SIZE": "4096"}),
    ("", {"LLAMA_ARG_CTX_SIZE": "4k"}),
    ("", {"LLAMA_ARG_CTX_SIZE": "many"}),
    ("", {"LLAMA_ARG_CTX_SIZE": ""}),
    *(
        ("", {"LLAMA_ARG_KV_UNIFIED": word})
        for word in ("on", "enabled", "true", "1", "off", "0", "TRUE", "")
    ),
    ("", {"LLAMA_ARG_KV_UNIFIED": "1", "LLAMA_ARG_NO_KV_UNIFIED": ""}),
    ("-kvu", {"LLAMA_ARG_NO_KV_UNIFIED": "1"}),
    *(("", {"LLAMA_ARG_SWA_FULL": word}) for word in (*WORDS, "")),
    ("", {"LLAMA_ARG_NO_SWA_FULL": "1"}),
    ("", {"LLAMA_ARG_NO_KV_OFFLOAD": "0"}),
    ("-kvo", {"LLAMA_ARG_KV_OFFLOAD": "0"}),
    ("", {"LLAMA_ARG_FLASH_ATTN": "off", "LLAMA_ARG_FIT": "0", "LLAMA_ARG_N_GPU_LAYERS": "all"}),
    ("--spec-type ngram-mod", {"LLAMA_ARG_SPEC_TYPE": "draft-mtp"}),
    ("", {"LLAMA_ARG_SPEC_DRAFT_N_MAX": "5", "LLAMA_ARG_N_PARALLEL": "3", "LLAMA_ARG_UBATCH": "7"}),
    ("", {"LLAMA_ARG_MODEL": "m.gguf", "LLAMA_ARG_SPEC_DRAFT_MODEL": ""}),
    ("", {"LLAMA_ARG_SLEEP_IDLE_SECONDS": "9"}),
]

READ_ANYWAY: list[str] = ["-c=4096", "--ctx-size=4096", "-fa", "--draft-max 7", "--mlock"]
"""What other builds or wrappers take."""

REFUSED_ALTHOUGH_TAKEN: list[str] = ["-c -5", "-b 0", "-ub -1"]
"""What the parser takes and no server can start with."""


def assert_read_alike(case: Case, answer: Answer, untouched: dict[str, Any]) -> None:
    arguments, variables = case
    if answer is None:
        with pytest.raises(ArgumentsError):
            context_settings(arguments, variables, strict=True)
        return
    settings = context_settings(arguments, variables, strict=True)
    read = {
        name: list(value) if isinstance(value, tuple) else value for name, value in said(settings).items()
    }
    assert {**untouched, **read} == answer, case


def test_each_case_is_read_or_refused_as_the_real_parser_does(
    ask: Callable[[Sequence[Case]], list[Answer]],
) -> None:
    cases: list[Case] = [(line.split(), variables) for line, variables in CASES]
    answers = ask(cases)
    untouched = answers[0]
    assert untouched is not None
    assert sum(answer is None for answer in answers) > 20
    for case, answer in zip(cases, answers, strict=True):
        assert_read_alike(case, answer, untouched)


def test_any_mixture_is_read_or_refused_as_the_real_parser_does(
    ask: Callable[[Sequence[Case]], list[Answer]],
) -> None:
    choose = random.Random(11549)
    pieces = [line.split() for line, _ in CASES]
    pieces += [
        [flag, value] for flag in ("--alias", "--tags", "--api-key") for value in ("-c", "-kvu", "--", "")
    ]
    variables = [variables for _, variables in CASES if variables]
    cases: list[Case] = [([], {})]
    for _ in range(2000):
        arguments = [word for piece in choose.choices(pieces, k=choose.randint(1, 5)) for word in piece]
        given = choose.choices(variables, k=choose.randint(0, 3))
        cases.append((arguments, {name: value for each in given for name, value in each.items()}))
    answers = ask(cases)
    untouched = answers[0]
    assert untouched is not None
    assert sum(answer is not None for answer in answers) > 400
    for case, answer in zip(cases, answers, strict=True):
        assert_read_alike(case, answer, untouched)


def test_where_we_differ_from_the_real_parser_is_known(ask: Callable[[Sequence[Case]], list[Answer]]) -> None:
    for line, answer in zip(READ_ANYWAY, ask([(line.split(), {}) for line in READ_ANYWAY]), strict=True):
        assert answer is None, line
        assert context_settings(line.split(), strict=True).unreadable == ()
    taken = ask([(line.split(), {}) for line in REFUSED_ALTHOUGH_TAKEN])
    for line, answer in zip(REFUSED_ALTHOUGH_TAKEN, taken, strict=True):
        assert answer is not None, line
        with pytest.raises(ArgumentsError):
            context_settings(line.split(), strict=True)


# --- servers ----------------------------------------------------------------------------------------

Started = tuple[str, Path]


@pytest.fixture
def serve(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[[str, Mapping[str, str]], Started]]:
    """Starts a llama-server by its own flags and variables, ready at return: its URL and its log."""
    program = tmp_path / "llama-server"
    program.write_text(SERVE)
    log = tmp_path / "log"
    processes: list[subprocess.Popen[str]] = []

    def start(line: str, variables: Mapping[str, str]) -> Started:
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [
                    sys.executable,
                    str(program),
                    "-m",
                    str(tiny_model),
                    "--port",
                    "0",
                    "-lv",
                    "4",
                    *line.split(),
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**surroundings(tmp_path), **variables},
            )
        processes.append(process)
        assert process.stdout
        for printed in process.stdout:
            if printed.startswith("http://"):
                return printed.strip(), log
        raise AssertionError(log.read_text()[-2000:])

    yield start
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("line", "variables"),
    [
        ("-c 1024 -np 2 -ctk q8_0 -fa on", {}),
        ("-c 2048 -no-kvu", {}),
        ("", {"LLAMA_ARG_CTX_SIZE": "2048", "LLAMA_ARG_N_PARALLEL": "3", "LLAMA_ARG_KV_UNIFIED": "true"}),
        ("-c 1024 -np 2 -b 64 -ub 0 -fa off", {"LLAMA_ARG_CTX_SIZE": "2048", "LLAMA_ARG_KV_UNIFIED": "off"}),
    ],
)
def test_what_is_read_from_a_process_is_what_the_server_runs_with(
    serve: Callable[[str, Mapping[str, str]], Started], line: str, variables: Mapping[str, str]
) -> None:
    url, log = serve(line, variables)
    text = log.read_text(errors="replace")

    def logged(pattern: str) -> str:
        found = re.findall(pattern, text)
        assert found, pattern
        return str(found[-1])

    process = find_server_process(ServerSettings("main", url))
    settings = process.settings
    assert settings.unreadable == ()
    assert process.working_directory == str(Path.cwd())
    assert str(settings.context_tokens) == logged(r"llama_context: n_ctx +=\s*(\d+)")
    assert unified(settings) is (logged(r"llama_context: kv_unified +=\s*(\w+)") == "true")
    slots = 4 if settings.slots is None else settings.slots
    assert str(slots) == logged(r"llama_context: n_seq_max +=\s*(\d+)")
    assert (settings.cache_type_k or "f16") == logged(r"llama_kv_cache: size.*K \((\w+)\)")
    micro_batch = 512 if settings.micro_batch_tokens is None else settings.micro_batch_tokens
    assert str(micro_batch or settings.batch_tokens) == logged(r"llama_context: n_ubatch +=\s*(\d+)")
