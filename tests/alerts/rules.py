"""The rules in alerts/ as values, and promtool, which tells whether their tests hold."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ALERTS = Path(__file__).parents[2] / "alerts"
RULE_FILES = (ALERTS / "kvscope-recording.yml", ALERTS / "kvscope-alerts.yml")
TESTS = ALERTS / "tests"


@dataclass(frozen=True, slots=True)
class Rule:
    """One alerting or recording rule; fields as the file has them."""

    file: Path
    fields: Mapping[str, Any]

    @property
    def alerts(self) -> bool:
        return "alert" in self.fields

    @property
    def name(self) -> str:
        return str(self.fields.get("alert") or self.fields["record"])

    @property
    def expr(self) -> str:
        return str(self.fields["expr"])

    @property
    def tests(self) -> Path:
        """The file of its tests."""
        return TESTS / f"{self.name.replace(':', '-')}.yml"


def rules() -> Iterator[Rule]:
    """Yield every rule of every file."""
    for file in RULE_FILES:
        for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]:
            for fields in group["rules"]:
                yield Rule(file, fields)


class TestsNotRun(Exception):
    """promtool could not run the tests: no verdict on the rule."""


def tests_hold(rule: Rule, fields: Mapping[str, Any]) -> bool:
    """Return whether the rule's tests hold with these fields in place of its own."""
    with tempfile.TemporaryDirectory(prefix="kvscope-alerts-") as folder:
        place = Path(folder)
        for file in RULE_FILES:
            group = {"name": file.stem, "rules": [fields] if file == rule.file else _recorded_for(rule, file)}
            (place / file.name).write_text(yaml.safe_dump({"groups": [group]}), encoding="utf-8")
        tests = rule.tests.read_text(encoding="utf-8").replace("../", "")
        (place / rule.tests.name).write_text(tests, encoding="utf-8")
        run = subprocess.run(
            ["promtool", "test", "rules", rule.tests.name],
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
        )
    said = run.stdout + run.stderr
    if run.returncode == 0:
        return True
    if "exp:" in said and "got:" in said:
        return False
    raise TestsNotRun(f"{rule.name}: {' '.join(said.split())[:300]}")


def _recorded_for(rule: Rule, file: Path) -> list[Mapping[str, Any]]:
    """Return what a file records and the rule asks for: fewer rules, faster tests."""
    return [each.fields for each in rules() if each.file == file and each.name in rule.expr]
