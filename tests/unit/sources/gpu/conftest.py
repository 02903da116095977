"""The stand-in for NVIDIA's driver, built once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.nvml import stand_in
from tests.nvml.stand_in import CompilerMissingError, StandIn


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built(tmp_path_factory)


@pytest.fixture(scope="session")
def old_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built(tmp_path_factory, "OLD_DRIVER")


@pytest.fixture
def nvml(nvml_library: Path) -> Iterator[StandIn]:
    """The stand-in where pynvml finds it."""
    with stand_in.loaded(nvml_library) as loaded:
        yield loaded


def _built(tmp_path_factory: pytest.TempPathFactory, *definitions: str) -> Path:
    if not sys.platform.startswith("linux"):
        pytest.skip("the stand-in for libnvidia-ml is a Linux library")
    try:
        return stand_in.build(tmp_path_factory.mktemp("nvml"), *definitions)
    except CompilerMissingError as error:
        pytest.skip(str(error))
