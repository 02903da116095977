"""Small files of /sys and /proc: what cannot be read is None, and no number is made up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvscope.sources.small_files import count_of, names_in, read_bytes, read_count, read_text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("17095983104", 17_095_983_104),
        ("9007199254740991", 2**53 - 1),
        ("9007199254740992", None),
        ("9" * 5000, None),
        ("-1", None),
        ("1.5", None),
        ("1e5", None),
        ("0x10", None),
        ("1_000", None),
        ("٣", None),
        ("²", None),
        ("", None),
        (None, None),
    ],
)
def test_only_plain_digits_that_prometheus_holds_exactly_are_a_number(
    text: str | None, number: int | None
) -> None:
    assert count_of(text) == number


def test_a_file_is_read_up_to_the_bound_and_without_blanks_around_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(" 12\n")
    (tmp_path / "long").write_bytes(b"x" * 10_000)
    assert read_count(tmp_path / "file") == 12
    assert read_text(tmp_path / "long") == "x" * 4096


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "loop", ".", "a\0b"):
        assert read_bytes(tmp_path / name) is None
        assert read_text(tmp_path / name) is None
    assert read_count(tmp_path / "pipe") is None
    assert names_in(tmp_path / "missing") is None
    assert names_in(tmp_path) == ["loop", "pipe"]
