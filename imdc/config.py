"""The options of a prefill: one frozen dataclass, checked once, with every default of imdc.

No torch here: the command line imports this for its option list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from imdc.errors import ConfigError, check_choice, check_int, check_share, did_you_mean
from imdc.kernels.limits import OUTPUT_CHANGE, POOLINGS, SCORINGS
from imdc.observers import OBSERVERS, Observer, find_observer
from imdc.presets import PER_STEP, PRESETS, preset_options, with_presets
from imdc.units import DefaultSize

SCHEDULES = ("imdc", "im", "fm", "full")
# The model's own prefill, where it stands beside the schedules.
UNPATCHED = "unpatched"
GROWTHS = ("linear", "sqrt", "square", "inverse_convex", "inverse_concave")
BALANCES = ("tokens", "bytes")
MEASURED_BUDGETS = ("adaptive", "entropy")
LAYER_BUDGETS = ("uniform", "pyramid", *MEASURED_BUDGETS)
POSITIONS = ("auto", "original", "compact")
STARTS = ("auto", PER_STEP)
RECALLS = ("none", "host", "disk")
RECALL_DTYPES = ("model", "int8")
RECALL_EVERY = 2
BACKENDS = ("auto", "triton", "flash", "varlen", "sdpa", "reference")
# Decoding appends to a layer one KV pair at a time; room is made for this many at once.
TAIL_BLOCK = 128
# Tokens of the text that have a scale in common for each channel of a key, where recall_dtype="int8".
INT8_GROUP = 128
# Tokens whose keys have one mean, by which an answer finds the keys to compare; see `imdc.prefill.recall`.
SUMMARY_TOKENS = 16
# initial_memory="auto": a share of the memory, but no fewer tokens besides sinks and recent ones. A share alone leaves
# next to nothing of a small memory: of 219 tokens 19, which finds 5 of 10 needles where the floor finds 9. A higher
# floor would cost the peak that shrinking chunks save where memory is large against the chunk (M = 1.8 C).
_FIRST_SHARE, _LEAST_FIRST = 0.25, 192
BYTES_REMEDY = "give an int for bytes (on the command line a size such as 24GiB)"


@with_presets
@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How a prompt is read: in which chunks, with how much memory, and who decides what is kept.

    Attributes:
        schedule: "imdc" (memory grows, chunks shrink), "im" (memory grows, equal chunks), "fm" (memory of fixed
            size, equal chunks) or "full" (equal chunks, nothing is evicted).
        growth: shape in which memory grows from `initial_memory` to `memory_tokens` ("im" and "imdc"): "linear",
            "sqrt", "square", "inverse_convex" (which starts at memory_tokens / steps whatever `initial_memory` says)
            or "inverse_concave".
        balance: what the shrinking chunks of "imdc" keep level: "tokens" of memory and chunk, as in the paper, or their
            "bytes" by the model's sizes, which lowers the peak but reads more of the prompt while memory is small.
        initial_memory: KV pairs kept after the first chunk: an int is a number of tokens, a float a share of
            `memory_tokens` in (0, 1]; "auto" is a quarter of it, but at least 192 besides sinks and recent tokens, as
            far as memory and chunk go; "per_step" is `memory_tokens` / steps, as in the paper.
        memory_tokens: KV pairs kept per layer (on average) and KV head after the prefill, sinks and recent tokens
            included; left out, less where compact positions would not fit the model's window.
        chunk_tokens: mean number of prompt tokens per step, or "auto": the largest that `memory_limit` allows; left
            out, less where compact positions would not fit the model's window.
        memory_limit: only with chunk_tokens="auto"; an int is bytes, a float a share in (0, 1] of what the device has;
            on the command line 24GiB or 0.5.
        observer: whose attention decides what is retained: "prompt_tail", "questions", "window", "all_queries",
            "sink_recent", "key_diff", "random", or in Python an object of a subclass of `imdc.Observer`.
        observation_tokens: queries whose attention decides, for "prompt_tail" and "window" (the observation window).
        observation_stride: every how manyth of the deciding queries votes, counted back from the last; with
            "all_queries", 4 costs a quarter of the scoring and leaves the expected scores as they are.
        scoring: "attention" retains the keys that get most of it, "output_change" those without which the outputs of
            the deciding queries would change most (CAOTE).
        pooling: "max" or "avg", how neighbouring keys share their scores.
        pool_kernel: odd width in keys of that pooling; 1 switches it off.
        sink_tokens: first tokens of the prompt (attention sinks), always retained.
        recent_tokens: latest tokens read, always retained.
        layer_budget: how the layers share `memory_tokens`, at the same total: "uniform", "pyramid" (less with depth, as
            in PyramidKV) or, for "im" and "imdc", by what is measured while reading: "adaptive" (more for layers that
            retain more) or "entropy" (more for layers whose keys have a higher matrix entropy, after UNComp).
        positions: "original" keeps each key's rotary position, "compact" numbers the memory anew at every step (for
            texts beyond the trained window), "auto" is compact where prompt and answer pass the model's window.
        decode_tokens: generated tokens after which the cache is compressed again; None lets it grow, with compact
            positions until the window is full.
        backend: "auto", "triton", "flash" (FlashAttention), "varlen" (PyTorch on cuDNN), "sdpa" or "reference".
        preset: "default", or "paper", the setting of the IMDC paper as far as it can be had (`imdc.presets` says what
            differs); options given beside it take precedence.
        recall: what becomes of evicted pairs: "none" drops them, "host" stores all pairs of the text in host memory and
            "disk" in a file, from which its question takes back those that it needs: that of `handle.ask()`, or the
            last `observation_tokens` of a prompt of `generate()`.
        recall_every: every how manyth token of an answer takes back anew what it needs by then; 0 leaves it with what
            its question took. Until `decode_tokens` compress the cache.
        recall_limit: bytes that recall stores at most, on the command line such as 24GiB; left out, what the system or
            the disk has available.
        recall_dir: folder of the file of recall="disk", which goes with the cache; left out, the system's for
            temporary files.
        recall_dtype: what recall stores, "model" (pairs in the model's dtype, as they are) or "int8" (about half of
            bfloat16, a quarter of float32), keys per channel and values per token, as KIVI quantises them.

    Raises:
        ConfigError: a value has the wrong type or range, or does not fit the others.
    """

    schedule: str = "imdc"
    growth: str = "linear"
    # Levelled bytes save more memory but find fewer needles: 19 of 20 against 20, and the demo's answer is lost.
    balance: str = "tokens"
    # The paper starts at memory / steps. On needle questions at an eighth of memory that finds 64%, a quarter all.
    initial_memory: int | float | str = "auto"
    memory_tokens: int = DefaultSize(4096)
    # Keeps the matrix products of a GPU busy; memory is then twice the chunk.
    chunk_tokens: int | str = DefaultSize(2048)
    memory_limit: int | float | None = None
    observer: str | Observer = "prompt_tail"
    observation_tokens: int = 16
    observation_stride: int = 1
    # With a sixteenth of memory attention finds 11 of 20 needles and this 19; see docs/DESIGN.md.
    scoring: str = OUTPUT_CHANGE
    pooling: str = "max"
    # Without pooling the digits of a needle are lost one by one, even by a single compression.
    pool_kernel: int = 15
    sink_tokens: int = 4
    # About one sentence: no later query has had a chance to attend to the newest tokens.
    recent_tokens: int = 32
    layer_budget: str = "uniform"
    positions: str = "auto"
    decode_tokens: int | None = None
    backend: str = "auto"
    preset: str = "default"
    recall: str = "none"
    # What the question took serves an answer's first words: of 0.40 nats that its own answers cost more, 0.07 are left.
    recall_every: int = RECALL_EVERY
    recall_limit: int | None = None
    recall_dir: str | None = None
    recall_dtype: str = "model"

    def __post_init__(self) -> None:
        """Check every field by itself, then those that depend on each other."""
        for name, choices in CHOICES.items():
            if name != "observer":
                check_choice(name, getattr(self, name), choices)
        find_observer(self.observer)
        for name, least in _LEAST.items():
            check_int(name, getattr(self, name), least)
        if self.pool_kernel % 2 == 0:
            raise ConfigError(
                f"pool_kernel must be odd, so that it is centred on a key, got {self.pool_kernel}; "
                f"use {self.pool_kernel - 1} or {self.pool_kernel + 1}"
            )
        if self.decode_tokens is not None:
            check_int("decode_tokens", self.decode_tokens, 1)
        if self.recall_limit is not None:
            check_int("recall_limit", self.recall_limit, 1)
        for name, (unset, places) in _FOR_RECALL.items():
            if getattr(self, name) != unset and self.recall not in places:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} has no effect with recall={self.recall!r}; set "
                    f"recall={places[0]!r}, or leave it out"
                )
        if self.layer_budget in MEASURED_BUDGETS and self.schedule in ("fm", "full"):
            raise ConfigError(
                f"layer_budget={self.layer_budget!r} shares out what the memory grows by, and "
                f"schedule={self.schedule!r} has none of that; take schedule='imdc' or 'im', or layer_budget='pyramid'"
            )
        self._check_memory()
        self._check_chunk()

    def _check_memory(self) -> None:
        always_kept = self.sink_tokens + self.recent_tokens
        if self.memory_tokens < always_kept:
            raise ConfigError(
                f"memory_tokens={self.memory_tokens} is smaller than sink_tokens + recent_tokens = "
                f"{self.sink_tokens} + {self.recent_tokens} = {always_kept}; raise memory_tokens to at least "
                f"{always_kept}, or lower recent_tokens or sink_tokens"
            )
        start = self.initial_memory
        if start in STARTS:
            return
        if isinstance(start, float):
            return check_share("initial_memory", start, "memory_tokens", "give an int for a number of tokens")
        if isinstance(start, str):
            raise ConfigError(
                f"initial_memory must be {' or '.join(map(repr, STARTS))}, an int (tokens) or a float (a share), "
                f"got {start!r}"
            )
        check_int("initial_memory", start, 1)
        if start > self.memory_tokens:
            raise ConfigError(
                f"initial_memory={start} is larger than memory_tokens={self.memory_tokens}; memory only grows, "
                f"so lower initial_memory or raise memory_tokens"
            )

    def _check_chunk(self) -> None:
        if isinstance(self.chunk_tokens, str):
            check_choice("chunk_tokens", self.chunk_tokens, ("auto",))
            if self.memory_limit is None:
                raise ConfigError(
                    "chunk_tokens='auto' needs a memory_limit: bytes as an int, or a share of the device as a float"
                )
        else:
            check_int("chunk_tokens", self.chunk_tokens, 1)
            if self.memory_limit is not None:
                raise ConfigError(
                    f"memory_limit={self.memory_limit} has no effect with chunk_tokens={self.chunk_tokens}; "
                    f"set chunk_tokens='auto' to fit the chunks into the limit, or leave memory_limit out"
                )
        if isinstance(self.memory_limit, float):
            check_share("memory_limit", self.memory_limit, "the device's memory", BYTES_REMEDY)
        elif self.memory_limit is not None:
            check_int("memory_limit", self.memory_limit, 1)

    def as_dict(self) -> dict[str, Any]:
        """The options by name, an observer of the user's own by its name; values for JSON."""
        return {**{name: getattr(self, name) for name in option_names()}, "observer": str(self.observer)}

    @property
    def levels_bytes(self) -> bool:
        """Whether the chunks depend on the sizes of the model."""
        return self.schedule == "imdc" and self.balance == "bytes"

    def first_memory_tokens(self, steps: int, chunk_tokens: int) -> int:
        """`initial_memory` in tokens, at least the sinks and recent tokens that are always kept.

        Args:
            steps: of the prompt.
            chunk_tokens: mean tokens per step: a first chunk leaves no more than it has, so a floor beyond it would
                only make the chunks after it large.
        """
        start, always_kept = self.initial_memory, self.sink_tokens + self.recent_tokens
        if start == PER_STEP:
            tokens = self.memory_tokens // steps
        elif isinstance(start, str):
            floor = min(always_kept + _LEAST_FIRST, chunk_tokens, self.memory_tokens)
            tokens = max(round(_FIRST_SHARE * self.memory_tokens), floor)
        else:
            tokens = round(start * self.memory_tokens) if isinstance(start, float) else start
        return max(1, tokens, always_kept)


def resolve_config(config: PrefillConfig | None = None, **options: Any) -> PrefillConfig:
    """`config`, or the defaults, with `options` on top.

    Raises:
        ConfigError: `config` is not a PrefillConfig, or an option is unknown or its value does not work.

    A `preset` among the options sets what it is about on top of `config`, and the other options go on top of that.
    """
    if config is not None and not isinstance(config, PrefillConfig):
        raise ConfigError(
            f"config must be a PrefillConfig or None, got {type(config).__name__}; "
            f"give options by name, such as memory_tokens=4096"
        )
    known = option_names()
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}.{did_you_mean(name, known)} Options are: {', '.join(known)}")
    if config is None:
        return PrefillConfig(**options)
    return replace(config, **{**preset_options(options), **options})


def option_names() -> tuple[str, ...]:
    """Names of all options, in the order of `PrefillConfig`."""
    return tuple(field.name for field in fields(PrefillConfig))


CHOICES: dict[str, Sequence[str]] = {
    "preset": tuple(PRESETS),
    "schedule": SCHEDULES,
    "growth": GROWTHS,
    "balance": BALANCES,
    "observer": tuple(OBSERVERS),
    "scoring": SCORINGS,
    "pooling": POOLINGS,
    "layer_budget": LAYER_BUDGETS,
    "positions": POSITIONS,
    "backend": BACKENDS,
    "recall": RECALLS,
    "recall_dtype": RECALL_DTYPES,
}
_LEAST = dict.fromkeys(("memory_tokens", "observation_tokens", "observation_stride", "pool_kernel"), 1)
_LEAST |= dict.fromkeys(("sink_tokens", "recent_tokens", "recall_every"), 0)
# What each is where it was left out, and with which recall it has an effect.
_FOR_RECALL: dict[str, tuple[str | int | None, Sequence[str]]] = {
    "recall_every": (RECALL_EVERY, ("host", "disk")),
    "recall_limit": (None, ("host", "disk")),
    "recall_dtype": ("model", ("host", "disk")),
    "recall_dir": (None, ("disk",)),
}
