"""A model's shape as a small JSON text: what its KV memory follows from, without the model.

Nothing else goes in: no path, no name, no text of the header but the architecture, no vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from kvscope.observed.model import MetadataValue, ModelHeader
from kvscope.sources.gguf_header import ARCHITECTURE_NAME, LONGEST_KEY, open_regular

VERSION = 1
LARGEST_FILE_BYTES = 1024 * 1024
LONGEST_ARRAY = 4096
"""Longer ones are left out of a shape; llama.cpp knows at most 512 layers (LLAMA_MAX_LAYERS)."""


class ShapeFileError(ValueError):
    """A file that is no shape; the message says what is wrong in one line."""


def shape_document(header: ModelHeader) -> dict[str, Any]:
    """Return a header's shape as `read_shape` takes it, for json.dumps.

    Of the metadata only finite numbers, truth values and arrays of them under the architecture's own
    prefix are in it.
    """
    prefix = f"{header.architecture}."
    metadata = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in sorted(header.metadata.items())
        if key.startswith(prefix) and len(key) <= LONGEST_KEY and _is_shape(value)
    }
    return {
        "kvscope_shape": VERSION,
        "architecture": header.architecture,
        "file_bytes": header.file_bytes,
        "nextn_tensors": header.nextn_tensors,
        "gpu_weights_bytes": header.gpu_weights_bytes,
        "metadata": metadata,
    }


def read_shape(path: Path) -> ModelHeader:
    """Return the header that a shape was taken from, as far as KV memory needs it.

    Raises ShapeFileError for a file that is no shape, and OSError where it cannot be read or is no file.
    """
    with open_regular(path) as file:
        body = file.read(LARGEST_FILE_BYTES + 1)
    try:
        return _header(_document(body))
    except ShapeFileError as error:
        raise ShapeFileError(f"{path.name!r} {error}") from None


def _document(body: bytes) -> dict[str, Any]:
    if body.startswith(b"GGUF"):
        raise ShapeFileError("is a GGUF model, not a shape; give it as a model's file")
    if len(body) > LARGEST_FILE_BYTES:
        raise ShapeFileError(f"is larger than a shape: it goes on after {LARGEST_FILE_BYTES} bytes")
    try:
        document = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ShapeFileError("is no JSON text") from None
    if not isinstance(document, dict) or "kvscope_shape" not in document:
        raise ShapeFileError("is no shape: it has no kvscope_shape; `kvscope plan --shape` prints one")
    return document


def _header(document: dict[str, Any]) -> ModelHeader:
    version = document["kvscope_shape"]
    if type(version) is not int or version != VERSION:
        raise ShapeFileError(f"has kvscope_shape {_shown(version)}; {VERSION} is read, print it anew")
    architecture = document.get("architecture")
    if not isinstance(architecture, str) or not ARCHITECTURE_NAME.fullmatch(architecture):
        raise ShapeFileError(f"has {_shown(architecture)} as its architecture, which is no name of one")
    nextn_tensors = document.get("nextn_tensors")
    if nextn_tensors is not None and not isinstance(nextn_tensors, bool):
        raise ShapeFileError(f"has {_shown(nextn_tensors)} as nextn_tensors, neither true nor false")
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        raise ShapeFileError(f"has {_shown(metadata)} as its metadata, which is no object")
    return ModelHeader(
        architecture=architecture,
        metadata={"general.architecture": architecture, **_metadata(f"{architecture}.", metadata)},
        file_bytes=_count(document, "file_bytes"),
        nextn_tensors=nextn_tensors,
        gpu_weights_bytes=_count(document, "gpu_weights_bytes"),
    )


def _count(document: dict[str, Any], key: str) -> int | None:
    count = document.get(key)
    if count is not None and (type(count) is not int or not 0 <= count < 2**63):
        raise ShapeFileError(f"has {_shown(count)} as {key}, which is no count")
    return count


def _metadata(prefix: str, entries: dict[str, Any]) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for key, entry in entries.items():
        value = tuple(entry) if isinstance(entry, list) else entry
        if not key.startswith(prefix) or len(key) > LONGEST_KEY:
            raise ShapeFileError(f"has the key {_shown(key)} in its metadata, not one of {prefix}*")
        if not _is_shape(value):
            raise ShapeFileError(f"has {_shown(entry)} for {_shown(key)}, neither numbers nor truth values")
        metadata[key] = value
    return metadata


def _is_shape(value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) <= LONGEST_ARRAY and all(_is_number(element) for element in value)
    return _is_number(value)


def _is_number(value: object) -> bool:
    if isinstance(value, int):  # truth values too; GGUF has no wider ones
        return -(2**63) <= value < 2**64
    return isinstance(value, float) and math.isfinite(value)


def _refuse(_: str) -> NoReturn:
    raise ValueError


def _shown(value: object) -> str:
    return f"{value!r:.64}"
