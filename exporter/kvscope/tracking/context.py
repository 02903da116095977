"""What a server's KV memory rests on: which source says what of its context, and what follows from it.

The order is the user's settings, the log, the process' command line and environment, and llama.cpp's
defaults only for what one of these was read and left unsaid. Nothing here is guessed: where the sources
do not tell, or contradict the running server, there are no figures but one line that says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvscope.observed.model import ContextSettings, ModelHeader, ModelSeen
from kvscope.observed.server import ServerProps
from kvscope.tracking.kv_memory import CacheKind, ContextParameters, KvMemory, ShapeError, kv_memory

SLOTS_WHEN_UNSAID = 4
DRAFT_TOKENS_WHEN_UNSAID = 3

_ROLL_BACK = frozenset({"draft-mtp", "draft-eagle3", "draft-dflash", "draft-dspark"})
_OWN_LAYERS_DRAFT = "draft-mtp"

_SUPPLY = (
    "give its arguments with --server-args NAME='...', or run kvscope where the server's process can be read"
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

    caches: bytes by kind of cache, the draft context's among them. sources: by setting, what it comes
    from (setting, log, process, props, default). problem: one line when there are no figures.
    """

    main: KvMemory | None = None
    caches: Mapping[CacheKind, int] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all caches together."""
        return sum(self.caches.values())


class _NotTold(Exception):
    """What stands in the way, in one line."""


def unified(settings: ContextSettings) -> bool:
    """Return whether all slots share one pool, as llama-server decides it.

    llama.cpp tools/server/server.cpp (b11549): without `-np`, or with one below 0, there are four slots
    and the cache is unified, whatever `-no-kvu` says; with `-np`, only when `-kvu` is given.
    """
    return settings.slots is None or settings.slots < 0 or bool(settings.unified)


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
        unified=unified(settings),
        batch_tokens=settings.batch_tokens or defaults.batch_tokens,
        micro_batch_tokens=settings.micro_batch_tokens or defaults.micro_batch_tokens,
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
    return ContextParameters(
        context_tokens=parameters.context_tokens,
        sequences=parameters.sequences,
        unified=parameters.unified,
        batch_tokens=parameters.batch_tokens,
        micro_batch_tokens=parameters.micro_batch_tokens,
        cache_type_k=settings.draft_cache_type_k or "f16",
        cache_type_v=settings.draft_cache_type_v or "f16",
        swa_full=parameters.swa_full,
        flash_attention=parameters.flash_attention,
        draft=True,
    )


def joined(*told: tuple[str, ContextSettings | None]) -> tuple[ContextSettings, Mapping[str, str]]:
    """Return one set of settings out of several, the first that says a thing before the others.

    Besides, for each setting of `kvscope_kv_source_info`, the name of the source that said it.
    """
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for name, settings in told:
        if settings is None:
            continue
        for each in ContextSettings.__dataclass_fields__:
            value = getattr(settings, each)
            if value not in (None, ()) and each not in values:
                values[each] = value
                sources[each] = name
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
) -> ServerMemory:
    """Return the KV memory that follows from a model's shape and what is told of its context.

    given: the user's settings; process: what its command line and environment say, None where they
    cannot be read.
    """
    if model is None:
        return ServerMemory()
    if given is None and process is None:
        return ServerMemory(problem=f"its KV bytes are left out: its arguments are not known; {_SUPPLY}")
    settings, sources = joined(("setting", given), ("process", process))
    shared = {**sources, "shape": "setting" if model.given else "props"}
    try:
        parameters = _parameters(settings, props, shared)
        main = kv_memory(model.header, parameters)
        _refuse_contradiction(main, parameters, props)
        draft = _draft(model.header, parameters, settings)
    except (_NotTold, ShapeError) as problem:
        return ServerMemory(problem=f"its KV bytes are left out: {problem}")
    caches = dict(main.allocated_by_kind())
    if draft is not None:
        for kind, size in draft.allocated_by_kind().items():
            caches[kind] = caches.get(kind, 0) + size
    return ServerMemory(main, caches, shared)


def remarks(settings: ContextSettings) -> Iterator[str]:
    """Yield one line for each thing that the figures do not contain, or that was left out of them."""
    yield from settings.notes
    if settings.draft_model is not None:
        yield "the caches of its draft model are not in its KV bytes"


def _parameters(
    settings: ContextSettings, props: ServerProps | None, sources: dict[str, str]
) -> ContextParameters:
    shared = unified(settings)
    slots = SLOTS_WHEN_UNSAID if settings.slots is None or settings.slots < 0 else settings.slots
    if settings.slots is None and props is not None and props.total_slots == 1:
        # Builds that run one slot when none is asked for: with one, shared and separate are the same.
        slots, sources["slots"] = 1, "props"
    context = settings.context_tokens or 0
    if context <= 0:
        # Unsaid, it is the model's own, perhaps reduced by -fit: only the server knows what came of it.
        if props is None or not props.context_limit_tokens:
            raise _NotTold("its context size is not given (-c), and /props does not tell it")
        context = props.context_limit_tokens * (1 if shared else slots)
        sources["context"] = "props"
    return context_parameters(settings, context, slots)


def _refuse_contradiction(main: KvMemory, parameters: ContextParameters, props: ServerProps | None) -> None:
    """Raise where the running server shows that the settings are not the ones it runs with."""
    if props is None:
        return
    if props.total_slots is not None and props.total_slots != parameters.sequences:
        raise _NotTold(
            f"it has {props.total_slots} slots and not the {parameters.sequences} of the settings read; "
            f"{_SUPPLY}"
        )
    limit = props.context_limit_tokens
    if limit is not None and main.memory_class != "none" and limit > main.sequence_context_tokens:
        raise _NotTold(
            f"its slots hold {limit} tokens and not the {main.sequence_context_tokens} of the settings read; "
            f"{_SUPPLY}"
        )


def _draft(header: ModelHeader, parameters: ContextParameters, settings: ContextSettings) -> KvMemory | None:
    draft = draft_parameters(parameters, settings)
    return None if draft is None else kv_memory(header, draft)
