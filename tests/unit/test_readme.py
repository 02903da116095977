"""What the README tells a reader to type can be typed, and what it links to is there."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvscope.cli import kvscope
from kvscope.commands.demo import demo

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


LINES = [line for block in blocks("sh") for line in block.splitlines()]
SERVE_LINES = [line for line in LINES if line.startswith("kvscope serve")]
MAKE_LINES = [line for line in LINES if line.startswith("make ")]


@pytest.fixture(autouse=True)
def in_a_folder_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing"))
    key = tmp_path / "llama.key"
    key.write_text("not-a-real-key\n")
    key.chmod(0o600)


def checked(*arguments: str) -> str:
    result = CliRunner().invoke(kvscope, ["serve", *arguments, "--check-config"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("line", SERVE_LINES)
def test_each_serve_line_is_a_possible_setting(line: str) -> None:
    arguments = shlex.split(line)[2:]
    named = [value for flag, value in pairwise(arguments) if flag == "--server"]
    output = checked(*arguments)
    assert len(re.findall(r"^server \w+: \w+:", output, re.MULTILINE)) == max(1, len(named))


def test_the_settings_file_is_a_possible_one() -> None:
    (toml,) = blocks("toml")
    Path("config.toml").write_text(toml)
    output = checked("--config", "config.toml")
    assert "server main: http://127.0.0.1:8080 (API key: from" in output
    assert "sleep idle: 300 s" in output


@pytest.mark.parametrize("line", MAKE_LINES)
def test_each_make_line_has_its_target_and_the_demos_options_exist(line: str) -> None:
    _, target, *arguments = shlex.split(line)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for given in arguments:
        demo.make_context("demo", shlex.split(given.removeprefix("ARGS=")))


def test_something_was_found_to_check() -> None:
    assert len(SERVE_LINES) >= 5
    assert {"make demo", "make test"} <= set(MAKE_LINES)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)]+)\)", README))))
def test_each_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


PICTURES = sorted(
    (page.relative_to(ROOT).as_posix(), picture)
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
    for picture in set(re.findall(r'\bsrc(?:set)?="(?!https?:)([^"]+)"', page.read_text(encoding="utf-8")))
)


@pytest.mark.parametrize(("page", "picture"), PICTURES)
def test_each_picture_is_there_and_has_a_twin_of_the_other_brightness(page: str, picture: str) -> None:
    assert (ROOT / page).parent.joinpath(picture).is_file()
    swapped = {"dark": "light", "light": "dark"}
    assert (page, re.sub("dark|light", lambda found: swapped[found[0]], picture)) in PICTURES


def test_nothing_tells_a_reader_to_install_a_package_that_is_not_published() -> None:
    unit = (ROOT / "deploy" / "kvscope.service").read_text(encoding="utf-8")
    assert "pip install ." in unit
    for text in (README, unit):
        assert not re.search(r"pipx? install kvscope", text)


def test_every_metric_it_names_is_documented() -> None:
    documented = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"`(kvscope_\w+)`", README)):
        assert f"`{name}`" in documented
