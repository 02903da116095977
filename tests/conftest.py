"""For every test: tools that `make tools` got are found, and in CI nothing is left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parent.parent / ".tools"


def pytest_configure() -> None:
    os.environ["PATH"] = f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test is a failure: what was not run proves nothing."""
    report = yield
    if in_ci() and report.skipped and not hasattr(report, "wasxfail"):
        fail(report, item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips all its tests."""
    report = yield
    if in_ci() and report.outcome == "skipped":
        fail(report, collector.nodeid)
    return report


def fail(report: Any, name: str) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{name} was skipped, which is a failure in CI: {reason.removeprefix('Skipped: ')}"


@pytest.fixture(autouse=True)
def log_handlers_as_before() -> Iterator[None]:
    """A test that starts kvscope's logging leaves no handler on a stream that is closed after it."""
    loggers = (logging.getLogger(), logging.getLogger("kvscope"))
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
