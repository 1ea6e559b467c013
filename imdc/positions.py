"""Which positions a turn takes, and what fits a model's window in compact ones. Pure Python, no torch.

With original positions every token keeps its place in the text, which may lie beyond the window. With compact ones the
memory is numbered 0..m-1, and what is read or written follows it, so all of that has to fit the window W:

    while reading     memory + chunk + tail rows               <= W
    while answering   memory + answer + room for what is next  <= W

What is next is a compression of the memory (one token and the rows that vote), or the first step of another turn, which
reads a quarter of a chunk against a full cache. So chunk and answer use the same room, one after the
other, and an answer that has filled its room is compressed like one that has reached `decode_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from imdc.config import PrefillConfig
from imdc.layer_budgets import fullest_share
from imdc.schedule import Step, least_first_chunk
from imdc.units import DefaultSize

# An answer is compressed after so many tokens at the earliest: more often, it would hardly get on. It is also more
# than assisted decoding usually drafts at once.
LEAST_ANSWER = 32


def last_position(start: int, prompt_tokens: int, new_tokens: int | None) -> int:
    """Positions taken when all is read and written, counted from 0; the last token that is written is never read.

    Args:
        start: positions taken before.
        prompt_tokens: tokens to read.
        new_tokens: tokens that will be generated at most; None where that is not known.
    """
    return start + prompt_tokens + max(0, (new_tokens or 1) - 1)


def compact_positions(
    start: int, prompt_tokens: int, new_tokens: int | None, window: int | None, config: PrefillConfig, full_layers: int
) -> bool:
    """Whether the memory of a text is numbered anew at every step, as its options and length ask.

    Args:
        start: positions taken before.
        prompt_tokens: tokens to read.
        new_tokens: tokens that will be generated at most; None where that is not known.
        window: positions that the model was trained for; None where its config does not say.
        config: the options.
        full_layers: layers that keep a memory; without one there is nothing to number.
    """
    if not full_layers or config.positions == "original":
        return False
    if config.positions == "compact":
        return True
    return window is not None and last_position(start, prompt_tokens, new_tokens) > window


def widest_step(steps: Sequence[Step], tails: Sequence[int], layers: Sequence[Sequence[int]]) -> int:
    """Positions that the widest step takes with compact positions: memory of the fullest layer, chunk and tail rows.

    `layers` are those of `imdc.layer_budgets.planned_layers`.
    """
    return max(max(held) + step.chunk_tokens + tail for step, tail, held in zip(steps, tails, layers, strict=False))


def fitted(config: PrefillConfig, window: int | None) -> PrefillConfig:
    """`config` with sizes that fit compact positions into `window`, where nobody chose them.

    What was chosen stays as it is: whether that fits is for `misfit` to say. At least a quarter of the window is left
    for the answer. A chunk of "auto" stays "auto", and `largest_chunk` limits it.
    """
    memory, chunk = config.memory_tokens, config.chunk_tokens
    if window is None or config.schedule == "full":
        return config
    room = window - config.observation_tokens
    share = fullest_share(config)
    free_memory, free_chunk = isinstance(memory, DefaultSize), isinstance(chunk, DefaultSize)
    if free_chunk and isinstance(chunk, int):
        # The defaults have a memory of two chunks.
        chunk = min(chunk, room // (1 + 2 * share) if free_memory else room - share * memory)
    if free_memory:
        beside = max(chunk if isinstance(chunk, int) else room // (1 + 2 * share), room // 4)
        memory = max(min(memory, (room - beside) // share), config.sink_tokens + config.recent_tokens, 1)
    if (memory, chunk) == (config.memory_tokens, config.chunk_tokens) or (isinstance(chunk, int) and chunk < 1):
        return config
    start = config.initial_memory
    capped = min(start, memory) if isinstance(start, int) else start
    return replace(config, memory_tokens=memory, chunk_tokens=chunk, initial_memory=capped)


def largest_chunk(config: PrefillConfig, window: int | None) -> int | None:
    """The largest mean chunk beside the memory of a `fitted` config in compact positions; None without a limit."""
    if window is None or config.schedule == "full":
        return None
    return max(1, window - config.observation_tokens - fullest_share(config) * config.memory_tokens)


def answer_room(config: PrefillConfig, window: int) -> int | None:
    """Tokens written in compact positions after which the memory is compressed again.

    Args:
        config: a `fitted` one.
        window: positions that the model was trained for.

    Returns:
        At least 1; None where compressing would make no room, because the memory fills the window by itself.
    """
    if config.schedule == "full":
        return None
    spare = window - fullest_share(config) * config.memory_tokens - config.observation_tokens
    chunk = config.chunk_tokens if isinstance(config.chunk_tokens, int) else max(0, spare)
    before_a_turn = spare - least_first_chunk(chunk)
    if before_a_turn >= LEAST_ANSWER:
        return before_a_turn
    # The next turn may have to read its history anew.
    return spare - 1 if spare > 1 else None


def misfit(config: PrefillConfig, window: int, *, widest: int, left: int, new_tokens: int | None) -> str | None:
    """Why a turn does not fit compact positions, and the remedy, as one sentence; None where it fits.

    Args:
        config: a `fitted` one.
        window: positions that the model was trained for.
        widest: positions of its widest step: memory, chunk and tail rows.
        left: KV pairs in the fullest layer's memory when all is read.
        new_tokens: tokens that will be generated at most; None where that is not known.
    """
    if widest > window:
        if config.schedule == "full":
            remedy = "schedule='full' keeps everything; take another schedule"
        else:
            remedy = (
                f"lower memory_tokens={config.memory_tokens} or chunk_tokens={config.chunk_tokens}, or leave both out"
            )
        return f"memory and chunk take {widest} positions, the model was trained for {window}; {remedy}"
    end = last_position(left, 0, new_tokens)
    if end > window and (answer_room(config, window) or 0) < min(new_tokens or LEAST_ANSWER, LEAST_ANSWER):
        if config.schedule == "full":
            remedy = "take another schedule than 'full' or ask for fewer new tokens"
        else:
            remedy = f"lower memory_tokens={config.memory_tokens}, or leave it out, or ask for fewer new tokens"
        return f"memory and answer take {end} positions, the model was trained for {window}; {remedy}"
    return None
