"""Reading the small files of /sys and /proc: bounded, never waiting, and never raising."""

from __future__ import annotations

import os
from pathlib import Path

MOST_BYTES = 4096
"""A file of /sys is one page at most."""
LARGEST_COUNT = 2**53
"""Above it a number of Prometheus is no exact integer any more; no machine counts that far."""


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes | None:
    """Return the first bytes of a file, None where it cannot be read (missing, denied, no file)."""
    try:
        # What poses as a file must not make us wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        return os.read(descriptor, most)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def read_text(path: str | Path, most: int = MOST_BYTES) -> str | None:
    """Return the first bytes of a file as text without the blanks around it, None as read_bytes."""
    content = read_bytes(path, most)
    return None if content is None else content.decode("utf-8", "replace").strip()


def count_of(text: str | None) -> int | None:
    """Return the whole number that a text is, None where it is none or beyond LARGEST_COUNT."""
    if not text or len(text) > 16 or not (text.isascii() and text.isdigit()):
        return None
    number = int(text)
    return number if number < LARGEST_COUNT else None


def read_count(path: str | Path) -> int | None:
    """Return the whole number in a file, None where it cannot be read or holds no such number."""
    return count_of(read_text(path))


def names_in(directory: str | Path) -> list[str] | None:
    """Return the names in a directory in order, None where it cannot be listed."""
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208 - names are wanted, not paths
    except (OSError, ValueError):
        return None
