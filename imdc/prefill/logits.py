"""For which tokens of a batch a forward call gives logits: what `logits_to_keep` means in transformers."""

from __future__ import annotations

import torch
from torch import Tensor


def real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which of `input_ids` [B, T] are tokens, not padding; bool [B, T]."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask[:, -input_ids.shape[1] :].to(input_ids.device, torch.bool)


class WantedLogits:
    """For which tokens of a batch the caller wants logits.

    With `logits_to_keep=1` those of each row's last token, wherever padding is; else those of the last columns, or of
    all of them (0), with zeros at padding.
    """

    def __init__(self, real: Tensor, logits_to_keep: int, order: list[int]) -> None:
        """`real` bool [B, T] says which columns are tokens; row i is read as the `order[i]`-th one."""
        self._order = order
        self._last = logits_to_keep == 1
        self._real = real[:, -logits_to_keep:]

    def keep(self, number: int) -> int:
        """How many last tokens of the row that is read as the `number`-th one are wanted, at least 1."""
        if self._last:
            return 1
        counts = self._real.sum(dim=1).tolist()
        return max(1, *(int(count) for count, place in zip(counts, self._order, strict=True) if place == number))

    def of_batch(self, logits: list[Tensor]) -> Tensor:
        """Logits [B, kept, V] of the batch from [1, n, V] of the rows that were read."""
        if self._last:
            return torch.cat(logits)[torch.tensor(self._order, device="cpu")]
        return torch.cat(
            [self._spread(logits[place], real) for place, real in zip(self._order, self._real, strict=True)]
        )

    @staticmethod
    def _spread(logits: Tensor, real: Tensor) -> Tensor:
        count = int(real.sum())
        if count == real.numel():
            return logits[:, -count:]
        spread = logits.new_zeros(1, real.numel(), logits.shape[2])
        if count:
            spread[:, real.to(logits.device)] = logits[:, -count:]
        return spread
