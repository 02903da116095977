"""How Docker Compose is called here: the program of its own, or the one that docker brings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

FILES = {
    "plain": ("docker-compose.yml",),
    "nvidia": ("docker-compose.yml", "compose.nvidia.yml"),
    "amd": ("docker-compose.yml", "compose.amd.yml"),
    "host": ("docker-compose.yml", "compose.host.yml"),
    "nvidia on the host's network": ("docker-compose.yml", "compose.host.yml", "compose.nvidia.yml"),
    "amd on the host's network": ("docker-compose.yml", "compose.host.yml", "compose.amd.yml"),
}


def program() -> tuple[str, ...] | None:
    """Return the words that start Compose, None where there is none."""
    for words in (("docker-compose",), ("docker", "compose")):
        if shutil.which(words[0]) is None:
            continue
        version = subprocess.run([*words, "version", "--short"], capture_output=True, text=True, check=False)
        if version.returncode == 0 and version.stdout.lstrip("v").startswith(("2.", "5.")):
            return words
    return None


def run(
    *arguments: str,
    files: Sequence[str] = FILES["plain"],
    env_file: Path | None = None,
    project: str = "kvscope-test",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Compose on these files; only env_file sets variables, no .env of the checkout."""
    words = program()
    assert words is not None
    named = [word for file in files for word in ("-f", str(ROOT / file))]
    return subprocess.run(
        [*words, "-p", project, "--env-file", str(env_file or "/dev/null"), *named, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def config(
    case: str, settings: Mapping[str, str], folder: Path, *, profiles: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what Compose makes of a case's files and settings."""
    answer = asked(case, settings, folder, *(word for each in profiles for word in ("--profile", each)))
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    read: dict[str, Any] = json.loads(answer.stdout)
    return read


def asked(
    case: str, settings: Mapping[str, str], folder: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Return Compose's answer to `config`, good or bad."""
    env_file = folder / "settings.env"
    env_file.write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))
    clean = {"PATH": os.environ["PATH"]}
    return run(
        *options, "config", "--format", "json", files=FILES[case], env_file=env_file, environment=clean
    )
