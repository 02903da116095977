"""Write the JSON of every page to generated/, and the form for importing to import_by_hand/."""

from __future__ import annotations

from pathlib import Path

from dashboards.page import text
from dashboards.pages import PAGES

GENERATED = Path(__file__).parent / "generated"
IMPORT = GENERATED.parent / "import_by_hand"


def main() -> None:
    """Write both files of each page, and remove those of pages that are no more."""
    for folder, by_hand in ((GENERATED, False), (IMPORT, True)):
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.json"):
            old.unlink()
        for page in PAGES:
            (folder / f"{page.uid}.json").write_text(text(page, by_hand=by_hand), encoding="utf-8")


if __name__ == "__main__":
    main()
