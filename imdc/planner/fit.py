"""Find what fits: the steps of a prefill within a memory limit, by predicted bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from imdc.config import PrefillConfig
from imdc.errors import ConfigError
from imdc.model.shape import ModelShape
from imdc.planner.footprint import balanced_steps, predict
from imdc.positions import fitted, largest_chunk
from imdc.units import format_bytes

# Smaller chunks save no memory: weights and KV cache dominate.
LEAST_CHUNK = 32
# Keeps a plan below one second.
MOST_STEPS = 4096


def execution(shape: ModelShape, prompt_tokens: int, config: PrefillConfig, device: str) -> tuple[str, bool]:
    """(backend, compact positions) that a prefill will use: what "auto" of either becomes for this model.

    Args:
        shape: the model.
        prompt_tokens: tokens of the longest prompt row.
        config: the options.
        device: "cuda" or "cpu".
    """
    backend = config.backend
    if backend == "auto":
        backend = "triton" if device == "cuda" else "reference" if shape.softcap else "sdpa"
    if not shape.full_layers:
        return backend, False
    beyond = shape.max_positions is not None and prompt_tokens > shape.max_positions
    return backend, config.positions == "compact" or (config.positions == "auto" and beyond)


def fit_chunk(shape: ModelShape, prompt_tokens: int, config: PrefillConfig, limit: int, *, device: str = "cuda") -> int:
    """The largest mean chunk whose predicted peak, weights included, stays within `limit` bytes, and which fits.

    With compact positions memory and chunk also have to fit the model's window.

    Raises:
        ConfigError: not even the smallest chunks fit; the message says what they need.
    """

    def peak(chunk: int) -> int:
        return peak_bytes(shape, prompt_tokens, with_chunk(config, chunk), device)

    most = prompt_tokens
    if execution(shape, prompt_tokens, config, device)[1]:
        config = fitted(config, shape.max_positions)
        most = min(most, largest_chunk(config, shape.max_positions) or most)
    least = max(LEAST_CHUNK, math.ceil(prompt_tokens / MOST_STEPS))
    if config.schedule == "full":
        what, remedy = "the whole prompt in memory", "take another schedule than 'full'"
    else:
        what, remedy = f"memory_tokens={config.memory_tokens} and the smallest chunks", "lower memory_tokens"
    return largest_within(limit, peak, least, most, what, remedy)


def limit_bytes(config: PrefillConfig, device_bytes: int | None) -> int:
    """`memory_limit` in bytes, weights included.

    Args:
        config: options with chunk_tokens="auto".
        device_bytes: what the device has for weights and prefill together, where that is known.

    Raises:
        ConfigError: the limit is a share, and what it is a share of is not known.
    """
    limit = config.memory_limit
    if isinstance(limit, float):
        if device_bytes is None:
            raise ConfigError(
                f"memory_limit={limit} is a share of the device, whose size is not known here; give it in bytes"
            )
        return round(limit * device_bytes)
    assert limit is not None, "PrefillConfig asks for a limit with 'auto'"
    return limit


def peak_bytes(shape: ModelShape, prompt_tokens: int, config: PrefillConfig, device: str) -> int:
    """Predicted peak in bytes, weights included, of a prefill whose chunk_tokens is a number."""
    backend, compact = execution(shape, prompt_tokens, config, device)
    config = fitted(config, shape.max_positions) if compact else config
    steps = balanced_steps(shape, prompt_tokens, config)
    footprints = predict(shape, config, steps, backend=backend, compact=compact)
    return max(footprint.total_bytes for footprint in footprints)


def largest_within(
    limit: int, peak: Callable[[int], int], least: int, most: int, what: str, remedy: str = "lower memory_tokens"
) -> int:
    """The largest value in least..most whose `peak` in bytes stays within `limit`, taking peaks to rise with it.

    Peaks rise but for rounding to whole steps, so the result fits for certain and may be a few tokens short.

    Raises:
        ConfigError: not even `least` fits; the message says what it needs, for `what`.
    """
    least = min(least, most)
    high = most
    # Halve from the top: small values mean many steps, and are only tried where nothing larger fits.
    low, above = high, 0
    while (needed := peak(low)) > limit:
        if low == least:
            raise ConfigError(
                f"a limit of {format_bytes(limit)} is too small: it needs at least {format_bytes(needed)} "
                f"for {what}; raise the limit or {remedy}"
            )
        high, above, low = low - 1, needed, max(least, low // 2)
    below, straight = needed, True
    while low < high:
        # Peaks are nearly straight lines, so the crossing is close to where a line would cross; halving in turns with
        # that bounds the tries where they are not.
        share = (limit - below) / (above - below) if straight and above > below else 0.5
        middle = min(high, low + max(1, round(share * (high + 1 - low))))
        needed, straight = peak(middle), not straight
        if needed <= limit:
            low, below = middle, needed
        else:
            high, above = middle - 1, needed
    return low


def with_chunk(config: PrefillConfig, chunk_tokens: int) -> PrefillConfig:
    """`config` with that mean chunk, and without the limit that only "auto" reads."""
    return replace(config, chunk_tokens=chunk_tokens, memory_limit=None)


def with_memory(config: PrefillConfig, memory_tokens: int) -> PrefillConfig:
    """`config` with another memory; an `initial_memory` in tokens is capped to it."""
    start = config.initial_memory
    capped = start if isinstance(start, float) else min(start, memory_tokens)
    return replace(config, memory_tokens=memory_tokens, initial_memory=capped)
