"""The cache layers of transformers that imdc works with: compressed full attention, and sliding windows.

A `MemoryLayer` stores [memory | tail]: what the prefill kept, then what decoding appended. It counts tokens *seen*
apart from KV pairs *stored*, so that transformers builds its masks and positions from the right one of the two.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from imdc.config import TAIL_BLOCK
from imdc.errors import UnsupportedCallError
from imdc.model import hf

# What a layer held at one moment: tokens stored and seen, and the tail; or the window's tensors and tokens seen.
Mark = tuple[Any, ...]


class MemoryLayer(hf.CacheLayerMixin):
    """One full-attention layer: compressed memory and decode tail in one buffer [B, Hkv, capacity, D].

    `keys` and `values` are views of the stored part. The buffer grows by blocks, never per token.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self) -> None:
        """An empty layer."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0
        self.tail = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def stored(self) -> int:
        """KV pairs stored per KV head and row, padding slots of shorter rows included."""
        return 0 if self.keys is None else self.keys.shape[2]

    def load(self, keys: Tensor, values: Tensor, seen: int) -> None:
        """Take [B, Hkv, m, D] keys and values as the memory of `seen` tokens; the tail becomes empty."""
        self.lazy_initialization(keys, values)
        self.keys, self.values, self._buffers = keys, values, None
        self.seen, self.tail = seen, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, q, D] to the tail and return all stored keys and values."""
        if not self.is_initialized or self.keys is None or self.values is None:
            raise UnsupportedCallError(
                "this cache was never prefilled; call generate() or model(...) of a patched model"
            )
        count, length = key_states.shape[2], self.stored
        if self._buffers is None or not self._writable(self._buffers[0], length + count):
            self._buffers = (self._roomier(self.keys, count), self._roomier(self.values, count))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + count] = states
        self._view(length + count)
        self.seen += count
        self.tail += count
        return self.keys, self.values

    @staticmethod
    def _writable(buffer: Tensor, length: int) -> bool:
        # What was made in inference mode may not be written outside it.
        return buffer.shape[2] >= length and (torch.is_inference_mode_enabled() or not buffer.is_inference())

    @staticmethod
    def _roomier(states: Tensor, count: int) -> Tensor:
        length = states.shape[2]
        blocks = -(-count // TAIL_BLOCK)
        buffer = states.new_empty(*states.shape[:2], length + blocks * TAIL_BLOCK, states.shape[3])
        buffer[:, :, :length] = states
        return buffer

    def _view(self, length: int) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def get_seq_length(self) -> int:
        """Tokens seen, not KV pairs stored."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(KV length, offset) of the mask: the stored pairs are the last ones of those seen."""
        return self.stored + query_length, self.seen - self.stored

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens; see `ImdcCache.crop`, which checks that they can be."""
        removed = -tokens_to_remove
        if removed == 0 or self.keys is None or self.values is None:
            return
        self.keys, self.values = (x[:, :, : self.stored - removed] for x in (self.keys, self.values))
        self.seen -= removed
        self.tail = max(0, self.tail - removed)

    def mark(self) -> Mark:
        """What `rewind` needs to take back all that is appended from now on."""
        return self.stored, self.seen, self.tail

    def rewind(self, mark: Mark) -> None:
        """Be as at `mark`, also when an `update` since then was cut off anywhere."""
        stored, self.seen, self.tail = mark
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :stored], self.values[:, :, :stored]

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self._buffers = None
        self.is_initialized = False
        self.seen = self.tail = 0

    def offload(self) -> None:
        """Move the stored pairs to the CPU."""
        super().offload()  # type: ignore[no-untyped-call]
        self._buffers = None

    def twin(self, rows: int) -> MemoryLayer:
        """A layer of `rows` rows that begin with this one's only row; their tensors are shared until one appends."""
        twin = copy.copy(self)
        if self.keys is not None and self.values is not None:
            twin.keys, twin.values = (x.expand(rows, -1, -1, -1) for x in (self.keys, self.values))
        # Both would write to the spare room of one buffer.
        twin._buffers = None
        return twin

    def _reindex(self, index: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            index = index.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
            self._buffers = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        self._reindex(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        self._reindex(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.keys is not None:
            self._reindex(torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats))


class SlidingLayer(hf.DynamicSlidingWindowLayer):
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

    def mark(self) -> Mark:
        """What `rewind` needs to take back all that is appended from now on."""
        return self.keys, self.values, self.cumulative_length

    def rewind(self, mark: Mark) -> None:
        """Be as at `mark`, also when an `update` since then was cut off anywhere."""
        self.keys, self.values, self.cumulative_length = mark

    def twin(self, rows: int) -> SlidingLayer:
        """A layer of `rows` rows that begin with this one's only row; their tensors are shared, and never written."""
        twin = copy.copy(self)
        if self.keys is not None and self.values is not None:
            twin.keys, twin.values = (x.expand(rows, -1, -1, -1) for x in (self.keys, self.values))
        return twin

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0

    def trim(self) -> None:
        """Drop what has left the window."""
        if self.keys is not None and self.values is not None:
            kept = max(0, self.keys.shape[2] - self.sliding_window + 1)
            self.keys, self.values = self.keys[:, :, kept:], self.values[:, :, kept:]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens, and what has left the window then.

        Raises:
            UnsupportedCallError: tokens that left the window would have to come back, and were not recorded.
        """
        if self.keys is None or self.values is None:
            return
        removed, before = -tokens_to_remove, self.sliding_window - 1
        seen = self.cumulative_length - removed
        end = self.keys.shape[2] - removed
        if removed and end < min(before, seen):
            raise UnsupportedCallError(
                f"crop({tokens_to_remove}) would bring back tokens that left the window of {self.sliding_window}; "
                f"only assisted decoding keeps those: read the prompt again instead"
            )
        start = max(0, end - before)
        self.keys, self.values = self.keys[:, :, start:end], self.values[:, :, start:end]
        self.cumulative_length = seen
