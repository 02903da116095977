"""Log lines on stderr: one line each as text, or one JSON object each.

A record about one server carries `extra={"server": name}` and names it in its message as well. Of an
exception only its type and place are written, never its text: that may quote what a server sent.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

import click

_COLOURS = {"DEBUG": "cyan", "INFO": "green", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
_PLACES_SHOWN = 3


def start_logging(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Write all log lines to stream (stderr by default): kvscope's from level on, others' from warning on."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    colour = stream.isatty() and not os.environ.get("NO_COLOR")
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines(colour))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("kvscope").setLevel(level.upper())


class TextLines(logging.Formatter):
    """`2026-01-02T03:04:05Z info message`."""

    def __init__(self, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of text."""
        level = record.levelname.lower()
        if self._colour:
            level = click.style(level, fg=_COLOURS.get(record.levelname))
        return f"{_time(record)} {level} {_message(record)}"


class JsonLines(logging.Formatter):
    """`{"time": ..., "level": ..., "message": ..., "server": ...}`, server only where one is meant."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one JSON object on one line."""
        line = {"time": _time(record), "level": record.levelname.lower(), "message": _message(record)}
        server = getattr(record, "server", None)
        if server:
            line["server"] = str(server)
        return json.dumps(line, ensure_ascii=False)


def what_and_where(error: BaseException) -> str:
    """Return the type of an exception and the innermost places it passed, without its text."""
    return _what_and_where(type(error), error.__traceback__)


def _what_and_where(kind: type[BaseException], trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)[-_PLACES_SHOWN:]
    places = " < ".join(
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames)
    )
    return f"{kind.__name__} at {places}" if places else kind.__name__


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.exc_info and record.exc_info[0]:
        message += f": {_what_and_where(record.exc_info[0], record.exc_info[2])}"
    return "".join(character if character.isprintable() else " " for character in message)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
