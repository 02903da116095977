"""GPUs: one module per backend, whose name is the value of --gpu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

from kvscope.logs import what_and_where
from kvscope.sources.gpu.backend import BackendMissingError, GpuBackend, GpuOptions

AUTOMATIC = ("nvml", "amdgpu")


def open_backends(
    setting: str, options: GpuOptions, opened: Sequence[GpuBackend] = ()
) -> tuple[Sequence[GpuBackend], str | None]:
    """Return the backends that a value of --gpu means, and in one line which of them are missing.

    setting: auto, none, or a backend's name with, behind a colon, its script. opened: those that are open
    already; they stay, and stay first.
    """
    name, _, script = setting.partition(":")
    if name == "none":
        return (), None
    found = list(opened)
    missing: list[str] = []
    for module in AUTOMATIC if name == "auto" else (name,):
        if module in (backend.name for backend in opened):
            continue
        try:
            found.append(
                import_module(f"{__name__}.{module}").open_backend(replace(options, script=script or None))
            )
        except BackendMissingError as error:
            missing.append(str(error))
        except Exception as error:  # one that cannot even be opened costs the others nothing
            missing.append(
                f"{module} fails by a fault of kvscope ({what_and_where(error)}); please report it"
            )
    if not missing:
        return found, None
    watched = ", ".join(backend.name for backend in found)
    begin = f"GPUs are watched through {watched} only" if found else "no GPU is watched"
    return found, f"{begin}: " + "; ".join(missing)
