"""Settings that KV bytes rest on: a server's arguments, its model's file, folder or shape."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest

from kvscope import settings as written
from kvscope.commands.options import Chosen, chosen_settings
from kvscope.commands.serve import serve
from kvscope.commands.settings_file import server_arguments
from kvscope.observed.model import ContextSettings
from kvscope.settings import ServerSettings, SettingsError


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("KVSCOPE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


def chosen(*arguments: str) -> Chosen:
    context = serve.make_context("serve", list(arguments))
    assert isinstance(context, click.Context)
    with context:
        return chosen_settings(context)


def only(*arguments: str) -> ServerSettings:
    (server,) = chosen(*arguments).settings.servers
    return server


def file(folder: Path, text: str) -> str:
    path = folder / "kvscope.toml"
    path.write_text(text)
    return str(path)


def test_arguments_are_taken_as_llama_server_takes_them() -> None:
    assert only("--server-args", "main=-c 65536 -np 4 -ctk q8_0").arguments == ContextSettings(
        context_tokens=65536, slots=4, cache_type_k="q8_0"
    )


def test_one_variable_holds_the_arguments_of_each_server_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSCOPE_SERVER_ARGS", "a=-c 1024 -np 2\nb=-c 2048")
    first, second = chosen("--server", "a=http://h:1", "--server", "b=http://h:2").settings.servers
    assert first.arguments == ContextSettings(context_tokens=1024, slots=2)
    assert second.arguments == ContextSettings(context_tokens=2048)


@pytest.mark.parametrize(
    "words", ["'-c 65536 --alias \"my model\"'", "['-c', '65536', '--alias', 'my model']"]
)
def test_in_the_file_they_are_a_text_or_a_list(tmp_path: Path, words: str) -> None:
    config = file(tmp_path, f"[servers.main]\nurl = 'http://h:1'\nserver_args = {words}\n")
    assert only("--config", config).arguments == ContextSettings(context_tokens=65536)


def test_a_flag_goes_before_the_file(tmp_path: Path) -> None:
    config = file(
        tmp_path, "[servers.main]\nurl = 'http://h:1'\nserver_args = '-c 1'\nmodel_file = 'a.gguf'\n"
    )
    server = only("--config", config, "--server-args", "main=-c 2048", "--kv-shape", "main=/b.json")
    assert server.arguments == ContextSettings(context_tokens=2048)
    assert (server.model_file, server.kv_shape) == (None, "/b.json")


def test_a_model_file_in_the_file_lies_beside_it(tmp_path: Path) -> None:
    config = file(tmp_path, "[servers.main]\nurl = 'http://h:1'\nmodel_file = 'a.gguf'\n")
    assert only("--config", config).model_file == str(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "arguments",
    ["-c many", "-c", "--no-such-flag", "-ctk q9_9", "'-c 1", "-c 4096 --api-key CANARY --nosuch"],
)
def test_arguments_that_llama_server_would_not_take_are_refused_in_one_line(arguments: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        server_arguments(arguments)
    assert "\n" not in str(refusal.value)
    assert "CANARY" not in str(refusal.value)


def test_folders_are_mapped_by_flags_or_a_table(tmp_path: Path) -> None:
    pairs = ("--model-path-map", "/srv/models=/models", "--model-path-map", "D:\\gguf=/gguf")
    assert chosen(*pairs).settings.model_path_map == (("/srv/models", "/models"), ("D:\\gguf", "/gguf"))
    config = file(tmp_path, "[model_path_map]\n'/srv/models/' = '/models/'\n")
    assert chosen("--config", config).settings.model_path_map == (("/srv/models", "/models"),)


@pytest.mark.parametrize("text", ["", "/a", "/a=", "=/a", "a=/b", "/a=b"])
def test_a_map_that_names_no_two_folders_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="write for example /srv/models=/models"):
        written.mapped_path(text)


def test_a_file_and_a_shape_for_one_server_are_refused() -> None:
    with pytest.raises(SettingsError, match="keep the one that is right"):
        chosen("--model-file", "main=/a.gguf", "--kv-shape", "main=/a.json")
