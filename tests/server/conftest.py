"""Real llama.cpp servers for tests, on a tiny generated model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvscope.demo.running_server import RunningServer
from kvscope.demo.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers, ready at return: start("-c", "4096", "--metrics"); all are stopped after the test."""
    servers: list[RunningServer] = []

    def start_one(*flags: str) -> RunningServer:
        server = RunningServer(tiny_model, *flags)
        servers.append(server)
        return server.wait()

    yield start_one
    for server in servers:
        server.stop()
