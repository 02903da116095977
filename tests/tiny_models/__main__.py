"""Write one model: `python -m tests.tiny_models NAME PATH`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.tiny_models.kinds import MODELS
from tests.tiny_models.writer import write_model

match sys.argv[1:]:
    case [name, path] if name in MODELS:
        write_model(MODELS[name], Path(path))
    case _:
        sys.exit("python -m tests.tiny_models NAME PATH; names: " + ", ".join(MODELS))
