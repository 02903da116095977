"""kvscope plan: what is asked of it on the command line, and what it prints."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.gguf_files import header, number, split_keys, string, tensor, write, write_parts

from kvscope import cli
from kvscope.commands import plan
from kvscope.commands.plan import size_in_bytes
from kvscope.observed.gpu import GpuReading, GpuSeen
from kvscope.settings import SettingsError
from kvscope.sources.known_models import known_models

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
GEMMA = ("--model", "gemma-4-26b-a4b", "--weights", "13.26GiB")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "open_backends", lambda *_: ((), "no GPU is watched"))
    for variable in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(["plan", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def answer(run: Run) -> Callable[..., dict[str, Any]]:
    def answer(*arguments: str) -> dict[str, Any]:
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (0, "")
        document: dict[str, Any] = json.loads(out)
        return document

    return answer


def model_of(architecture: str, **values: int) -> bytes:
    """Return a GGUF header with one tensor, of whose weights nothing follows."""
    keys = (number(f"{architecture}.{key}".replace("__", "."), "u32", each) for key, each in values.items())
    return header(string("general.architecture", architecture), *keys, tensors=[tensor("output.weight")])


TINY = model_of(
    "llama",
    context_length=8192,
    block_count=4,
    embedding_length=128,
    attention__head_count=4,
    attention__head_count_kv=2,
)
TINY_TOKEN = 4 * 2 * 32 * 2 * 2


def test_the_readme_shows_what_the_command_prints(run: Run) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n\$ kvscope plan (.*?)\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for arguments, shown in blocks:
        code, out, _ = run(*shlex.split(arguments))
        assert code == 0
        assert out == shown


def test_the_question_of_a_card_of_16_gib_is_answered_without_any_file(
    answer: Callable[..., dict[str, Any]],
) -> None:
    plan = answer(*GEMMA, "--vram", "16GiB", "-c", "131072", "-np", "1")
    (context,) = plan["contexts"]
    assert context["kv_bytes"] == 2860 * (1 << 20)
    assert context["left_bytes"] == 16 * GIB - int(13.26 * GIB) - 2860 * (1 << 20)
    assert plan["model"]["list_date"] == known_models().date
    plan = answer(*GEMMA, *shlex.split("--vram 16GiB -c 131072 -np 1 -ctk q8_0 -ctv q8_0"))
    assert round(plan["contexts"][0]["kv_bytes"] / (1 << 20)) == 1519


@pytest.mark.parametrize("model", sorted(known_models().models))
@pytest.mark.parametrize(
    "arguments",
    [
        "--weights 1013.37MiB --vram 16GiB -np 1",
        "--vram 6GB",
        "--vram 96GiB -np 16 -ctk q5_1 -ctv q5_1 -c 4194304",
        "--vram 8GiB -fa off -np 3 --reserve 1GiB --swa-full",
    ],
)
def test_every_answer_fits_80_columns_and_no_figure_is_cut(run: Run, model: str, arguments: str) -> None:
    code, out, _ = run("--model", model, *arguments.split())
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "\x1b" not in out


def test_a_header_alone_answers(answer: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(TINY)
    plan = answer("tiny.gguf", "-c", "4096", "-np", "2")
    assert plan["model"]["name"] == "tiny.gguf"
    assert plan["contexts"][0]["kv_bytes"] == 4096 * TINY_TOKEN
    assert plan["contexts"][0]["slot_kv_bytes"] == 2048 * TINY_TOKEN
    assert "weights_bytes" not in plan["model"]
    assert any(note.startswith("KV only") for note in plan["notes"])


@pytest.mark.parametrize("given_part", [1, 2])
def test_a_split_model_answers_with_the_weights_of_all_its_parts(
    answer: Callable[..., dict[str, Any]], tmp_path: Path, given_part: int
) -> None:
    own = (
        number("llama.context_length", "u32", 8192),
        number("llama.block_count", "u32", 4),
        number("llama.embedding_length", "u32", 128),
        number("llama.attention.head_count", "u32", 4),
    )
    contents = [
        header(string("general.architecture", "llama"), *own, *split_keys(0, 2), tensors=[tensor("a")]),
        header(*split_keys(1, 2), tensors=[tensor("b"), tensor("c", offset=128)]),
    ]
    paths = write_parts(tmp_path, "model", [content + bytes(1000) for content in contents])
    model = answer(paths[given_part - 1].name)["model"]
    assert model["weights_bytes"] == sum(path.stat().st_size for path in paths)
    write(paths[1], contents[1] + bytes(64))
    assert "weights_bytes" not in answer(paths[given_part - 1].name)["model"]


def test_a_shape_answers_as_its_model_does(
    run: Run, answer: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for model in known_models().models:
        (tmp_path / "shape").write_text(run("--model", model, "--shape")[1])
        of_list, of_shape = answer("--model", model, "--vram", "8GiB"), answer("shape", "--vram", "8GiB")
        assert of_shape["model"]["origin"] == "shape"
        assert of_shape["contexts"] == of_list["contexts"]
        assert of_shape["fits"] == of_list["fits"]


def test_several_contexts_are_given_by_commas_or_by_repeating(
    answer: Callable[..., dict[str, Any]],
) -> None:
    plan = answer("--model", "llama-3.1-8b", "-c", "1024,2048", "--ctx-size", "4096", "-c", "1024")
    assert [context["context_tokens"] for context in plan["contexts"]] == [1024, 2048, 4096]


def test_settings_mean_what_they_mean_to_llama_server(answer: Callable[..., dict[str, Any]]) -> None:
    arguments = shlex.split("-c 8192 -np 2 -kvu -ctk q8_0 -ctv f32 --swa-full -b 1024 -ub 256 -fa on")
    settings = answer("--model", "gemma-3-27b", *arguments)["settings"]
    assert settings == {
        "slots": 2,
        "unified": True,
        "cache_type_k": "q8_0",
        "cache_type_v": "f32",
        "swa_full": True,
        "flash_attention": True,
        "batch_tokens": 1024,
        "micro_batch_tokens": 256,
    }


def test_what_is_unknown_is_absent_from_the_json(answer: Callable[..., dict[str, Any]]) -> None:
    plan = answer("--model", "llama-3.1-8b", "-c", "1024")
    assert "weights_bytes" not in plan["model"]
    assert not {"needed_bytes", "left_bytes", "slot_kv_bytes"} & plan["contexts"][0].keys()
    assert "vram_bytes" not in plan
    assert "null" not in json.dumps(plan)


def test_every_key_of_the_json_is_documented(answer: Callable[..., dict[str, Any]]) -> None:
    document = (ROOT / "docs" / "PLAN.md").read_text(encoding="utf-8")
    plan = answer(*GEMMA, "--vram", "16GiB", "-np", "2", "-fa", "off")

    def keys(value: object) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        if isinstance(value, dict):
            kinds = value.keys() <= {"full", "window", "recurrent", "compressed", "indexer", "draft"}
            return (set() if kinds else set(value)).union(*map(keys, value.values()))
        return set()

    missing = [key for key in sorted(keys(plan)) if f"`{key}`" not in document]
    assert missing == []


def test_colours_are_for_terminals_only_and_not_where_none_are_wanted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = (*GEMMA, "--vram", "8GiB")
    assert "\x1b" not in run(*over)[1]


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("16GiB", 16 * GIB),
        ("16 gib", 16 * GIB),
        ("13.26GiB", 14237816586),
        ("500MiB", 500 << 20),
        ("24GB", 24_000_000_000),
        ("1.5MB", 1_500_000),
        ("0.5TiB", GIB * 512),
        ("64KiB", 65536),
        ("17179869184", 16 * GIB),
        ("5B", 5),
    ],
)
def test_a_size_is_read_as_it_is_written(written: str, size: int) -> None:
    assert size_in_bytes(written) == size


@pytest.mark.parametrize("written", ["", "GiB", "-1GiB", "16G", "1e9", "nan", "1.GiB", "16GiB!", "\u0661GiB"])
def test_what_is_no_size_is_refused(written: str) -> None:
    with pytest.raises(SettingsError, match="is no size"):
        size_in_bytes(written)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "--model"),
        ("file.gguf --model llama-3.1-8b", "one model"),
        ("--model gemma", "gemma-4-26b-a4b"),
        ("--model llama-3.1-8b --vram 16G", "'16G'"),
        ("--model llama-3.1-8b -c 1024,x", "'x'"),
        ("--model llama-3.1-8b -c -1", "-c '-1'"),
        ("--model llama-3.1-8b -c 1024abc", "'1024abc'"),
        ("--model llama-3.1-8b -np 0", "-np '0'"),
        ("--model llama-3.1-8b -np 300", "-np 300"),
        ("--model llama-3.1-8b -ctk q9_0", "'q9_0'"),
        ("--model llama-3.1-8b -fa perhaps", "'perhaps'"),
        ("--model llama-3.1-8b -fa off -ctv q8_0", "flash attention"),
        ("--model llama-3.1-8b -ngl 99", "-n"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(run: Run, arguments: str, named: str) -> None:
    code, out, err = run(*arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert named in err


def test_what_cannot_be_answered_is_one_line_and_exit_code_1(run: Run, tmp_path: Path) -> None:
    (tmp_path / "unknown.gguf").write_bytes(model_of("nonsense", context_length=4096))
    (tmp_path / "no.gguf").write_bytes(b"no model")
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "cut.gguf").write_bytes(TINY[:100])
    for file, named in {
        "unknown.gguf": "nonsense",
        "no.gguf": "GGUF",
        "no.json": "shape",
        "cut.gguf": "cut.gguf",
        "missing.gguf": "missing.gguf",
        ".": "regular file",
    }.items():
        code, out, err = run(file)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert named in err


def test_no_home_folder_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny.gguf").write_bytes(TINY)
    for arguments in (("~/tiny.gguf",), (str(tmp_path / "tiny.gguf"), "--json"), ("~/missing.gguf",)):
        _, out, err = run(*arguments)
        assert str(tmp_path) not in out + err


def test_a_files_name_cannot_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31mb.gguf").write_bytes(TINY)
    code, out, _ = run("a\x1b[31mb.gguf")
    assert code == 0
    assert "\x1b" not in out


def test_help_shows_examples_that_can_be_typed(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    examples = [
        shlex.split(line.partition(">")[0])[2:]
        for line in out.splitlines()
        if line.strip().startswith("kvscope plan --model")
    ]
    assert examples
    for example in examples:
        assert run(*example)[0] == 0


def test_without_vram_the_largest_gpu_of_the_machine_is_taken_and_said_to_be(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gpus:
        name = "two"

        def look(self) -> GpuReading:
            small, large = GpuSeen("0", memory_total_bytes=8 * GIB), GpuSeen("1", memory_total_bytes=16 * GIB)
            return GpuReading((small, large, GpuSeen("2")))

        def close(self) -> None:
            closed.append(self.name)

    closed: list[str] = []
    monkeypatch.setattr(plan, "open_backends", lambda *_: ((Gpus(),), None))
    code, out, _ = run(*GEMMA, "-c", "131072", "-np", "1")
    assert code == 0
    assert "GPU 16.00 GiB" in out
    assert "largest GPU of this machine" in out
    assert closed == ["two"]
    assert "largest GPU" not in run(*GEMMA, "--vram", "16GiB")[1]


def test_an_apus_memory_is_what_the_system_lets_it_have(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Apu:
        name = "apu"

        def look(self) -> GpuReading:
            own = GpuSeen("0", memory_total_bytes=GIB, gtt_total_bytes=63 * GIB, unified=True)
            return GpuReading((own,))

        def close(self) -> None:
            pass

    monkeypatch.setattr(plan, "open_backends", lambda *_: ((Apu(),), None))
    assert "GPU 64.00 GiB" in run(*GEMMA, "-c", "131072", "-np", "1")[1]
