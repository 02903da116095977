"""What a llama-server command line and its environment say of the context: one pure parser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvscope.observed.model import ContextSettings


class ArgumentsError(ValueError):
    """Arguments that llama-server would not take; the message names the flag and the value."""


def context_settings(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, *, strict: bool = False
) -> ContextSettings:
    """Return what arguments (without the program's name) and environment say; a flag wins over its variable.

    Values that cannot be read are left out with a note; strict: they, and flags that llama-server does
    not know, raise ArgumentsError instead.
    """
    raise NotImplementedError
