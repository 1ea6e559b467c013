"""What a prefill did: plain records, filled by the engine and read by callers, the CLI and benchmarks.

Tokens are counted per prompt row; bytes are bytes (never MiB); seconds are wall-clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from imdc.config import PrefillConfig
from imdc.schedule import Step


class OfStep:
    """What is said of one step shows that step's own numbers as its attributes."""

    __slots__ = ()
    step: Step

    @property
    def index(self) -> int:
        """Number of the step in its row."""
        return self.step.index

    @property
    def start(self) -> int:
        """First prompt token read."""
        return self.step.start

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens read."""
        return self.step.chunk_tokens

    @property
    def memory_before(self) -> int:
        """KV pairs that they are read against."""
        return self.step.memory_before

    @property
    def memory_after(self) -> int:
        """KV pairs retained."""
        return self.step.memory_after


@dataclass(frozen=True, slots=True)
class StepReport(OfStep):
    """One step of one prompt row: `step` as planned, and what it took.

    Attributes:
        row: number of the row among those that were read.
        step: chunk and memory.
        step_count: steps of the row.
        prompt_tokens: tokens of the row.
        seconds: wall-clock time.
        kv_bytes: bytes of the memory of all rows read so far.
        retention: per layer the share of the memory before the step, 0 to 1 and averaged over KV heads, that survived
            it (the IMDC paper's retention ratio); None in sliding-window layers and where there was no memory yet.
    """

    row: int
    step: Step
    step_count: int
    prompt_tokens: int
    seconds: float
    kv_bytes: int
    retention: tuple[float | None, ...]

    @property
    def tokens_read(self) -> int:
        """Prompt tokens of the row read so far."""
        return self.start + self.chunk_tokens

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens of this step per wall-clock second."""
        return self.chunk_tokens / self.seconds if self.seconds > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """The last prefill of a patched model.

    `config` has the sizes in force: with compact positions those that were left out may be smaller than the defaults.
    `prompt_tokens` sums over the rows that were really read: identical rows (beams) are read once.
    `kv_bytes` is what the finished cache stores over all layers, `memory_tokens` the longest row's stored
    KV pairs per layer (on average) and KV head, and `restarts` how often an out-of-memory step began again with a
    smaller plan. With recall, `host_bytes` are those of the pairs in host memory or on disk, `recalled_bytes` what
    question and answer read of them, and `recall_seconds` how long that took; the question's are among `seconds`.
    """

    config: PrefillConfig
    backend: str
    rows: int
    prompt_tokens: int
    memory_tokens: int
    kv_bytes: int
    seconds: float
    steps: tuple[StepReport, ...]
    restarts: int = 0
    host_bytes: int = 0
    recalled_bytes: int = 0
    recall_seconds: float = 0.0

    def followed_by(self, question: PrefillReport) -> PrefillReport:
        """This reading of a text and that of the `question` behind it as one: what the cache has is the latter's."""
        return replace(
            question,
            config=self.config,
            prompt_tokens=self.prompt_tokens + question.prompt_tokens,
            seconds=self.seconds + question.seconds,
            steps=self.steps + question.steps,
            restarts=self.restarts + question.restarts,
        )

    def renewed(self, moved_bytes: int, seconds: float) -> PrefillReport:
        """With what the answer has read of the store since."""
        moved, spent = self.recalled_bytes + moved_bytes, self.recall_seconds + seconds
        return replace(self, recalled_bytes=moved, recall_seconds=spent)

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens read per wall-clock second."""
        return self.prompt_tokens / self.seconds if self.seconds > 0 else float("inf")
