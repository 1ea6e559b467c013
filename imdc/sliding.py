"""The cache layer of sliding-window attention: transformers' own, able to take decoded tokens back.

transformers before 5.14 cannot crop a sliding window, and gives assisted decoding full layers instead. Those would
grow with the prompt, so this layer records what it is about to drop, as transformers' own does since 5.14.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from imdc.errors import UnsupportedCallError


class SlidingLayer(DynamicSlidingWindowLayer):
    """Keys and values [B, Hkv, stored, D] of the last `sliding_window - 1` tokens.

    Attributes:
        record_past: whether tokens that leave the window stay until the next `crop`.
        cumulative_length: tokens seen, padding included.
    """

    is_croppable = True

    def __init__(self, sliding_window: int) -> None:
        """An empty layer of a model that sees `sliding_window` tokens, the current one included."""
        super().__init__(sliding_window)
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep what leaves the window until the next `crop`, which may then take tokens back."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, q, D] and return what the q queries may see: at most a window before each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.cumulative_length += key_states.shape[2]
        keys = torch.cat((self.keys, key_states), dim=2)
        values = torch.cat((self.values, value_states), dim=2)
        before = self.sliding_window - 1
        kept = 0 if self.record_past else max(0, keys.shape[2] - before)
        self.keys, self.values = keys[:, :, kept:], values[:, :, kept:]
        visible = max(0, keys.shape[2] - before - key_states.shape[2])
        return keys[:, :, visible:], values[:, :, visible:]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (negative count), or all but the first n seen (transformers < 5.14).

        Raises:
            UnsupportedCallError: tokens that left the window would have to come back, and were not recorded.
        """
        if self.keys is None or self.values is None:
            return
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.cumulative_length - tokens_to_remove)
        before, seen = self.sliding_window - 1, self.cumulative_length - removed
        end = self.keys.shape[2] - removed
        if removed and end < min(before, seen):
            raise UnsupportedCallError(
                f"crop({tokens_to_remove}) would bring back tokens that left the window of {self.sliding_window}; "
                f"call record_past(True) of the cache before decoding them"
            )
        start = max(0, end - before)
        self.keys, self.values = self.keys[:, :, start:end], self.values[:, :, start:end]
        self.cumulative_length = seen
