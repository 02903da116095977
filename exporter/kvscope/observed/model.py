"""What a model's file says of its shape, and what llama-server was told about its context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MetadataValue = bool | int | float | str | tuple[bool | int | float, ...]


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """The header of a GGUF model, or a shape that was taken from one.

    metadata: keys as they stand in the file (`llama.block_count`), without arrays of text and without
    arrays too long to be of use here (the vocabulary). file_bytes: size on disk of all parts; None where
    a part is missing or only a shape is known. nextn_tensors: whether the weights of the layers that
    predict further tokens are in the file; None where nobody looked. gpu_weights_bytes: of the weights that
    lie on the GPU where every layer was put on one, of a model that generates; None where that is not
    certain.
    """

    architecture: str
    metadata: Mapping[str, MetadataValue]
    file_bytes: int | None = None
    nextn_tensors: bool | None = None
    gpu_weights_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """The shape of the model that a server loaded. given: a setting named its file or its shape."""

    header: ModelHeader
    given: bool = False


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """What a command line and its environment say of a server's context; None: nothing is said.

    Names and meanings are those of llama.cpp's common/arg.cpp: context_tokens `-c` (0: the model's own),
    slots `-np` (below 1: the server decides), unified `-kvu`/`-no-kvu`, cache_type_k/_v `-ctk`/`-ctv` in
    lower case, swa_full `--swa-full`, flash_attention `-fa` ("on", "off" or "auto"), batch_tokens `-b`,
    micro_batch_tokens `-ub` (0: as many as batch_tokens), fit `-fit`, draft_kinds `--spec-type` (without
    "none"), draft_tokens_max `--spec-draft-n-max`, draft_cache_type_k/_v `-ctkd`/`-ctvd`, draft_model
    `-md`, gpu_layers `-ngl` ("auto", "all" or a number), tensor_placement (never said, only unreadable: flags
    put some of the weights elsewhere), kv_on_gpu `-kvo`/`-nkvo`, model_path `-m`,
    sleep_idle_seconds `--sleep-idle-seconds` (below 0: never), unified_slot_tokens
    `--kv-unified-per-slot` (above 0 and without `-c`: the context has so many for each slot). notes: one
    line for each thing that was left out and may change the figures (a preset file). unreadable: names of
    the fields above that are None although something is said of them that cannot be told: no default may
    stand in for them.
    """

    context_tokens: int | None = None
    slots: int | None = None
    unified: bool | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    swa_full: bool | None = None
    flash_attention: str | None = None
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    fit: bool | None = None
    draft_kinds: tuple[str, ...] | None = None
    draft_tokens_max: int | None = None
    draft_cache_type_k: str | None = None
    draft_cache_type_v: str | None = None
    draft_model: str | None = None
    gpu_layers: str | None = None
    tensor_placement: None = None
    kv_on_gpu: bool | None = None
    model_path: str | None = None
    sleep_idle_seconds: float | None = None
    unified_slot_tokens: int | None = None
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
