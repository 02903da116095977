"""Asks llama.cpp itself which weights a model needs, so that no list of them is kept here.

llama_model_init_from_user builds a model from a file without weights and hands out every tensor that
it wants filled. Structures are passed as llama.cpp gave them, so their fields need not be known here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import xllamacpp

F32 = 0
MAX_DIMENSIONS = 4


class _ModelParameters(ctypes.Structure):
    # Larger than llama_model_params of any build; only handed back.
    _fields_ = (("opaque", ctypes.c_uint64 * 64),)


class _ReadParameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


class _Tensor(ctypes.Structure):
    # The first fields of ggml_tensor (ggml.h).
    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("lengths", ctypes.c_int64 * MAX_DIMENSIONS),
    )


_Fill = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


def wanted_weights(header: Path) -> dict[str, tuple[int, ...]]:
    """Return name and shape (rows first, as numpy has it) of every float tensor the model is made of.

    Raises ValueError when llama.cpp takes no such model; its reason is on stderr.
    """
    library = ctypes.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _ReadParameters]
    library.ggml_get_name.restype = ctypes.c_char_p
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    library.llama_model_default_params.restype = _ModelParameters
    library.llama_model_init_from_user.restype = ctypes.c_void_p
    library.llama_model_init_from_user.argtypes = [ctypes.c_void_p, _Fill, ctypes.c_void_p, _ModelParameters]
    wanted: dict[str, tuple[int, ...]] = {}

    def note(address: int, _: int | None) -> None:
        tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
        name = library.ggml_get_name(address).decode()
        lengths = list(tensor.lengths)
        while len(lengths) > 1 and lengths[-1] == 1:
            lengths.pop()
        if tensor.type == F32:
            wanted[name] = tuple(reversed(lengths))

    metadata = library.gguf_init_from_file(bytes(header), _ReadParameters(no_alloc=True, context=None))
    if not library.llama_model_init_from_user(
        metadata, _Fill(note), None, library.llama_model_default_params()
    ):
        raise ValueError(f"llama.cpp takes no model with the header of {header.name}")
    return wanted
