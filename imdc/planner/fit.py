"""Find what fits: the steps of a prefill within a memory limit, by predicted bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from imdc.config import BYTES_REMEDY, PrefillConfig
from imdc.errors import ConfigError
from imdc.layer_budgets import planned_layers
from imdc.model.backend_rule import ANY_MACHINE, AttentionTraits, Machine, choose_backend
from imdc.model.shape import ModelShape
from imdc.planner.asking import predict_question
from imdc.planner.batch import DEFAULT_ROOM, Batch, Kept
from imdc.planner.footprint import StepFootprint, balanced_steps, predict, predict_after
from imdc.positions import compact_positions, fitted, largest_chunk, misfit, widest_step
from imdc.schedule import Step, tail_rows
from imdc.units import format_bytes

# Smaller chunks save no memory: weights and KV cache dominate.
LEAST_CHUNK = 32
# Keeps a plan below one second.
MOST_STEPS = 4096


def execution(
    shape: ModelShape, batch: Batch, config: PrefillConfig, device: str, machine: Machine = ANY_MACHINE
) -> tuple[str, bool]:
    """(backend, compact positions) that a prefill will use: what "auto" of either becomes for this model.

    Args:
        shape: the model.
        batch: what is read.
        config: the options.
        device: type of the device, such as "cuda" or "cpu".
        machine: where the prefill will run.

    Raises:
        ConfigError: the backend that is asked for cannot serve the model.
    """
    traits = AttentionTraits.of(shape, device)
    backend, _ = choose_backend(config.backend, traits, machine)
    read, written = batch.prompt_tokens, batch.new_tokens
    if batch.question_tokens:
        written = max(DEFAULT_ROOM, batch.question_tokens + batch.decoded_tokens)
    return backend, compact_positions(batch.seen_tokens, read, written, shape.max_positions, config, shape.full_layers)


def fit_chunk(
    shape: ModelShape,
    batch: Batch,
    config: PrefillConfig,
    limit: int,
    *,
    device: str = "cuda",
    asked: bool = False,
) -> int:
    """The largest mean chunk whose predicted peak, weights, other rows and answer included, is within `limit` bytes.

    With compact positions memory and chunk also have to fit the model's window. Questions about a document (`asked`)
    are not cut where pairs are taken back for them: their chunk is the longest of them.

    Raises:
        ConfigError: not even the smallest chunks fit; the message says what they need.
    """

    def peak(chunk: int) -> int:
        return peak_bytes(shape, batch, with_chunk(config, chunk), device)

    most, least = batch.prompt_tokens, least_chunk(batch)
    if execution(shape, batch, config, device)[1]:
        config = fitted(config, shape.max_positions)
        most = min(most, largest_chunk(config, shape.max_positions) or most)
    if asked:
        least = least if config.recall == "none" else most
        what = f"a question of {most} tokens" if batch.copies == 1 else f"questions of up to {most} tokens"
        remedy = "ask a shorter one"
    elif config.schedule == "full":
        what, remedy = "the whole prompt in memory", "take another schedule than 'full'"
    else:
        what, remedy = f"memory_tokens={config.memory_tokens} and the smallest chunks", "lower memory_tokens"
    if batch.copies > 1:
        what, remedy = f"{what} of {batch.copies} rows", f"{remedy}, or read fewer rows or beams at once"
    return largest_within(limit, peak, least, most, what, remedy)


def least_chunk(batch: Batch) -> int:
    """The smallest mean chunk that is tried where memory is short."""
    return max(LEAST_CHUNK, math.ceil(batch.prompt_tokens / MOST_STEPS))


def smaller_chunk(
    shape: ModelShape, batch: Batch, config: PrefillConfig, chunk: int, limit: int | None, *, device: str
) -> int:
    """The mean chunk to try after one of `chunk` tokens, more than `least_chunk`, ran out of memory.

    It saves half of what the smallest chunks would, by predicted peaks, and more where `limit` asks for that.

    Args:
        shape: the model.
        batch: what is read.
        config: the options; its chunk_tokens is not read.
        chunk: the mean chunk that failed.
        limit: bytes that the device has for everything, weights included; None where that is not known.
        device: as in `execution`.
    """
    chunk, least = min(chunk, batch.prompt_tokens), least_chunk(batch)

    def peak(tokens: int) -> int:
        # Of reading alone: that is what ran out, however much the answer will take.
        smaller = with_chunk(config, tokens)
        _, footprints, _ = foresee(shape, batch, smaller, execution(shape, batch, smaller, device))
        return max(footprint.total_bytes for footprint in footprints)

    lowest = peak(least)
    allowed = (lowest + peak(chunk)) // 2
    allowed = max(lowest, allowed if limit is None else min(allowed, limit))
    return largest_within(allowed, peak, least, chunk - 1, "the smallest chunks")


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
                f"memory_limit={limit} is a share of the device, whose size is not known here; {BYTES_REMEDY}"
            )
        return round(limit * device_bytes)
    assert limit is not None, "PrefillConfig asks for a limit with 'auto'"
    return limit


def peak_bytes(shape: ModelShape, batch: Batch, config: PrefillConfig, device: str) -> int:
    """Predicted peak in bytes, weights included, of a prefill whose chunk_tokens is a number, and of its answer."""
    _, footprints, after = foresee(shape, batch, config, execution(shape, batch, config, device))
    return max(footprint.total_bytes for footprint in (*footprints, *after))


def foresee(
    shape: ModelShape,
    batch: Batch,
    config: PrefillConfig,
    chosen: tuple[str, bool],
    machine: Machine = ANY_MACHINE,
) -> tuple[tuple[Step, ...], tuple[StepFootprint, ...], tuple[StepFootprint, ...]]:
    """(steps, their footprints, those of what follows them), for a config whose chunk_tokens is a number.

    Args:
        shape: the model.
        batch: what is read.
        config: the options; sizes that were left out are made to fit the model's window where positions are compact.
        chosen: backend and whether positions are compact, as `execution` says.
        machine: where the prefill will run.
    """
    backend, compact = chosen
    config = fitted(config, shape.max_positions) if compact else config
    steps = balanced_steps(shape, batch.prompt_tokens, config, stored_tokens=batch.stored_tokens)
    footprints = predict(shape, config, steps, backend=backend, compact=compact, batch=batch, machine=machine)
    fullest = max(planned_layers(config, shape.full_layers, steps)[-1], default=0)
    kept = Kept.after(shape, batch, steps[-1].memory_after, fullest)
    after = predict_after(config, batch, kept)
    if batch.question_tokens:
        after += predict_question(config, batch, kept, chosen, machine)
    return steps, footprints, after


def compact_misfit(shape: ModelShape, config: PrefillConfig, steps: Sequence[Step], new_tokens: int) -> str | None:
    """Why these steps with compact positions, and an answer of `new_tokens` (0: not known), are refused; None: not."""
    if shape.max_positions is None:
        return None
    held = planned_layers(config, shape.full_layers, steps)
    widest = widest_step(steps, tail_rows(steps, config, full_layers=shape.full_layers), held)
    return misfit(config, shape.max_positions, widest=widest, left=max(held[-1]), new_tokens=new_tokens or None)


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
    capped = min(start, memory_tokens) if isinstance(start, int) else start
    return replace(config, memory_tokens=memory_tokens, initial_memory=capped)
