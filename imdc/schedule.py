"""The steps of a prefill: how large each chunk is and how much memory it leaves behind. Pure Python, no torch.

Step i reads chunk c_i against the memory m_(i-1) and keeps m_i of the m_(i-1) + c_i KV pairs. With N prompt tokens,
C = chunk_tokens and M = memory_tokens there are n = ceil(N / C) steps, so a schedule never costs more steps than
another one. Memory follows a target that ends at M:

    fm               M from the first step on
    im, imdc         a = initial_memory grows to M by one of the shapes below (i = 0..n-1)
        linear           a + (M - a) * i / (n - 1)
        sqrt             a + (M - a) * sqrt(i / (n - 1))
        square           a + (M - a) * (i / (n - 1))^2
        inverse_convex   M / (n - i)
        inverse_concave  M + a - M / (i + 1)
    full             everything is kept

No target is below the sinks and recent tokens that are always kept, nor below what a second turn finds stored.

Chunks of "fm", "im" and "full" are equal (they differ by one token at most). Those of "imdc" shrink as the memory
grows, so that memory_before + c_i is the same level L at every step after the first, which reads N / n. Without
limits that is c_i = N/n + mean(m_0..m_(n-2)) - m_(i-1), the token-balanced rule of the IMDC paper (Incremental Memory
and Decremental Chunk). Its last chunks turn negative where M is large against C, so here no chunk is
smaller than a quarter of N / n, and L is solved for: the level at which the n chunks cover the prompt exactly.

What holds for every N, M, C, growth and stored cache:

- The chunks cover the prompt once, in order, and each has at least one token.
- Memory never shrinks, except that a cache that already holds more than M is cut to M by the first step.
- No more is ever dropped than must be: a prompt that fits keeps every KV pair, any other ends at exactly M.
- memory_before + chunk_tokens <= M + C at every step (FM's own peak), or <= stored + max(1, C // 4) in the first step
  of a second turn whose stored cache leaves less room than that ("full" has no bound).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from imdc.config import PrefillConfig
from imdc.errors import ConfigError

# Smaller chunks would leave the matrix products of a GPU idle, larger ones would keep IMDC from balancing: at M = 8C a
# quarter gives 1.8 times fewer query-key pairs than FM, an eighth hardly more.
_LEAST_SHARE = 4


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


def build_steps(
    prompt_tokens: int, config: PrefillConfig, *, stored_tokens: int = 0, chunk_tokens: int | None = None
) -> tuple[Step, ...]:
    """The steps in which `prompt_tokens` new tokens are read.

    Args:
        prompt_tokens: tokens to read, N >= 1.
        config: the options; `chunk_tokens` must be a number there or be given here.
        stored_tokens: KV pairs that the cache already holds (a second turn); may exceed `memory_tokens`.
        chunk_tokens: mean chunk size in place of the config's, for a planner that has chosen one.

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
    walk = _Walk(prompt_tokens, stored_tokens, config, chunk)
    return walk.balanced() if config.schedule == "imdc" and walk.drops > 0 else walk.equal()


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


class _Walk:
    """Memory and chunks of one prompt, walked from the first step to the last."""

    def __init__(self, prompt_tokens: int, stored_tokens: int, config: PrefillConfig, chunk: int) -> None:
        memory = config.memory_tokens
        self.prompt_tokens = prompt_tokens
        self.stored_tokens = stored_tokens
        self.memory_tokens = memory
        self.chunk = chunk
        # The first chunk makes room for a cache that holds more than M already.
        room = max(1, chunk // _LEAST_SHARE, memory + chunk - stored_tokens)
        self.count = math.ceil(prompt_tokens / chunk)
        self.first = min(math.ceil(prompt_tokens / self.count), room)
        if prompt_tokens > self.first:
            self.count = 1 + math.ceil((prompt_tokens - self.first) / chunk)
        # A prompt that fits is not cut at all; of any other exactly this many KV pairs go, and memory ends at M.
        self.drops = max(0, stored_tokens + prompt_tokens - memory)
        least = min(memory, max(1, stored_tokens, config.sink_tokens + config.recent_tokens))
        first = memory if config.schedule == "fm" else max(least, config.first_memory_tokens)
        self.targets = [max(least, target) for target in _targets(config.growth, first, memory, self.count)]

    def equal(self) -> tuple[Step, ...]:
        """Steps of equal chunks."""
        rest = _equal_chunks(self.prompt_tokens - self.first, self.count - 1) if self.count > 1 else []
        return self._walk(lambda index, memory: rest[index - 1])

    def balanced(self) -> tuple[Step, ...]:
        """Steps whose memory and chunk add up to one level: the one at which they cover the prompt.

        One more token of level at one step brings one more token read or none, over the whole walk. So the number of
        tokens read rises with the level: first in whole steps (the lowest level that reads enough at all steps), then
        token by token (from the level below, only the first `raised` steps are one higher).
        """
        level = _lowest(0, self.memory_tokens + self.chunk, lambda level: self._read(level, 0) >= self.prompt_tokens)
        raised = _lowest(0, self.count, lambda raised: self._read(level - 1, raised) >= self.prompt_tokens)
        return self._walk(self._chunk_at(level - 1, raised))

    def _chunk_at(self, level: int, raised: int) -> Callable[[int, int], int]:
        least = max(1, (self.prompt_tokens - self.first) // max(1, self.count - 1) // _LEAST_SHARE)
        return lambda index, memory: max(least, level + (index < raised) - memory)

    def _read(self, level: int, raised: int) -> int:
        """Tokens that a walk at this level reads; `_walk` without the records, since it runs some thirty times."""
        chunk_at = self._chunk_at(level, raised)
        memory, dropped = self.stored_tokens, 0
        for index, target in enumerate(self.targets):
            attended = memory + (self.first if index == 0 else chunk_at(index, memory))
            drop = max(0, min(attended - target, self.drops - dropped))
            memory, dropped = attended - drop, dropped + drop
        return memory + dropped - self.stored_tokens

    def _walk(self, chunk_at: Callable[[int, int], int]) -> tuple[Step, ...]:
        steps: list[Step] = []
        start, memory, dropped = 0, self.stored_tokens, 0
        for index, target in enumerate(self.targets):
            chunk = self.first if index == 0 else chunk_at(index, memory)
            drop = max(0, min(memory + chunk - target, self.drops - dropped))
            after = memory + chunk - drop
            steps.append(Step(index, start, chunk, memory, after))
            start, memory, dropped = start + chunk, after, dropped + drop
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
