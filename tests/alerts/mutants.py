"""A rule with one thing changed: what its tests must notice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import promql_parser as promql

TURNED_ROUND = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "==": "!=", "!=": "=="}
FACTORS = (0.1, 10)
NEVER, ALWAYS = "vector(1) > 2", "vector(1) > 0"

Changed = tuple[str, str]
"""What was changed, and the whole text after it."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """change: what was changed, in words. fields: the rule's, after it."""

    change: str
    fields: Mapping[str, Any]


def mutants(fields: Mapping[str, Any]) -> Iterator[Mutant]:
    """Yield every mutant of a rule."""
    for change, text in expressions(promql.parse(fields["expr"])):
        yield Mutant(change, {**fields, "expr": text})
    yield Mutant("never", {**fields, "expr": NEVER})
    yield Mutant("always", {**fields, "expr": ALWAYS})
    if "for" in fields:
        duration = promql.parse_duration(fields["for"])
        yield Mutant("for dropped", {**fields, "for": "0s"})
        yield Mutant("for x10", {**fields, "for": _duration(duration * 10)})


def expressions(node: Any) -> Iterator[Changed]:
    """Yield the expression with each part changed in turn."""
    match node:
        case promql.BinaryExpr():
            yield from _binary(node)
        case promql.ParenExpr():
            yield from _around("(", node.expr, ")")
        case promql.UnaryExpr():
            yield from _around("-", node.expr, "")
        case promql.AggregateExpr():
            parameter = f"{node.param}, " if node.param else ""
            yield from _around(f"{node.op} {node.modifier or ''} ({parameter}", node.expr, ")")
        case promql.Call():
            texts = [str(argument) for argument in node.args]
            for position, argument in enumerate(node.args):
                before, after = texts[:position], texts[position + 1 :]
                for change, text in expressions(argument):
                    yield change, f"{node.func.name}({', '.join([*before, text, *after])})"
        case promql.MatrixSelector():
            for factor in FACTORS:
                longer = _duration(node.range * factor)
                yield f"[{_duration(node.range)}] x{factor}", f"{node.vector_selector}[{longer}]"
            for change, text in expressions(node.vector_selector):
                yield change, f"{text}[{_duration(node.range)}]"
        case promql.VectorSelector():
            yield from _selector(node)
        case promql.NumberLiteral():
            for factor in FACTORS:
                if node.val:
                    yield f"{node.val:g} x{factor}", repr(node.val * factor)
        case _:
            raise NotImplementedError(f"{type(node).__name__} in a rule: say here how to change it")


def _around(before: str, node: Any, after: str) -> Iterator[Changed]:
    for change, text in expressions(node):
        yield change, f"{before}{text}{after}"


def _binary(node: Any) -> Iterator[Changed]:
    operator = str(node.op)
    matching = str(node.modifier or "")
    left, right = str(node.lhs), str(node.rhs)
    if operator in TURNED_ROUND:
        turned = TURNED_ROUND[operator]
        yield f"{operator} turned round in: {_short(node)}", f"{left} {turned} {matching} {right}"
    if operator in ("and", "or", "unless"):
        yield f"dropped: {operator} {_short(node.rhs)}", left
    if operator in ("and", "or"):
        yield f"dropped: {_short(node.lhs)} {operator}", right
    labels = list(node.modifier.matching.labels) if node.modifier and node.modifier.matching else []
    for label in labels:
        kept = ", ".join(each for each in labels if each != label)
        change = f"{label} dropped from: {operator} {matching} {_short(node.rhs)}"
        yield change, f"{left} {operator} on ({kept}) {right}"
    for change, text in expressions(node.lhs):
        yield change, f"{text} {operator} {matching} {right}"
    for change, text in expressions(node.rhs):
        yield change, f"{left} {operator} {matching} {text}"


def _selector(node: Any) -> Iterator[Changed]:
    matchers = [str(matcher) for matcher in node.matchers.matchers]
    for position, (matcher, text) in enumerate(zip(node.matchers.matchers, matchers, strict=True)):
        before, after = matchers[:position], matchers[position + 1 :]
        yield f"{text} dropped from {node.name}", f"{node.name}{{{','.join([*before, *after])}}}"
        values = matcher.value.split("|")
        for value in values if len(values) > 1 else ():
            kept = matcher.value.split("|")
            kept.remove(value)
            fewer = text.replace(matcher.value, "|".join(kept))
            yield f"{value} dropped from {text}", f"{node.name}{{{','.join([*before, fewer, *after])}}}"


def _duration(duration: timedelta) -> str:
    return f"{round(duration.total_seconds() * 1000)}ms"


def _short(node: Any) -> str:
    text = " ".join(str(node).split())
    return text if len(text) <= 70 else f"{text[:67]}..."
