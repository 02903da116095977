"""The demo end to end: it ends by itself, shows every scene, leaves nothing behind, and dies clearly."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.real_server

Demo = Callable[..., "subprocess.Popen[str]"]
ESCAPE = "\x1b"
DEADLINE_SECONDS = 120


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Demo]:
    """Starts `kvscope demo` as a user would, with a cache and a home of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **environment: str) -> subprocess.Popen[str]:
        demo = subprocess.Popen(
            [sys.executable, "-m", "kvscope", "demo", "--breath", "0.6", *options],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(demo)
        return demo

    yield start
    for demo in started:
        demo.kill()
        demo.communicate()


def read_until(demo: subprocess.Popen[str], wanted: str) -> str:
    assert demo.stdout
    seen = ""
    for line in demo.stdout:
        seen += line
        if wanted in line:
            return seen
    pytest.fail(f"{wanted!r} was never printed:\n{seen}{demo.stderr.read() if demo.stderr else ''}")


def last_number(out: str, figure: str, kind: str = "") -> int:
    """Return the figure as it was last printed, 0 when it never was."""
    found = re.findall(rf"{figure}: (?:.*, )?(\d+) ?{kind}", out)
    return int(found[-1]) if found else 0


def server_of(demo: subprocess.Popen[str]) -> psutil.Process:
    (server,) = psutil.Process(demo.pid).children()
    return server


@pytest.mark.parametrize(
    ("mode", "turns", "scenes", "requests"),
    [
        # Of the main agent 2 requests a turn, then 1 sub-agent, 3 at once, 2 strangers; 200 tokens each.
        ("default", 2, ["a sub-agent asks", "three sub-agents ask"], 2 * 2 + 1 + 3),
        ("separate", 3, ["a sub-agent asks", "three sub-agents ask", "someone else asks"], 2 * 3 + 1 + 3 + 2),
    ],
)
def test_it_ends_after_its_turns_with_every_scene_every_token_and_a_picture(
    start_demo: Demo, tmp_path: Path, mode: str, turns: int, scenes: list[str], requests: int
) -> None:
    picture = tmp_path / "picture.svg"
    out, err = start_demo(
        "--turns", str(turns), "--breath", "0", "--mode", mode, "--picture", str(picture)
    ).communicate(timeout=DEADLINE_SECONDS)
    assert err == ""
    assert ESCAPE not in out
    for scene in (*scenes, "the session is over"):
        assert scene in out
    assert "/metrics" in out
    seen = last_number(out, "demo generated tokens") + last_number(out, "seen in no slot", "generated")
    assert seen == 200 * requests
    assert ("one pool for all slots" if mode == "default" else "separate slots") in out
    assert " tokens, copy unknown)" in out
    svg = picture.read_text()
    assert "slots" in svg
    assert "http" not in svg.replace("http://www.w3.org/", "").replace("http://127.0.0.1:", "").replace(
        "https://www.textualize.io", ""
    )


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_everything_else(
    start_demo: Demo, tmp_path: Path, ending: signal.Signals
) -> None:
    demo = start_demo()
    read_until(demo, "tokens held")
    server = server_of(demo)
    demo.send_signal(ending)
    _, err = demo.communicate(timeout=DEADLINE_SECONDS)
    assert (demo.returncode, err) == (0, "")
    assert psutil.wait_procs([server], timeout=10)[1] == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["kvscope"]


def test_a_server_that_dies_is_one_clear_line(start_demo: Demo) -> None:
    demo = start_demo()
    read_until(demo, "tokens held")
    server_of(demo).kill()
    _, err = demo.communicate(timeout=DEADLINE_SECONDS)
    assert demo.returncode == 1
    assert err.splitlines() == ["kvscope demo: the llama.cpp server died (signal 9)"]


def test_a_cache_directory_that_cannot_be_written_is_one_clear_line(start_demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    demo = start_demo(XDG_CACHE_HOME=str(tmp_path / "a-file"))
    _, err = demo.communicate(timeout=DEADLINE_SECONDS)
    assert demo.returncode == 1
    assert "set XDG_CACHE_HOME" in err
    assert len(err.splitlines()) == 1


def test_an_unknown_option_ends_with_2(start_demo: Demo) -> None:
    demo = start_demo("--no-such-option")
    _, err = demo.communicate(timeout=DEADLINE_SECONDS)
    assert demo.returncode == 2
    assert "--no-such-option" in err


def test_a_taken_port_is_told_and_another_one_is_used(start_demo: Demo) -> None:
    first = start_demo()
    read_until(first, "/metrics")
    second = start_demo()
    said = read_until(second, "* metrics: ")
    assert "is taken" in said
    assert ":10188/" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_it_draws_and_gives_the_cursor_back(start_demo: Demo, tmp_path: Path) -> None:
    import pty

    controller, terminal = pty.openpty()
    demo = subprocess.Popen(
        [sys.executable, "-m", "kvscope", "demo"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TERM": "xterm-256color", "NO_COLOR": "1"},
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    seen = b""
    asked_to_end = False
    started = time.monotonic()
    while time.monotonic() - started < DEADLINE_SECONDS:
        try:
            part = os.read(controller, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
        if b"tokens" in seen and not asked_to_end:
            demo.send_signal(signal.SIGINT)
            asked_to_end = True
    os.close(controller)
    assert demo.wait(DEADLINE_SECONDS) == 0
    assert b"context" in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
    # NO_COLOR: no colour is ever set (SGR 30-49, 90-107).
    codes = {int(code or 0) for sgr in seen.split(b"\x1b[")[1:] for code in _codes(sgr)}
    assert not any(30 <= code <= 49 or 90 <= code <= 107 for code in codes)


def _codes(after_escape: bytes) -> list[bytes]:
    head, ends, _ = after_escape.partition(b"m")
    return head.split(b";") if ends and head.replace(b";", b"").isdigit() else []
