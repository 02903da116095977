"""Reads the shape of the model that a server runs: once, and again when it may be another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvscope.logs import what_and_where
from kvscope.observed.model import ModelSeen
from kvscope.observed.server import ServerProcess, ServerProps, Source, SourceAnswer
from kvscope.own_thread import in_own_thread
from kvscope.settings import ServerSettings
from kvscope.sources.model_file import ModelFile, ModelFileError, Served
from kvscope.sources.server_process import is_here

MODEL_EVERY_SECONDS = 30.0
MODEL_PATIENCE_SECONDS = 2.0
"""A model on a disk that sleeps is read on while the looks go on."""


class ModelWatch:
    """Follows one server's model file. monotonic: seconds of a clock that never jumps.

    may_be_new: set when the server restarted, so that the file is looked at again. problem: one line when
    it cannot be read. reading: whether an answer is awaited still.
    """

    def __init__(self, server: ServerSettings, file: ModelFile, monotonic: Callable[[], float]) -> None:
        self._server = server
        self._file = file
        self._monotonic = monotonic
        self._model: ModelSeen | None = None
        self._model_of: Served | None = None
        self._asked_at: float | None = None
        self._reading: asyncio.Future[ModelSeen | None] | None = None
        self._here: bool | None = None
        self.may_be_new = False
        self.problem: str | None = None

    @property
    def reading(self) -> bool:
        """Whether the file is being read."""
        return self._reading is not None

    @property
    def known(self) -> bool:
        """Whether a shape was read."""
        return self._model is not None

    def of(self, props: ServerProps | None, process: ServerProcess | None) -> ModelSeen | None:
        """Return the shape of the model that the server names; None while it is not known."""
        return self._model if self._served(props, process) == self._model_of else None

    async def look(self, props: ServerProps | None, process: ServerProcess | None) -> Sequence[SourceAnswer]:
        """Read the file where that is due; return how it went, nothing where no file is in sight or due."""
        if self._here is None:
            self._here = await asyncio.to_thread(is_here, self._server)
        served = self._served(props, process)
        now = self._monotonic()
        due = self._asked_at is None or now - self._asked_at >= MODEL_EVERY_SECONDS
        if self._reading is None and (due or served != self._model_of or self.may_be_new):
            self._asked_at = now
            self.may_be_new = False
            if served != self._model_of:
                self._model, self._model_of = None, served
            self._reading = in_own_thread(lambda: self._file.read(served))
        if self._reading is None:
            return ()
        done, _ = await asyncio.wait({self._reading}, timeout=MODEL_PATIENCE_SECONDS)
        return self._answer() if done else ()

    def stop(self) -> None:
        """Wait for no answer any more."""
        if self._reading is not None:
            self._reading.cancel()

    def _answer(self) -> Sequence[SourceAnswer]:
        assert self._reading is not None
        reading, self._reading, self.problem = self._reading, None, None
        try:
            self._model = reading.result()
        except ModelFileError as error:
            self._model, self.problem = None, str(error)
        except Exception as error:  # whatever a file holds costs its own figures only
            where = what_and_where(error)
            self._model, self.problem = None, f"its model file is left out: a fault of kvscope ({where})"
        if self._model is None and self.problem is None:
            return ()
        took = self._monotonic() - (self._asked_at or 0.0)
        return (SourceAnswer(Source.MODEL_FILE, took, self.problem),)

    def _served(self, props: ServerProps | None, process: ServerProcess | None) -> Served:
        return Served(
            path=props.model_path if props else None,
            directory=process.working_directory if process else None,
            here=process is not None or bool(self._here),
            process_seen=process is not None,
            started_at=process.started_at if process else None,
        )
