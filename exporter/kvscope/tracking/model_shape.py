"""What of a model's header decides over its memory: checked numbers, one for each layer where they vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvscope.observed.model import ModelHeader

MOST_LAYERS = 512
"""LLAMA_MAX_LAYERS of src/llama-hparams.h, b11549."""
LARGEST_VALUE = 2**32 - 1
"""Header values are unsigned 32-bit numbers to llama.cpp; larger ones do not load."""


class ShapeError(ValueError):
    """A model whose memory cannot be told: an architecture that is not known, a key that is missing."""


class Keys:
    """The header's keys of one architecture (`block_count` for `llama.block_count`), read with checks.

    Every method raises ShapeError that names the key: where it is needed and missing, where it holds no
    whole number from 0 to 2^32 - 1, where a list has not one entry a layer.
    """

    def __init__(self, header: ModelHeader) -> None:
        self.architecture = header.architecture
        self.nextn_tensors = header.nextn_tensors
        self._metadata: Mapping[str, object] = header.metadata

    def full_name(self, name: str) -> str:
        """Return the key as it stands in the file."""
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        """Return whether the key stands in the header."""
        return self.full_name(name) in self._metadata

    def is_list(self, name: str) -> bool:
        """Return whether the key holds one value a layer."""
        return isinstance(self._metadata.get(self.full_name(name)), (tuple, list))

    def number(self, name: str, default: int | None = None, least: int = 0) -> int:
        """Return one number; default where the key is missing, None: it is needed."""
        if not self.has(name):
            if default is None:
                raise ShapeError(f"{self.full_name(name)} is missing from the header")
            return default
        value = self._whole(name, self._metadata[self.full_name(name)])
        if value < least:
            raise ShapeError(f"{self.full_name(name)} is {value}, below {least}")
        return value

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return a list of numbers of any length up to the most layers there can be."""
        values = self._metadata[self.full_name(name)]
        if not isinstance(values, (tuple, list)):
            values = (values,)
        if len(values) > MOST_LAYERS:
            raise ShapeError(f"{self.full_name(name)} has {len(values)} entries, more than {MOST_LAYERS}")
        return tuple(self._whole(name, value) for value in values)

    def per_layer(self, name: str, layers: int, default: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return one number a layer: a list as it is, one number for all; default where the key is missing.

        From llama_model_loader::get_key_or_arr (src/llama-model-loader.cpp, b11434).
        """
        if not self.has(name):
            if default is None:
                raise ShapeError(f"{self.full_name(name)} is missing from the header")
            return tuple(default)
        values = self.numbers(name)
        if not self.is_list(name):
            return values * layers
        if len(values) != layers:
            raise ShapeError(f"{self.full_name(name)} has {len(values)} entries for {layers} layers")
        return values

    def listed(self, name: str, layers: int) -> tuple[int, ...]:
        """Return a list cut or filled with 0 to one entry a layer; one number for all layers.

        From llama_model_loader::get_arr (src/llama-model-loader.cpp, b11549): lists of any length.
        """
        if not self.is_list(name):
            return self.per_layer(name, layers)
        values = self.numbers(name)[:layers]
        return values + (0,) * (layers - len(values))

    def _whole(self, name: str, value: object) -> int:
        number = value
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if not isinstance(number, int) or not 0 <= number <= LARGEST_VALUE:
            raise ShapeError(
                f"{self.full_name(name)} is {str(value)[:40]!r}, not a number from 0 to 2^32 - 1"
            )
        return int(number)


@dataclass(frozen=True, slots=True)
class Recurrent:
    """What recurrent layers keep of one sequence, in 32-bit elements a layer (llama_memory_recurrent).

    convolution: R, also the token shift. state: S. history: P, of history_layers alone.
    """

    layers: tuple[int, ...]
    convolution: int
    state: int
    history: int = 0
    history_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Numbers of one model. Lists have an entry for each layer, those that predict further tokens included.

    trunk_layers: those of the model itself; the layers from there on predict further tokens (MTP).
    window_tokens: None where the model has no window; chunked: it begins anew every so many tokens. latent:
    keys alone are cached (MLA). image_positions: a saved cell carries the positions of M-RoPE.
    attention_layers: those that keep keys and values in the main context.
    """

    keys: Keys
    context_length: int
    trunk_layers: int
    layers: int
    kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    key_length_window: int
    value_length_window: int
    window_tokens: int | None
    chunked: bool
    window_layers: tuple[bool, ...]
    latent: bool
    image_positions: bool
    attention_layers: tuple[int, ...]
    recurrent: Recurrent | None

    @property
    def further(self) -> tuple[int, ...]:
        """Layers that predict further tokens (MTP)."""
        return tuple(range(self.trunk_layers, self.layers))

    def k_width(self, layer: int) -> int:
        """Return the elements of one token's keys in a layer (llama_hparams::n_embd_k_gqa, b11434)."""
        return self.kv_heads[layer] * (
            self.key_length_window if self.window_layers[layer] else self.key_length
        )

    def v_width(self, layer: int) -> int:
        """Return the elements of one token's values in a layer (llama_hparams::n_embd_v_gqa, b11434)."""
        length = self.value_length_window if self.window_layers[layer] else self.value_length
        return self.kv_heads[layer] * length
