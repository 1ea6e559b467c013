"""Exceptions of imdc. All derive from `ImdcError`; those a caller's argument causes are also `ValueError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ImdcError(Exception):
    """Base of every error that imdc raises on purpose."""


class ConfigError(ImdcError, ValueError):
    """An option has a name, type or value that cannot work."""


class UnsupportedModelError(ImdcError, ValueError):
    """The model's architecture or mode cannot be prefilled by imdc."""


class UnsupportedCallError(ImdcError, ValueError):
    """The model is supported, but not called in this way."""


class CacheMismatchError(ImdcError, ValueError):
    """A cache was handed to a model, plan or batch that it was not made for."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of an error message that suggests the nearest choice, or an empty string.

    >>> did_you_mean("memory_token", ["memory_tokens", "chunk_tokens"])
    " Did you mean 'memory_tokens'?"
    """
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    if value not in choices:
        raise ConfigError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.{did_you_mean(value, choices)}"
        )


def check_share(name: str, value: float, of: str, remedy: str) -> None:
    """Raise `ConfigError` unless `value` is a share of `of`; `remedy` says how to give something else."""
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"{name}={value} as a float is a share of {of} and must be above 0 and at most 1; {remedy}")


def check_int(name: str, value: object, least: int) -> None:
    """Raise `ConfigError` unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
