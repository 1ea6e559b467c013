"""The steps of a prefill: how large each chunk is and how much memory it leaves behind. Pure Python, no torch.

Step i reads chunk c_i against the memory m_(i-1) and keeps m_i of the m_(i-1) + c_i KV pairs. With N prompt tokens,
C = chunk_tokens and M = memory_tokens there are n = ceil(N / C) steps, so a schedule never costs more steps than
another one. Memory follows a target that ends at M:

    fm               M from the first step on
    im, imdc         a = initial_memory (`PrefillConfig.first_memory_tokens`) grows to M by a shape (i = 0..n-1)
        linear           a + (M - a) * i / (n - 1)
        sqrt             a + (M - a) * sqrt(i / (n - 1))
        square           a + (M - a) * (i / (n - 1))^2
        inverse_convex   M / (n - i)
        inverse_concave  M + a - M / (i + 1)
    full             everything is kept

No target is below the sinks and recent tokens that are always kept, nor below what a second turn finds stored.

Chunks of "fm", "im" and "full" are equal (they differ by one token at most). Those of "imdc" shrink as the target
grows, so that memory and chunk add up to the same level L at every step. In tokens that is m_(i-1) + c_i = L after a
first step that reads N / n: without limits c_i = N/n + mean(m_0..m_(n-2)) - m_(i-1), the rule of the IMDC paper
(Incremental Memory and Decremental Chunk). A `MemoryCost` weighs KV pairs against tokens of the chunk, as a model's
bytes do: w_b * m_(i-1) + w_a * m_i + c_i = L, from the first step on. Either rule turns negative where the memory is
large against the chunk, so here no chunk is smaller than `least_chunk` says, and L is solved for: the level at which
the n chunks cover the prompt exactly. The M + C below holds in either unit.

What holds for every N, M, C, growth and stored cache:

- The chunks cover the prompt once, in order, and each has at least one token.
- Memory never shrinks, except that a cache that already holds more than M is cut to M by the first step.
- No more is ever evicted than must be: a prompt that fits keeps every KV pair, any other ends at exactly M.
- memory_before + chunk_tokens <= M + C at every step (FM's own peak), or <= stored + max(1, C // 4) in the first step
  of a second turn whose stored cache leaves less room than that ("full" has no bound).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from imdc.config import PrefillConfig
from imdc.errors import ConfigError
from imdc.observers import find_observer

# Below some hundred tokens a step takes as long as reading the weights does, however few they are. Larger chunks keep
# IMDC from levelling: SmolLM2's peak at M = 1.8C falls by 19% with a quarter and by 24% with a sixteenth.
_LEAST_SHARE, _LEAST_TOKENS, _LEAST_OF_LARGE = 4, 128, 16


@dataclass(frozen=True, slots=True)
class Step:
    """One step: prompt tokens start..start+chunk_tokens are read against `memory_before` KV pairs.

    `memory_after` of the memory_before + chunk_tokens KV pairs are kept, per layer and KV head.
    """

    index: int
    start: int
    chunk_tokens: int
    memory_before: int
    memory_after: int

    @property
    def attended_tokens(self) -> int:
        """KV pairs present while the chunk is read: the memory and the chunk itself."""
        return self.memory_before + self.chunk_tokens

    @property
    def attention_pairs(self) -> int:
        """Query-key pairs of the step per head, bottom-right causal."""
        return self.chunk_tokens * self.memory_before + self.chunk_tokens * (self.chunk_tokens + 1) // 2


def attention_pairs(steps: Iterable[Step]) -> int:
    """Query-key pairs of a schedule, per query head and layer: what its attention costs."""
    return sum(step.attention_pairs for step in steps)


def tail_rows(steps: Sequence[Step], config: PrefillConfig, *, full_layers: int) -> list[int]:
    """Rows that ride along with each step of a prefill, for observers that ask for it: the prompt's tail, or questions.

    None do where nothing is dropped, nor the prompt's tail with the last chunk, which holds it itself; none at all in
    a model whose layers all have sliding windows: nothing is compressed there.
    """
    observer = find_observer(config.observer)
    rows = min(config.observation_tokens, sum(step.chunk_tokens for step in steps))
    if observer.questions:
        rows = sum(map(len, observer.questions))
    if not observer.rides_along or not full_layers:
        rows = 0
    holds_them = None if observer.questions else steps[-1]
    return [rows if step is not holds_them and step.memory_after < step.attended_tokens else 0 for step in steps]


def observing_rows(config: PrefillConfig, chunk_tokens: int, tail_rows: int) -> int | None:
    """How many of a step's last queries vote by their attention; None for observers that score without queries.

    Tail rows take the place of the chunk's own queries where the observer lets them ride along. While an answer is
    compressed they ride along with every observer that asks for queries.
    """
    observer = find_observer(config.observer)
    queries = observer.queries(config, chunk_tokens)
    if queries is None or (observer.rides_along and tail_rows):
        return None if queries is None else tail_rows
    return queries + tail_rows


@dataclass(frozen=True, slots=True)
class MemoryCost:
    """What one KV pair of memory weighs against one token of the chunk, for balancing "imdc".

    `before` counts the memory that a step starts with, `after` what it leaves; see
    `imdc.planner.footprint.memory_cost`.
    """

    before: float
    after: float


TOKENS = MemoryCost(before=1.0, after=0.0)


def least_chunk(mean: int) -> int:
    """The smallest chunk of "imdc" besides the last, for a mean chunk of `mean` tokens."""
    return max(1, mean // _LEAST_OF_LARGE, min(_LEAST_TOKENS, mean // _LEAST_SHARE))


def least_first_chunk(mean: int) -> int:
    """Tokens that the first chunk of a second turn may have however full the cache is, for a mean chunk of `mean`."""
    return max(1, mean // _LEAST_SHARE)


def build_steps(
    prompt_tokens: int,
    config: PrefillConfig,
    *,
    stored_tokens: int = 0,
    chunk_tokens: int | None = None,
    cost: MemoryCost | None = None,
) -> tuple[Step, ...]:
    """The steps in which `prompt_tokens` new tokens are read.

    Args:
        prompt_tokens: tokens to read, N >= 1.
        config: the options; `chunk_tokens` must be a number there or be given here.
        stored_tokens: KV pairs that the cache already holds (a second turn); may exceed `memory_tokens`.
        chunk_tokens: mean chunk size in place of the config's, for a planner that has chosen one.
        cost: what "imdc" balances; None is the paper's rule, in tokens.

    Returns:
        The steps in order; see the module's text for what holds for them.

    Raises:
        ConfigError: a count is out of range, or chunk_tokens="auto" has not been resolved.
    """
    chunk = config.chunk_tokens if chunk_tokens is None else chunk_tokens
    if isinstance(chunk, str):
        raise ConfigError("chunk_tokens='auto' depends on the model: resolve it with imdc.plan, or give chunk_tokens")
    if prompt_tokens < 1:
        raise ConfigError(f"prompt_tokens must be at least 1, got {prompt_tokens}; there is nothing to read")
    if stored_tokens < 0:
        raise ConfigError(f"stored_tokens must be at least 0, got {stored_tokens}")
    if chunk < 1:
        raise ConfigError(f"chunk_tokens must be at least 1, got {chunk}")
    if config.schedule == "full":
        return _full(prompt_tokens, stored_tokens, chunk)
    schedule = _Schedule(prompt_tokens, stored_tokens, config, chunk)
    balance = config.schedule == "imdc" and schedule.drops > 0
    return schedule.steps(schedule.balanced(cost) if balance else schedule.equal())


def _full(prompt_tokens: int, stored_tokens: int, chunk: int) -> tuple[Step, ...]:
    steps: list[Step] = []
    start = 0
    for index, size in enumerate(_equal_chunks(prompt_tokens, math.ceil(prompt_tokens / chunk))):
        before = stored_tokens + start
        steps.append(Step(index, start, size, before, before + size))
        start += size
    return tuple(steps)


def _equal_chunks(tokens: int, count: int) -> list[int]:
    """`tokens` in `count` parts that differ by one at most, the larger ones first."""
    size, larger = divmod(tokens, count)
    return [size + (index < larger) for index in range(count)]


class _Schedule:
    """The targets of the memory, the chunks, and the steps that follow from both."""

    def __init__(self, prompt_tokens: int, stored_tokens: int, config: PrefillConfig, chunk: int) -> None:
        memory = config.memory_tokens
        self.prompt_tokens = prompt_tokens
        self.stored_tokens = stored_tokens
        self.budget = memory + chunk
        # The first chunk makes room for a cache that holds more than M already.
        self.room = max(least_first_chunk(chunk), self.budget - stored_tokens)
        self.count = math.ceil(prompt_tokens / chunk)
        self.first = min(math.ceil(prompt_tokens / self.count), self.room)
        if prompt_tokens > self.first:
            self.count = 1 + math.ceil((prompt_tokens - self.first) / chunk)
        self.least = least_chunk((prompt_tokens - self.first) // max(1, self.count - 1))
        # A prompt that fits is not cut at all; of any other exactly this many KV pairs go, and memory ends at M.
        self.drops = max(0, stored_tokens + prompt_tokens - memory)
        least = min(memory, max(1, stored_tokens, config.sink_tokens + config.recent_tokens))
        first = memory if config.schedule == "fm" else max(least, config.first_memory_tokens(self.count, chunk))
        self.targets = [max(least, target) for target in _targets(config.growth, first, memory, self.count)]

    def equal(self) -> list[int]:
        """Chunks of one size, but for a first one that has less room."""
        if self.count == 1:
            return [self.first]
        return [self.first, *_equal_chunks(self.prompt_tokens - self.first, self.count - 1)]

    def balanced(self, cost: MemoryCost | None) -> list[int]:
        """Chunks that with their memory, weighed by `cost`, add up to one level: the lowest that covers the prompt.

        Binary search in two stages: the lowest level that covers the prompt; then, one token below it, the fewest first
        steps that must be raised by one.
        """
        if self.count == 1:
            return [self.first]
        weights = cost or TOKENS
        # The paper's first chunk is N / n.
        first = None if cost else self.first

        def covers(level: int, raised: int) -> bool:
            return sum(self._within(level, raised, weights, first)) == self.prompt_tokens

        highest = math.ceil((1 + weights.before + weights.after) * max(self.budget, self.stored_tokens))
        level = _lowest(0, highest, lambda level: covers(level, 0)) - 1
        raised = _lowest(0, self.count, lambda raised: covers(level, raised))
        return self._within(level, raised, weights, first)

    def _within(self, level: int, raised: int, weights: MemoryCost, first: int | None) -> list[int]:
        """The largest chunks that keep every step within the level, until the prompt is read."""
        chunks: list[int] = []
        memory, dropped, unread = self.stored_tokens, 0, self.prompt_tokens
        for index, target in enumerate(self.targets):
            left = self.drops - dropped
            free = level + (index < raised) - weights.before * memory
            # `_kept`, solved for the chunk: all is kept, or the target, or what exceeds the drops that are left.
            room = max((free - weights.after * memory) / (1 + weights.after), free - weights.after * target)
            room = min(room, (free - weights.after * (memory - left)) / (1 + weights.after))
            most = min(self.budget - memory if index else self.room, unread - self.least * (self.count - 1 - index))
            chunk = first if first and not index else min(most, max(self.least, math.floor(room)))
            after = self._kept(memory + chunk, target, dropped)
            dropped, unread, memory = dropped + memory + chunk - after, unread - chunk, after
            chunks.append(chunk)
        return chunks

    def _kept(self, present: int, target: int, dropped: int) -> int:
        """KV pairs kept of `present`: the target, unless fewer are there, or fewer may go after `dropped` went."""
        return max(min(present, target), present - (self.drops - dropped))

    def steps(self, chunks: Sequence[int]) -> tuple[Step, ...]:
        """The steps of these chunks: memory follows the targets as far as there is something to keep, or to drop."""
        steps: list[Step] = []
        start, memory, dropped = 0, self.stored_tokens, 0
        for index, (chunk, target) in enumerate(zip(chunks, self.targets, strict=True)):
            after = self._kept(memory + chunk, target, dropped)
            steps.append(Step(index, start, chunk, memory, after))
            start, dropped, memory = start + chunk, dropped + memory + chunk - after, after
        return tuple(steps)


def _targets(growth: str, first: int, last: int, count: int) -> list[int]:
    """Memory after each of `count` steps, from `first` to exactly `last`, before what has been read limits it."""
    grown = last - first
    targets = []
    for index in range(count - 1):
        share = index / (count - 1)
        if growth == "linear":
            exact = first + grown * share
        elif growth == "sqrt":
            exact = first + grown * math.sqrt(share)
        elif growth == "square":
            exact = first + grown * share**2
        elif growth == "inverse_convex":
            exact = last / (count - index)
        else:
            exact = last + first - last / (index + 1)
        targets.append(min(last, round(exact)))
    return [*targets, last]


def _lowest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """The lowest value in low..high that is enough; `high` is known to be."""
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low
