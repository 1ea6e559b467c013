"""The methods that `fidelity.py` compares: names on the command line, and ways with a share of the prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longbench_ways import FULL, SCHEDULES, Amount, Way, WayError

from imdc.config import PrefillConfig, option_names
from imdc.errors import did_you_mean
from imdc.observers import OBSERVERS, AttentionObserver

if TYPE_CHECKING:
    from torch import Tensor

    from imdc.prefill.observation import Observation

ONE_SHOT, APPEND_ONLY = "one-shot", "append-only"
METHODS = (*SCHEDULES, ONE_SHOT, APPEND_ONLY)
# What `Way` fills in itself.
_TAKEN = ("schedule", "memory_tokens", "chunk_tokens", "observer")


class AppendOnly(AttentionObserver):
    """Retains for good what was retained once: only a chunk's own pairs compete, as another observer scores them."""

    name = "append_only"

    def __init__(self, base: AttentionObserver) -> None:
        """`base` scores."""
        self.base = base
        self.query_aware, self.rides_along = base.query_aware, base.rides_along

    def queries(self, config: PrefillConfig, chunk_tokens: int) -> int | None:
        """As the other."""
        return self.base.queries(config, chunk_tokens)

    def score(self, seen: Observation) -> Tensor:
        """The other's, and more than any of them for what is memory already."""
        scores = self.base.score(seen)
        scores[:, :, : seen.scored_keys - seen.chunk_tokens] = float("inf")
        return scores


class AppendOnlyWay(Way):
    """Memory grows by the same amount at every step, and nothing in it is evicted again."""

    @property
    def key(self) -> str:
        """Not that of "im", whose options it has."""
        return f"{APPEND_ONLY} {super().key}"

    def config(self, prompt_tokens: int) -> PrefillConfig | None:
        """As of the schedule "im", from what one step may keep on."""
        config = super().config(prompt_tokens)
        base = OBSERVERS[str(self.observer)]
        assert config is not None and self.chunk is not None and isinstance(base, AttentionObserver)
        steps = -(-prompt_tokens // self.chunk.of(prompt_tokens))
        least = config.sink_tokens + config.recent_tokens
        first = max(config.memory_tokens // steps, min(config.memory_tokens, least))
        return replace(config, observer=AppendOnly(base), initial_memory=first)


def parse_methods(text: str, *, shares: Sequence[Amount], chunk: Amount, observer: str) -> list[Way]:
    """The ways of `--methods`, each at every share; "full" stands there once, whatever the shares.

    "one-shot" reads the whole prompt in one chunk and compresses once, at its end, as SnapKV does on the full cache:
    what the same observer retains when nothing had to be dropped before all was seen. It bounds no memory.
    "append-only" compresses every chunk once, into an equal part of the memory, and leaves it at that.

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
        kind, schedule, size = Way, method, chunk
        if method == ONE_SHOT:
            schedule, size = "fm", Amount.parse("100%")
        elif method == APPEND_ONLY:
            kind, schedule = AppendOnlyWay, "im"
            if not isinstance(OBSERVERS[observer], AttentionObserver):
                raise WayError(f"--methods {word!r}: --observer {observer!r} scores by no attention; take another")
        for share in shares:
            way = kind(f"{word}@{share.text}", schedule, observer, share, size, options)
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
        return name, json.loads(value)
    except ValueError:
        return name, value
