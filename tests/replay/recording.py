"""The form of a recording: one JSON object a line, in the order in which it happened.

The first line says what was recorded and how. Each other line is either an answer of the server,
`{"look", "t", "took", "path", "status", "json" or "text", "headers"}`, or what the exporter found out
about the server's process, `{"look", "t", "process"}`. look: the number of the exporter's look; t:
seconds since the recording began; took: seconds until the answer. status is null where the server gave
no answer at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDINGS = Path(__file__).resolve().parents[1] / "recordings"
EXPECTED = RECORDINGS.with_name("expected")
ANSWERS = "answers.jsonl"

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Recording:
    """head: its first line; lines: the others, so that lines[n] stands in line n + 2 of the file."""

    name: str
    head: Line
    lines: Sequence[Line]


def names() -> list[str]:
    """Return the names of all recordings."""
    return sorted(folder.name for folder in RECORDINGS.iterdir() if folder.is_dir())


def load(name: str) -> Recording:
    """Return a recording; raises OSError when there is none of this name."""
    head, *lines = map(json.loads, (RECORDINGS / name / ANSWERS).read_text(encoding="utf-8").splitlines())
    return Recording(name, head, lines)


def save(recording: Recording) -> Path:
    """Write a recording and return its file."""
    path = RECORDINGS / recording.name / ANSWERS
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(line, separators=(",", ":")) + "\n" for line in (recording.head, *recording.lines))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def body_of(line: Line) -> bytes:
    """Return the body of an answer."""
    if "json" in line:
        return json.dumps(line["json"], separators=(",", ":")).encode()
    return str(line.get("text", "")).encode()
