"""A model's header is read as others read it, for little, and a broken one costs one clear line."""

from __future__ import annotations

import errno
import io
import math
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gguf_files import (
    LETTERS,
    array,
    header,
    llama,
    number,
    split_keys,
    string,
    strings,
    tensor,
    text,
    vocabulary,
    write,
    write_parts,
)

from kvscope.demo.tiny_model import write_tiny_model
from kvscope.observed.model import ModelHeader
from kvscope.sources import gguf_header
from kvscope.sources.gguf_header import (
    LONGEST_ARRAY,
    LONGEST_TEXT,
    MOST_KEPT_BYTES,
    MOST_READ_BYTES,
    WINDOW_BYTES,
    HeaderError,
    header_identity,
    read_header,
)

MB = 1_000_000
ARCHITECTURE = string("general.architecture", "llama")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Says how many bytes the reader has read so far."""
    count = 0
    really_open = gguf_header.open_regular

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal count
            data = super().read(size)
            count += len(data)
            return data

    def counting(path: Path) -> Any:
        really_open(path).close()
        return Counting(path)

    monkeypatch.setattr(gguf_header, "open_regular", counting)
    return lambda: count


def peak_memory(path: Path) -> int:
    tracemalloc.start()
    try:
        try:
            kept: object = read_header(path)
        except HeaderError as error:
            kept = error
        assert kept
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- what is read -----------------------------------------------------------------------------------


def as_gguf_reads(path: Path) -> dict[str, Any]:
    """All metadata but arrays of text, as ggml-org's own package reads it."""
    read = {}
    for key, field in gguf.GGUFReader(path).fields.items():
        if key.startswith("GGUF.") or field.types[-1:] == [gguf.GGUFValueType.STRING] != field.types:
            continue
        value = field.contents()
        read[key] = tuple(value) if isinstance(value, list) else value
    return read


def without_vocabulary(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if not key.startswith("tokenizer.")}


def same(one: Any, other: Any) -> bool:
    """Equal in value and type; no number equals itself when it is none."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and bool(one == other)


def assert_same(header: ModelHeader, expected: dict[str, Any]) -> None:
    assert header.metadata.keys() == expected.keys()
    assert [key for key, value in header.metadata.items() if not same(value, expected[key])] == []


def test_a_model_that_gguf_wrote_reads_as_gguf_reads_it(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    read = read_header(path)
    assert_same(read, without_vocabulary(as_gguf_reads(path)))
    assert read.architecture == "llama"
    assert read.file_bytes == path.stat().st_size
    assert read.nextn_tensors is None


def test_every_type_that_gguf_writes_reads_as_gguf_reads_it(model: Path) -> None:
    writer = gguf.GGUFWriter(model, "llama")
    writer.add_uint8("llama.u8", 255)
    writer.add_int8("llama.i8", -128)
    writer.add_uint16("llama.u16", 65535)
    writer.add_int16("llama.i16", -32768)
    writer.add_uint32("llama.u32", 2**32 - 1)
    writer.add_int32("llama.i32", -(2**31))
    writer.add_float32("llama.f32", 0.1)
    writer.add_bool("llama.true", True)
    writer.add_bool("llama.false", False)
    writer.add_string("llama.rope.scaling.type", "yärn")
    writer.add_uint64("llama.u64", 2**64 - 1)
    writer.add_int64("llama.i64", -(2**63))
    writer.add_float64("llama.f64", 0.1)
    writer.add_array("llama.attention.head_count_kv", [8, 8, 0, 4])
    writer.add_array("llama.attention.sliding_window_pattern", [True, True, False])
    writer.add_array("llama.floats", [0.5, -1.25])
    writer.add_array("llama.negative", [-1, 2])
    writer.add_array("general.languages", ["en", "de"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = read_header(model)
    assert_same(read, as_gguf_reads(model))
    assert read.metadata["llama.attention.head_count_kv"] == (8, 8, 0, 4)
    assert read.metadata["llama.attention.sliding_window_pattern"] == (True, True, False)
    assert read.metadata["llama.u64"] == 2**64 - 1
    assert "general.languages" not in read.metadata


def ranges(kind: str) -> st.SearchStrategy[Any]:
    if kind == "bool":
        return st.booleans()
    if kind in ("f32", "f64"):
        return st.floats(width=32 if kind == "f32" else 64)
    bits = int(kind[1:])
    return (
        st.integers(0, 2**bits - 1)
        if kind[0] == "u"
        else st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )


def values() -> st.SearchStrategy[Callable[[str], bytes]]:
    """Functions from a key to the key with some value."""
    kinds = st.sampled_from(sorted(LETTERS))
    scalar = kinds.flatmap(lambda kind: ranges(kind).map(lambda value: lambda key: number(key, kind, value)))
    row = kinds.flatmap(
        lambda kind: st.lists(ranges(kind), min_size=1).map(lambda some: lambda key: array(key, kind, some))
    )
    words = st.text(max_size=40)
    one = words.map(lambda value: lambda key: string(key, value))
    several = st.lists(words, min_size=1).map(lambda some: lambda key: strings(key, some))
    return st.one_of(scalar, row, one, several)


KEYS = st.from_regex(r"(llama|general|tokenizer)\.[a-z_.0-9]{1,20}", fullmatch=True)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, values(), max_size=8), st.sampled_from([2, 3]))
def test_whatever_a_valid_header_says_reads_as_gguf_reads_it(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Callable[[str], bytes]], version: int
) -> None:
    entries.pop("general.architecture", None)
    entries.pop("general.alignment", None)
    keys = [entry(key) for key, entry in entries.items()]
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    write(path, header(*keys, ARCHITECTURE, version=version))
    assert_same(read_header(path), without_vocabulary(as_gguf_reads(path)))


def test_keys_after_the_vocabulary_are_read_and_the_vocabulary_is_not(model: Path) -> None:
    after = number("llama.attention.head_count_kv", "u32", 2)
    write(model, header(*vocabulary(3000, 5000), ARCHITECTURE, after))
    assert read_header(model).metadata == {
        "general.architecture": "llama",
        "llama.attention.head_count_kv": 2,
    }


def test_arrays_and_texts_are_kept_up_to_their_limits(model: Path) -> None:
    keys = (
        array("llama.longest", "u8", [1] * LONGEST_ARRAY),
        array("llama.longer", "u8", [1] * (LONGEST_ARRAY + 1)),
        array("llama.empty", "u32", []),
        string("llama.longest_text", "x" * LONGEST_TEXT),
        string("llama.longer_text", "x" * (LONGEST_TEXT + 1)),
        number("llama.after", "u8", 7),
    )
    metadata = read_header(write(model, llama(*keys))).metadata
    assert metadata["llama.longest"] == (1,) * LONGEST_ARRAY
    assert metadata["llama.longest_text"] == "x" * LONGEST_TEXT
    assert metadata["llama.empty"] == ()
    assert metadata["llama.after"] == 7
    assert not {"llama.longer", "llama.longer_text"} & metadata.keys()


def test_what_is_no_utf_8_is_left_out_and_the_rest_is_read(model: Path) -> None:
    keys = (string("general.author", b"\xff\xfe"), string(b"llama.\xff", "x"), number("llama.after", "u8", 7))
    metadata = read_header(write(model, llama(*keys))).metadata
    assert metadata["llama.after"] == 7
    assert metadata.keys() == {
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.after",
    }


def test_a_key_that_lies_across_two_windows_is_read(model: Path) -> None:
    for shift in range(40):
        padding = string("tokenizer.chat_template", "x" * (WINDOW_BYTES - 200 + shift))
        keys = (padding, strings("tokenizer.ggml.tokens", ["abc"] * 9), number("llama.after", "u64", 2**40))
        assert read_header(write(model, llama(*keys))).metadata["llama.after"] == 2**40


@pytest.mark.parametrize("length", [0, 1, 255, 256, 65_535, 65_536, 3 * WINDOW_BYTES])
def test_texts_of_any_length_are_hopped_over(model: Path, length: int) -> None:
    tokens = strings("tokenizer.ggml.tokens", ["a", "x" * length, "", "y" * length, "b"])
    read = read_header(write(model, llama(tokens, number("llama.after", "u8", 7))))
    assert read.metadata["llama.after"] == 7


@pytest.mark.parametrize("kind", ["mmproj", "adapter"])
def test_another_kind_of_file_is_read_by_its_own_architecture(model: Path, kind: str) -> None:
    write(model, header(string("general.type", kind), string("general.architecture", "clip")))
    assert read_header(model).architecture == "clip"


# --- what it costs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A header with the largest common vocabulary and a gigabyte of nothing behind it."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    after = array("llama.attention.head_count_kv", "u32", [8] * 62)
    write(path, llama(*vocabulary(), after, tensors=[tensor(f"blk.{layer}") for layer in range(700)]))
    with path.open("r+b") as file:
        file.truncate(10**9)
    return path


def test_a_vocabulary_of_262144_tokens_takes_a_megabyte_of_memory(large: Path) -> None:
    assert len(read_header(large).metadata) == 4
    assert peak_memory(large) < MB


def test_of_a_vocabulary_only_texts_are_read_and_nothing_behind_the_keys(
    large: Path, bytes_read: Callable[[], int]
) -> None:
    texts = sum(len(key) for key in vocabulary() if b"tokens" in key[:40] or b"merges" in key[:40])
    read_header(large)
    assert texts <= bytes_read() <= texts + 6 * WINDOW_BYTES
    assert bytes_read() < 16 * MB


def test_a_small_header_is_read_at_once(model: Path, bytes_read: Callable[[], int]) -> None:
    write(model, llama() + bytes(10 * MB))
    read_header(model)
    assert bytes_read() == WINDOW_BYTES


def test_reading_takes_a_small_part_of_the_time_that_gguf_takes(model: Path) -> None:
    write(model, llama(*vocabulary(20_000, 20_000)))

    def seconds(read: Callable[[Path], object]) -> float:
        began = time.process_time()
        read(model)
        return time.process_time() - began

    assert min(seconds(read_header) for _ in range(3)) < seconds(gguf.GGUFReader) / 20


def test_what_is_kept_is_bounded_too(model: Path) -> None:
    count = MOST_KEPT_BYTES // (64 + 15) - 100
    write(model, llama(*(number(f"llama.{key:09}", "f64", key + 0.5) for key in range(count))))
    assert peak_memory(model) < 20 * MB
    numbers = [value + 0.5 for value in range(LONGEST_ARRAY)]
    write(model, llama(*(array(f"llama.{key}", "f64", numbers) for key in range(3))))
    assert len(read_header(model).metadata) == 6
    assert peak_memory(model) < 20 * MB


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ([number(f"llama.{key:09}", "u8", 1) for key in range(30_000)], "its keys and values take more than"),
        ([array(f"llama.{key}", "u8", [1] * LONGEST_ARRAY) for key in range(5)], "its keys and values take"),
        ([string(f"llama.{key}", "x" * LONGEST_TEXT) for key in range(2500)], "its keys and values take"),
    ],
    ids=["keys", "arrays", "texts"],
)
def test_more_than_any_header_says_is_refused(model: Path, keys: list[bytes], left: str) -> None:
    with pytest.raises(HeaderError, match=left):
        read_header(write(model, llama(*keys)))


def test_a_header_without_end_is_given_up(model: Path, bytes_read: Callable[[], int]) -> None:
    """The most work for a byte: texts without a letter, in a file that takes no room."""
    write(model, header(ARCHITECTURE, strings("tokenizer.ggml.tokens", [], count=2**27)))
    with model.open("r+b") as file:
        file.truncate(2**31)
    with pytest.raises(HeaderError, match=f"it goes on after {MOST_READ_BYTES} bytes"):
        read_header(model)
    assert bytes_read() <= MOST_READ_BYTES


def test_many_small_steps_over_much_are_given_up_too(model: Path, bytes_read: Callable[[], int]) -> None:
    step = bytes(WINDOW_BYTES)
    with model.open("wb") as file:
        file.write(header(ARCHITECTURE, key_count=5001))
        for key in range(5000):
            file.write(array(f"tokenizer.{key}", "u8", [], count=len(step)))
            file.seek(len(step), os.SEEK_CUR)
        file.write(number("llama.after", "u8", 1))
    with pytest.raises(HeaderError, match="it goes on after"):
        read_header(model)
    assert bytes_read() <= MOST_READ_BYTES


# --- broken files -----------------------------------------------------------------------------------

HUGE = 2**60
BROKEN = {
    "empty": (b"", "is cut off: the magic takes 4 bytes at byte 0, and it ends at 0"),
    "wrong magic": (b"GGML" + llama()[4:], "is no GGUF file"),
    "zeros": (bytes(64), "is no GGUF file"),
    "version 0": (llama(version=0), "version 0"),
    "version 1": (llama(version=1), "version 1"),
    "version 4": (llama(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + bytes(64), "big-endian"),
    "2^60 keys": (header(ARCHITECTURE, key_count=HUGE), f"{HUGE} keys"),
    "30 000 keys of one": (header(ARCHITECTURE, key_count=30_000), "is cut off: key 2 of 30000"),
    "a key of 2^40 bytes": (header(struct.pack("<Q", 2**40)), f"a name of {2**40} bytes for key 1 of 1"),
    "a key of 2^64 - 1 bytes": (header(struct.pack("<Q", 2**64 - 1)), "a name of"),
    "a text of 2^40 bytes": (
        header(ARCHITECTURE, text("llama.x") + struct.pack("<IQ", 8, 2**40)),
        f"'llama.x' takes {2**40} bytes",
    ),
    "a text of 2^40 bytes in the vocabulary": (
        header(ARCHITECTURE, strings("tokenizer.ggml.tokens", [], 1) + struct.pack("<Q", 2**40)),
        f"a text of {2**40} bytes in 'tokenizer.ggml.tokens'",
    ),
    "a text of 2^64 - 1 bytes before others": (
        header(ARCHITECTURE, strings("tokenizer.ggml.tokens", ["a"], 9) + b"\xff" * 8 + bytes(99)),
        f"a text of {2**64 - 1} bytes",
    ),
    "2^60 texts": (
        header(ARCHITECTURE, strings("tokenizer.ggml.tokens", ["a"], HUGE)),
        f"'tokenizer.ggml.tokens' takes {8 * HUGE} bytes",
    ),
    "2^60 numbers": (
        header(ARCHITECTURE, array("llama.x", "u32", [1], HUGE)),
        f"'llama.x' takes {4 * HUGE} bytes",
    ),
    "2^60 numbers in the vocabulary": (
        header(ARCHITECTURE, array("tokenizer.x", "f64", [1], HUGE)),
        f"'tokenizer.x' takes {8 * HUGE} bytes",
    ),
    "60 000 numbers where one is": (
        header(ARCHITECTURE, array("llama.x", "u32", [1], 60_000)),
        "'llama.x' takes 240000 bytes",
    ),
    "unknown type": (
        header(ARCHITECTURE, text("llama.x") + struct.pack("<I", 13) + bytes(99)),
        "unknown type 13 for 'llama.x'",
    ),
    "unknown type of an array": (
        header(ARCHITECTURE, text("llama.x") + struct.pack("<IIQ", 9, 99, 1) + bytes(99)),
        "unknown type 99 for 'llama.x'",
    ),
    "array in an array": (
        header(ARCHITECTURE, text("llama.x") + struct.pack("<IIQ", 9, 9, 1) + bytes(99)),
        "unknown type 9 for 'llama.x'",
    ),
    "a key twice": (llama(number("llama.block_count", "u32", 5)), "the key 'llama.block_count' twice"),
    "no architecture": (header(number("llama.block_count", "u32", 5)), "no usable general.architecture"),
    "no key": (header(), "no usable general.architecture"),
    "a number as architecture": (
        header(number("general.architecture", "u32", 7)),
        "no usable general.architecture, only 7",
    ),
    "lines as architecture": (
        header(string("general.architecture", "a\nb")),
        r"no usable general.architecture, only 'a\nb'",
    ),
    "lines as a key": (header(text("a\nb") + struct.pack("<I", 77)), r"type 77 for 'a\nb'"),
}


@pytest.mark.parametrize(("content", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_costs_one_line_that_says_what_and_where(
    model: Path, content: bytes, says: str, bytes_read: Callable[[], int]
) -> None:
    with pytest.raises(HeaderError) as caught:
        read_header(write(model, content))
    line = str(caught.value)
    assert says in line
    assert line.startswith("'model.gguf' ")
    assert "\n" not in line
    assert len(line) < 200
    assert bytes_read() <= len(content)
    assert peak_memory(model) < MB


def test_a_header_cut_at_any_byte_is_said_to_be_cut_off(model: Path) -> None:
    keys = (
        *vocabulary(3, 2)[:5],
        array("llama.attention.head_count_kv", "u32", [1, 2]),
        number("llama.x", "f64", 1),
    )
    whole = llama(*keys)
    assert len(read_header(write(model, whole)).metadata) == 5
    for end in range(len(whole)):
        with pytest.raises(HeaderError, match="is cut off"):
            read_header(write(model, whole[:end]))


def read_or_refuse(path: Path) -> None:
    """Fails on anything but a header or a refusal in one line."""
    refusal = "none"
    try:
        read_header(path)
    except HeaderError as error:
        refusal = str(error)
    assert len(refusal.splitlines()) == 1


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3), st.sampled_from([2, 3]))
def test_any_bytes_behind_the_magic_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, keys: int, version: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.gguf"
    read_or_refuse(write(path, b"GGUF" + content))
    read_or_refuse(write(path, header(content, version=version, key_count=keys)))


MUTABLE = llama(
    *vocabulary(4, 3)[:5],
    array("llama.attention.head_count_kv", "u32", [1, 2]),
    number("llama.nextn_predict_layers", "u32", 1),
    string("general.name", "name"),
    tensors=[tensor("token_embd.weight"), tensor("blk.2.nextn.eh_proj.weight"), tensor("output.weight")],
)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(MUTABLE) - 1),
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8])),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(len(MUTABLE) // 2, len(MUTABLE)),
)
def test_a_header_changed_anywhere_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]], end: int
) -> None:
    content = bytearray(MUTABLE)
    for place, bytes_there in changes:
        content[place : place + len(bytes_there)] = bytes_there
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    read_or_refuse(write(path, bytes(content)))
    read_or_refuse(write(path, bytes(content[:end])))


def after_first_read(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Let something happen to a file while it is read."""

    class Changing(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            change()
            return data

    monkeypatch.setattr(gguf_header, "open_regular", Changing)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(model, llama(*vocabulary(30_000, 0)))
    after_first_read(monkeypatch, lambda: os.truncate(model, 100))
    with pytest.raises(HeaderError, match="became shorter while it was read"):
        read_header(model)


def test_a_file_that_grows_while_it_is_read_is_read_as_it_was(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = llama(*vocabulary(30_000, 0))
    write(model, content)

    def grow() -> None:
        with model.open("ab") as file:
            file.write(bytes(100))

    after_first_read(monkeypatch, grow)
    assert read_header(model).file_bytes == len(content)


# --- no files ---------------------------------------------------------------------------------------


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        read_header(tmp_path / "fifo")


@pytest.mark.parametrize("path", ["/", "/dev/zero", "/dev/null", ""])
def test_a_directory_or_a_device_is_refused(path: str) -> None:
    with pytest.raises(OSError, match="not a regular file"):
        read_header(Path(path))


def test_a_file_that_is_not_there_or_may_not_be_read_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError):
        header_identity(tmp_path / "none.gguf")
    if os.geteuid():  # root may read everything
        write(tmp_path / "closed.gguf", llama()).chmod(0)
        with pytest.raises(PermissionError):
            read_header(tmp_path / "closed.gguf")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 5000])
@pytest.mark.parametrize("function", [read_header, header_identity])
def test_what_can_be_no_path_is_an_error_of_the_system(name: str, function: Callable[[Path], object]) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one depends on the system
        function(Path(name))
    assert caught.value.errno in (errno.EINVAL, errno.ENOENT, errno.ENAMETOOLONG)


# --- parts ------------------------------------------------------------------------------------------


NEXTN = number("llama.nextn_predict_layers", "u32", 1)


def three_parts(directory: Path, *keys: bytes, last: str = "output.weight") -> list[Path]:
    """A model in three parts, as llama-gguf-split writes them: the metadata is in the first alone."""
    return write_parts(
        directory,
        "model",
        [
            llama(*keys, *split_keys(0, 3), tensors=[tensor("token_embd.weight")]),
            header(*split_keys(1, 3), tensors=[tensor("blk.0.attn_q.weight")]) + bytes(1000),
            header(*split_keys(2, 3), tensors=[tensor(last)]) + bytes(500),
        ],
    )


@pytest.mark.parametrize("given_part", [0, 1, 2])
def test_of_a_split_model_any_part_gives_the_first_and_the_size_of_all(
    tmp_path: Path, given_part: int
) -> None:
    parts = three_parts(tmp_path)
    read = read_header(parts[given_part])
    assert read.architecture == "llama"
    assert read.metadata["split.no"] == 0
    assert read.file_bytes == sum(part.stat().st_size for part in parts)


def test_parts_that_are_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    parts = three_parts(tmp_path)
    for number_, part in enumerate(parts):
        (snapshot / part.name).symlink_to(part.rename(tmp_path / f"blob{number_}"))
    assert read_header(snapshot / parts[0].name).file_bytes == sum(
        (tmp_path / f"blob{number_}").stat().st_size for number_ in range(3)
    )


def test_a_missing_part_leaves_the_size_out(tmp_path: Path) -> None:
    parts = three_parts(tmp_path)
    parts[2].unlink()
    assert read_header(parts[0]).file_bytes is None


def test_a_further_part_without_the_first_is_refused_by_name(tmp_path: Path) -> None:
    parts = three_parts(tmp_path)
    parts[0].unlink()
    with pytest.raises(
        HeaderError,
        match=r"'model-00002-of-00003.gguf' is a further part of a model; "
        r"the first, 'model-00001-of-00003.gguf', is not beside it",
    ):
        read_header(parts[1])


def test_a_further_part_under_another_name_is_refused(tmp_path: Path) -> None:
    parts = three_parts(tmp_path)
    with pytest.raises(HeaderError, match="give the first"):
        read_header(parts[1].rename(tmp_path / "other.gguf"))
    with pytest.raises(HeaderError, match="named as the first part of a model and is none"):
        read_header(parts[2].rename(parts[0]) and write(parts[2], header(*split_keys(2, 3))))


def test_a_first_part_under_another_name_is_read_without_a_size(tmp_path: Path) -> None:
    renamed = three_parts(tmp_path, NEXTN)[0].rename(tmp_path / "other.gguf")
    read = read_header(renamed)
    assert (read.file_bytes, read.nextn_tensors) == (None, None)


def test_a_whole_model_that_is_named_like_a_part_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "model-00001-of-00009.gguf", llama())
    assert read_header(path).file_bytes == len(llama())


@pytest.mark.parametrize(
    ("keys", "names", "expected"),
    [
        ([], ["blk.3.nextn.eh_proj.weight"], None),
        ([number("llama.nextn_predict_layers", "u32", 0)], ["blk.3.nextn.eh_proj.weight"], None),
        ([number("llama.nextn_predict_layers", "u32", 4)], ["blk.0.nextn.eh_proj.weight"], None),
        ([NEXTN], ["output.weight", "blk.3.nextn.eh_proj.weight"], True),
        ([NEXTN], ["output.weight", "blk.3.attn_q.weight"], False),
        ([NEXTN], ["blk.2.nextn.eh_proj.weight"], False),
        ([NEXTN], [], False),
    ],
)
def test_the_weights_of_further_layers_are_looked_for_where_llama_cpp_looks(
    model: Path, keys: list[bytes], names: list[str], expected: bool | None
) -> None:
    write(model, llama(*keys, *vocabulary(9, 9), tensors=[tensor(name, (32, 2)) for name in names]))
    assert read_header(model).nextn_tensors is expected


def test_the_weights_of_further_layers_are_found_in_any_part(tmp_path: Path) -> None:
    parts = three_parts(tmp_path, NEXTN, last="blk.3.nextn.eh_proj.weight")
    assert read_header(parts[0]).nextn_tensors is True
    parts[1].unlink()
    assert read_header(parts[0]).nextn_tensors is None
    parts = three_parts(tmp_path, NEXTN)
    assert read_header(parts[0]).nextn_tensors is False
    write(parts[2], b"GGUF")
    assert read_header(parts[0]).nextn_tensors is None


@pytest.mark.parametrize(
    ("tensors", "count", "says"),
    [
        ([tensor("x")], HUGE, "more than 262144 tensors"),
        ([tensor("x")], 5, "is cut off: tensor 2 of 5"),
        ([tensor("x", (1,) * 5)], 1, "5 dimensions for tensor 1 of 1"),
        ([struct.pack("<Q", 2**40)], 1, f"a name of {2**40} bytes for tensor 1 of 1"),
    ],
)
def test_broken_tensor_names_are_refused_where_they_are_read(
    model: Path, tensors: list[bytes], count: int, says: str
) -> None:
    keys = (ARCHITECTURE, number("llama.block_count", "u32", 4), NEXTN)
    with pytest.raises(HeaderError, match=says):
        read_header(write(model, header(*keys, tensors=tensors, tensor_count=count)))
    without = header(*keys[:2], tensors=tensors, tensor_count=count)
    assert read_header(write(model, without)).architecture == "llama"


# --- identity ---------------------------------------------------------------------------------------


def test_the_identity_changes_with_the_file_and_only_then(model: Path) -> None:
    write(model, llama())
    first = header_identity(model)
    read_header(model)
    assert header_identity(model) == first
    os.utime(model, ns=(0, 12345))
    touched = header_identity(model)
    assert touched != first
    other = write(model.with_name("other.gguf"), llama())
    os.utime(other, ns=(0, 12345))
    other.replace(model)
    assert header_identity(model) != touched


def test_the_identity_changes_when_a_further_part_arrives(tmp_path: Path) -> None:
    parts = three_parts(tmp_path)
    whole = header_identity(parts[0])
    assert whole == header_identity(parts[1])
    parts[2].rename(tmp_path / "elsewhere")
    assert header_identity(parts[0]) == (*whole[:2], None)
