"""Which file tells a model's shape, and when it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.gguf_files import llama, number, write

from kvscope.demo.tiny_model import write_tiny_model
from kvscope.observed.model import ModelHeader, ModelSeen
from kvscope.settings import ServerSettings
from kvscope.sources import model_file
from kvscope.sources.gguf_header import read_header
from kvscope.sources.model_file import ModelFile, ModelFileError, Served
from kvscope.sources.model_shape import shape_document


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return write(tmp_path / "models" / "tiny.gguf", llama())


def layers(seen: ModelSeen | None) -> object:
    return None if seen is None else seen.header.metadata["llama.block_count"]


def seen_at(path: object, **more: object) -> Served:
    return Served(str(path), here=True, process_seen=True)._replace(**more)


def test_the_path_that_a_server_on_this_machine_names_is_read(model: Path) -> None:
    seen = ModelFile(ServerSettings("main")).read(seen_at(model))
    assert layers(seen) == 4
    assert seen is not None
    assert not seen.given


def test_a_relative_path_begins_where_the_server_was_started(model: Path) -> None:
    served = seen_at("models/tiny.gguf")
    assert (
        layers(ModelFile(ServerSettings("main")).read(served._replace(directory=str(model.parents[1])))) == 4
    )
    assert ModelFile(ServerSettings("main")).read(served) is None


def test_a_path_of_another_machine_is_never_opened(model: Path) -> None:
    assert ModelFile(ServerSettings("main")).read(Served(str(model))) is None


def test_a_path_of_a_container_that_publishes_a_port_here_is_no_failure(tmp_path: Path) -> None:
    assert ModelFile(ServerSettings("main")).read(Served(str(tmp_path / "gone.gguf"), here=True)) is None


def test_a_path_of_a_process_in_sight_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="--model-file main=PATH") as error:
        ModelFile(ServerSettings("main")).read(seen_at(tmp_path / "gone.gguf"))
    assert str(tmp_path) not in str(error.value)


def test_a_mapped_folder_is_read_whoever_named_it(model: Path) -> None:
    mapped = ModelFile(ServerSettings("main"), [("/srv", "/nowhere"), ("/srv/models", str(model.parent))])
    assert layers(mapped.read(Served("/srv/models/tiny.gguf"))) == 4
    windows = ModelFile(ServerSettings("main"), [("D:\\gguf", str(model.parent))])
    assert layers(windows.read(Served("d:\\GGUF\\tiny.gguf"))) == 4
    assert mapped.read(Served("/srv2/models/tiny.gguf")) is None


def test_a_path_that_leaves_its_mapped_folder_again_is_not_opened(model: Path) -> None:
    mapped = ModelFile(ServerSettings("main"), [("/srv", str(model.parent / "deeper"))])
    assert mapped.read(Served("/srv/../tiny.gguf")) is None
    assert mapped.read(Served("\\srv\\..\\tiny.gguf")) is None


def test_a_named_file_needs_no_word_of_the_server(model: Path) -> None:
    seen = ModelFile(ServerSettings("main", model_file=str(model))).read(Served(None))
    assert layers(seen) == 4
    assert seen is not None
    assert seen.given


def test_a_shape_stands_in_for_the_file(model: Path) -> None:
    shape = model.with_suffix(".json")
    shape.write_text(json.dumps(shape_document(read_header(model))))
    seen = ModelFile(ServerSettings("main", kv_shape=str(shape))).read(Served("/elsewhere/tiny.gguf"))
    assert layers(seen) == 4


def test_a_header_alone_tells_the_shape_but_no_size_of_weights(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "whole.gguf")
    whole = ModelFile(ServerSettings("main")).read(seen_at(path))
    assert whole is not None
    assert whole.header.file_bytes == path.stat().st_size
    cut = write(tmp_path / "cut.gguf", path.read_bytes()[:100_000])
    seen = ModelFile(ServerSettings("main")).read(seen_at(cut))
    assert layers(seen) == 4
    assert seen is not None
    assert seen.header.file_bytes is None


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model", b"GGUF" + bytes(1000)])
def test_a_file_that_is_no_model_is_one_line_without_its_folder(model: Path, content: bytes) -> None:
    model.write_bytes(content)
    with pytest.raises(ModelFileError) as error:
        ModelFile(ServerSettings("main")).read(seen_at(model))
    assert str(model.parent) not in str(error.value)
    assert "\n" not in str(error.value)


def test_it_is_read_again_only_when_it_changed(model: Path) -> None:
    source = ModelFile(ServerSettings("main"))
    first = source.read(seen_at(model))
    assert source.read(seen_at(model)) is first
    model.unlink()
    write(model, llama(number("llama.more", "u32", 1)))
    os.utime(model, ns=(1, 1))
    second = source.read(seen_at(model))
    assert second is not first
    assert second is not None
    assert second.header.metadata["llama.more"] == 1


def test_a_file_that_comes_back_is_read_again(model: Path) -> None:
    source = ModelFile(ServerSettings("main"))
    source.read(seen_at(model))
    content = model.read_bytes()
    model.unlink()
    with pytest.raises(ModelFileError):
        source.read(seen_at(model))
    model.write_bytes(content)
    assert layers(source.read(seen_at(model))) == 4


def test_a_file_that_cannot_be_used_is_read_once_until_it_changes(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []

    def counted(path: Path) -> ModelHeader:
        reads.append(path)
        return read_header(path)

    monkeypatch.setattr(model_file, "read_header", counted)
    source = ModelFile(ServerSettings("main"))
    content = model.read_bytes()
    model.write_bytes(b"not a model")
    for _ in range(3):
        with pytest.raises(ModelFileError, match="cannot be used"):
            source.read(seen_at(model))
    assert len(reads) == 1
    model.write_bytes(content)
    assert layers(source.read(seen_at(model))) == 4


def test_a_file_replaced_under_a_running_server_is_not_the_one_it_loaded(model: Path) -> None:
    source = ModelFile(ServerSettings("main"))
    os.utime(model, (1000, 1000))
    first = source.read(seen_at(model, started_at=1500.0))
    write(model, llama(number("llama.more", "u32", 1)))
    os.utime(model, (2000, 2000))
    assert source.read(seen_at(model, started_at=1500.0)) is first
    restarted = source.read(seen_at(model, started_at=2500.0))
    assert restarted is not None
    assert restarted.header.metadata["llama.more"] == 1
