"""Reads the header of a GGUF model, and nothing behind it."""

from __future__ import annotations

from pathlib import Path

from kvscope.observed.model import ModelHeader


class HeaderError(ValueError):
    """A file that is no readable GGUF header; the message says what is wrong and where, in one line."""


def read_header(path: Path) -> ModelHeader:
    """Return the header of a model; of a split one, path is its first part.

    Raises HeaderError for a file that is none, and OSError where it cannot be read.
    """
    raise NotImplementedError
