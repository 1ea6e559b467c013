"""The methods that `fidelity.py` compares: names on the command line, and ways with a share of the prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from longbench_ways import FULL, SCHEDULES, Amount, Way, WayError

from imdc.config import PrefillConfig, option_names
from imdc.errors import did_you_mean

ONE_SHOT = "one-shot"
METHODS = (*SCHEDULES, ONE_SHOT)
# What `Way` fills in itself.
_TAKEN = ("schedule", "memory_tokens", "chunk_tokens", "observer")


def parse_methods(text: str, *, shares: Sequence[Amount], chunk: Amount, observer: str) -> list[Way]:
    """The ways of `--methods`, each at every share; "full" stands there once, whatever the shares.

    "one-shot" reads the whole prompt in one chunk and compresses once, at its end, as SnapKV does on the full cache:
    what the same observer retains when nothing had to be dropped before all was seen. It bounds no memory.

    Args:
        text: METHOD[:OPTION=VALUE]... with commas between them, such as "full,fm,imdc,imdc:initial_memory=256".
        shares: memory as shares of the prompt.
        chunk: mean tokens per step, of all but "full" and "one-shot".
        observer: of all; "full" has none.

    Raises:
        WayError: a method or an option is unknown, two methods are the same, or a memory is no share.
        ConfigError: a value does not work.
    """
    for share in shares:
        if share.share is None:
            raise WayError(f"--memory {share.text!r} is not a share of the prompt, such as 1/8")
    ways: list[Way] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        method, *given = word.split(":")
        if method not in METHODS:
            raise WayError(
                f"unknown method {method!r}.{did_you_mean(method, METHODS)} Methods are {', '.join(METHODS)}"
            )
        options = dict(_option(word, one) for one in given)
        if method == FULL:
            if options:
                raise WayError(f"--methods {word!r}: {FULL} is the unpatched model, which has no options")
            ways.append(Way(word, FULL))
            continue
        schedule, size = ("fm", Amount.parse("100%")) if method == ONE_SHOT else (method, chunk)
        for share in shares:
            way = Way(f"{word}@{share.text}", schedule, observer, share, size, options)
            # Whatever does not work is said before a model is loaded.
            way.config(4096)
            ways.append(way)
    if not ways:
        raise WayError(f"--methods {text!r} names no method")
    names = [way.name for way in ways]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise WayError(f"--methods {text!r} has {', '.join(twice)} twice")
    # The unpatched model answers first: the others are held against it.
    return sorted(ways, key=lambda way: way.schedule != FULL)


def method_of(name: str) -> tuple[str, str]:
    """(method, share) of a way's name; the share of "full" is empty."""
    method, _, share = name.partition("@")
    return method, share


def _option(word: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    known = [one for one in option_names() if one not in _TAKEN]
    if not equals or name not in known:
        raise WayError(
            f"--methods {word!r}: {text!r} is not OPTION=VALUE.{did_you_mean(name, known)} Options are "
            f"{', '.join(known)}; {', '.join(_TAKEN)} follow from the method, --memory, --chunk-tokens and --observer"
        )
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    PrefillConfig(**{name: parsed})
    return name, parsed
