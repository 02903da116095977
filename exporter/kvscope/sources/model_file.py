"""The shape of the model that a server runs: which file tells it, and reading it again when it changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from kvscope.observed.model import ModelSeen
from kvscope.settings import ServerSettings
from kvscope.sources.gguf_header import FileIdentity, HeaderError, has_weights, header_identity, read_header
from kvscope.sources.model_shape import ShapeFileError, read_shape

FileIdentities = tuple[FileIdentity | None, ...]


class ModelFileError(Exception):
    """The model's shape cannot be read; the message is one line without the file's path."""


class Served(NamedTuple):
    """Where a server found its model: the path it names, and the folder where a relative one begins.

    here: it answers on this machine. process_seen: its process is in sight, so its paths are ours.
    started_at: Unix seconds; a file that was replaced since then is not the one it loaded.
    """

    path: str | None
    directory: str | None = None
    here: bool = False
    process_seen: bool = False
    started_at: float | None = None


class ModelFile:
    """Reads the shape of one server's model; blocks as files do, so a thread of its own calls it."""

    def __init__(self, server: ServerSettings, path_map: Sequence[tuple[str, str]] = ()) -> None:
        self._server = server
        self._named = server.kv_shape or server.model_file
        self._path_map = sorted(path_map, key=lambda pair: len(pair[0]), reverse=True)
        self._last: tuple[Path, FileIdentities, ModelSeen | str] | None = None

    def read(self, served: Served) -> ModelSeen | None:
        """Return the model's shape; None where no file is known that could tell it. Raises ModelFileError."""
        path, certain = self._path(served)
        if path is None:
            return None
        is_shape = bool(self._server.kv_shape)
        try:
            identity = header_identity(path)
            last = self._known(path, identity, served.started_at)
            if isinstance(last, str):
                raise ModelFileError(last)
            if last is not None:
                return last
            header = read_shape(path) if is_shape else read_header(path)
            if not is_shape and not has_weights(path):
                header = replace(header, file_bytes=None)  # a header alone is no measure of the weights
        except (HeaderError, ShapeFileError) as error:
            problem = f"the {self._what()} cannot be used: {error}"
            self._last = (path, identity, problem)
            raise ModelFileError(problem) from None
        except OSError as error:
            self._last = None
            if not certain:
                return None
            raise ModelFileError(
                f"the {self._what()} cannot be read ({error.strerror}): {self._way_out()}"
            ) from None
        seen = ModelSeen(header, given=self._named is not None)
        self._last = (path, identity, seen)
        return seen

    def _known(
        self, path: Path, identity: FileIdentities, started_at: float | None
    ) -> ModelSeen | str | None:
        """What was read of this very file, or of the one that lay there when the server loaded it."""
        if self._last is None or self._last[0] != path:
            return None
        _, last_identity, last = self._last
        newest = max((part[-1] for part in identity if part is not None), default=0) / 1e9
        replaced_since = started_at is not None and newest > started_at and isinstance(last, ModelSeen)
        return last if identity == last_identity or replaced_since else None

    def _path(self, served: Served) -> tuple[Path | None, bool]:
        """The file, and whether it must be there: a container's own paths are not."""
        if self._named is not None:
            return Path(self._named), True
        if not served.path:
            return None, False
        for there, mapped in self._path_map:
            inside = _inside(served.path, there)
            if inside is not None:
                return Path(mapped, inside), True
        if not served.here:
            return None, False
        path = Path(served.path)
        if path.is_absolute():
            return path, served.process_seen
        return (Path(served.directory, path) if served.directory else None), True

    def _what(self) -> str:
        if self._server.kv_shape:
            return "shape file of --kv-shape"
        return "model file of --model-file" if self._server.model_file else "model file that the server names"

    def _way_out(self) -> str:
        if self._named is not None:
            return "check its path and permissions"
        name = self._server.name
        return f"name one that can be with --model-file {name}=PATH, or its folder with --model-path-map"


def _inside(served: str, folder: str) -> str | None:
    """Return what of a path lies inside a folder, as a server on either kind of system writes it."""
    windows = "\\" in served or "\\" in folder
    kind = PureWindowsPath if windows else PurePosixPath
    try:
        inside = kind(served).relative_to(kind(folder))
    except ValueError:
        return None
    return None if ".." in inside.parts else inside.as_posix()
