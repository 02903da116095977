"""Write the JSON of every page to generated/: `python -m dashboards`."""

from __future__ import annotations

from pathlib import Path

from dashboards.page import text
from dashboards.pages import PAGES

GENERATED = Path(__file__).parent / "generated"


def main() -> None:
    """Write a file for each page, and remove those of pages that are no more."""
    GENERATED.mkdir(exist_ok=True)
    for old in GENERATED.glob("*.json"):
        old.unlink()
    for page in PAGES:
        (GENERATED / f"{page.uid}.json").write_text(text(page), encoding="utf-8")


if __name__ == "__main__":
    main()
