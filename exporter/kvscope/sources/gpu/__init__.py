"""GPUs: one module per backend, whose name is the value of --gpu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

from kvscope.sources.gpu.backend import BackendMissingError, GpuBackend, GpuOptions

AUTOMATIC = ("nvml", "amdgpu")


def open_backends(setting: str, options: GpuOptions) -> tuple[Sequence[GpuBackend], str | None]:
    """Return the backends that a value of --gpu means, and in one line what is missing, if none is there.

    setting: auto, none, or a backend's name with, behind a colon, its script.
    """
    name, _, script = setting.partition(":")
    if name == "none":
        return (), None
    found: list[GpuBackend] = []
    missing: list[str] = []
    for module in AUTOMATIC if name == "auto" else (name,):
        try:
            found.append(
                import_module(f"{__name__}.{module}").open_backend(replace(options, script=script or None))
            )
        except BackendMissingError as error:
            missing.append(str(error))
    return found, None if found else "no GPU is watched: " + "; ".join(missing)
