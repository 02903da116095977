"""One demo session for all tests: both servers, their exporters, and the Prometheus that scraped them."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack when its session is over; everything still runs."""
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is missing: make tools")
    with asyncio.Runner() as loop:
        stack = Stack(tmp_path_factory.mktemp("stack"))
        try:
            loop.run(stack.play())
            yield stack
        finally:
            loop.run(stack.stop())
