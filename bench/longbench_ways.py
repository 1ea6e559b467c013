"""What is compared: the unpatched model, and imdc by schedule, observer, memory and chunk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from imdc.config import PrefillConfig
from imdc.errors import ConfigError, ImdcError, did_you_mean
from imdc.observers import OBSERVERS
from imdc.units import parse_tokens

FULL = "full"
SCHEDULES = (FULL, "fm", "im", "imdc")
# A share of a short prompt may be less than what is always kept; this much is left to choose from.
_LEAST_CHOSEN = 32


class WayError(ImdcError, ValueError):
    """A way of reading, or an amount in it, is misspelt or twice the same."""


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of tokens, or a share of the prompt."""

    text: str
    tokens: int | None
    share: Fraction | None

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Tokens from "2048" or "4k"; a share of the prompt from "1/8", "0.125" or "12.5%".

        Raises:
            WayError: neither, or a share that is not above 0 and at most 1.
        """
        word = text.strip()
        try:
            if re.fullmatch(r"\d+/\d+|0?\.\d+|1\.0*|\d+(\.\d+)?%", word):
                share = Fraction(word[:-1]) / 100 if word.endswith("%") else Fraction(word)
                if not 0 < share <= 1:
                    raise WayError(f"the share {text!r} of the prompt must be above 0 and at most 1")
                return cls(word, None, share)
            return cls(word, parse_tokens(word), None)
        except (ConfigError, ZeroDivisionError) as error:
            raise WayError(f"{text!r} is neither a number of tokens nor a share of the prompt such as 1/8") from error

    @property
    def words(self) -> str:
        """For a table."""
        return f"{self.tokens:,} tokens" if self.tokens is not None else f"{self.text} of the prompt"

    def of(self, prompt_tokens: int) -> int:
        """In tokens of a prompt of that length."""
        return self.tokens if self.tokens is not None else max(1, round(self.share * prompt_tokens))  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class Way:
    """One column of the table.

    Attributes:
        name: as it was given, the column's heading.
        schedule: "full" is the unpatched model.
        observer: of imdc; None for the unpatched model.
        memory: kept per layer and KV head.
        chunk: mean tokens per step.
        options: further fields of `PrefillConfig`, the same for all.
    """

    name: str
    schedule: str
    observer: str | None = None
    memory: Amount | None = None
    chunk: Amount | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Everything that its answers depend on, as one text."""
        if self.memory is None or self.chunk is None:
            return self.schedule
        rest = "".join(f" {name}={value}" for name, value in sorted(self.options.items()))
        return f"{self.schedule}:{self.observer}@{self.memory.text} chunk={self.chunk.text}{rest}"

    @property
    def aware(self) -> bool:
        """Whether the question is known while the prompt is read."""
        return self.observer is None or OBSERVERS[self.observer].query_aware

    def config(self, prompt_tokens: int) -> PrefillConfig | None:
        """The options of `imdc.patch` for a prompt of that length; None leaves the model as it is."""
        if self.memory is None or self.chunk is None:
            return None
        config = PrefillConfig(schedule=self.schedule, observer=str(self.observer), **self.options)
        least = config.sink_tokens + config.recent_tokens + (_LEAST_CHOSEN if self.memory.share is not None else 0)
        memory, chunk = self.memory.of(prompt_tokens), self.chunk.of(prompt_tokens)
        options = dict(self.options)
        if self.memory.share is not None:
            memory = max(least, memory)
            # A first memory in tokens may be more than a share of a short prompt.
            if isinstance(first := options.get("initial_memory"), int):
                options["initial_memory"] = min(first, memory)
        return PrefillConfig(
            schedule=self.schedule,
            observer=str(self.observer),
            memory_tokens=memory,
            chunk_tokens=chunk,
            **options,
        )


def parse_ways(text: str, *, observer: str, memory: Amount, chunk: Amount, options: Mapping[str, Any]) -> list[Way]:
    """The ways of `--schedules`.

    Args:
        text: SCHEDULE[:OBSERVER][@MEMORY][+recall[EVERY]], with commas between them, such as
            "full,fm,imdc:window@1/4,imdc+recall2", where every second token of an answer takes back from host memory.
        observer: where none is given.
        memory: where none is given.
        chunk: of all.
        options: of all.

    Raises:
        WayError: a schedule, observer or amount is unknown, or two ways are the same.
        ConfigError: the values do not work together.
    """
    ways = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        found = re.fullmatch(r"([^:@+]+)(?::([^:@+]+))?(?:@([^:@+]+))?(\+recall(\d+)?)?", word)
        if found is None:
            raise WayError(
                f"--schedules {word!r} is not SCHEDULE[:OBSERVER][@MEMORY][+recall[EVERY]], such as imdc:window@1/4"
            )
        schedule, watching, amount, recalls, every = found.groups()
        _known("schedule", schedule, SCHEDULES)
        if schedule == FULL:
            if watching or amount or recalls:
                raise WayError(f"--schedules {word!r}: {FULL} is the unpatched model, which keeps everything")
            ways.append(Way(word, schedule))
            continue
        _known("observer", watching or observer, tuple(OBSERVERS))
        kept = Amount.parse(amount) if amount else memory
        recall: dict[str, Any] = {"recall": "host"} if recalls else {}
        if every:
            recall["recall_every"] = int(every)
        way = Way(word, schedule, watching or observer, kept, chunk, {**options, **recall})
        # Whatever does not work together is said before the model is loaded.
        way.config(4096)
        ways.append(way)
    if not ways:
        raise WayError(f"--schedules {text!r} names no schedule")
    keys = [way.key for way in ways]
    for way in ways:
        if keys.count(way.key) > 1:
            raise WayError(f"--schedules {text!r} has {way.name!r} twice ({way.key})")
    return ways


def _known(kind: str, word: str, choices: tuple[str, ...]) -> None:
    if word not in choices:
        raise WayError(f"unknown {kind} {word!r}.{did_you_mean(word, choices)} Use one of {', '.join(choices)}")
