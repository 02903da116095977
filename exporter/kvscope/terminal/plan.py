"""What a plan answers, as tables for people. Pure; fits 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvscope.planned import ContextFit, LeftOut, Plan, PlannedContext, PlannedSettings

_UNITS = ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)
_GIB = 1 << 30
_MODEL_ENDS = "*"
_ORIGINS = {"file": "header of the file", "shape": "shape file", "list": "built-in list"}


_Column = tuple[str, Callable[[PlannedContext], int | None], Callable[[PlannedContext], int | None]]
"""A heading, what it says of all slots together, and of each."""


def render(plan: Plan) -> RenderableType:
    """Return the answer: what each context needs, what is the largest that fits, what is left out."""
    return Group(*_spaced(_parts(plan)))


def size(count: int) -> str:
    """Return bytes in binary units with two decimals."""
    for unit, factor in _UNITS:
        if abs(count) >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _parts(plan: Plan) -> Iterator[RenderableType]:
    yield _heading(plan)
    yield from _contexts(plan)
    if plan.fits:
        beside = "without the weights" if plan.model.weights_bytes is None else "beside the weights"
        heading = f"Largest context in tokens that fits into {size(plan.vram_bytes or 0)} {beside}:"
        yield Group(Text(heading, style="bold"), _fits(plan.fits), *_legend(plan))
    yield Group(*(_bullet(note) for note in plan.notes))
    yield Group(
        Text("Left out, and typically so large:", style="bold"),
        *(_bullet(_left_out(each)) for each in plan.left_out),
    )


def _spaced(parts: Iterator[RenderableType]) -> Iterator[RenderableType]:
    for index, part in enumerate(parts):
        yield Padding(part, (1 if index else 0, 0, 0, 0))


def _heading(plan: Plan) -> RenderableType:
    model = plan.model
    origin = _ORIGINS[model.origin]
    if model.list_date:
        origin += f" of {model.list_date}"
    first = Text(_shown(model.name), style="bold")
    first.append(f"  {_shown(model.architecture)}, {origin}", style="not bold dim")
    weights = "weights not counted" if model.weights_bytes is None else f"weights {size(model.weights_bytes)}"
    second = [weights, *_settings(plan.settings)]
    if plan.vram_bytes is not None:
        second.append(f"GPU {size(plan.vram_bytes)}")
    if plan.reserve_bytes:
        second.append(f"{size(plan.reserve_bytes)} kept free")
    return Group(first, Text(", ".join(second)))


def _settings(settings: PlannedSettings) -> Iterator[str]:
    pool = " on one pool" if settings.unified and settings.slots > 1 else ""
    yield f"{settings.slots} slot{'s' if settings.slots > 1 else ''}{pool}"
    yield f"K {settings.cache_type_k}, V {settings.cache_type_v}"
    yield f"-ub {settings.micro_batch_tokens}"
    if settings.swa_full:
        yield "--swa-full"
    if not settings.flash_attention:
        yield "-fa off"


def _contexts(plan: Plan) -> Iterator[Table]:
    kinds = list(dict.fromkeys(kind for context in plan.contexts for kind in context.bytes_by_kind))
    kinds = kinds if len(kinds) > 1 else []
    # More kinds than two and the sums besides do not fit into 80 columns.
    apart = len(kinds) > 2
    columns = [] if apart else [*map(_kind_column, kinds)]
    columns.append(("KV", lambda context: context.kv_bytes, lambda context: context.slot_kv_bytes))
    if plan.model.weights_bytes is not None:
        columns.append(("+ weights", lambda context: context.needed_bytes, _nothing))
    if plan.vram_bytes is not None:
        columns.append(("left", lambda context: context.left_bytes, _nothing))
    yield _context_table(plan, columns)
    if apart:
        yield _context_table(plan, [*map(_kind_column, kinds)])


def _kind_column(kind: str) -> _Column:
    return (
        kind,
        lambda context: context.bytes_by_kind.get(kind),
        lambda context: (context.slot_bytes_by_kind or {}).get(kind),
    )


def _nothing(_: PlannedContext) -> None:
    """Say nothing of one slot."""


def _context_table(plan: Plan, columns: Sequence[_Column]) -> Table:
    table = _table("context")
    table.add_column("tokens", justify="right")
    for name, _, _ in columns:
        table.add_column(name, justify="right", overflow="fold")
    several = plan.settings.slots > 1
    for context in plan.contexts:
        sizes = (_size_cell(of_all(context)) for _, of_all, _ in columns)
        table.add_row("in all" if several else "one slot", str(context.context_tokens), *sizes)
        if several:
            table.add_row(*_slot_row(context, columns), style="dim")
    return table


def _slot_row(context: PlannedContext, columns: Sequence[_Column]) -> Iterator[RenderableType]:
    tokens = str(context.slot_context_tokens)
    if context.slot_kv_bytes is not None:
        yield from ("each slot", tokens)
        yield from (_size_cell(of_slot(context)) for _, _, of_slot in columns)
    else:
        yield from ("a full slot", tokens)
        yield from (_size_cell(context.full_slot_bytes if name == "KV" else None) for name, _, _ in columns)


def _size_cell(count: int | None) -> Text:
    return Text("") if count is None else Text(size(count), style="red" if count < 0 else "")


def _fits(fits: Sequence[ContextFit]) -> Table:
    table = _table("K / V", apart=1)
    first = [fit for fit in fits if (fit.cache_type_k, fit.cache_type_v) == _types(fits[0])]
    for fit in first:
        if fit.unified:
            table.add_column(f"{fit.slots} slots\none pool", justify="right", overflow="fold")
        elif fit.slots == 1:
            table.add_column("1 slot", justify="right", overflow="fold")
        else:
            table.add_column(f"{fit.slots} slots\neach", justify="right", overflow="fold")
            table.add_column("\nin all", justify="right", overflow="fold")
    for types, row in groupby(fits, _types):
        name = types[0] if types[0] == types[1] else "/".join(types)
        table.add_row(name, *(cell for fit in row for cell in _fit_cells(fit)))
    return table


def _types(fit: ContextFit) -> tuple[str, str]:
    return fit.cache_type_k, fit.cache_type_v


def _fit_cells(fit: ContextFit) -> Iterator[str]:
    both = fit.slots > 1 and not fit.unified
    if fit.slot_context_tokens is None or fit.context_tokens is None:
        yield from ["refused "] * (2 if both else 1)
        return
    mark = _MODEL_ENDS if fit.ended_by == "model" else " "
    yield f"{fit.slot_context_tokens or 'none'}{mark}"
    if both:
        yield f"{fit.context_tokens or 'none'}{mark}"


def _legend(plan: Plan) -> Iterator[Text]:
    if any(fit.ended_by == "model" for fit in plan.fits):
        yield Text(
            f"{_MODEL_ENDS} the model's own {plan.model.context_length} tokens a slot end it, not memory"
        )
    for problem in dict.fromkeys(fit.problem for fit in plan.fits if fit.problem):
        yield Text(f"refused: {problem}")


def _table(first: str, apart: int = 2) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, apart, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    return table


def _left_out(each: LeftOut) -> str:
    low, high = (f"{count / _GIB:.2g}" for count in (each.typical_low_bytes, each.typical_high_bytes))
    return f"{each.what.replace('_', ' ')}: {low} to {high} GiB; {each.words}"


def _bullet(words: str) -> Table:
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_row("-", Text(_shown(words)))
    return line


def _shown(text: str) -> str:
    """Return text of a file without what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)
