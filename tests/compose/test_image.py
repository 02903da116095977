"""The image is built from what its lock files say, and these follow pyproject.toml; no engine is needed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "exporter/Dockerfile").read_text()

WANTED = {
    "requirements.lock": PROJECT["project"]["dependencies"],
    "requirements-demo.lock": [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["demo"],
    ],
    "requirements-build.lock": PROJECT["build-system"]["requires"],
}


def entries(name: str) -> list[str]:
    """Return a lock file's packages, each with its version and hashes in one line."""
    text = (ROOT / "exporter" / name).read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def locked(name: str) -> dict[str, str]:
    """Return the version of each package in a lock file."""
    pairs = (line.split()[0].split("==") for line in entries(name))
    return {canonicalize_name(package): version for package, version in pairs}


@pytest.mark.parametrize("name", WANTED)
def test_every_dependency_is_locked_within_its_range(name: str) -> None:
    versions = locked(name)
    for wanted in map(Requirement, WANTED[name]):
        version = versions.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted.name} is not in {name}: run `make lock`"
        assert wanted.specifier.contains(version), f"{name} has {wanted.name} {version}: run `make lock`"


@pytest.mark.parametrize("name", WANTED)
def test_every_locked_package_has_one_version_and_hashes(name: str) -> None:
    for line in entries(name):
        assert re.match(r"[\w.-]+==[\w.]+( ; [^-]+)?( +--hash=sha256:[0-9a-f]{64})+ *$", line), line[:60]


@pytest.mark.parametrize("name", WANTED)
def test_a_lock_file_names_no_registry(name: str) -> None:
    assert "://" not in (ROOT / "exporter" / name).read_text()


def test_the_demo_runs_on_what_the_exporter_runs_on() -> None:
    assert locked("requirements.lock").items() <= locked("requirements-demo.lock").items()


@pytest.mark.parametrize("name", WANTED)
def test_the_image_is_built_from_the_lock_file(name: str) -> None:
    assert f"--require-hashes -r exporter/{name}" in DOCKERFILE


def test_no_image_runs_as_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    users = {
        stage.split()[2]: re.findall(r"^USER (.+)$", stage, re.MULTILINE)[-1]
        for stage in stages
        if "\nUSER " in stage
    }
    assert users == {"bare": "10188:10188", "demo": "10188:10188"}


def test_the_labels_say_what_the_project_says() -> None:
    for label, value in {
        "title": PROJECT["project"]["name"],
        "licenses": PROJECT["project"]["license"],
        "version": "${VERSION}",
    }.items():
        assert f'org.opencontainers.image.{label}="{value}"' in DOCKERFILE


def test_nothing_but_what_the_wheel_needs_is_sent_to_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert sent == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "exporter",
        "dashboards",
        "alerts",
    }
