"""NVIDIA GPUs, through NVML: the library of the driver that nvidia-smi asks too (nvidia-ml-py, pynvml).

Functions, units and errors are those of NVIDIA's nvml.h, API version 13; older drivers lack some of the
functions, which costs the figures that only these tell.
"""

from __future__ import annotations

import _ctypes
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import pynvml  # type: ignore[import-untyped]

from kvscope.observed.gpu import GpuProcess, GpuReading, GpuSeen
from kvscope.sources.gpu.backend import BackendMissingError, GpuOptions

FIRST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 300.0
"""How long after a GPU or the driver went away NVML is started anew; doubled each time up to the longest."""

UNEXPLAINED_BYTES = 64 * 2**20
"""Less than the context alone of any CUDA program takes: so much is in use beside those who are listed."""

MOST_EVENTS = 1000
"""Taken in one look, so that a GPU that fails all the time cannot hold it up."""

DRIVER_GONE = {
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
}
GPU_GONE = {
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
}
NOT_OURS = {pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_OPERATING_SYSTEM}
"""A GPU that others may use: a container sees the number of all, and may open its own."""

OTHER_DRIVER = {
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_DEPRECATED,
}
"""The function is not for this driver or GPU; another one of the same meaning may be."""

NOTHING_TO_TELL = OTHER_DRIVER - {pynvml.NVML_ERROR_INVALID_ARGUMENT} | {
    pynvml.NVML_ERROR_NO_DATA,
    pynvml.NVML_ERROR_VGPU_ECC_NOT_SUPPORTED,
}
"""This GPU does not have such a figure: nothing went wrong."""

MISSING = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "NVIDIA's libnvidia-ml is not there: install the driver, or give "
    "the container its GPUs (docker run --gpus all)",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded: load it (modprobe nvidia)",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA driver's library and its kernel module are of "
    "different versions: restart the machine, or this container",
    pynvml.NVML_ERROR_NO_PERMISSION: "the NVIDIA driver may not be asked: give kvscope access to "
    "/dev/nvidia*",
}
NO_GPU = "the NVIDIA driver is there, but no GPU that kvscope may open: see nvidia-smi -L"

THROTTLED = {
    # nvmlClocksEventReasonSwPowerCap, HwPowerBrakeSlowdown
    "power": 0x04 | 0x80,
    # nvmlClocksEventReasonSwThermalSlowdown, HwThermalSlowdown
    "thermal": 0x20 | 0x40,
    # nvmlClocksEventReasonSyncBoost, DisplayClockSetting
    "other": 0x10 | 0x100,
}
"""Idle clocks and clocks that somebody set are no throttling."""
HARDWARE_SLOWDOWN = 0x08
"""nvmlClocksEventReasonHwSlowdown: set besides the bit that says why, where one does."""

Call = tuple[Any, ...]
"""The name of a function, and what it is given after the GPU."""

MEMORY: tuple[Call, ...] = (
    ("nvmlDeviceGetMemoryInfo", pynvml.nvmlMemory_v2),
    ("nvmlDeviceGetMemoryInfo",),
)
PROCESSES: tuple[tuple[Call, ...], ...] = tuple(
    tuple((f"nvmlDeviceGet{kind}RunningProcesses_{version}",) for version in ("v3", "v2"))
    for kind in ("Compute", "Graphics")
)
TEMPERATURE: tuple[Call, ...] = tuple(
    (function, pynvml.NVML_TEMPERATURE_GPU)
    for function in ("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV")
    if hasattr(pynvml, function)  # the second came after nvidia-ml-py 12.560
)
CLOCKS: dict[str, tuple[Call, ...]] = {
    "graphics": (("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_GRAPHICS),),
    "memory": (("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),),
}
CLOCK_REASONS: tuple[Call, ...] = (
    ("nvmlDeviceGetCurrentClocksEventReasons",),
    ("nvmlDeviceGetCurrentClocksThrottleReasons",),
)
PCIE: dict[str, tuple[Call, ...]] = {
    "rx": (("nvmlDeviceGetPcieThroughput", pynvml.NVML_PCIE_UTIL_RX_BYTES),),
    "tx": (("nvmlDeviceGetPcieThroughput", pynvml.NVML_PCIE_UTIL_TX_BYTES),),
}
ECC: dict[str, tuple[Call, ...]] = {
    # Aggregate, not volatile: volatile counts start again whenever the driver is loaded.
    kind: (("nvmlDeviceGetTotalEccErrors", error, pynvml.NVML_AGGREGATE_ECC),)
    for kind, error in (
        ("ecc_corrected", pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        ("ecc_uncorrected", pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
    )
}


def open_backend(options: GpuOptions) -> NvmlBackend:
    """Return the backend, its driver in use. Raises BackendMissingError where there is no driver or GPU."""
    return NvmlBackend(options)


class NvmlBackend:
    """Reads NVIDIA's GPUs. A GPU that went away is absent, and looked for again from time to time."""

    name = "nvml"

    def __init__(self, options: GpuOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._clock = clock
        self._gpus: tuple[_Gpu, ...] = ()
        self._driver: str | None = None
        self._started = False
        self._missing: str | None = None
        self._other_version = False
        self._wait = FIRST_WAIT_SECONDS
        self._again_at: float | None = None
        self._rising: dict[tuple[str, str], _Rising] = {}
        self._programs: dict[int, tuple[bool, str | None]] = {}
        self._start()

    def look(self) -> GpuReading:
        """Return what can be read now; what cannot is absent. Raises nothing."""
        now = self._clock()
        if self._again_at is not None and now >= self._again_at:
            self._start_anew()
        problems = [self._missing] if self._missing else []
        gone = bool(self._missing)
        seen: list[GpuSeen] = []
        listed: set[int] = set()
        for gpu in self._gpus:
            device = _Device(f"GPU {gpu.index}", (gpu.handle,))
            try:
                parts = list(self._look_at(gpu, device, listed))
            except _GoneError as error:
                gone = True
                self._other_version |= error.code == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
                problems.append(str(error))
            else:
                seen.extend(parts)
                problems.extend(device.problems)
        self._programs = {pid: program for pid, program in self._programs.items() if pid in listed}
        self._plan(now, gone)
        return GpuReading(tuple(seen), tuple(dict.fromkeys(problems)))

    def close(self) -> None:
        """Let go of the driver."""
        self._again_at = None
        self._stop()

    # --- the driver ---------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start NVML and take every GPU that may be opened. Raises BackendMissingError."""
        try:
            pynvml.nvmlInit()
            self._started = True
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self._stop()
            self._other_version = error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
            raise BackendMissingError(
                MISSING.get(error.value, f"the NVIDIA driver does not start ({error}): see nvidia-smi")
            ) from None
        self._gpus = tuple(gpu for gpu in map(_opened, range(count)) if gpu is not None)
        self._driver = None
        if not self._gpus:
            self._stop()
            raise BackendMissingError(NO_GPU)

    def _stop(self) -> None:
        for gpu in self._gpus:
            if gpu.events is not None:
                with contextlib.suppress(pynvml.NVMLError):
                    pynvml.nvmlEventSetFree(gpu.events)
        self._gpus = ()
        if self._started:
            self._started = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def _start_anew(self) -> None:
        """Start NVML again: only then does it know a GPU again that was away, or its new place."""
        self._stop()
        if self._other_version:
            _forget_library()
            self._other_version = False
        try:
            self._start()
        except BackendMissingError as error:
            self._missing = str(error)
        else:
            self._missing = None

    def _plan(self, now: float, gone: bool) -> None:
        """Say when NVML is started anew."""
        if not gone:
            self._again_at, self._wait = None, FIRST_WAIT_SECONDS
        elif self._again_at is None or now >= self._again_at:
            self._again_at = now + self._wait
            self._wait = min(2 * self._wait, LONGEST_WAIT_SECONDS)

    # --- one GPU ------------------------------------------------------------------------------------

    def _look_at(self, gpu: _Gpu, device: _Device, listed: set[int]) -> Iterator[GpuSeen]:
        """Yield the card and, in MIG mode, its instances: then only these have memory and processes."""
        if gpu.trouble is not None:
            raise _GoneError(device.title, gpu.trouble)
        card = self._identity(device, gpu.identity)
        owner = card.get("uuid") or str(gpu.index)
        errors = self._errors(gpu, device, owner)
        mode = device.ask(("nvmlDeviceGetMigMode",))
        instances = mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE
        utilization = device.ask(("nvmlDeviceGetUtilizationRates",))
        energy = device.ask(("nvmlDeviceGetTotalEnergyConsumption",))
        # What is at this place on the bus is then an instance, not the card without memory.
        memory = {"pci_id": None} if instances else self._memory(device, listed)
        yield GpuSeen(
            gpu=str(gpu.index),
            **card | memory,
            utilization_ratio=None if utilization is None else utilization.gpu / 100,
            memory_bandwidth_utilization_ratio=None if utilization is None else utilization.memory / 100,
            power_watts=_thousandths(device.ask(("nvmlDeviceGetPowerUsage",))),
            power_limit_watts=_thousandths(device.ask(("nvmlDeviceGetEnforcedPowerLimit",))),
            energy_joules=_thousandths(self._total(owner, "energy", energy)),
            temperature_celsius=_float(device.ask(*TEMPERATURE)),
            clocks_hertz={name: mhz * 10**6 for name, mhz in device.each(CLOCKS)},
            pcie_bytes_per_second=(
                {name: kilobytes * 1000.0 for name, kilobytes in device.each(PCIE)}
                if self._options.pcie_throughput
                else {}
            ),
            throttled=_throttled(device.ask(*CLOCK_REASONS)),
            errors=errors,
        )
        if instances:
            for index, handle in _instances(device):
                part = _Device(f"GPU {gpu.index}:{index}", (handle,), device.problems)
                yield GpuSeen(
                    gpu=f"{gpu.index}:{index}",
                    **self._identity(part, {"pci_id": card["pci_id"]}),
                    **self._memory(part, listed),
                )

    def _identity(self, device: _Device, known: dict[str, Any]) -> dict[str, Any]:
        """Return what does not change while NVML runs; asked for again until it is known."""
        if self._driver is None:
            driver = _Device("the NVIDIA driver", (), device.problems)
            self._driver = driver.ask(("nvmlSystemGetDriverVersion",))
        for name, function in (("uuid", "nvmlDeviceGetUUID"), ("name", "nvmlDeviceGetName")):
            if known.get(name) is None:
                known[name] = device.ask((function,))
        if known.get("pci_id") is None:
            pci = device.ask(("nvmlDeviceGetPciInfo_v3",))
            known["pci_id"] = None if pci is None else pci_id(pci.busId)
        return known | {"vendor": "NVIDIA", "driver": self._driver}

    def _memory(self, device: _Device, listed: set[int]) -> dict[str, Any]:
        memory = device.ask(*MEMORY)
        processes = self._processes(device, listed)
        if memory is None:
            # nvml.h: such a GPU has no memory of its own but shares the system's.
            unified = device.refused.get("nvmlDeviceGetMemoryInfo") == pynvml.NVML_ERROR_NOT_SUPPORTED
            return {"unified": unified, "processes": processes}
        reserved = getattr(memory, "reserved", None)
        used = memory.used
        if reserved and used >= reserved and used + memory.free == memory.total:
            # nvml.h calls the reserved bytes a part of those in use; drivers seen so far keep them apart.
            used -= reserved
        return {
            "memory_total_bytes": memory.total,
            "memory_used_bytes": used,
            "memory_free_bytes": memory.free,
            "memory_reserved_bytes": reserved,
            "processes": processes,
            "processes_complete": _explain(processes, used),
        }

    def _processes(self, device: _Device, listed: set[int]) -> tuple[GpuProcess, ...] | None:
        compute, graphics = (device.ask(*calls) for calls in PROCESSES)
        if compute is None:
            return None
        held: dict[int, int | None] = {}
        for entry in (*compute, *(graphics or ())):
            # A program may be in both lists, each time with all that it holds.
            sizes = [size for size in (held.get(entry.pid), entry.usedGpuMemory) if size is not None]
            held[entry.pid] = max(sizes, default=None)
        listed.update(held)
        return tuple(self._process(pid, size) for pid, size in sorted(held.items()))

    def _process(self, pid: int, size: int | None) -> GpuProcess:
        """Return the process with its program's name, read once as long as it stays in a list."""
        if pid not in self._programs:
            self._programs[pid] = _program(pid)
        visible, name = self._programs[pid]
        return GpuProcess(pid if visible else None, name, size)

    # --- counters -----------------------------------------------------------------------------------

    def _errors(self, gpu: _Gpu, device: _Device, owner: str) -> Mapping[str, int]:
        errors = {kind: self._total(owner, kind, count) for kind, count in device.each(ECC)}
        if gpu.events is not None and (new := device.take_xids(gpu.events)) is not None:
            xids = self._rising.setdefault((owner, "xid"), _Rising())
            xids.total += new
            errors["xid"] = xids.total
        return {kind: count for kind, count in errors.items() if count is not None}

    def _total(self, owner: str, kind: str, count: int | None) -> int | None:
        """Return the counter such that it never goes back, though the driver may start its own anew."""
        if count is None:
            return None
        return self._rising.setdefault((owner, kind), _Rising()).advance(count)


@dataclass(slots=True)
class _Gpu:
    """A GPU since NVML was started. trouble: the error code that kept it from being opened."""

    index: int
    handle: Any = None
    events: Any = None
    trouble: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Rising:
    last: int = 0
    total: int = 0

    def advance(self, count: int) -> int:
        self.total += count - self.last if count >= self.last else count
        self.last = count
        return self.total


class _GoneError(Exception):
    """The GPU, or the whole driver, cannot be asked any more."""

    def __init__(self, title: str, code: int) -> None:
        whose = "the NVIDIA driver" if code in DRIVER_GONE else title
        super().__init__(
            f"{whose}: {_told(code)}; its figures are left out until it answers again, see nvidia-smi"
        )
        self.code = code


@dataclass(slots=True)
class _Device:
    """Asks one GPU, instance or (no handle) the driver, and keeps what went wrong.

    refused: error codes by function.
    """

    title: str
    handle: tuple[Any, ...]
    problems: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)

    def ask(self, *calls: Call) -> Any:
        """Return what the first of these calls gives that this driver has, else None. Raises _GoneError."""
        for number, (function, *arguments) in enumerate(calls, 1):
            try:
                return getattr(pynvml, function)(*self.handle, *arguments)
            except pynvml.NVMLError as error:
                if error.value in OTHER_DRIVER and number < len(calls):
                    continue
                self.refuse(function, error)
            except (ValueError, MemoryError) as error:  # text that is no text, lists without end
                self.problems.append(f"{self.title}: {function} gives nonsense ({type(error).__name__})")
            break
        return None

    def each(self, calls: Mapping[str, Iterable[Call]]) -> Iterator[tuple[str, int]]:
        """Yield the answer of each of these calls that has one."""
        for name, ways in calls.items():
            answer = self.ask(*ways)
            if answer is not None:
                yield name, answer

    def take_xids(self, events: Any) -> int | None:
        """Return how many XID errors came since the last look; None where it cannot be told."""
        count = 0
        for _ in range(MOST_EVENTS):
            try:
                event = pynvml.nvmlEventSetWait_v2(events, 0)
            except pynvml.NVMLError as error:
                # What came before the error counts: XID 79 is the last that a lost GPU tells.
                if error.value == pynvml.NVML_ERROR_TIMEOUT or count:
                    break
                self.refuse("nvmlEventSetWait_v2", error)
                return None
            count += event.eventType == pynvml.nvmlEventTypeXidCriticalError
        return count

    def refuse(self, function: str, error: pynvml.NVMLError) -> None:
        """Take an error: it costs one field, or the whole GPU (_GoneError)."""
        if error.value in DRIVER_GONE | GPU_GONE:
            raise _GoneError(self.title, error.value)
        self.refused[function] = error.value
        if error.value not in NOTHING_TO_TELL:
            self.problems.append(f"{self.title}: {function} fails: {_told(error.value)}")


def pci_id(bus_id: str) -> str | None:
    """Return NVML's 00000000:01:00.0 as 0000:01:00.0, in lower case as in sysfs; None where it is none."""
    domain, _, rest = bus_id.partition(":")
    try:
        return f"{int(domain, 16):04x}:{rest.lower()}"
    except ValueError:
        return None


def _opened(index: int) -> _Gpu | None:
    """Return the GPU, its XID errors recorded where the driver can; None where it is not ours."""
    try:
        gpu = _Gpu(index, pynvml.nvmlDeviceGetHandleByIndex(index))
    except pynvml.NVMLError as error:
        return None if error.value in NOT_OURS else _Gpu(index, trouble=error.value)
    try:
        events = pynvml.nvmlEventSetCreate()
    except pynvml.NVMLError:
        return gpu
    try:
        pynvml.nvmlDeviceRegisterEvents(gpu.handle, pynvml.nvmlEventTypeXidCriticalError, events)
    except pynvml.NVMLError:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlEventSetFree(events)
    else:
        gpu.events = events
    return gpu


def _instances(card: _Device) -> Iterator[tuple[int, Any]]:
    for index in range(card.ask(("nvmlDeviceGetMaxMigDeviceCount",)) or 0):
        try:
            yield index, pynvml.nvmlDeviceGetMigDeviceHandleByIndex(*card.handle, index)
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_NOT_FOUND:  # fewer than the card could hold
                card.refuse("nvmlDeviceGetMigDeviceHandleByIndex", error)


def _explain(processes: Iterable[GpuProcess] | None, used: int) -> bool:
    """Return whether those listed hold all that is in use.

    They do not in WSL2 and under Windows (sizes are not told) and seen from another pid namespace (programs
    outside are not listed).
    """
    if processes is None:
        return False
    sizes = [process.memory_bytes for process in processes]
    return None not in sizes and used - sum(filter(None, sizes)) <= UNEXPLAINED_BYTES


def _program(pid: int) -> tuple[bool, str | None]:
    """Return whether the process is visible from here, and its program's name."""
    try:
        return True, psutil.Process(pid).name() or None
    except psutil.NoSuchProcess:
        return False, None
    except psutil.Error:
        return True, None


def _throttled(reasons: int | None) -> dict[str, bool]:
    if reasons is None:
        return {}
    throttled = {reason: bool(reasons & bits) for reason, bits in THROTTLED.items()}
    if reasons & HARDWARE_SLOWDOWN and not (throttled["power"] or throttled["thermal"]):
        throttled["other"] = True
    return throttled


def _float(count: int | None) -> float | None:
    return None if count is None else float(count)


def _thousandths(count: int | None) -> float | None:
    return None if count is None else count / 1000


def _told(code: int) -> str:
    return str(pynvml.NVMLError(code)).rstrip(".")


def _forget_library() -> None:
    """Have the driver's library loaded anew: an update put another one in its place.

    pynvml keeps it, and the functions in it, for ever.
    """
    library, pynvml.nvmlLib = pynvml.nvmlLib, None
    pynvml._nvmlGetFunctionPointer_cache.clear()
    close = getattr(_ctypes, "dlclose", None) or getattr(_ctypes, "FreeLibrary", None)
    if library is not None and close is not None:
        close(library._handle)
