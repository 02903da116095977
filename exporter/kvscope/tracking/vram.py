"""Who holds a GPU's memory: one budget for each GPU, whose parts sum to its total.

A part is a kind and, for the kinds of a server, its name:

- weights, kv, compute: what a server allocated on this GPU when it loaded its model;
- server_rest: what else its process holds (the driver's context, pictures' projector, adapters);
- server_unsplit: memory of its process that cannot be told apart;
- other_processes: processes that are no watched server; one without pid and name is out of sight and
  may be one;
- unattributed: not free, and by whom it is held cannot be read;
- reserved: kept back by driver and firmware; free.

What is not known is left out, so a part that is there and 0 is known to be nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvscope.observed.gpu import GpuProcess, GpuSeen
from kvscope.observed.logged_memory import LoggedContext, LoggedMemory
from kvscope.observed.model import ContextSettings, ModelSeen
from kvscope.tracking.context import ServerMemory

Part = tuple[str, str | None]
"""A kind, and the name of the server for the kinds of one."""

KINDS = (
    "weights",
    "kv",
    "compute",
    "server_rest",
    "server_unsplit",
    "other_processes",
    "unattributed",
    "reserved",
    "free",
)

_HOST = re.compile(r"CPU(?:_\w+)?|AMX\w*|\w+_Host|RPC.*")
"""Buffers (ggml's buffer types) that its process holds on no GPU; those of RPC are another process'."""

_ON_DEVICE = re.compile(r"(?P<device>(?P<kind>[A-Za-z]+)[0-9]*)(?:_Mapped|_Private)?")
"""Buffers of one device. Others (`CUDA0_Split`, `Meta(CUDA0,CUDA1)`) lie on several."""

_VENDORS = {"CUDA": "nvidia", "ROCm": "amd"}
"""The kinds of llama.cpp's devices that run on the cards of one vendor only."""


@dataclass(frozen=True, slots=True)
class ServerSizes:
    """Bytes that a server allocated on one GPU; None where nothing tells."""

    weights: int | None = None
    kv: int | None = None
    compute: int | None = None

    def known(self) -> Mapping[str, int]:
        """Return those that are known, by kind."""
        sizes = {"weights": self.weights, "kv": self.kv, "compute": self.compute}
        return {kind: size for kind, size in sizes.items() if size is not None}


@dataclass(frozen=True, slots=True)
class ServerClaim:
    """What is known of one server on one GPU. pid: None where its process is not in sight."""

    server: str
    pid: int | None = None
    sizes: ServerSizes = field(default_factory=ServerSizes)


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """What the sources tell of a server's load; a field is None where its source tells nothing.

    settings: of all sources together (`kvscope.tracking.context.joined`). asleep: it gave its memory back.
    """

    logged: LoggedMemory | None = None
    memory: ServerMemory | None = None
    settings: ContextSettings | None = None
    model: ModelSeen | None = None
    asleep: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes by part; none is negative."""

    parts: Mapping[Part, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts: the GPU's memory."""
        return sum(self.parts.values())

    def bytes_of(self, kind: str, server: str | None = None) -> int | None:
        """Return the bytes of one part; None where it is not known."""
        return self.parts.get((kind, server))


def budget(gpu: GpuSeen, claims: Sequence[ServerClaim]) -> Budget | None:
    """Return who holds the GPU's memory, in bytes that sum to its total whatever the readings say.

    On a unified GPU the memory is VRAM and GTT together. None where total or use are not known. Where
    readings contradict each other the use wins over the processes' sums, and these over the sizes that
    a server allocated. A server whose process is on this machine but whose memory on this GPU cannot be
    read has its sizes taken out of what nobody visible explains; what else it holds stays there.
    """
    whole = _whole(gpu)
    if whole is None:
        return None
    parts: Counter[Part] = Counter()
    left = whole.used
    held = _held(gpu)
    owners = _owners(claims)
    for claim in owners.values():
        size = held.by_pid.get(claim.pid)
        if size is not None:
            given = min(size, left)
            left -= given
            for kind, part in _split(claim.sizes, given, given < size).items():
                parts[kind, claim.server] += part
    others = [size for pid, size in held.by_pid.items() if pid not in owners] + list(held.named)
    if any(size is not None for size in others) or (held.complete and not others):
        parts["other_processes", None] = min(left, sum(size or 0 for size in others))
        left -= parts["other_processes", None]
    for claim in owners.values():
        known = claim.sizes.known()
        if held.may_hide(claim.pid) and min(known.values(), default=0) >= 0 and sum(known.values()) <= left:
            left -= sum(known.values())
            for kind, part in known.items():
                parts[kind, claim.server] += part
    parts["unattributed", None] = left + whole.neither
    if whole.reserved is not None:
        parts["reserved", None] = whole.reserved
    parts["free", None] = whole.free
    return Budget(dict(parts))


def server_bytes(gpu: GpuSeen, claims: Sequence[ServerClaim]) -> Mapping[str, int]:
    """Return the bytes that each server's process holds of the GPU, where that can be read."""
    held = _held(gpu).by_pid
    sizes: Counter[str] = Counter()
    for claim in _owners(claims).values():
        size = held.get(claim.pid)
        if size is not None:
            sizes[claim.server] += size
    return dict(sizes)


def largest_processes(gpu: GpuSeen, at_most: int = 10) -> Mapping[str, int]:
    """Return the bytes of the programs that hold most of the GPU, largest first.

    By program name; processes of one name are summed, those without a name or a size left out.
    """
    names: dict[int, str] = {}
    sizes: Counter[str] = Counter()
    for process in gpu.processes or ():
        if process.name and process.pid is not None:
            names[process.pid] = process.name
    for pid, size in _held(gpu).by_pid.items():
        if pid in names and size is not None:
            sizes[names[pid]] += size
    for process in gpu.processes or ():
        size = _process_bytes(gpu, process)
        if process.name and process.pid is None and size is not None:
            sizes[process.name] += size
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:at_most])


def server_sizes_on(gpu: GpuSeen, gpus: Sequence[GpuSeen], pid: int | None, load: ServerLoad) -> ServerSizes:
    """Return the bytes of weights, KV and compute buffers that a server allocated on one GPU of all.

    From the log, device by device: a device is the GPU whose PCI id the log prints for it ("using device
    CUDA0 (NVIDIA ...) (0000:01:00.0) - 23000 MiB free", llama.cpp src/llama.cpp b11549); where it prints
    none, only the single CUDA (ROCm) device of a machine with a single NVIDIA (AMD) GPU is certain. A kind
    with a buffer whose place is not certain is None as a whole. Buffers in host memory are on no GPU, not
    even on a unified one that maps them (`Vulkan_Host`): there they stay in the rest of the process.

    Without a log, weights and KV can be known: from the model's file and by formula, where every layer was
    told to go to the GPU (`-ngl all` or more than the model has, b11549 counts the output as one), there is
    no draft model, and the process holds memory of this GPU and of no other. Not with `-ngl auto`, the
    default: what the server chose is in its log only. Weights besides only without flags that put tensors
    elsewhere (`-ot`, `-cmoe`, `-sm`), of a model that generates, as only such a one copies a token embedding
    that its output shares, and not on a unified GPU, which may use the file's pages where they are.
    Adapters and projectors (`--lora`, `--mmproj`) are not counted, nor is what a driver rounds up to.
    Compute buffers are in the log only.
    """
    if load.asleep:
        return ServerSizes(0, 0, 0)
    main = load.logged.main if load.logged is not None else None
    if load.logged is None or main is None:
        if not _all_on(gpu, gpus, pid, load):
            return ServerSizes()
        return ServerSizes(weights=_weights_by_file(gpu, load), kv=_kv_by_formula(load))
    contexts = (main, *load.logged.drafts)
    places = _Places(gpu, gpus, contexts)
    # A draft context may share the main one's weights; a cache of no bytes has no buffer.
    weights = [context.model_buffers for context in contexts if context is main or context.model_buffers]
    caches = [cache for context in contexts for cache in context.caches if cache.devices or cache.total_bytes]
    return ServerSizes(
        weights=places.bytes_here(weights),
        kv=places.bytes_here([cache.devices for cache in caches]),
        compute=places.bytes_here([context.compute_buffers for context in contexts]),
    )


@dataclass(frozen=True, slots=True)
class _Whole:
    """used without reserved; neither: bytes that are neither used nor reserved nor free by the readings."""

    used: int
    reserved: int | None
    free: int
    neither: int


def _whole(gpu: GpuSeen) -> _Whole | None:
    total = _pool(gpu, gpu.memory_total_bytes, gpu.gtt_total_bytes)
    used = _pool(gpu, gpu.memory_used_bytes, gpu.gtt_used_bytes)
    free = None if gpu.unified else gpu.memory_free_bytes
    reserved = gpu.memory_reserved_bytes or 0
    if total is None or total < 0 or (used is None and free is None):
        return None
    if used is None:
        used = total - (free or 0) - reserved
    # nvml.h: nvmlMemory_v2_t has used + free + reserved = total; nvmlMemory_t, like amdgpu, counts what
    # is reserved as used.
    contained = free is not None and used + free == total
    used = _within(used, total)
    reserved = _within(reserved, used if contained else total - used)
    if contained:
        used -= reserved
    left = total - used - reserved
    free = left if free is None else _within(free, left)
    return _Whole(used, None if gpu.memory_reserved_bytes is None else reserved, free, left - free)


def _within(size: int, most: int) -> int:
    return min(max(size, 0), most)


def _pool(gpu: GpuSeen, own: int | None, mapped: int | None) -> int | None:
    if not gpu.unified:
        return own
    return None if own is None or mapped is None else own + mapped


@dataclass(frozen=True, slots=True)
class _Held:
    """Bytes by process; named: of those of which the name alone is known. complete: there are no more."""

    by_pid: Mapping[int | None, int | None]
    named: tuple[int | None, ...]
    complete: bool

    def may_hide(self, pid: int | None) -> bool:
        """Whether the process may hold memory that cannot be read."""
        return self.by_pid[pid] is None if pid in self.by_pid else not self.complete


def _held(gpu: GpuSeen) -> _Held:
    by_pid: dict[int | None, int | None] = {}
    named = []
    nameless = False
    for process in gpu.processes or ():
        size = _process_bytes(gpu, process)
        if process.pid is not None:
            # Twice (once for computing, once for drawing) it is told the same figure.
            sizes = [each for each in (by_pid.get(process.pid), size) if each is not None]
            by_pid[process.pid] = max(sizes, default=None)
        elif process.name:
            named.append(size)
        else:
            nameless = True
    complete = gpu.processes is not None and gpu.processes_complete and not nameless
    return _Held(by_pid, tuple(named), complete)


def _process_bytes(gpu: GpuSeen, process: GpuProcess) -> int | None:
    sizes = (process.memory_bytes, process.gtt_bytes if gpu.unified else None)
    known = [size for size in sizes if size is not None and size >= 0]
    return sum(known) if known else None


def _owners(claims: Sequence[ServerClaim]) -> Mapping[int | None, ServerClaim]:
    """The server of each process: of two names for one process the first."""
    owners: dict[int | None, ServerClaim] = {}
    for claim in claims:
        if claim.pid is not None:
            owners.setdefault(claim.pid, claim)
    return owners


def _split(sizes: ServerSizes, given: int, cut: bool) -> Mapping[str, int]:
    known = sizes.known()
    rest = given - sum(known.values())
    if cut or rest < 0 or min(known.values(), default=0) < 0:
        return {"server_unsplit": given}
    return {**known, "server_rest" if len(known) == 3 else "server_unsplit": rest}


class _Places:
    """Which of a log's buffers lie on one GPU."""

    def __init__(self, gpu: GpuSeen, gpus: Sequence[GpuSeen], contexts: Iterable[LoggedContext]) -> None:
        self._gpu = gpu
        self._gpus = gpus
        self._ids: dict[str, str | None] = {}
        self._devices: set[tuple[str, str]] = set()
        for context in contexts:
            self._ids.update(context.devices)
            caches = (cache.devices for cache in context.caches)
            for names in (context.devices, context.model_buffers, context.compute_buffers, *caches):
                found = (_ON_DEVICE.fullmatch(name) for name in names if not _HOST.fullmatch(name))
                self._devices.update((each["kind"], each["device"]) for each in found if each)

    def bytes_here(self, buffers: Sequence[Mapping[str, int]]) -> int | None:
        """Return the sum of the buffers on the GPU; None where one is not told or its place not certain."""
        places = {name: self._is_here(name) for each in buffers for name in each}
        if not buffers or not all(buffers) or None in places.values():
            return None
        return sum(size for each in buffers for name, size in each.items() if places[name])

    def _is_here(self, name: str) -> bool | None:
        if _HOST.fullmatch(name):
            return False
        found = _ON_DEVICE.fullmatch(name)
        if found is None:
            return None
        pci_id = self._ids.get(found["device"])
        if pci_id is not None:
            owners = [gpu.gpu for gpu in self._gpus if gpu.pci_id == pci_id]
            unknown = any(gpu.pci_id is None for gpu in self._gpus)
            return owners == [self._gpu.gpu] if len(owners) == 1 or not (owners or unknown) else None
        vendors = [(gpu.vendor or "").lower() for gpu in self._gpus]
        vendor = _VENDORS.get(found["kind"])
        if vendor is None or not set(vendors) <= set(_VENDORS.values()):
            return None
        if (self._gpu.vendor or "").lower() != vendor:
            return False
        siblings = [device for kind, device in self._devices if kind == found["kind"]]
        return True if vendors.count(vendor) == len(siblings) == 1 else None


def _all_on(gpu: GpuSeen, gpus: Sequence[GpuSeen], pid: int | None, load: ServerLoad) -> bool:
    """Whether every layer was told to go to the GPU, and it is the only one that the process uses."""
    settings = load.settings
    if settings is None or "gpu_layers" in settings.unreadable or not _every_layer(settings, load.model):
        return False
    if settings.draft_model is not None:  # neither its caches nor its weights are counted
        return False
    return pid is not None and [each.gpu for each in gpus if pid in _held(each).by_pid] == [gpu.gpu]


def _weights_by_file(gpu: GpuSeen, load: ServerLoad) -> int | None:
    if load.settings is None or load.model is None or load.memory is None or not load.memory.caches:
        return None
    if gpu.unified or {"draft_model", "tensor_placement"} & set(load.settings.unreadable):
        return None
    return load.model.header.gpu_weights_bytes


def _kv_by_formula(load: ServerLoad) -> int | None:
    settings, memory = load.settings, load.memory
    if settings is None or memory is None or not memory.caches or settings.kv_on_gpu is False:
        return None
    return None if "kv_on_gpu" in settings.unreadable else memory.allocated_bytes


def _every_layer(settings: ContextSettings, model: ModelSeen | None) -> bool:
    if settings.gpu_layers == "all":
        return True
    if settings.gpu_layers is None or not settings.gpu_layers.isdecimal() or model is None:
        return False
    layers = model.header.metadata.get(f"{model.header.architecture}.block_count")
    return isinstance(layers, int) and int(settings.gpu_layers) > layers
