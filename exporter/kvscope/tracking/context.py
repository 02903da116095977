"""What a server's KV memory rests on: which source says what of its context, and what follows from it.

The order is the user's settings, the log, the process' command line and environment, and llama.cpp's
defaults only for what one of these was read and left unsaid. Nothing here is guessed: where the sources
do not tell, or contradict the running server, there are no figures but one line that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvscope.observed.logged_memory import LoggedCache, LoggedMemory
from kvscope.observed.model import ContextSettings, ModelHeader, ModelSeen
from kvscope.observed.server import ServerProps
from kvscope.tracking.kv_memory import ContextParameters, KvMemory, ShapeError, kv_memory

SLOTS_WHEN_UNSAID = 4
DRAFT_TOKENS_WHEN_UNSAID = 3
LARGEST_DISAGREEMENT = 0.01
"""Rounding and padding of the log stay below it; what is above it is another model or other settings."""

_ROLL_BACK = frozenset({"draft-mtp", "draft-eagle3", "draft-dflash", "draft-dspark"})
_OWN_LAYERS_DRAFT = "draft-mtp"

_LEFT_OUT = "its KV bytes are left out"
_NAME_MODEL = "name the file with --model-file, its folder with --model-path-map or its shape with --kv-shape"
_NAME_ARGUMENTS = (
    "give its arguments with --server-args, or run kvscope where it can read the server's process"
)
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "context": ("context_tokens",),
    "slots": ("slots",),
    "unified": ("unified",),
    "cache_type": ("cache_type_k", "cache_type_v"),
    "swa_full": ("swa_full",),
    "flash_attention": ("flash_attention",),
    "batch": ("batch_tokens", "micro_batch_tokens"),
}
"""The label `setting` of `kvscope_kv_source_info`, and the fields that it stands for."""


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """The KV memory of one server, or why it is not known.

    caches: bytes by (device, kind of cache), those of a draft context with the model's own layers among
    them; the device is None where only the formula tells, the kind where only the log does and not which.
    sources: by setting, what it comes from (setting, log, process, props, default). limit_tokens: cells
    of the pool or pools. disagreement: how far the formula is from the log, by the log's size. remarks:
    one line for each thing that the figures do not contain, warnings: for each that contradicts another.
    problem: one line when there are no figures.
    """

    main: KvMemory | None = None
    caches: Mapping[tuple[str | None, str | None], int] = field(default_factory=dict)
    bytes_per_token: float | None = None
    limit_tokens: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    disagreement: float | None = None
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def known(self) -> bool:
        """Whether anything is known of it."""
        return bool(self.sources)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all caches together."""
        return sum(self.caches.values())

    def sequence_bytes(self, tokens: int) -> int | None:
        """Return the bytes that a sequence of tokens occupies; None where only the allocation is known."""
        if self.main is not None:
            return self.main.sequence_bytes(tokens)
        # One plain cache in the log: every token takes one cell.
        return None if self.bytes_per_token is None else round(self.bytes_per_token * tokens)


class _Contradicted(Exception):
    """The running server shows other settings than those that were read, in one line."""


class _NotTold(Exception):
    """What stands in the way, in one line."""


def unified(settings: ContextSettings) -> bool | None:
    """Return whether all slots share one pool, as llama-server decides it; None: it cannot be told.

    llama.cpp tools/server/server.cpp (b11549): without `-np`, or with one below 0, there are four slots
    and the cache is unified, whatever `-no-kvu` says; with `-np`, only when `-kvu` is given.
    """
    if settings.unified:
        return True
    if "slots" in settings.unreadable:
        return None
    if settings.slots is None or settings.slots < 0:
        return True
    return None if "unified" in settings.unreadable else False


def slots_contradict(settings: ContextSettings, props: ServerProps | None) -> bool:
    """Return whether the server has another number of slots than the settings mean."""
    if props is None or props.total_slots is None or "slots" in settings.unreadable:
        return False
    return _slots(settings, props)[0] != props.total_slots


def context_parameters(settings: ContextSettings, context_tokens: int, slots: int) -> ContextParameters:
    """Return what llama-server asks llama_init_from_model for, with the size and slots that it decided on."""
    rollback = 0
    if _ROLL_BACK & set(settings.draft_kinds or ()):
        rollback = (
            DRAFT_TOKENS_WHEN_UNSAID if settings.draft_tokens_max is None else settings.draft_tokens_max
        )
    defaults = ContextParameters()
    return ContextParameters(
        context_tokens=context_tokens,
        sequences=slots,
        unified=bool(unified(settings)),
        batch_tokens=defaults.batch_tokens if settings.batch_tokens is None else settings.batch_tokens,
        micro_batch_tokens=(
            defaults.micro_batch_tokens
            if settings.micro_batch_tokens is None
            else settings.micro_batch_tokens
        ),
        cache_type_k=settings.cache_type_k or defaults.cache_type_k,
        cache_type_v=settings.cache_type_v or defaults.cache_type_v,
        swa_full=bool(settings.swa_full),
        flash_attention=settings.flash_attention != "off",
        rollback_snapshots=rollback,
    )


def draft_parameters(parameters: ContextParameters, settings: ContextSettings) -> ContextParameters | None:
    """Return the context beside the main one that predicts with the model's own last layers, if any."""
    if _OWN_LAYERS_DRAFT not in (settings.draft_kinds or ()) or settings.draft_model is not None:
        return None
    defaults = ContextParameters()
    return replace(
        parameters,
        cache_type_k=settings.draft_cache_type_k or defaults.cache_type_k,
        cache_type_v=settings.draft_cache_type_v or defaults.cache_type_v,
        rollback_snapshots=0,
        draft=True,
    )


def joined(*told: tuple[str, ContextSettings | None]) -> tuple[ContextSettings, Mapping[str, str]]:
    """Return one set of settings out of several, the first that says a thing before the others.

    Besides, for each setting of `kvscope_kv_source_info`, the name of the source that said it.
    """
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    unreadable: set[str] = set()
    for name, settings in told:
        if settings is None:
            continue
        unreadable |= {each for each in settings.unreadable if each not in values}
        for each in ContextSettings.__dataclass_fields__:
            value = getattr(settings, each)
            if value not in (None, ()) and each not in values and each not in unreadable:
                values[each] = value
                sources[each] = name
    values["unreadable"] = tuple(sorted(unreadable))
    grouped = {
        group: next((sources[each] for each in fields if each in sources), "default")
        for group, fields in _GROUPS.items()
    }
    return ContextSettings(**values), grouped  # type: ignore[arg-type]


def server_memory(
    model: ModelSeen | None,
    given: ContextSettings | None,
    process: ContextSettings | None,
    props: ServerProps | None,
    logged: LoggedMemory | None = None,
) -> ServerMemory:
    """Return the KV memory that follows from a model's shape and what is told of its context.

    given: the user's settings; process: what its command line and environment say, None where they
    cannot be read; logged: what the server's log says that was allocated.
    """
    log = logged if logged is not None and logged.main is not None else None
    if log is None and (model is None or (given is None and process is None)):
        return ServerMemory(problem=_what_is_missing(model, given, process))
    user, server = ("setting", given), ("process", process)
    if log is None:
        return _by_formula(model, props, user, server)
    from_log = ("log", _settings_in(log))
    expected = _by_formula(model, props, user, from_log, server)
    difference = _difference(expected, log)
    if difference is not None and difference <= LARGEST_DISAGREEMENT:
        return replace(expected, caches=_on_devices(expected, log), disagreement=difference)
    # The log wins: its settings first, and where even these do not explain it, its sizes alone.
    by_log = _by_formula(model, props, from_log, user, server)
    warnings: tuple[str, ...] = ()
    if difference is not None:
        size = _bytes_in(_counted(expected, log))
        warnings = (
            f"its log says that {size} bytes of KV cache were allocated, by its model and settings it would "
            f"be {expected.allocated_bytes}: the log's figures are used",
        )
    by_log_difference = _difference(by_log, log)
    if by_log_difference is not None and by_log_difference <= LARGEST_DISAGREEMENT:
        return replace(by_log, caches=_on_devices(by_log, log), disagreement=difference, warnings=warnings)
    return replace(_by_log_alone(log), disagreement=difference, warnings=warnings)


def _by_formula(
    model: ModelSeen | None, props: ServerProps | None, *told: tuple[str, ContextSettings | None]
) -> ServerMemory:
    if model is None:
        return ServerMemory()
    settings, sources = joined(*told)
    sources = {**sources, "shape": "setting" if model.given else "props"}
    try:
        parameters = _parameters(settings, props, sources)
        main = kv_memory(model.header, parameters)
        _refuse_contradiction(main, parameters, props, _most_of_a_slot(main, model.header, settings))
        draft = _draft(model.header, parameters, settings)
    except _Contradicted as problem:
        words = f"{_LEFT_OUT}: {problem}"
        return ServerMemory(warnings=(words,), problem=words)
    except (_NotTold, ShapeError) as problem:
        return ServerMemory(problem=f"{_LEFT_OUT}: {problem}")
    caches: dict[tuple[str | None, str | None], int] = {}
    for memory in (main, draft):
        for kind, size in memory.allocated_by_kind().items() if memory else ():
            caches[None, kind.value] = caches.get((None, kind.value), 0) + size
    return ServerMemory(
        main,
        caches,
        main.bytes_per_token,
        main.context_tokens if main.caches else None,
        sources,
        remarks=_remarks(settings),
    )


def _settings_in(log: LoggedMemory) -> ContextSettings:
    main = log.main
    assert main is not None
    types = next((cache.types for cache in main.caches if {"K", "V"} & set(cache.types)), {})
    flash = main.flash_attention
    return ContextSettings(
        context_tokens=main.context_tokens,
        slots=main.sequences,
        unified=main.unified,
        cache_type_k=types.get("K"),
        cache_type_v=types.get("V"),
        flash_attention=None if flash is None else "on" if flash else "off",
        batch_tokens=main.batch_tokens,
        micro_batch_tokens=main.micro_batch_tokens,
    )


def _bytes_in(log: LoggedMemory) -> int:
    return sum(context.cache_bytes for context in (log.main, *log.drafts) if context is not None)


def _difference(expected: ServerMemory, log: LoggedMemory) -> float | None:
    """How far the formula is from the log, by the log's size; None where there is no formula."""
    if not expected.known:
        return None
    size = _bytes_in(_counted(expected, log))
    if not size:
        return None if expected.allocated_bytes else 0.0
    return abs(size - expected.allocated_bytes) / size


def _counted(expected: ServerMemory, log: LoggedMemory) -> LoggedMemory:
    """The log's contexts that the formula counts too: of a draft model of its own it knows nothing."""
    main = expected.main
    drafts_too = main is not None and expected.allocated_bytes > main.allocated_bytes
    return log if drafts_too else replace(log, drafts=())


def _on_devices(expected: ServerMemory, log: LoggedMemory) -> Mapping[tuple[str | None, str | None], int]:
    """The formula's exact sizes with the log's devices; the log's rounded ones where it names several."""
    by_log = _caches_in(_counted(expected, log))
    caches: dict[tuple[str | None, str | None], int] = {}
    for (_, kind), size in expected.caches.items():
        there = {key: part for key, part in by_log.items() if key[1] == kind}
        if len(there) > 1:
            caches.update(there)
        else:
            caches[next(iter(there), (None, kind))] = size
    return caches


def _caches_in(log: LoggedMemory) -> Mapping[tuple[str | None, str | None], int]:
    caches: dict[tuple[str | None, str | None], int] = {}
    for context in (log.main, *log.drafts):
        for cache in context.caches if context else ():
            for device, size in cache.devices.items() or ((None, cache.total_bytes),):
                caches[device, cache.kind] = caches.get((device, cache.kind), 0) + size
    return caches


def _by_log_alone(log: LoggedMemory) -> ServerMemory:
    main = log.main
    assert main is not None
    per_token: float | None = None
    match main.caches:
        case (LoggedCache(kind="full", cells=cells, streams=streams, total_bytes=size),) if cells and streams:
            per_token = size / (cells * streams)
    return ServerMemory(
        caches=_caches_in(log),
        bytes_per_token=per_token,
        limit_tokens=main.context_tokens,
        sources={**dict.fromkeys(_GROUPS, "log"), "shape": "log"},
    )


def _what_is_missing(
    model: ModelSeen | None, given: ContextSettings | None = None, process: ContextSettings | None = None
) -> str:
    unread = {
        "its model's file": (model is None, _NAME_MODEL),
        "its arguments": (given is None and process is None, _NAME_ARGUMENTS),
    }
    what = " and ".join(name for name, (missing, _) in unread.items() if missing)
    ways = "; ".join(way for missing, way in unread.values() if missing)
    return f"{_LEFT_OUT}, {what} cannot be read here: {ways}"


def _remarks(settings: ContextSettings) -> tuple[str, ...]:
    draft = ("the caches of its draft model are not in its KV bytes",) * (settings.draft_model is not None)
    return (*settings.notes, *draft)


def _parameters(
    settings: ContextSettings, props: ServerProps | None, sources: dict[str, str]
) -> ContextParameters:
    _refuse_unreadable(settings)
    shared = unified(settings)
    slots, by_props = _slots(settings, props)
    if by_props:
        sources["slots"] = "props"
    context = settings.context_tokens or 0
    if context <= 0 and settings.unified_slot_tokens and "context_tokens" not in settings.unreadable:
        context = slots * settings.unified_slot_tokens
        sources["context"] = sources["unified"]
    elif context <= 0:
        # Unsaid, it is the model's own, perhaps reduced by -fit: only the server knows what came of it.
        if props is None or not props.context_limit_tokens:
            raise _NotTold("its context size is not given (-c), and /props does not tell it")
        context = props.context_limit_tokens * (1 if shared else slots)
        sources["context"] = "props"
    return context_parameters(settings, context, slots)


def _slots(settings: ContextSettings, props: ServerProps | None) -> tuple[int, bool]:
    """Return how many slots there are by the settings, and whether /props had to say it."""
    if settings.slots is None and props is not None and props.total_slots == 1:
        # Builds that run one slot when none is asked for: with one, shared and separate are the same.
        return 1, True
    unsaid = settings.slots is None or settings.slots < 0
    return (SLOTS_WHEN_UNSAID if unsaid else settings.slots or 0), False


def _refuse_unreadable(settings: ContextSettings) -> None:
    """Raise where something is said of a setting that cannot be told: no default may stand in for it."""
    needed = [each for fields in _GROUPS.values() for each in fields] + ["draft_kinds", "unified_slot_tokens"]
    if settings.draft_kinds:
        needed.append("draft_tokens_max")
    left_open = [each.replace("_", " ") for each in needed if each in settings.unreadable]
    if left_open:
        raise _NotTold(f"its arguments leave open the {', the '.join(left_open)}: say it with --server-args")


def _refuse_contradiction(
    main: KvMemory, parameters: ContextParameters, props: ServerProps | None, most: int
) -> None:
    """Raise where the running server shows that the settings are not the ones it runs with.

    most: how many tokens a slot would show by the settings. Builds before the cap show all its cells.
    """
    if props is None:
        return
    if props.total_slots not in (None, parameters.sequences):
        raise _Contradicted(
            f"it has {props.total_slots} slots, its arguments as they were read mean {parameters.sequences}: "
            "give the right ones with --server-args"
        )
    limit = props.context_limit_tokens
    if limit and main.memory_class != "none" and not most <= limit <= main.sequence_context_tokens:
        raise _Contradicted(
            f"a slot of it holds {limit} tokens, its arguments as they were read mean {most}: "
            "give the right ones with --server-args"
        )


def _most_of_a_slot(main: KvMemory, header: ModelHeader, settings: ContextSettings) -> int:
    """Return what a slot holds at most by the settings: the server caps it, whatever was allocated."""
    trained = header.metadata.get(f"{header.architecture}.context_length")
    caps = (main.sequence_context_tokens, trained, settings.unified_slot_tokens)
    return min(cap for cap in caps if type(cap) is int and cap > 0)


def _draft(header: ModelHeader, parameters: ContextParameters, settings: ContextSettings) -> KvMemory | None:
    draft = draft_parameters(parameters, settings)
    return None if draft is None else kv_memory(header, draft)
