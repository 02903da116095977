"""Reads the header of a GGUF model, and nothing behind it.

The format is that of ggml/src/gguf.cpp (llama.cpp b11549): magic, version, two counts, then keys with
typed values, then what each tensor is called, its shape and type, and where it lies. The vocabulary is
hopped over. Whatever
a file says, at most MOST_READ_BYTES of it are read, in about a second, and about 10 MB of memory used.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kvscope.observed.model import MetadataValue, ModelHeader

MOST_READ_BYTES = 128 * 1024 * 1024
"""Of all parts together; a vocabulary of 262 144 tokens with its 514 906 merges takes 15 MB."""
MOST_KEPT_BYTES = 2 * 1024 * 1024
"""Of keys, texts and arrays that are kept; real headers have some ten thousand."""
LONGEST_KEY = 1024
LONGEST_TEXT = 1024
LONGEST_ARRAY = 65_536
"""Longer texts and arrays are left out; llama.cpp knows at most 512 layers (LLAMA_MAX_LAYERS)."""
MOST_TENSORS = 262_144
MOST_PARTS = 1000
WINDOW_BYTES = 64 * 1024

ARCHITECTURE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")

_MAGIC = b"GGUF"
_LENGTH = struct.Struct("<Q")
_COUNT = struct.Struct("<I")
_COUNTS = struct.Struct("<QQ")
_NUMBERS = {
    code: struct.Struct(f"<{letter}")
    for code, letter in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip
_TEXT = 8
_ARRAY = 9
_KEY_COST = 64
_MOST_KEYS = MOST_KEPT_BYTES // _KEY_COST
_MOST_DIMENSIONS = 4
_SHAPES = tuple(struct.Struct(f"<{count}QIQ") for count in range(_MOST_DIMENSIONS + 1))
"""Lengths, type and place of a tensor."""
_ALIGNMENT = 32
"""Of the weights, where general.alignment does not say another (GGUF_DEFAULT_ALIGNMENT)."""
_SIZES = {
    0: (1, 4), 1: (1, 2), 30: (1, 2),  # F32, F16, BF16
    2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),  # Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),  # Q2_K to Q6_K
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50),  # IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S
    20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 29: (256, 56),  # IQ4_NL, IQ3_S to IQ1_M
    39: (32, 17),  # MXFP4
}  # fmt: skip
"""Weights in a block and its bytes, by type (ggml.h, ggml-common.h): those that GPUs calculate with."""
_LONGEST_NAME = 63
"""Of a tensor that llama.cpp takes (GGML_MAX_NAME)."""
_TOKEN_EMBEDDING = b"token_embd.weight"
_OUTPUT = b"output.weight"
_ON_CPU = (b"position_embd.weight", b"token_types.weight", b"per_layer_token_embd.weight")
_ON_GPU = re.compile(
    rb"blk\.[0-9]+\..+|(?:output|output_norm|token_embd_norm|cls|cls\.output|rope_freqs"
    rb"|rope_factors_(?:long|short)|per_layer_(?:model_proj|proj_norm)|altup_(?:proj|unembd_proj))"
    rb"\.(?:weight|bias)"
)
_NOT_CERTAIN = re.compile(rb"\.nextn\.|\.ssm_d\b|time_mix|attn_rel_b|_ape\b|tid2eid")
"""Loaded only at times, or on the CPU where a GPU lacks what is calculated with them."""
_PART_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)

FileIdentity = tuple[int, int, int, int]
"""Device, inode, size and time of the last change in nanoseconds."""


class HeaderError(ValueError):
    """A file that is no readable GGUF header; the message says what is wrong and where, in one line."""


def read_header(path: Path) -> ModelHeader:
    """Return the header of a model; of a split one path may be any part, if the first lies beside it.

    Kept are numbers, truth values, texts up to LONGEST_TEXT bytes and arrays of numbers or truth values
    up to LONGEST_ARRAY elements, all but those of the tokenizer. nextn_tensors answers llama.cpp's own
    question (src/models/deepseek4.cpp): is `blk.N.nextn.eh_proj.weight` there, N the first layer that
    predicts further tokens; it is looked for where the metadata has such layers. gpu_weights_bytes follows
    load_tensors of src/llama-model.cpp and LLM_TENSOR_INFOS of src/llama-arch.cpp: the input layer stays on
    the CPU, everything else is on the GPU, and where the output has no weights of its own it gets a copy of
    the token embedding. None for a tensor of another name or type, and where a part or its weights lack.
    Raises HeaderError for a file that is no header, and OSError where it cannot be read or is no file.
    """
    allowance = _Allowance()
    part = _read_part(path, allowance)
    by_name = _parts(path)
    number = part.metadata.get("split.no", 0)
    if number != 0:
        path, part = by_name[0], _first_part(path, by_name, allowance)
    parts = _parts_of(path, part, by_name)
    architecture = part.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not ARCHITECTURE_NAME.fullmatch(architecture):
        raise HeaderError(f"{path.name!r} has no usable general.architecture, only {architecture!r:.100}")
    return ModelHeader(
        architecture=architecture,
        metadata=part.metadata,
        file_bytes=_total_bytes(path, part, parts),
        nextn_tensors=_nextn_tensors(architecture, path, part, parts, allowance),
        gpu_weights_bytes=_gpu_weights_bytes(path, part, parts, allowance),
    )


def has_weights(path: Path) -> bool:
    """Return whether a model's weights follow its header, in every part of a split one.

    False for a file that ends before its last tensor begins, and where a further part is missing or no
    GGUF file: its size is not that of the weights. Raises HeaderError and OSError for path itself.
    """
    allowance = _Allowance()
    part = _read_part(path, allowance)
    if not _goes_on_to_its_last_tensor(path, part, allowance):
        return False
    others = (each for each in _parts_of(path, part, _parts(path)) if each != path)
    try:
        return all(
            _goes_on_to_its_last_tensor(each, _read_part(each, allowance), allowance) for each in others
        )
    except (OSError, HeaderError):
        return False


def header_identity(path: Path) -> tuple[FileIdentity | None, ...]:
    """Return what changes when a model's file, or a part of it, is replaced; None for a missing part.

    Costs one stat for each part that the name speaks of. Raises OSError where path itself is missing.
    """
    _status(path)
    return tuple(_identity(part) for part in _parts(path))


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered. Raises OSError, also for what is no regular file.

    That is asked before it is opened: a FIFO would wait for a writer, a device may act on it.
    """
    if not stat.S_ISREG(_status(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.open("rb", buffering=0)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except ValueError:  # a zero byte, half a surrogate pair: a path may come from a server's answer
        raise OSError(errno.EINVAL, "not a path", repr(str(path))) from None


# --- parts ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """One file of a model. tensors_at: the offset at which its tensors are described."""

    metadata: Mapping[str, MetadataValue]
    file_bytes: int
    tensors: int
    tensors_at: int


def _parts(path: Path) -> tuple[Path, ...]:
    """Return all parts by the name of one (llama_split_path in src/llama.cpp); path alone if it is none."""
    match = _PART_NAME.fullmatch(path.name)
    if not match:
        return (path,)
    prefix, number, count = match[1], int(match[2]), int(match[3])
    if not 1 <= number <= count <= MOST_PARTS:
        return (path,)
    return tuple(path.with_name(f"{prefix}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1))


def _first_part(path: Path, by_name: Sequence[Path], allowance: _Allowance) -> _Part:
    if by_name[0] == path:
        raise HeaderError(f"{path.name!r} is a further part of a model and not named as one; give the first")
    try:
        first = _read_part(by_name[0], allowance)
    except FileNotFoundError:
        raise HeaderError(
            f"{path.name!r} is a further part of a model; the first, {by_name[0].name!r}, is not beside it"
        ) from None
    if first.metadata.get("split.no", 0) != 0:
        raise HeaderError(f"{by_name[0].name!r} is named as the first part of a model and is none")
    return first


def _parts_of(path: Path, part: _Part, by_name: Sequence[Path]) -> Sequence[Path]:
    """Return all parts of a model, its first being path; none where names and header disagree."""
    count = part.metadata.get("split.count", 0)
    if count in (0, 1):
        return (path,)
    return by_name if count == len(by_name) else ()


def _total_bytes(path: Path, first: _Part, parts: Sequence[Path]) -> int | None:
    sizes = [first.file_bytes]
    for part in parts:
        if part != path:
            identity = _identity(part)
            if identity is None:
                return None
            sizes.append(identity[2])
    return sum(sizes) if parts else None


def _identity(path: Path) -> FileIdentity | None:
    try:
        status = _status(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _nextn_tensors(
    architecture: str, path: Path, first: _Part, parts: Sequence[Path], allowance: _Allowance
) -> bool | None:
    """Return whether the weights of the layers that predict further tokens are in any part."""
    nextn = first.metadata.get(f"{architecture}.nextn_predict_layers")
    layers = first.metadata.get(f"{architecture}.block_count")
    if type(nextn) is not int or type(layers) is not int or not 0 < nextn < layers:
        return None
    name = f"blk.{layers - nextn}.nextn.eh_proj.weight".encode()
    if _has_tensor(path, first, name, allowance):
        return True
    for other in parts:
        if other != path:
            try:
                part = _read_part(other, allowance)
                if _has_tensor(other, part, name, allowance):
                    return True
            except (OSError, HeaderError):
                return None
    return False if parts else None


def _gpu_weights_bytes(path: Path, first: _Part, parts: Sequence[Path], allowance: _Allowance) -> int | None:
    """Return the bytes of what a GPU holds that every layer is on; None where that is not certain."""
    sums = _Weights()
    try:
        for each in parts:
            part = first if each == path else _read_part(each, allowance)
            if not _add_weights(sums, each, part, allowance):
                return None
    except (OSError, HeaderError):
        return None
    if not sums.embedding:
        return None
    return sums.repeating + (sums.output or sums.embedding)


# --- one file ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Allowance:
    """What all parts of one model may still cost."""

    read_bytes: int = MOST_READ_BYTES
    kept_bytes: int = MOST_KEPT_BYTES
    tensors: int = MOST_TENSORS

    def spend(self, what: str, amount: int) -> None:
        left = getattr(self, what) - amount
        if left < 0:
            raise HeaderError(f"is larger than any header: {_LIMITS[what]}")
        setattr(self, what, left)


_LIMITS = {
    "read_bytes": f"it goes on after {MOST_READ_BYTES} bytes",
    "kept_bytes": f"its keys and values take more than {MOST_KEPT_BYTES} bytes",
    "tensors": f"it speaks of more than {MOST_TENSORS} tensors",
}


@contextmanager
def _reading(path: Path, allowance: _Allowance) -> Iterator[_Reader]:
    """Open a file for a reader of its header; a HeaderError then begins with the file's name."""
    with open_regular(path) as file:
        try:
            yield _Reader(file, os.fstat(file.fileno()).st_size, allowance)
        except HeaderError as error:
            raise HeaderError(f"{path.name!r} {error}") from None


def _read_part(path: Path, allowance: _Allowance) -> _Part:
    with _reading(path, allowance) as reader:
        if reader.take(4, "the magic") != _MAGIC:
            raise HeaderError("is no GGUF file: it does not begin with 'GGUF'")
        _check_version(reader.number(_COUNT, "the version"))
        tensors, keys = _COUNTS.unpack(reader.take(_COUNTS.size, "the counts"))
        if keys > _MOST_KEYS:
            raise HeaderError(f"is larger than any header: it speaks of {keys} keys")
        metadata = _metadata(reader, keys, allowance)
        return _Part(metadata, reader.size, tensors, reader.offset)


def _check_version(version: int) -> None:
    if version & 0xFFFF == 0 and version:
        raise HeaderError("is big-endian; only little-endian GGUF is read")
    if version not in (2, 3):
        raise HeaderError(f"has GGUF version {version}; versions 2 and 3 are read, convert the model anew")


def _metadata(reader: _Reader, keys: int, allowance: _Allowance) -> Mapping[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    seen: set[bytes] = set()
    for number in range(keys):
        place = f"key {number + 1} of {keys}"
        length = reader.length(place)
        if length > LONGEST_KEY:
            raise HeaderError(f"has a name of {length} bytes for {place}, before byte {reader.offset}")
        name = reader.take(length, place)
        allowance.spend("kept_bytes", _KEY_COST + length)
        if name in seen:
            raise HeaderError(f"has the key {_shown(name)} twice, before byte {reader.offset}")
        seen.add(name)
        value = _value(reader, name, allowance)
        if value is not None and name.isascii():
            metadata[name.decode()] = value
    return metadata


def _value(reader: _Reader, name: bytes, allowance: _Allowance) -> MetadataValue | None:
    """Read one value; None where it is hopped over."""
    what = _shown(name)
    wanted = not name.startswith(b"tokenizer.")
    kind = reader.number(_COUNT, what)
    if kind == _ARRAY:
        return _array(reader, what, wanted, allowance)
    if kind == _TEXT:
        return _text(reader, what, wanted, allowance)
    if kind not in _NUMBERS:
        raise HeaderError(f"has a value of the unknown type {kind} for {what}, before byte {reader.offset}")
    value: MetadataValue = reader.number(_NUMBERS[kind], what)
    return value if wanted else None


def _text(reader: _Reader, what: str, wanted: bool, allowance: _Allowance) -> str | None:
    length = reader.length(what)
    if not wanted or length > LONGEST_TEXT:
        reader.skip(length, what)
        return None
    allowance.spend("kept_bytes", length)
    try:
        return reader.take(length, what).decode()
    except UnicodeDecodeError:
        return None


def _array(
    reader: _Reader, what: str, wanted: bool, allowance: _Allowance
) -> tuple[bool | int | float, ...] | None:
    kind = reader.number(_COUNT, what)
    count = reader.length(what)
    if kind == _TEXT:
        reader.skip_texts(count, what)
        return None
    if kind not in _NUMBERS:  # llama.cpp takes no arrays in arrays either
        raise HeaderError(f"has an array of the unknown type {kind} for {what}, before byte {reader.offset}")
    form = _NUMBERS[kind]
    if not wanted or count > LONGEST_ARRAY:
        reader.skip(count * form.size, what)
        return None
    allowance.spend("kept_bytes", count * 8)
    return struct.unpack(f"<{count}{form.format[1:]}", reader.take(count * form.size, what))


def _has_tensor(path: Path, part: _Part, name: bytes, allowance: _Allowance) -> bool:
    with _reading(path, allowance) as reader:
        return any(each.name == name for each in _tensors(reader, part, allowance))


def _goes_on_to_its_last_tensor(path: Path, part: _Part, allowance: _Allowance) -> bool:
    if _alignment(part) is None or part.tensors == 0:
        return part.tensors == 0
    with _reading(path, allowance) as reader:
        try:
            last = max(each.offset for each in _tensors(reader, part, allowance))
        except HeaderError:
            return False  # it ends among what describes the tensors
        return _weights_at(reader, part) + last < reader.size


def _alignment(part: _Part) -> int | None:
    alignment = part.metadata.get("general.alignment", _ALIGNMENT)
    return alignment if type(alignment) is int and alignment > 0 else None


def _weights_at(reader: _Reader, part: _Part) -> int:
    """Where the weights begin; the reader is behind the last tensor's description."""
    alignment = _alignment(part) or 1
    return -(-reader.offset // alignment) * alignment


class _Tensor(NamedTuple):
    """What a header says of a tensor. offset: where its weights begin behind the header."""

    name: bytes
    lengths: tuple[int, ...]
    kind: int
    offset: int

    @property
    def size(self) -> int | None:
        """Bytes of its weights; None where its type is not known."""
        block, size = _SIZES.get(self.kind, (0, 0))
        if not block or not self.lengths or self.lengths[0] % block:
            return None
        return math.prod(self.lengths) // block * size


@dataclass(slots=True)
class _Weights:
    """Bytes of the token embedding, of the output, and of the others that are not of the input."""

    embedding: int = 0
    output: int = 0
    repeating: int = 0


def _add_weights(sums: _Weights, path: Path, part: _Part, allowance: _Allowance) -> bool:
    """Add those of one part; False where one is not known, or where the file does not have them."""
    if _alignment(part) is None:
        return False
    end = 0
    with _reading(path, allowance) as reader:
        for tensor in _tensors(reader, part, allowance):
            size = tensor.size
            if size is None or len(tensor.name) > _LONGEST_NAME or _NOT_CERTAIN.search(tensor.name):
                return False
            if tensor.name == _TOKEN_EMBEDDING:
                sums.embedding += size
            elif tensor.name == _OUTPUT:
                sums.output += size
            elif _ON_GPU.fullmatch(tensor.name):
                sums.repeating += size
            elif tensor.name not in _ON_CPU:
                return False
            end = max(end, tensor.offset + size)
        return not end or _weights_at(reader, part) + end <= reader.size


def _tensors(reader: _Reader, part: _Part, allowance: _Allowance) -> Iterator[_Tensor]:
    """Yield what is said of each tensor."""
    allowance.spend("tensors", part.tensors)
    reader.skip(part.tensors_at, "the keys")
    for number in range(part.tensors):
        what = f"tensor {number + 1} of {part.tensors}"
        length = reader.length(what)
        if length > LONGEST_KEY:
            raise HeaderError(f"has a name of {length} bytes for {what}, before byte {reader.offset}")
        name = reader.take(length, what)
        dimensions = reader.number(_COUNT, what)
        if dimensions > _MOST_DIMENSIONS:
            raise HeaderError(f"has {dimensions} dimensions for {what}, before byte {reader.offset}")
        *lengths, kind, offset = _SHAPES[dimensions].unpack(reader.take(dimensions * 8 + 12, what))
        yield _Tensor(name, tuple(lengths), kind, offset)


def _shown(name: bytes) -> str:
    return repr(name[:64].decode("utf-8", "replace"))


class _Reader:
    """Goes through a file from its beginning, a window of it in memory, and never beyond its end."""

    def __init__(self, file: BinaryIO, size: int, allowance: _Allowance) -> None:
        self.size = size
        self._file = file
        self._allowance = allowance
        self._window = b""
        self._window_at = 0
        self._position = 0

    @property
    def offset(self) -> int:
        """Bytes of the file that are behind us."""
        return self._window_at + self._position

    def take(self, count: int, what: str) -> bytes:
        """Return the next bytes."""
        if self._position + count > len(self._window):
            self._move_window(count, what)
        begin = self._position
        self._position += count
        return self._window[begin : self._position]

    def number(self, form: struct.Struct, what: str) -> int:
        """Return the next number of this form; it may be a float or a truth value too."""
        (value,) = form.unpack(self.take(form.size, what))
        return value  # type: ignore[no-any-return]

    def length(self, what: str) -> int:
        """Return the next length of a text or an array."""
        return self.number(_LENGTH, what)

    def skip(self, count: int, what: str) -> None:
        """Go on by this many bytes without reading them."""
        self._check(count, what)
        self._position += count

    def skip_texts(self, count: int, what: str) -> None:
        """Go on by this many texts, a length before each."""
        self._check(count * _LENGTH.size, what)
        length_at = _LENGTH.unpack_from
        while count:
            window, position, length = self._window, self._position, 0
            left = count
            try:
                for left in range(count, 0, -1):  # noqa: B007 - read below
                    (length,) = length_at(window, position)
                    position += length + 8
                left = 0
            except (struct.error, OverflowError):  # the window ends here
                pass
            count, self._position = left, position
            if self.offset > self.size:
                raise HeaderError(f"is cut off: a text of {length} bytes in {what} ends beyond {self.size}")
            if count:
                self._move_window(_LENGTH.size, what)

    def _check(self, count: int, what: str) -> None:
        if self.offset + count > self.size:
            raise HeaderError(
                f"is cut off: {what} takes {count} bytes at byte {self.offset}, and it ends at {self.size}"
            )

    def _move_window(self, count: int, what: str) -> None:
        """Let the window begin here and hold at least this many bytes."""
        self._check(count, what)
        self._window_at, self._position = self.offset, 0
        wanted = min(max(count, WINDOW_BYTES), self.size - self._window_at)
        self._allowance.spend("read_bytes", wanted)
        self._file.seek(self._window_at)
        self._window = self._file.read(wanted)
        if len(self._window) < count:
            raise HeaderError(f"became shorter while it was read: {what} was at byte {self._window_at}")
