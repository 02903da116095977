"""Draws growth-light.svg and growth-dark.svg: how the KV cache of three models grows with its tokens.

Run it with `make pictures`. The figures are those of kvscope's own formulas for the built-in list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from kvscope.sources.known_models import known_models
from kvscope.tracking.kv_memory import ContextParameters, kv_memory

HERE = Path(__file__).parent
GIB = 1 << 30
TOKENS = 131072
FIRST_TOKENS = 4096
POINTS = 128

MODELS = {
    "llama-3.1-8b": "Llama-3.1-8B: 32 layers, all plain",
    "qwen3-30b-a3b": "Qwen3-30B-A3B: 48 layers, all plain",
    "gemma-4-26b-a4b": "Gemma-4-26B-A4B: 25 window layers, 5 plain",
}


@dataclass(frozen=True)
class Look:
    """The colours of one of the two pictures."""

    ink: str
    quiet: str
    grid: str
    lines: Mapping[str, str]


LOOKS = {
    "light": Look(
        "#1f2328",
        "#59636e",
        "#d1d9e0",
        {"llama-3.1-8b": "#0969da", "qwen3-30b-a3b": "#8250df", "gemma-4-26b-a4b": "#bc4c00"},
    ),
    "dark": Look(
        "#f0f6fc",
        "#9198a1",
        "#3d444d",
        {"llama-3.1-8b": "#58a6ff", "qwen3-30b-a3b": "#bc8cff", "gemma-4-26b-a4b": "#f0883e"},
    ),
}


def held_bytes(model: str, most: int) -> tuple[list[int], list[int]]:
    """Return numbers of tokens and the bytes that a sequence of so many occupies at f16."""
    memory = kv_memory(known_models().models[model].header, ContextParameters(context_tokens=TOKENS))
    tokens = [most * point // POINTS for point in range(POINTS + 1)]
    return tokens, [memory.sequence_bytes(each) for each in tokens]


def draw(look: Look, path: Path) -> None:
    """Draw both panels: the first tokens, where the window fills, and the whole context."""
    plt.rcParams |= {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "svg.hashsalt": "kvscope",
        "text.color": look.ink,
        "xtick.color": look.quiet,
        "ytick.color": look.quiet,
    }
    figure, (first, whole) = plt.subplots(1, 2, figsize=(10, 4.5), width_ratios=(1, 1.25))
    _panel(first, look, FIRST_TOKENS, 1 << 20, "MiB, first 4 096 tokens")
    _panel(whole, look, TOKENS, GIB, "GiB, up to 131 072 tokens")
    first.axvline(1024, color=look.quiet, linewidth=1, linestyle=(0, (3, 3)))
    first.annotate(
        "window full: 1 024 tokens",
        (1024, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6, -2),
        textcoords="offset points",
        color=look.quiet,
        va="top",
        fontsize=9,
    )
    figure.text(0.012, 0.955, "KV cache of one conversation at f16, over its tokens", fontweight="bold")
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.003, 0.945),
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=1.5,
        columnspacing=1.8,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.89), w_pad=3)
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _panel(axes: Axes, look: Look, most: int, unit: int, title: str) -> None:
    for model, label in MODELS.items():
        tokens, sizes = held_bytes(model, most)
        colour = look.lines[model]
        axes.plot(tokens, [size / unit for size in sizes], color=colour, linewidth=2.2, label=label)
        shown = f"{sizes[-1] / unit:.0f}" if unit < GIB else f"{sizes[-1] / unit:.2f}"
        axes.annotate(
            shown,
            (tokens[-1], sizes[-1] / unit),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
        )
    axes.set_title(title, loc="left", fontsize=9.5, color=look.quiet)
    axes.set_xlim(0, most)
    axes.set_ylim(0, None)
    axes.set_xticks([most * step // 4 for step in range(5)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{int(tokens):,}".replace(",", " ")))
    axes.grid(axis="y", color=look.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(look.grid)


if __name__ == "__main__":
    for name, look in LOOKS.items():
        draw(look, HERE / f"growth-{name}.svg")
