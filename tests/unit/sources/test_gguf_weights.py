"""Whether a model's file goes on to its weights, or was cut off behind its header."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.gguf_files import llama, number, split_keys, tensor, write, write_parts

from kvscope.demo.tiny_model import write_tiny_model
from kvscope.sources.gguf_header import HeaderError, has_weights

TENSORS = [tensor("a"), tensor("b", offset=128)]
ALIGNED = number("general.alignment", "u32", 64)


def test_a_whole_model_has_its_weights_and_its_beginning_has_not(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    assert has_weights(path)
    write(path, path.read_bytes()[:100_000])
    assert not has_weights(path)


def test_it_has_them_from_the_first_byte_of_its_last_tensor_on(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content, alignment in ((llama(tensors=TENSORS), 32), (llama(ALIGNED, tensors=TENSORS), 64)):
        last_at = -(-len(content) // alignment) * alignment + 128
        write(path, content + bytes(last_at - len(content)))
        assert not has_weights(path)
        write(path, content + bytes(last_at - len(content) + 1))
        assert has_weights(path)


def test_a_header_that_ends_among_its_tensors_has_none(tmp_path: Path) -> None:
    content = llama(tensors=TENSORS)
    for length in range(len(llama()), len(content)):
        assert not has_weights(write(tmp_path / "cut.gguf", content[:length]))


def test_what_is_no_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeaderError):
        has_weights(write(tmp_path / "no.gguf", b"no model"))


def test_a_split_model_has_them_in_all_parts_or_not_at_all(tmp_path: Path) -> None:
    contents = [llama(*split_keys(part, 3), tensors=TENSORS) + bytes(1000) for part in range(3)]
    first, _, last = write_parts(tmp_path, "model", contents)
    assert has_weights(first)
    assert has_weights(last)
    write(last, contents[2][:-1000])
    assert not has_weights(first)
    write(last, b"still being downloaded")
    assert not has_weights(first)
    last.unlink()
    assert not has_weights(first)


def test_a_model_named_like_a_part_is_asked_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "model-00001-of-00009.gguf", llama(tensors=TENSORS) + bytes(1000))
    assert has_weights(path)
