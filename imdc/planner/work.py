"""What one step of a plan asks of a model, and what is alive in a phase of a layer: the words of the byte counts."""

from __future__ import annotations

from dataclasses import dataclass

from imdc.config import PrefillConfig
from imdc.model.backend_rule import ANY_MACHINE, KERNELS, Machine
from imdc.model.shape import ModelShape
from imdc.observers import find_observer
from imdc.schedule import Step, observing_rows


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes besides memory and workspace, by kind.

    `layer_memory` says which memory of the running layer exists: that from "before", "none" while the workspace alone
    holds it, or that from "after".
    """

    name: str
    activations: int
    attention: int = 0
    scoring: int = 0
    logits: int = 0
    layer_memory: str = "before"

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.activations + self.attention + self.scoring + self.logits


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of one kind, and the KV pairs that each of them stores before and after the step."""

    count: int
    before: int
    after: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Work:
    """What one step of a plan asks of a model; r, T and the rest as in the text of `imdc.planner.layer_bytes`.

    `seen_tokens` were read by earlier turns. `layers` are the KV pairs of each full-attention layer before and after,
    where these differ. `machine` is where it runs. `recalled` are the tokens of the text that a question
    takes its memory back from.
    """

    shape: ModelShape
    config: PrefillConfig
    step: Step
    tail: int
    last: bool
    backend: str
    compact: bool
    seen_tokens: int = 0
    layers: tuple[tuple[int, int], ...] = ()
    machine: Machine = ANY_MACHINE
    recalled: int = 0

    @property
    def rows(self) -> int:
        """Query rows r: the chunk and the prompt tail."""
        return self.step.chunk_tokens + self.tail

    @property
    def kinds(self) -> list[Layers]:
        """Full-attention layers, which follow the plan, and sliding-window layers, which keep window - 1 pairs."""
        shape, step = self.shape, self.step
        full = [Layers(shape.full_layers, step.memory_before, step.memory_after, None)]
        if self.layers:
            full = [Layers(1, before, after, None) for before, after in self.layers]
        limit = (shape.window or 1) - 1
        begin = self.seen_tokens + step.start
        end = begin + step.chunk_tokens
        sliding = Layers(shape.sliding_layers, min(begin, limit), min(end, limit), shape.window)
        return [layers for layers in (sliding, *full) if layers.count]

    @property
    def keys(self) -> int:
        """KV pairs in the workspace while the layer with the most of them runs."""
        return max(layers.before for layers in self.kinds) + self.rows

    @property
    def drops(self) -> bool:
        """Whether any KV pair goes."""
        return self.step.memory_after < self.step.attended_tokens

    @property
    def observing_rows(self) -> int:
        """Query rows that score keys, 0 where nothing is dropped or the observer asks no queries."""
        return (observing_rows(self.config, self.step.chunk_tokens, self.tail) or 0) if self.drops else 0

    @property
    def voting_rows(self) -> int:
        """Those of them that vote."""
        return -(-self.observing_rows // self.config.observation_stride)

    @property
    def in_one_call(self) -> bool:
        """Whether one call of the backend attends, scores and selects."""
        plain = find_observer(self.config.observer).is_plain and not self.shape.sinks
        return self.backend in KERNELS and self.observing_rows > 0 and plain and len(self.questions) < 2

    @property
    def questions(self) -> tuple[int, ...]:
        """Tokens of each question that rides along; several attend one after another, see `imdc.prefill.step`."""
        return tuple(map(len, find_observer(self.config.observer).questions)) if self.tail else ()
