"""How the layers share the memory of a step: `layer_budget`. Pure Python, no torch.

A schedule says how many KV pairs a layer keeps on average. Every budget hands out exactly that average times the number
of compressed layers, so that two budgets compare at equal memory:

    uniform    every layer the same
    pyramid    the layers' shares fall linearly with depth, from 2 - 1/20 to 1/20 of what is beyond sinks and recent
               tokens (PyramidKV, arXiv 2406.02069, and its code, with its beta of 20)
    adaptive   in proportion to the softmax of the layers' mean retention ratios so far, as in the IMDC paper's code
               (ZhiYuanZeng/Collie, branch emnlp2024, `get_layerwise_incremental_memsize`): a layer that retains more of
               its memory from step to step gets more. Only what the memory grows by is shared out so: no layer shrinks,
               and the total never passes its level while the layers of a step run. There, all layers end at the full
               memory; here, the last step keeps the shares and the total.
    entropy    as "adaptive", by the softmax of the truncated matrix entropy of the layers' keys in the first chunk
               (UNComp, arXiv 2410.03090, and its code; `imdc.prefill.key_entropy`): a layer whose keys have more
               entropy gets more. UNComp measures queries too, over the whole prompt; by entropy it sorts heads into
               groups with budgets of their own, and drops hidden states in layers where the entropy has fallen. Here
               it decides about layers alone, before most of the prompt was read.

No layer holds more than twice the average, nor more than it has read, nor less than sinks and recent tokens; what that
cuts off goes to the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from imdc.config import MEASURED_BUDGETS, PrefillConfig
from imdc.schedule import Step

# The fullest layer holds at most so many times the average.
MOST = 2
_BETA = 20
_HALVINGS = 48


def fullest_share(config: PrefillConfig) -> int:
    """How many times the average the fullest layer may hold."""
    return 1 if config.layer_budget == "uniform" else MOST


def share_out(
    config: PrefillConfig, step: Step, before: Sequence[int], measured: Sequence[float] | None = None
) -> tuple[int, ...]:
    """KV pairs that each compressed layer keeps after a step; they add up to `step.memory_after` per layer.

    Args:
        config: the options.
        step: chunk, and memory per layer on average.
        before: KV pairs that each compressed layer holds before the step.
        measured: per layer the mean retention ratio of the steps so far for "adaptive", the entropy of its keys for
            "entropy"; None where there is none yet.
    """
    if not before:
        # A model whose layers all have sliding windows.
        return ()
    layers, mean = len(before), step.memory_after
    if config.layer_budget == "uniform" and len(set(before)) <= 1:
        return (mean,) * layers
    room = [min(held + step.chunk_tokens, MOST * mean) for held in before]
    always = [min(config.sink_tokens + config.recent_tokens, most) for most in room]
    if config.layer_budget == "pyramid":
        return _level(layers * mean, pyramid_shares(layers), always, always, room)
    flat = [0] * layers
    if config.layer_budget == "uniform":
        return _level(layers * mean, [1.0] * layers, flat, always, room)
    if layers * mean < sum(before):
        # Later turns and answers are compressed to the shares that were found.
        return _level(layers * mean, [float(held) for held in before], flat, always, room)
    shares = [math.exp(value) for value in measured] if measured else [float(held or 1) for held in before]
    # No less than before, and no less than sinks and recent tokens, which a first short chunk may not have filled.
    least = [max(min(held, most), forced) for held, most, forced in zip(before, room, always, strict=True)]
    return _level(layers * mean, shares, flat, least, room)


def pyramid_shares(layers: int) -> list[float]:
    """The linearly falling shares of PyramidKV, one on average."""
    last = 1 / _BETA
    return [2 - last - 2 * (1 - last) * layer / (layers - 1) for layer in range(layers)] if layers > 1 else [1.0]


def planned_layers(
    config: PrefillConfig, layers: int, steps: Sequence[Step], before: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """KV pairs of each of `layers` compressed layers before the first step, and after each of `steps`.

    What will be measured is not known before: there the first layer stands for the fullest that may be.

    Args:
        config: the options.
        layers: compressed layers of the model.
        steps: the steps of a prefill.
        before: what earlier turns left; None where it is the average in all layers, shared out as the budget does.
    """
    if not layers:
        return [()] * (len(steps) + 1)
    if before is None:
        held = steps[0].memory_before
        whole = Step(0, 0, MOST * held, 0, held)
        before = _fullest(config, layers, held, MOST * held) if config.layer_budget in MEASURED_BUDGETS else ()
        before = before or share_out(config, whole, (0,) * layers)
    found = [tuple(before)]
    seen = max(before)
    for step in steps:
        seen += step.chunk_tokens
        if config.layer_budget in MEASURED_BUDGETS:
            found.append(_fullest(config, layers, step.memory_after, seen))
        else:
            found.append(share_out(config, step, found[-1]))
    return found


def shares_in_words(config: PrefillConfig, layers: int, steps: Sequence[Step]) -> list[str]:
    """What the layers keep of these steps, as one sentence; none where all keep the same."""
    last = planned_layers(config, layers, steps)[-1]
    if len(set(last)) < 2:
        return []
    least = "" if config.layer_budget in MEASURED_BUDGETS else f"{min(last)} to "
    most = f"{least}{max(last)}" if least else f"at most {max(last)}"
    return [f"memory is the average of the layers, which keep {most} by layer_budget={config.layer_budget!r}"]


def _fullest(config: PrefillConfig, layers: int, mean: int, seen: int) -> tuple[int, ...]:
    if layers == 1:
        return (mean,)
    # The others keep sinks and recent tokens too.
    always = min(config.sink_tokens + config.recent_tokens, mean)
    first = min(MOST * mean, seen, layers * mean - (layers - 1) * always)
    each, more = divmod(layers * mean - first, layers - 1)
    return (first, *(each + (layer < more) for layer in range(layers - 1)))


def _level(
    total: int, shares: Sequence[float], base: Sequence[int], least: Sequence[int], most: Sequence[int]
) -> tuple[int, ...]:
    """Whole numbers base + level * share within least..most that add up to `total`, by the level for which they do."""

    def at(level: float) -> list[float]:
        bounds = zip(shares, base, least, most, strict=True)
        return [min(high, max(low, start + level * share)) for share, start, low, high in bounds]

    low, high = 0.0, total / min(share for share in shares if share > 0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    exact = at(high)
    counts = [math.floor(count) for count in exact]
    # What rounding left goes to the largest remainders, and on to whoever has room.
    order = sorted(range(len(counts)), key=lambda layer: counts[layer] - exact[layer])
    missing = total - sum(counts)
    while missing:
        for layer in order:
            if missing > 0 and counts[layer] < most[layer]:
                counts[layer], missing = counts[layer] + 1, missing - 1
            elif missing < 0 and counts[layer] > least[layer]:
                counts[layer], missing = counts[layer] - 1, missing + 1
    return tuple(counts)
