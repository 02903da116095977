"""Will it fit: what a model's context costs, and the largest context for the memory there is. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvscope.observed.model import ContextSettings, ModelHeader
from kvscope.planned import (
    ContextFit,
    LeftOut,
    Plan,
    PlannedCache,
    PlannedContext,
    PlannedModel,
    PlannedSettings,
)
from kvscope.tracking.architectures import architecture, model_shape
from kvscope.tracking.context import SLOTS_WHEN_UNSAID, context_parameters, draft_parameters, unified
from kvscope.tracking.kv_memory import MOST_SEQUENCES, ContextParameters, KvMemory, ShapeError, kv_memory
from kvscope.tracking.memory_kinds import ROW_TYPES

CELLS_STEP = 256
"""llama.cpp rounds each slot's context up to so many cells (llama_context::llama_context)."""

USUAL_CONTEXTS = (8192, 32768, 131072)
"""What is shown when no context is asked for, besides the model's own."""

FIT_SLOTS = (1, 2, 4)
FIT_CACHE_TYPES = ("f16", "q8_0", "q4_0")
_DRAFT = "draft"
_GIB = 1 << 30

LEFT_OUT = (
    LeftOut(
        "compute_buffers",
        _GIB // 4,
        2 * _GIB,
        "they grow with -ub and the context, and with -fa off to far more",
    ),
    LeftOut("mmproj", 3 * _GIB // 20, 3 * _GIB // 2, "the file for images or sound, where one is loaded"),
    LeftOut("others", _GIB // 4, _GIB, "the GPU's driver, a desktop"),
)
"""What no figure here contains; docs/PLAN.md says where the sizes come from."""

_DRAFT_LEFT_OUT = LeftOut(
    "draft_context",
    _GIB // 20,
    2 * _GIB,
    "where used; --spec-type draft-mtp counts that of the model's own layers (MTP)",
)


class RefusedError(ValueError):
    """Settings with which llama-server does not start; the message says which and what helps."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for. settings: without a context; context_tokens: each size asked for, 0 the model's own.

    weights_bytes goes before the size of the header's file.
    """

    header: ModelHeader
    name: str
    origin: str
    settings: ContextSettings
    context_tokens: Sequence[int] = ()
    weights_bytes: int | None = None
    vram_bytes: int | None = None
    vram_found: bool = False
    reserve_bytes: int = 0
    list_date: str | None = None


@dataclass(frozen=True, slots=True)
class _Memory:
    """The main context and the draft context beside it."""

    main: KvMemory
    draft: KvMemory | None

    @property
    def allocated_bytes(self) -> int:
        return self.main.allocated_bytes + (self.draft.allocated_bytes if self.draft else 0)


def plan(question: Question) -> Plan:
    """Return what is needed and what fits.

    Raises ShapeError for a model whose memory cannot be told, RefusedError for settings with which
    llama-server does not start.
    """
    header, settings = question.header, question.settings
    shared = bool(unified(settings))
    slots = _slots(settings)
    own_context = _context_length(header)
    weights = header.file_bytes if question.weights_bytes is None else question.weights_bytes
    asked = [
        tokens or _whole_context(header, slots, shared)
        for tokens in question.context_tokens or _usual_contexts(own_context)
    ]
    parameters = context_parameters(settings, asked[0], slots)
    _refuse_impossible(header, parameters)
    free = None if question.vram_bytes is None else question.vram_bytes - question.reserve_bytes
    contexts = tuple(
        _planned(
            _memory(header, replace(parameters, context_tokens=tokens), settings),
            parameters,
            weights,
            free,
            own_context,
        )
        for tokens in dict.fromkeys(asked)
    )
    memory_class = _memory(header, parameters, settings).main.memory_class
    fits: tuple[ContextFit, ...] = ()
    if free is not None:
        fits = tuple(_fits(header, parameters, settings, free - (weights or 0)))
    return Plan(
        model=PlannedModel(
            name=question.name,
            architecture=header.architecture,
            origin=question.origin,
            memory_class=memory_class,
            context_length=own_context,
            weights_bytes=weights,
            list_date=question.list_date,
        ),
        settings=PlannedSettings(
            slots=slots,
            unified=shared,
            cache_type_k=parameters.cache_type_k,
            cache_type_v=parameters.cache_type_v,
            swa_full=parameters.swa_full,
            flash_attention=parameters.flash_attention,
            batch_tokens=parameters.batch_tokens,
            micro_batch_tokens=parameters.micro_batch_tokens,
        ),
        contexts=contexts,
        left_out=LEFT_OUT if draft_parameters(parameters, settings) else (*LEFT_OUT, _DRAFT_LEFT_OUT),
        notes=tuple(_notes(question, asked, contexts, slots, shared, weights, own_context)),
        fits=fits,
        vram_bytes=question.vram_bytes,
        reserve_bytes=None if question.vram_bytes is None else question.reserve_bytes,
    )


def largest_context(
    header: ModelHeader,
    parameters: ContextParameters,
    settings: ContextSettings,
    most_bytes: int,
    context_length: int,
) -> int:
    """Return the most tokens a slot, in steps of 256, whose caches take at most so many bytes; 0: none fit.

    parameters' own context_tokens does not matter. Ends at context_length; what llama.cpp allocates
    never shrinks as the context grows, which the search rests on.
    """
    steps = -(-context_length // CELLS_STEP)

    def needed(step: int) -> int:
        tokens = min(step * CELLS_STEP, context_length)
        return _memory(header, _sized(parameters, tokens), settings).allocated_bytes

    fitting = bisect_right(range(1, steps + 1), most_bytes, key=needed)
    return min(fitting * CELLS_STEP, context_length)


def _fits(
    header: ModelHeader, parameters: ContextParameters, settings: ContextSettings, most_bytes: int
) -> Iterator[ContextFit]:
    context_length = _context_length(header)
    if context_length is None:
        return
    types = [(each, each) for each in FIT_CACHE_TYPES]
    if (own := (parameters.cache_type_k, parameters.cache_type_v)) not in types:
        types.append(own)
    ways = [(slots, False) for slots in sorted({*FIT_SLOTS, parameters.sequences})]
    if parameters.unified and parameters.sequences > 1:
        ways = [(slots, False) for slots in FIT_SLOTS] + [(parameters.sequences, True)]
    for type_k, type_v in types:
        for slots, shared in ways:
            asked = replace(
                parameters, sequences=slots, unified=shared, cache_type_k=type_k, cache_type_v=type_v
            )
            try:
                yield _fit(header, asked, settings, most_bytes, context_length)
            except (RefusedError, ShapeError) as problem:
                yield ContextFit(type_k, type_v, slots, shared, "refused", problem=str(problem))


def _fit(
    header: ModelHeader,
    parameters: ContextParameters,
    settings: ContextSettings,
    most_bytes: int,
    context_length: int,
) -> ContextFit:
    _refuse_impossible(header, parameters)
    tokens = largest_context(header, parameters, settings, most_bytes, context_length)
    sized = _sized(parameters, tokens)
    return ContextFit(
        parameters.cache_type_k,
        parameters.cache_type_v,
        parameters.sequences,
        parameters.unified,
        ended_by="model" if tokens == context_length else "memory",
        slot_context_tokens=tokens,
        context_tokens=sized.context_tokens,
        kv_bytes=_memory(header, sized, settings).allocated_bytes if tokens else None,
    )


def _sized(parameters: ContextParameters, slot_tokens: int) -> ContextParameters:
    slots = 1 if parameters.unified else parameters.sequences
    return replace(parameters, context_tokens=slot_tokens * slots)


def _memory(header: ModelHeader, parameters: ContextParameters, settings: ContextSettings) -> _Memory:
    draft = draft_parameters(parameters, settings)
    return _Memory(kv_memory(header, parameters), kv_memory(header, draft) if draft else None)


def _planned(
    memory: _Memory,
    parameters: ContextParameters,
    weights: int | None,
    free: int | None,
    own_context: int | None,
) -> PlannedContext:
    caches = tuple(_caches(memory))
    by_kind = Counter[str]()
    for cache in caches:
        if cache.layers:
            by_kind[cache.kind] += cache.total_bytes
    total = by_kind.total()
    slots = parameters.sequences
    separate = not parameters.unified or slots == 1
    needed = None if weights is None else weights + total
    main = memory.main
    slot_tokens = min(main.sequence_context_tokens, own_context or main.sequence_context_tokens)
    return PlannedContext(
        context_tokens=main.context_tokens,
        slot_context_tokens=slot_tokens,
        caches=caches,
        bytes_by_kind=dict(by_kind),
        kv_bytes=total,
        full_slot_bytes=main.sequence_bytes(slot_tokens),
        # Every cache of separate slots is as many equal streams, or rows of state, as there are slots.
        slot_bytes_by_kind={kind: size // slots for kind, size in by_kind.items()} if separate else None,
        slot_kv_bytes=total // slots if separate else None,
        needed_bytes=needed,
        left_bytes=None if free is None else free - (total if needed is None else needed),
    )


def _caches(memory: _Memory) -> Iterator[PlannedCache]:
    for context in (memory.main, memory.draft):
        for cache in context.caches if context else ():
            yield PlannedCache(
                name=cache.name,
                kind=_DRAFT if context is memory.draft else cache.kind.value,
                cells=cache.cells,
                streams=cache.streams,
                layers=len(cache.layers),
                k_bytes=cache.k_bytes,
                v_bytes=cache.v_bytes,
                state_bytes=cache.state_bytes,
                total_bytes=cache.total_bytes,
            )


def _slots(settings: ContextSettings) -> int:
    if settings.slots is None or settings.slots < 0:
        return SLOTS_WHEN_UNSAID
    if not 1 <= settings.slots <= MOST_SEQUENCES:
        raise RefusedError(f"-np {settings.slots}: llama-server takes 1 to {MOST_SEQUENCES} slots")
    return settings.slots


def _context_length(header: ModelHeader) -> int | None:
    own = header.metadata.get(f"{header.architecture}.context_length")
    return own if isinstance(own, int) and own > 0 else None


def _whole_context(header: ModelHeader, slots: int, shared: bool) -> int:
    """Return what llama-server makes of no -c: the model's own length for each slot, or for the pool."""
    own = _context_length(header)
    if own is None:
        key = f"{header.architecture}.context_length"
        raise ShapeError(f"{key} is missing, so the model's own context is not known: give -c")
    return own * (1 if shared else slots)


def _usual_contexts(own: int | None) -> Sequence[int]:
    return (*(tokens for tokens in USUAL_CONTEXTS if own is None or tokens < own), *([0] if own else []))


def _refuse_impossible(header: ModelHeader, parameters: ContextParameters) -> None:
    """Raise RefusedError for what llama_init_from_model refuses (src/llama-context.cpp, b11549)."""
    type_k, type_v = parameters.cache_type_k, parameters.cache_type_v
    if ROW_TYPES[type_v][0] > 1 and not parameters.flash_attention:
        raise RefusedError(
            f"-ctv {type_v} with -fa off is refused by llama.cpp: a quantized V cache needs flash attention, "
            "leave out -fa or keep V at f16"
        )
    shape = model_shape(header, architecture(header.architecture))
    for name, cache_type, plain, window in (
        ("-ctk", type_k, shape.key_length, shape.key_length_window),
        ("-ctv", type_v, shape.value_length, shape.value_length_window),
    ):
        block = ROW_TYPES[cache_type][0]
        heads = {window if in_window else plain for in_window in shape.window_layers[: shape.trunk_layers]}
        for length in sorted(heads):
            if length % block:
                raise RefusedError(
                    f"{name} {cache_type} is refused by llama.cpp: its blocks of {block} do not divide this "
                    f"model's heads of {length}, keep them at f16"
                )


def _notes(
    question: Question,
    asked: Sequence[int],
    contexts: Sequence[PlannedContext],
    slots: int,
    shared: bool,
    weights: int | None,
    own_context: int | None,
) -> Iterator[str]:
    settings = question.settings
    if settings.slots is None or settings.slots < 0:
        yield (
            "Without -np llama-server runs four slots on one unified pool: each may hold up to the whole "
            "context, together no more. -np N gives N separate slots."
        )
        if settings.unified is False:
            yield "-no-kvu changes nothing without -np: the pool is unified all the same."
    elif shared and slots > 1:
        yield (
            f"-kvu: {slots} slots share one pool; each may hold up to the whole context, together no more."
        )
    if question.vram_found and question.vram_bytes is not None:
        yield "--vram is not given: the memory is that of the largest GPU of this machine, all of it."
    if weights is None:
        yield (
            "KV only: the size of the weights is not known, and no figure contains them. Add them with "
            "--weights 13.26GiB or so."
        )
    for context in contexts:
        if context.left_bytes is not None and context.left_bytes < 0:
            missing = -context.left_bytes / 2**20
            yield f"-c {context.context_tokens} does not fit: {missing:.2f} MiB are missing."
    for tokens, context in zip(dict.fromkeys(asked), contexts, strict=True):
        if tokens != context.context_tokens:
            yield (
                f"-c {tokens} becomes {context.context_tokens}: llama.cpp rounds each slot up to "
                f"{CELLS_STEP} cells."
            )
        if own_context and context.context_tokens > own_context * (1 if shared else slots):
            yield (
                f"-c {context.context_tokens} is allocated, but llama-server lets no slot grow past the "
                f"model's own {own_context} tokens."
            )
    if not question.context_tokens and own_context:
        yield (f"Without -c llama-server takes {asked[-1]} tokens, or fewer where they do not fit (-fit).")
    yield from settings.notes
