"""Start a real llama.cpp server as a child process, and stop it."""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from kvscope.demo import llama_server

READY_SECONDS = 60.0
STOP_SECONDS = 5.0


class ServerDidNotStart(Exception):
    """The server ended or stayed silent before it was ready; the text has the tail of its log."""


class RunningServer:
    """A llama.cpp server in a child process of this one, which ends with it whatever happens.

    url: its base, with the path prefix if it has one. pid: of the process that listens.
    log_path: its log, removed when the server is stopped.
    """

    def __init__(self, model: Path, *flags: str, environment: Mapping[str, str] | None = None) -> None:
        """Start it with llama-server's own flags; --port is 0 unless given. `wait` says when it is ready."""
        given = llama_server.flags().parse_args(["-m", str(model), "--port", "0", *flags])
        self._prefix: str = given.api_prefix
        self._directory = tempfile.TemporaryDirectory(prefix="kvscope-")
        self.log_path = Path(self._directory.name) / "log"
        self._said = Path(self._directory.name) / "said"
        self.url = ""
        command = [sys.executable, "-m", "kvscope.demo.llama_server", "-m", str(model), "--port", "0", *flags]
        with self.log_path.open("wb") as log, self._said.open("wb") as said:
            # The pipe to its stdin closes when this process ends, even when it is killed.
            self._process = subprocess.Popen(  # noqa: S603 - the command is this package's own
                [*command, "--until-stdin-closes"],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=log,
                env={**os.environ, **environment} if environment else None,
                start_new_session=True,  # Ctrl-C is for this process, which then stops the server
            )

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return None while it runs, else its exit code (negative: ended by that signal)."""
        return self._process.poll()

    def wait(self, seconds: float = READY_SECONDS) -> RunningServer:
        """Return when the server answers /health with 200 (or with 401: it wants a key).

        Raises ServerDidNotStart when it ends before or is not ready in time.
        """
        deadline = time.monotonic() + seconds
        while not self._ready():
            if self._process.poll() is not None:
                raise ServerDidNotStart(f"llama.cpp server ended with {self.exit_code()}: {self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerDidNotStart(f"llama.cpp server not ready in {seconds:.0f} s: {self.log_tail()}")
            time.sleep(0.02)
        return self

    def log_tail(self, lines: int = 3) -> str:
        """Return the last lines of its log in one line, with the home directory as ~."""
        text = self.log_path.read_text(errors="replace").replace(str(Path.home()), "~")
        return " | ".join(text.strip().splitlines()[-lines:]) or "its log is empty"

    def stop(self) -> None:
        """End it in good order and remove its log; killed when it does not end in time."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._clean_up()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> RunningServer:
        """Return the server; it is stopped at the end of the `with`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    def _clean_up(self) -> None:
        self._process.wait()
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._directory.cleanup()

    def _ready(self) -> bool:
        if not self.url:
            said = self._said.read_text()
            if not said.startswith("listening on ") or not said.endswith("\n"):
                return False
            self.url = said.removeprefix("listening on ").strip() + self._prefix
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
        try:
            connection.request("GET", f"{parts.path}/health")
            return connection.getresponse().status in (200, 401)
        except OSError:
            return False
        finally:
            connection.close()


@contextlib.contextmanager
def start_server(
    model: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """Give a server that is ready, started with llama-server's own flags; it is stopped at the end.

    `with start_server(model, "-c", "16384", "--metrics") as server: ...`
    Raises ServerDidNotStart, and SystemExit for a flag that is not known.
    """
    with RunningServer(model, *flags, environment=environment) as server:
        yield server.wait()
