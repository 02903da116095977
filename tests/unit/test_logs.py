"""Log lines: one line each, whatever is logged, and nothing of an exception's text."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from kvscope.logs import start_logging

Start = Callable[..., io.StringIO]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def start() -> Iterator[Start]:
    """Start logging into a stream; afterwards everything is as before."""
    root, ours = logging.getLogger(), logging.getLogger("kvscope")
    before = root.handlers[:], root.level, ours.level

    def start(level: str = "info", log_format: str = "text", terminal: bool = False) -> io.StringIO:
        stream = Terminal() if terminal else io.StringIO()
        start_logging(level, log_format, stream)
        return stream

    yield start
    root.handlers[:], root.level, ours.level = before[0], before[1], before[2]


log = logging.getLogger("kvscope.test")


def test_a_text_line_has_time_level_and_message(start: Start) -> None:
    stream = start()
    log.info("server main is ready", extra={"server": "main"})
    time, level, message = stream.getvalue().split(" ", 2)
    assert time.endswith("Z")
    assert (level, message) == ("info", "server main is ready\n")


def test_a_json_line_has_the_server_where_one_is_meant(start: Start) -> None:
    stream = start(log_format="json")
    log.warning("server %s is slow", "main", extra={"server": "main"})
    log.error("no server")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert {**first, "time": ""} == {
        "time": "",
        "level": "warning",
        "message": "server main is slow",
        "server": "main",
    }
    assert set(second) == {"time", "level", "message"}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_is_one_line_without_its_text(start: Start, log_format: str) -> None:
    stream = start(log_format=log_format)
    try:
        int("CANARY")
    except ValueError:
        log.exception("a fault")
    assert stream.getvalue().count("\n") == 1
    assert "a fault: ValueError at test_logs.py:" in stream.getvalue()
    assert "CANARY" not in stream.getvalue()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_message_cannot_forge_a_line(start: Start, log_format: str) -> None:
    stream = start(log_format=log_format)
    log.info("model %s", "a\n2026-01-01T00:00:00Z error forged\x1b[31m\u2028")
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


def test_the_level_is_kvscopes_and_others_are_heard_from_warning_on(start: Start) -> None:
    stream = start("debug")
    log.debug("ours")
    logging.getLogger("other").info("theirs, quiet")
    logging.getLogger("other").warning("theirs, loud")
    assert [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()] == ["ours", "theirs, loud"]


def test_colour_is_for_terminals_that_want_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = start(terminal=True)
    log.error("red")
    assert "\x1b[31merror" in stream.getvalue()
    stream = start()
    log.error("plain")
    assert "\x1b" not in stream.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    stream = start(terminal=True)
    log.error("plain")
    assert "\x1b" not in stream.getvalue()
