"""kvscope plan: will it fit, and how much context; asked of a file, a shape or a well-known model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import click

from kvscope.commands.options import Written
from kvscope.commands.settings_file import path_of, shown_path
from kvscope.observed.model import ModelHeader
from kvscope.planned import PLAN_VERSION, Plan
from kvscope.settings import SettingsError
from kvscope.sources.gguf_header import HeaderError, has_weights, open_regular, read_header
from kvscope.sources.gpu import open_backends
from kvscope.sources.gpu.backend import GpuOptions
from kvscope.sources.known_models import known_models
from kvscope.sources.model_shape import ShapeFileError, read_shape, shape_document
from kvscope.sources.server_arguments import ArgumentsError, context_settings
from kvscope.tracking.kv_memory import ShapeError
from kvscope.tracking.plan import Question, RefusedError, plan

EXAMPLES = """
\b
Examples:
  kvscope plan model.gguf
  kvscope plan model.gguf --vram 16GiB -c 32768,131072 -np 2 -ctk q8_0 -ctv q8_0
  kvscope plan --model gemma-4-26b-a4b --weights 13.26GiB --vram 16GiB -c 131072 -np 1
  kvscope plan model-00001-of-00003.gguf --json
  kvscope plan model.gguf --shape > model.json

\b
Options of llama-server have its names and its meaning. Without -np it runs four slots that share one pool,
with -np N each slot has its own part of the context, unless -kvu is given.
Exit codes: 0 answered; 1 could not be answered (no such file, architecture not known); 2 a wrong setting.
"""

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}ib": 1 << 10 * power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
}


def size_in_bytes(text: str) -> int:
    """Return the bytes of a size as 16GiB, 500 MB or a plain number, rounded down. Raises SettingsError."""
    written = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?) ?([A-Za-z]*)", text, re.ASCII)
    if written is None or written[2].lower() not in _UNITS:
        raise SettingsError(f"{text!r} is no size: write 16GiB, 500MB or a number of bytes")
    return int(Fraction(written[1]) * _UNITS[written[2].lower()])


def find_gpu_memory() -> int | None:
    """Return the bytes of memory of this machine's largest GPU; None: none is found.

    Of one that shares the system's memory, what the system lets it have altogether.
    """
    backends, _ = open_backends("auto", GpuOptions())
    try:
        gpus = [gpu for backend in backends for gpu in backend.look().gpus]
    finally:
        for backend in backends:
            backend.close()
    sizes = [
        gpu.memory_total_bytes + (gpu.gtt_total_bytes or 0 if gpu.unified else 0)
        for gpu in gpus
        if gpu.memory_total_bytes
    ]
    return max(sizes, default=None)


_SIZE = Written("size", size_in_bytes)


@click.command(epilog=EXAMPLES, short_help="Say what a model's context needs, and how much fits.")
@click.argument("file", metavar="[MODEL.gguf|SHAPE.json]", required=False)
@click.option("--model", metavar="ID", help="A well-known model instead of a file; a wrong ID lists them.")
@click.option("--weights", type=_SIZE, metavar="SIZE", help="Of the weights.  [default: the file's size]")
@click.option(
    "--vram",
    type=_SIZE,
    metavar="SIZE",
    help="Memory of the GPU: says what fits into it.  [default: the largest GPU of this machine]",
)
@click.option("--reserve", type=_SIZE, metavar="SIZE", default=0, help="Of it, keep so much free.")
@click.option(
    "-c",
    "--ctx-size",
    "contexts",
    multiple=True,
    metavar="N[,N...]",
    help="Tokens of all slots together; several by commas or -c again; 0: the model's own.",
)
@click.option("-np", "--parallel", metavar="N", help="Slots.  [default: 4 on one pool]")
@click.option("-kvu/-no-kvu", "--kv-unified/--no-kv-unified", default=None, help="All slots share one pool.")
@click.option("-ctk", "--cache-type-k", metavar="TYPE", help="f16, q8_0, q4_0, ...  [default: f16]")
@click.option("-ctv", "--cache-type-v", metavar="TYPE", help="The same for V.")
@click.option("--swa-full", is_flag=True, help="Full-size cache for sliding-window layers.")
@click.option("-b", "--batch-size", metavar="N", help="[default: 2048]")
@click.option("-ub", "--ubatch-size", metavar="N", help="[default: 512]")
@click.option("-fa", "--flash-attn", metavar="on|off|auto", help="[default: auto, counted as on]")
@click.option("--spec-type", metavar="KIND", help="draft-mtp counts the model's own layers that draft.")
@click.option("--spec-draft-n-max", metavar="N", help="Tokens drafted at once.  [default: 3]")
@click.option("-ctkd", "--cache-type-k-draft", metavar="TYPE", help="[default: f16]")
@click.option("-ctvd", "--cache-type-v-draft", metavar="TYPE", help="[default: f16]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/PLAN.md names its keys).")
@click.option("--shape", is_flag=True, help="Print the model's shape, for `kvscope plan` elsewhere.")
@click.pass_context
def plan_command(
    ctx: click.Context,
    /,
    *,
    file: str | None,
    model: str | None,
    weights: int | None,
    vram: int | None,
    reserve: int,
    contexts: tuple[str, ...],
    as_json: bool,
    shape: bool,
    **_: object,
) -> int:
    """Say what a model's context needs, in all and for each slot, and the largest that fits."""
    header, name, origin, list_date = _model(file, model)
    if shape:
        click.echo(json.dumps(shape_document(header), indent=1))
        return 0
    try:
        common = list(_server_arguments(ctx))
        settings = context_settings(common, strict=True)
        sizes = tuple(_context_sizes(contexts))
    except ArgumentsError as error:
        raise SettingsError(str(error)) from None
    found = find_gpu_memory() if vram is None else None
    question = Question(
        header=header,
        name=name,
        origin=origin,
        settings=settings,
        context_tokens=sizes,
        weights_bytes=weights,
        vram_bytes=found if vram is None else vram,
        vram_found=vram is None,
        reserve_bytes=reserve,
        list_date=list_date,
    )
    try:
        answer = plan(question)
    except RefusedError as error:
        raise SettingsError(str(error)) from None
    except ShapeError as error:
        raise click.ClickException(f"{name}: {error}") from None
    click.echo(json.dumps(document(answer), indent=2) if as_json else _table(answer))
    return 0


def document(answer: Plan) -> object:
    """Return what --json prints: the answer's fields by name, what is unknown left out."""
    return {"kvscope_plan": PLAN_VERSION, **_known(asdict(answer))}


def _known(fields: dict[str, object]) -> dict[str, object]:
    return {key: _plain(value) for key, value in fields.items() if value is not None}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return _known(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _table(answer: Plan) -> str:
    # Only here: other commands start faster without it.
    from rich.console import Console

    from kvscope.terminal.plan import render

    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(render(answer))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _model(file: str | None, model: str | None) -> tuple[ModelHeader, str, str, str | None]:
    if (file is None) == (model is None):
        raise SettingsError("name one model: a file, or --model with one of the built-in list")
    if file is not None:
        path = path_of(file)
        header, origin = _read(path)
        return header, path.name, origin, None
    known = known_models()
    chosen = known.models.get(str(model))
    if chosen is None:
        raise SettingsError(
            f"--model {model!r} is not in the built-in list of {known.date}: name a file or one of "
            + ", ".join(known.models)
        )
    return chosen.header, chosen.name, "list", known.date


def _read(path: Path) -> tuple[ModelHeader, str]:
    try:
        with open_regular(path) as opened:
            is_shape = opened.read(1) == b"{"
        if is_shape:
            return read_shape(path), "shape"
        header = read_header(path)
        # A header that was cut off for a question like this: its size is not that of the weights.
        return (header if has_weights(path) else replace(header, file_bytes=None)), "file"
    except (HeaderError, ShapeFileError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise click.ClickException(f"{shown_path(path)} cannot be read: {reason}") from None


_PASSED_ON = {
    "parallel": "-np",
    "cache_type_k": "-ctk",
    "cache_type_v": "-ctv",
    "batch_size": "-b",
    "ubatch_size": "-ub",
    "flash_attn": "-fa",
    "spec_type": "--spec-type",
    "spec_draft_n_max": "--spec-draft-n-max",
    "cache_type_k_draft": "-ctkd",
    "cache_type_v_draft": "-ctvd",
}


def _server_arguments(ctx: click.Context) -> Iterator[str]:
    """Yield the options as llama-server's command line has them, so that one parser reads both."""
    for parameter, flag in _PASSED_ON.items():
        if ctx.params[parameter] is not None:
            yield from (flag, ctx.params[parameter])
    if ctx.params["kv_unified"] is not None:
        yield "-kvu" if ctx.params["kv_unified"] else "-no-kvu"
    if ctx.params["swa_full"]:
        yield "--swa-full"


def _context_sizes(contexts: Sequence[str]) -> Iterator[int]:
    for written in (each.strip() for context in contexts for each in context.split(",")):
        read = context_settings(["-c", written], strict=True)
        if read.context_tokens is None or read.notes:
            raise SettingsError(f"-c {written!r}: write a number of tokens, or 0 for the model's own")
        yield read.context_tokens
