"""The prompts of a batch: its rows without padding, of which equal ones are read once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from imdc.errors import UnsupportedCallError
from imdc.prefill.history import check_mask_shape
from imdc.prefill.logits import WantedLogits, real_tokens


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a batch asks to read.

    Attributes:
        texts: int64 [n] of every row of the batch.
        unique: the rows that are read.
        order: row i of the batch is what the `order[i]`-th of `unique` becomes.
        wanted: for which tokens logits are given.
    """

    texts: list[Tensor]
    unique: list[int]
    order: list[int]
    wanted: WantedLogits

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor | None, *, seen: int, logits_to_keep: int, alike: bool
    ) -> Prompts:
        """The prompts `input_ids` int64 [B, T] behind `seen` columns.

        Args:
            input_ids: new tokens of every row.
            attention_mask: [B, seen + T], or its last T columns; 0 marks padding. None: none.
            seen: columns of earlier turns.
            logits_to_keep: for how many last tokens of each row logits are given; 0 for every column.
            alike: whether rows with the same new tokens are the same, as they are behind one text.

        Raises:
            UnsupportedCallError: a row is empty, or the mask has another shape.
        """
        rows, columns = input_ids.shape
        if columns == 0 or rows == 0:
            raise UnsupportedCallError(f"input_ids has shape {tuple(input_ids.shape)}: an empty prompt; pass a token")
        if attention_mask is not None:
            check_mask_shape(attention_mask, (rows, columns), seen)
        real = real_tokens(input_ids, attention_mask)
        # Picking tokens out by a mask makes the host wait for the device.
        masked = attention_mask is not None
        texts = [ids[mask] for ids, mask in zip(input_ids, real, strict=True)] if masked else list(input_ids)
        for number, text in enumerate(texts):
            if text.numel() == 0:
                raise UnsupportedCallError(f"row {number} of input_ids is all padding: an empty prompt; pass a token")
        unique, order = _distinct(texts) if alike else (list(range(rows)), list(range(rows)))
        return cls(texts, unique, order, WantedLogits(real, logits_to_keep, order))


def _distinct(texts: list[Tensor]) -> tuple[list[int], list[int]]:
    """(unique, order): text i equals text unique[order[i]]."""
    seen: dict[bytes, int] = {}
    unique: list[int] = []
    order: list[int] = []
    for number, text in enumerate(texts):
        name = text.cpu().numpy().tobytes()
        if name not in seen:
            seen[name] = len(unique)
            unique.append(number)
        order.append(seen[name])
    return unique, order
