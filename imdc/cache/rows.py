"""The rows of a batch apart: each prompt is read alone, with its own memory and its own positions."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, slots=True)
class Taken:
    """What a question took back in one layer: `places` int32 [1, Hkv, m] in the text, and their `scores`, float32.

    Both on the CPU.
    """

    places: Tensor
    scores: Tensor


@dataclass(slots=True)
class Row:
    """The KV memory of one prompt row, per layer, while it is read and between turns.

    Attributes:
        keys: per layer [1, Hkv, n, D]. With compact positions the keys of a row that is being read are canonical
            (not rotated), those of a finished row are rotated.
        values: as `keys`.
        tokens: tokens seen so far, padding not counted.
        position: rotary position of the next token.
        compact: whether its memory is numbered 0..m-1.
        question: the last token ids of the turn's prompt, int64 [n] on the CPU: who judges while the answer is
            compressed.
        taken: what its question took back, per layer that did; nothing without recall.
    """

    keys: list[Tensor | None]
    values: list[Tensor | None]
    tokens: int = 0
    position: int = 0
    compact: bool = False
    question: Tensor | None = None
    taken: dict[int, Taken] = field(default_factory=dict)

    @classmethod
    def empty(cls, layers: int) -> Row:
        """A row that has read nothing."""
        return cls([None] * layers, [None] * layers)

    def stored(self, layer: int) -> int:
        """KV pairs stored per KV head in `layer`."""
        keys = self.keys[layer]
        return 0 if keys is None else keys.shape[2]

    def nbytes(self) -> int:
        """Bytes of all stored keys and values."""
        return sum(x.nbytes for x in (*self.keys, *self.values) if x is not None)


@dataclass(slots=True)
class RowState:
    """What is kept per row beside its keys and values; all tensors are int64 [B] on the CPU, `compact` is bool.

    Attributes:
        tokens: tokens seen by the prefill, padding not counted.
        position: rotary position that follows the prefill.
        padding: int64 [B, layers], unused slots at the front of the full-attention layers of shorter rows.
        compact: whether the row's memory is numbered 0..m-1.
        question: the last token ids of the turn's prompt, int64 [B, n], shorter ones preceded by -1.
        taken: per row what its question took back, per layer that did; no tensors, and no file has it.
    """

    tokens: Tensor
    position: Tensor
    padding: Tensor
    compact: Tensor
    question: Tensor
    taken: list[dict[int, Taken]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Rows of which nothing is said took nothing back."""
        self.taken = self.taken or [{} for _ in range(self.tokens.numel())]

    @classmethod
    def of(cls, rows: list[Row], padding: list[list[int]]) -> RowState:
        """The state of finished rows; `padding` per layer and row."""
        questions = [
            row.question if row.question is not None else torch.empty(0, dtype=torch.long, device="cpu") for row in rows
        ]
        return cls(
            tokens=torch.tensor([row.tokens for row in rows], device="cpu"),
            position=torch.tensor([row.position for row in rows], device="cpu"),
            padding=torch.tensor(padding, device="cpu").T.contiguous(),
            compact=torch.tensor([row.compact for row in rows], device="cpu"),
            question=pad_sequence(questions, batch_first=True, padding_value=-1, padding_side="left"),
            taken=[row.taken for row in rows],
        )

    def select(self, index: Tensor) -> RowState:
        """The rows `index`, in that order."""
        index = index.cpu()
        tensors = {one.name: getattr(self, one.name)[index] for one in fields(self) if one.name != "taken"}
        return RowState(**tensors, taken=[self.taken[number] for number in index.tolist()])
