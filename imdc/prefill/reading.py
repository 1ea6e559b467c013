"""What the steps of a prefill share: the tools of all rows, and the state of the row that is being read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from imdc.cache.rows import Row
from imdc.cache.store import HostStore
from imdc.config import PrefillConfig
from imdc.model.parts import Parts
from imdc.observers import Observer
from imdc.prefill.backends import Backend
from imdc.prefill.recall import Recall
from imdc.prefill.recording import Recorder
from imdc.prefill.turn import RowTurn


class Workspace:
    """The one buffer for memory | chunk | tail rows that all layers of a prefill share, per device and head shape."""

    def __init__(self) -> None:
        """Nothing is allocated before the first layer asks."""
        self._buffers: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def take(self, states: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, Hkv, length, D], not initialised, of the device and dtype of `states`."""
        key = (states.device, states.dtype, states.shape[1], states.shape[3])
        if key not in self._buffers or self._buffers[key][0].shape[2] < length:
            self._buffers.pop(key, None)
            size = (1, states.shape[1], length, states.shape[3])
            self._buffers[key] = (states.new_empty(size), states.new_empty(size))
        keys, values = self._buffers[key]
        return keys[:, :, :length], values[:, :, :length]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(k.nbytes + v.nbytes for k, v in self._buffers.values())


class Retention:
    """The retention ratios of a row's compressed layers so far, averaged over its steps."""

    def __init__(self, layers: Sequence[int]) -> None:
        """Of these layers."""
        self._layers = layers
        self._sums, self._count = [0.0] * len(layers), 0

    def add(self, retention: Sequence[float | None]) -> None:
        """Count a step, by all layers; one that had no memory before does not count."""
        ratios = [retention[layer] for layer in self._layers]
        if ratios and None not in ratios:
            self._sums = [total + (ratio or 0.0) for total, ratio in zip(self._sums, ratios, strict=True)]
            self._count += 1

    def means(self) -> list[float] | None:
        """The mean of every layer; None before the first step that counts."""
        return [total / self._count for total in self._sums] if self._count else None


@dataclass(frozen=True, slots=True)
class Tools:
    """With what rows are read: the model, who computes, who decides, and the buffer that all layers share."""

    parts: Parts
    backend: Backend
    observer: Observer
    workspace: Workspace = field(default_factory=Workspace)


@dataclass(frozen=True, slots=True)
class RowReading:
    """One row while it is read; its memory is replaced layer by layer.

    Attributes:
        row: the row.
        config: the options, with the sizes in force for it.
        retention: what its layers retained so far.
        rotated: whether its keys come rotated and stay so.
        questions: lengths of the questions that tail rows are; empty where all of them follow the text together.
        store: where all pairs that are read go.
        recall: what takes pairs back from a store, in exchange for the row's.
        recorder: what notes for a probe what the layers keep; None where none is on.
        entropies: of the compressed layers' keys in the first chunk, where the layer budget asks for them and there are
            further steps to use them; None elsewhere.
    """

    row: Row
    config: PrefillConfig
    retention: Retention
    rotated: bool = False
    questions: tuple[int, ...] = ()
    store: HostStore | None = None
    recall: Recall | None = None
    recorder: Recorder | None = None
    entropies: dict[int, float] | None = None

    def measured(self, layers: Sequence[int]) -> list[float] | None:
        """What the shares of `layers` in a growing memory go by, as far as it is known; see `imdc.layer_budgets`."""
        if self.config.layer_budget == "entropy":
            return [self.entropies[layer] for layer in layers] if self.entropies else None
        return self.retention.means()

    @classmethod
    def of(cls, turn: RowTurn, tools: Tools, recorder: Recorder | None = None) -> RowReading:
        """The reading of a turn that begins."""
        row, store, fresh = turn.row, turn.store, turn.row.tokens == 0
        recall = None
        if store is not None and not fresh:
            recall = Recall(store, tools.parts, turn.config, tools.backend, row.compact)
        return cls(
            row=row,
            config=turn.config,
            retention=Retention(tools.parts.full_layers),
            rotated=row.compact and not fresh and len(turn.steps) == 1 and store is None,
            questions=turn.questions,
            store=store if fresh else None,
            recall=recall,
            recorder=recorder,
            entropies={} if turn.config.layer_budget == "entropy" and len(turn.steps) > 1 else None,
        )
