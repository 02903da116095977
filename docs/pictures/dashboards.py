"""Photographs the dashboards: dashboard-<page>-<dark or light>.png, from a Grafana that has them.

    python docs/pictures/dashboards.py --grafana http://127.0.0.1:3000 --exporter kvscope-demo:10188

It needs chromium, a Grafana that lets anybody look, and about ten minutes of history.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
PAGES = sorted(file.stem for file in (HERE.parents[1] / "dashboards" / "generated").glob("*.json"))
THEMES = ("dark", "light")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)
WIDTH = 1600
ONE_SCREEN = 900
GRID_ROW = 38
ABOVE_AND_BELOW = 80
SETTLED_MILLISECONDS = 10_000
"""Of the page's own time, which stands still while it waits for an answer."""
LONGEST_SECONDS = 120
COLOURS = 256
KEPT_COLOURS = 32


class NoPicture(Exception):
    """A picture cannot be taken; the text is one line that says why."""


def browser() -> str:
    """Return the path of a browser; raises NoPicture where there is none."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise NoPicture("chromium is missing: install it, for instance with apt-get install chromium")


def ask(address: str) -> Any:
    """Return what Grafana answers; raises NoPicture."""
    try:
        with urlopen(address, timeout=30) as answer:  # noqa: S310 - whoever starts this gives it
            return json.load(answer)
    except HTTPError as error:
        raise NoPicture(f"{address} answers {error.code}: is it there, may anybody look?") from None
    except URLError as error:
        raise NoPicture(f"{address} does not answer ({error.reason}): check --grafana") from None
    except ValueError:
        raise NoPicture(f"{address} is no address of a Grafana: check --grafana") from None


def height(dashboard: dict[str, Any]) -> int:
    """Return the height at which the whole page is seen: what is out of sight is not loaded."""
    if dashboard.get("timepicker", {}).get("hidden"):
        return ONE_SCREEN
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    return ABOVE_AND_BELOW + GRID_ROW * int(rows)


def in_few_colours(shot: Image.Image) -> Image.Image:
    """Return the picture in as many colours as one byte tells apart: a third of the size.

    The most frequent ones stay as they are, the others become the nearest of a choice by coverage: else
    backgrounds get a tint, or curves that are drawn thin the colour of something else.
    """
    flat = np.asarray(shot).reshape(-1, 3)
    seen, of_pixel, often = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    frequent = seen[np.argsort(often)[-KEPT_COLOURS:]]
    chosen = shot.quantize(COLOURS - KEPT_COLOURS, method=Image.Quantize.MAXCOVERAGE).getpalette() or []
    palette = np.concatenate([frequent, np.array(chosen, np.uint8).reshape(-1, 3)])
    distances = ((seen[:, None].astype(int) - palette) ** 2).sum(axis=2)
    indices = distances.argmin(axis=1).astype(np.uint8)[of_pixel.reshape(-1)]
    few = Image.fromarray(indices.reshape(shot.height, shot.width))
    few.putpalette(palette.tobytes())
    return few


def photograph(program: str, address: str, tall: int, picture: Path) -> None:
    """Write what a browser shows at an address, in few colours; raises NoPicture."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.png"
        command = [
            program,
            *FLAGS,
            # With its sandbox, Chromium does not start as root.
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            f"--user-data-dir={folder}/profile",
            f"--window-size={WIDTH},{tall}",
            f"--virtual-time-budget={SETTLED_MILLISECONDS}",
            f"--screenshot={raw}",
            address,
        ]
        try:
            subprocess.run(command, capture_output=True, timeout=LONGEST_SECONDS, check=False)  # noqa: S603
        except subprocess.TimeoutExpired:
            raise NoPicture(f"{address} was not drawn within {LONGEST_SECONDS} s") from None
        if not raw.exists():
            raise NoPicture(f"{program} drew no picture of {address}")
        with Image.open(raw) as shot:
            in_few_colours(shot.convert("RGB")).save(picture, optimize=True)


def take(grafana: str, shown: dict[str, str], minutes: int) -> Iterator[Path]:
    """Yield each picture once it is taken; raises NoPicture."""
    program = browser()
    for page in PAGES:
        tall = height(ask(f"{grafana}/api/dashboards/uid/{page}")["dashboard"])
        for theme in THEMES:
            query = {"theme": theme, "from": f"now-{minutes}m", "to": "now", "refresh": "", **shown}
            picture = HERE / f"dashboard-{page.removeprefix('kvscope-')}-{theme}.png"
            photograph(program, f"{grafana}/d/{page}?kiosk&{urlencode(query)}", tall, picture)
            yield picture


def main() -> None:
    """Take the pictures of every page."""
    parser = argparse.ArgumentParser(description="Photograph the dashboards of a Grafana.")
    parser.add_argument("--grafana", default="http://127.0.0.1:3000", help="its address [%(default)s]")
    parser.add_argument("--exporter", help="the exporter to show, as Prometheus calls its instance")
    parser.add_argument("--server", help="the server to show")
    parser.add_argument("--minutes", type=int, default=10, help="how much of the past to show [%(default)s]")
    given = parser.parse_args()
    variables = {"var-instance": given.exporter, "var-server": given.server}
    shown = {name: value for name, value in variables.items() if value}
    try:
        for picture in take(given.grafana.rstrip("/"), shown, given.minutes):
            print(f"{picture.name}: {picture.stat().st_size / 1000:.0f} kB")
    except NoPicture as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
