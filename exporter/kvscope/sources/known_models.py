"""The built-in list of well-known models' shapes: sizes a card before a model is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from kvscope.observed.model import MetadataValue, ModelHeader

_LIST = "known_models.json"
_ARCHITECTURE = "general.architecture"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One model of the list; its header is without the size of any file."""

    id: str
    name: str
    header: ModelHeader


@dataclass(frozen=True, slots=True)
class KnownModels:
    """The list by id, and the day (ISO 8601) on which its headers were read."""

    date: str
    models: Mapping[str, KnownModel]


@cache
def known_models() -> KnownModels:
    """Return the list that this version of kvscope carries: known_models.json beside this module."""
    document = json.loads(files(__package__).joinpath(_LIST).read_text(encoding="utf-8"))
    models = (
        KnownModel(model["id"], model["name"], _header(model["metadata"])) for model in document["models"]
    )
    return KnownModels(document["date"], {model.id: model for model in models})


def _header(metadata: Mapping[str, object]) -> ModelHeader:
    values: dict[str, MetadataValue] = {
        key: tuple(value) if isinstance(value, list) else value  # type: ignore[misc]
        for key, value in metadata.items()
    }
    return ModelHeader(str(values[_ARCHITECTURE]), values)
