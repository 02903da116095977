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

_SUMS: Sequence[_Column] = (
    ("KV", lambda context: context.kv_bytes, lambda context: context.slot_kv_bytes),
    ("+ weights", lambda context: context.needed_bytes, lambda _: None),
    ("left", lambda context: context.left_bytes, lambda _: None),
)
_COLUMNS = 80
_MOST_SIZES = 5
"""So many sizes fit beside one another into 80 columns, however wide they are."""


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
    apart = len(kinds) > _MOST_SIZES - len(_SUMS)
    columns = [] if apart else [*map(_kind_column, kinds)]
    columns += [
        column for column in _SUMS if any(column[1](context) is not None for context in plan.contexts)
    ]
    yield _context_table(plan, columns)
    for begin in range(0, len(kinds) if apart else 0, _MOST_SIZES):
        yield _context_table(plan, [*map(_kind_column, kinds[begin : begin + _MOST_SIZES])])


def _kind_column(kind: str) -> _Column:
    return (
        kind,
        lambda context: context.bytes_by_kind.get(kind),
        lambda context: (context.slot_bytes_by_kind or {}).get(kind),
    )


def _context_table(plan: Plan, columns: Sequence[_Column]) -> Table:
    several = plan.settings.slots > 1
    rows = [("context", "tokens", *(name for name, _, _ in columns))]
    for context in plan.contexts:
        sizes = (_size_cell(of_all(context)) for _, of_all, _ in columns)
        rows.append(("in all" if several else "one slot", str(context.context_tokens), *sizes))
        of_one = (*_slot_row(context, columns),)
        if several and any(of_one[2:]):
            rows.append(of_one)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = _table(rows[0][0], apart=2 if sum(widths) + 2 * len(widths) <= _COLUMNS else 1)
    for name in rows[0][1:]:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows[1:]:
        cells = (Text(cell, style="red" if cell.startswith("-") else "") for cell in row)
        table.add_row(*cells, style="dim" if "slot" in row[0] and several else "")
    return table


def _slot_row(context: PlannedContext, columns: Sequence[_Column]) -> Iterator[str]:
    shared = context.slot_kv_bytes is None
    yield from ("a full slot" if shared else "each slot", str(context.slot_context_tokens))
    for name, _, of_slot in columns:
        yield _size_cell(context.full_slot_bytes if shared and name == "KV" else of_slot(context))


def _size_cell(count: int | None) -> str:
    return "" if count is None else size(count)


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
