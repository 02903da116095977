"""Builds the stand-in for libnvidia-ml and puts it where pynvml finds it."""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pynvml  # type: ignore[import-untyped]

NAME = "libnvidia-ml.so.1"
SOURCE = Path(__file__).with_name("stand_in.c")

Lines = Mapping[tuple[str, object], object]
"""What a script says: by function and device (- for none) its values."""


class CompilerMissingError(Exception):
    """No C compiler is there."""


class StandIn:
    """The stand-in, loaded into this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def script(self, lines: Lines) -> None:
        """Have the driver answer so from now on."""
        if self._library.stand_in_script(text(lines).encode(errors="surrogateescape")) < 0:
            raise ValueError("the stand-in cannot read its script")

    @property
    def starts(self) -> int:
        """How often NVML was started, with or without success."""
        return int(self._library.stand_in_starts())

    @property
    def started(self) -> int:
        """How often NVML is started and not shut down."""
        return int(self._library.stand_in_started())

    @property
    def open_sets(self) -> int:
        """How many event sets are open."""
        return int(self._library.stand_in_open_sets())


def text(lines: Lines) -> str:
    """Return the script's text."""
    return "".join(f"{function} {device} {value}\n" for (function, device), value in lines.items())


def build(folder: Path, *definitions: str) -> Path:
    """Compile the stand-in into a folder; with OLD_DRIVER it lacks what drivers before R510 lack.

    Raises CompilerMissingError.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CompilerMissingError("no C compiler (cc, gcc) is there to build the stand-in for libnvidia-ml")
    path = folder / NAME
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{NAME}"]
    subprocess.run([compiler, *flags, *(f"-D{name}" for name in definitions), SOURCE, "-o", path], check=True)
    return path


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[StandIn]:
    """Load the stand-in first: the linker then has the name for pynvml too, whatever driver is installed."""
    forget()
    library = ctypes.CDLL(str(path))
    try:
        yield StandIn(library)
    finally:
        forget()
        _ctypes.dlclose(library._handle)


def forget() -> None:
    """Have pynvml look for the library anew."""
    library, pynvml.nvmlLib = pynvml.nvmlLib, None
    pynvml._nvmlGetFunctionPointer_cache.clear()
    if library is not None:
        _ctypes.dlclose(library._handle)
