"""Where prompt tokens come from: boxes that flow into the prompts, and answers out of them.

A canvas is plain data: the SDK does not know the styles of connections. Places are in percent of the panel,
so that it keeps its shape on any screen; sizes of text are pixels.
"""

from __future__ import annotations

from typing import Any

from dashboards.palette import COMPUTED, DECODE, NEUTRAL, REUSED, TEXT
from dashboards.style import UNKNOWN

WHITE = "#FFFFFF"
WIDEST = 26


def options() -> dict[str, Any]:
    """Return the canvas' options: two sources at the left, the prompts, the answers."""
    computed = _box("computed", COMPUTED, left=1, top=8, right=66, bottom=54)
    reused = _box("reused", REUSED, left=1, top=54, right=66, bottom=8)
    prompts = _ellipse("prompts", left=49, top=22, right=23, bottom=22)
    answers = _box("answers", DECODE, left=83, top=36, right=1, bottom=36)
    computed[0]["connections"] = [_flow("prompts", COMPUTED, "computed", (1, 0), (-0.84, 0.55))]
    reused[0]["connections"] = [_flow("prompts", REUSED, "reused", (1, 0), (-0.84, -0.55))]
    prompts[0]["connections"] = [_flow("answers", DECODE, None, (1, 0), (-1, 0))]
    elements = [
        *computed,
        *reused,
        *prompts,
        *answers,
        _label("reused name", "reused", WHITE, 20, left=1, top=59, right=66, bottom=31),
        _value("reused share", "reused", WHITE, 46, left=1, top=69, right=66, bottom=11),
        _label("computed name", "computed", WHITE, 20, left=1, top=13, right=66, bottom=77),
        _value("computed share", "computed", WHITE, 46, left=1, top=23, right=66, bottom=57),
        _label("prompts name", "prompts", TEXT, 18, left=49, top=32, right=23, bottom=60),
        _value("prompts tokens", "prompts", TEXT, 32, left=49, top=41, right=23, bottom=45),
        _label("prompts window", "last 5 min", NEUTRAL, 15, left=49, top=57, right=23, bottom=35),
        _label("answers name", "answers", WHITE, 16, left=83, top=39, right=1, bottom=53),
        _value("answers tokens", "answers", WHITE, 22, left=83, top=48, right=1, bottom=42),
    ]
    return {
        "inlineEditing": False,
        "panZoom": False,
        "showAdvancedTypes": True,
        "tooltip": {"mode": "none"},
        "zoomToContent": False,
        "root": {
            "type": "frame",
            "name": "flow",
            "background": {"color": {"fixed": "transparent"}},
            "border": {"color": {"fixed": "transparent"}},
            "constraint": {"horizontal": "left", "vertical": "top"},
            "placement": {"left": 0, "top": 0, "width": 100, "height": 100},
            "elements": elements,
        },
    }


def _element(kind: str, name: str, config: dict[str, Any], **edges: float) -> dict[str, Any]:
    return {
        "type": kind,
        "name": name,
        "config": config,
        "background": {"color": {"fixed": "transparent"}},
        "border": {"color": {"fixed": "transparent"}},
        "constraint": {"horizontal": "scale", "vertical": "scale"},
        "placement": dict(edges),
        "connections": [],
    }


def _box(name: str, colour: str, **edges: float) -> list[dict[str, Any]]:
    box = _element("rectangle", name, {"align": "center", "valign": "middle"}, **edges)
    box["background"] = {"color": {"fixed": colour}}
    box["border"] = {"color": {"fixed": colour}, "radius": 8, "width": 0}
    return [box]


def _ellipse(name: str, **edges: float) -> list[dict[str, Any]]:
    ellipse = _element("ellipse", name, {"align": "center", "valign": "middle"}, **edges)
    ellipse["border"] = {"color": {"fixed": NEUTRAL}, "width": 1}
    return [ellipse]


def _text(words: dict[str, Any], colour: str, size: int) -> dict[str, Any]:
    return {"align": "center", "valign": "middle", "color": {"fixed": colour}, "size": size, "text": words}


def _label(name: str, words: str, colour: str, size: int, **edges: float) -> dict[str, Any]:
    return _element("text", name, _text({"mode": "fixed", "fixed": words}, colour, size), **edges)


def _value(name: str, field: str, colour: str, size: int, **edges: float) -> dict[str, Any]:
    # Without a value a text asks the reader to set it, unless it has words of its own.
    words = {"mode": "field", "field": field, "fixed": UNKNOWN}
    return _element("text", name, _text(words, colour, size), **edges)


def _flow(
    target: str,
    colour: str,
    field: str | None,
    start: tuple[float, float],
    end: tuple[float, float],
) -> dict[str, Any]:
    size = {"fixed": 4, "min": 1, "max": WIDEST, **({"field": field} if field else {})}
    return {
        "source": {"x": start[0], "y": start[1]},
        "target": {"x": end[0], "y": end[1]},
        "targetName": target,
        "color": {"fixed": colour},
        "size": size,
        "path": "straight",
        "lineStyle": {"style": "dashed", "animate": True},
        "direction": {"mode": "fixed", "fixed": "none"},
    }
