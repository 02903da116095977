"""A model's shape travels as a small JSON text that holds nothing else; a broken one is refused in a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gguf_files import array, llama, number, string, strings, vocabulary, write

from kvscope.observed.model import ModelHeader
from kvscope.sources.gguf_header import read_header
from kvscope.sources.model_shape import (
    LARGEST_FILE_BYTES,
    LONGEST_ARRAY,
    ShapeFileError,
    read_shape,
    shape_document,
)

SHAPE: dict[str, Any] = {
    "kvscope_shape": 1,
    "architecture": "gemma3",
    "file_bytes": 13_000_000_000,
    "nextn_tensors": None,
    "gpu_weights_bytes": None,
    "metadata": {"gemma3.block_count": 62, "gemma3.attention.head_count_kv": [16, 8]},
}


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    return tmp_path / "shape.json"


def write_shape(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_a_shape_says_what_the_header_says_of_its_memory_and_nothing_else(
    tmp_path: Path, shape: Path
) -> None:
    keys = (
        string("general.name", "Secret Project"),
        string("general.author", "Somebody"),
        string("general.source.url", "https://example.org/private"),
        number("general.file_type", "u32", 7),
        number("other.block_count", "u32", 7),
        string("llama.rope.scaling.type", "linear"),
        strings("llama.words", ["word"]),
        array("llama.attention.head_count_kv", "u32", [8, 8, 0, 4]),
        array("llama.attention.sliding_window_pattern", "bool", [True, False]),
        number("llama.attention.layer_norm_rms_epsilon", "f32", 1e-6),
        number("llama.rope.freq_base", "f32", float("nan")),
        number("llama.flag", "bool", False),
        number("llama.largest", "u64", 2**64 - 1),
        number("llama.nextn_predict_layers", "u32", 1),
        *vocabulary(5, 5),
    )
    header = read_header(write(tmp_path / "model.gguf", llama(*keys)))
    document = shape_document(header)
    assert json.loads(json.dumps(document, allow_nan=False)) == {
        "kvscope_shape": 1,
        "architecture": "llama",
        "file_bytes": (tmp_path / "model.gguf").stat().st_size,
        "nextn_tensors": False,
        "gpu_weights_bytes": None,
        "metadata": {
            "llama.attention.head_count_kv": [8, 8, 0, 4],
            "llama.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
            "llama.attention.sliding_window_pattern": [True, False],
            "llama.block_count": 4,
            "llama.context_length": 4096,
            "llama.flag": False,
            "llama.largest": 2**64 - 1,
            "llama.nextn_predict_layers": 1,
        },
    }
    again = read_shape(write_shape(shape, document))
    assert again == ModelHeader(
        architecture="llama",
        metadata={
            "general.architecture": "llama",
            **{
                key: value
                for key, value in header.metadata.items()
                if key.startswith("llama.") and key not in ("llama.rope.scaling.type", "llama.rope.freq_base")
            },
        },
        file_bytes=header.file_bytes,
        nextn_tensors=False,
    )
    assert again.metadata["llama.flag"] is False


numbers = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False)
)


@given(
    st.from_regex(r"[a-z][a-z0-9_-]{0,20}", fullmatch=True).flatmap(
        lambda name: st.builds(
            ModelHeader,
            architecture=st.just(name),
            metadata=st.dictionaries(
                st.text(max_size=20).map(lambda rest: f"{name}.{rest}"),
                st.one_of(numbers, st.lists(numbers).map(tuple)),
            ).map(lambda metadata: {"general.architecture": name, **metadata}),
            file_bytes=st.one_of(st.none(), st.integers(0, 2**63 - 1)),
            nextn_tensors=st.one_of(st.none(), st.booleans()),
            gpu_weights_bytes=st.one_of(st.none(), st.integers(0, 2**63 - 1)),
        )
    )
)
def test_whatever_numbers_a_header_has_come_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, header: ModelHeader
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    again = read_shape(write_shape(path, shape_document(header)))
    assert again == header
    assert repr(sorted(again.metadata.items())) == repr(sorted(header.metadata.items()))


def test_an_array_longer_than_any_of_layers_is_left_out_of_a_shape() -> None:
    metadata = {"llama.longest": (1,) * LONGEST_ARRAY, "llama.longer": (1,) * (LONGEST_ARRAY + 1)}
    assert shape_document(ModelHeader("llama", metadata))["metadata"].keys() == {"llama.longest"}


def test_fields_of_a_later_release_are_passed_over(shape: Path) -> None:
    assert read_shape(write_shape(shape, {**SHAPE, "made_by": "kvscope 9"})).architecture == "gemma3"


def test_what_may_be_unknown_may_be_missing(shape: Path) -> None:
    document = {key: SHAPE[key] for key in ("kvscope_shape", "architecture", "metadata")}
    read = read_shape(write_shape(shape, document))
    assert (read.file_bytes, read.nextn_tensors, read.gpu_weights_bytes) == (None, None, None)


BROKEN: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "empty": (b"", "is no JSON text"),
    "cut off": (json.dumps(SHAPE).encode()[:-5], "is no JSON text"),
    "no utf-8": (b'{"kvscope_shape": "\xff"}', "is no JSON text"),
    "a model": (llama(), "is a GGUF model, not a shape"),
    "a large model": (llama() + bytes(LARGEST_FILE_BYTES), "is a GGUF model, not a shape"),
    "too deep": (b"[" * 100_000, "is no JSON text"),
    "a number of many digits": (b'{"kvscope_shape": ' + b"1" * 5000 + b"}", "is no JSON text"),
    "no number": (b'{"kvscope_shape": NaN}', "is no JSON text"),
    "too large": (b" " * (LARGEST_FILE_BYTES + 1), f"goes on after {LARGEST_FILE_BYTES} bytes"),
    "a list": (b"[1]", "is no shape"),
    "another object": (b'{"block_count": 7}', "is no shape: it has no kvscope_shape"),
    "a later version": (SHAPE | {"kvscope_shape": 2}, "has kvscope_shape 2; 1 is read"),
    "true as version": (SHAPE | {"kvscope_shape": True}, "has kvscope_shape True"),
    "no architecture": ({"kvscope_shape": 1}, "has None as its architecture"),
    "lines as architecture": (SHAPE | {"architecture": "a\nb"}, r"has 'a\nb' as its architecture"),
    "a negative size": (SHAPE | {"file_bytes": -1}, "has -1 as file_bytes"),
    "half a byte": (SHAPE | {"file_bytes": 0.5}, "has 0.5 as file_bytes"),
    "half a byte of weights": (SHAPE | {"gpu_weights_bytes": 0.5}, "has 0.5 as gpu_weights_bytes"),
    "a word as nextn_tensors": (SHAPE | {"nextn_tensors": "yes"}, "has 'yes' as nextn_tensors"),
    "no metadata": (SHAPE | {"metadata": None}, "has None as its metadata"),
    "metadata of another": (
        SHAPE | {"metadata": {"llama.block_count": 1}},
        "has the key 'llama.block_count' in its metadata, not one of gemma3.*",
    ),
    "a text": (SHAPE | {"metadata": {"gemma3.x": "y"}}, "has 'y' for 'gemma3.x', neither numbers nor"),
    "nothing": (SHAPE | {"metadata": {"gemma3.x": None}}, "has None for 'gemma3.x'"),
    "a text in an array": (SHAPE | {"metadata": {"gemma3.x": [1, "y"]}}, "has [1, 'y'] for 'gemma3.x'"),
    "an array in an array": (SHAPE | {"metadata": {"gemma3.x": [[1]]}}, "has [[1]] for 'gemma3.x'"),
    "an object": (SHAPE | {"metadata": {"gemma3.x": {}}}, "has {} for 'gemma3.x'"),
    "a number that is none": (SHAPE | {"metadata": {"gemma3.x": float("inf")}}, "is no JSON text"),
    "a number beyond all": (
        json.dumps(SHAPE).replace("62", "1e999").encode(),
        "has inf for 'gemma3.block_count'",
    ),
    "a number wider than any": (SHAPE | {"metadata": {"gemma3.x": 2**64}}, "has 18446744073709551616 for"),
    "a long array": (SHAPE | {"metadata": {"gemma3.x": [1] * (LONGEST_ARRAY + 1)}}, "for 'gemma3.x'"),
    "a long key": (SHAPE | {"metadata": {"gemma3." + "x" * 2000: 1}}, "has the key 'gemma3.xxx"),
}


@pytest.mark.parametrize(("content", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_shape_is_refused_in_one_line(
    shape: Path, content: bytes | dict[str, Any], says: str
) -> None:
    shape.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ShapeFileError) as caught:
        read_shape(shape)
    line = str(caught.value)
    assert says in line
    assert line.startswith("'shape.json' ")
    assert "\n" not in line
    assert len(line) < 200


@given(st.binary(max_size=200))
def test_any_bytes_are_a_shape_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    with pytest.raises(ShapeFileError):
        read_shape(path)


def test_what_is_no_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        read_shape(tmp_path / "fifo")
    with pytest.raises(FileNotFoundError):
        read_shape(tmp_path / "none.json")
