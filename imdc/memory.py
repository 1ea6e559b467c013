"""The compressed KV cache that `generate()` works with: transformers cache layers over a bounded memory.

A layer stores [memory | tail]: what the prefill kept, then what decoding appended. It counts tokens *seen* apart from
KV pairs *stored*, so that transformers builds its masks and positions from the right one of the two.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from imdc.errors import UnsupportedCallError
from imdc.rows import Row, RowState
from imdc.sliding import SlidingLayer

# Decoding appends one KV pair at a time; room is made for this many at once.
_TAIL_BLOCK = 128


class MemoryLayer(CacheLayerMixin):
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
        if self._buffers is None or self._buffers[0].shape[2] < length + count:
            self._buffers = (self._roomier(self.keys, count), self._roomier(self.values, count))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + count] = states
        self._view(length + count)
        self.seen += count
        self.tail += count
        return self.keys, self.values

    @staticmethod
    def _roomier(states: Tensor, count: int) -> Tensor:
        length = states.shape[2]
        blocks = -(-count // _TAIL_BLOCK)
        buffer = states.new_empty(*states.shape[:2], length + blocks * _TAIL_BLOCK, states.shape[3])
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

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in transformers before 5.10."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of the tail (negative count), or all but the first n seen (transformers < 5.14).

        Raises:
            UnsupportedCallError: the memory itself would have to be cut; what it dropped cannot come back.
        """
        if not self.is_initialized:
            return
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if removed == 0:
            return
        if removed > self.tail:
            raise UnsupportedCallError(
                f"crop({tokens_to_remove}) would cut {removed} tokens, but only the {self.tail} decoded since the last "
                f"compression can be removed; read the prompt again instead"
            )
        assert self.keys is not None and self.values is not None
        self.keys, self.values = (x[:, :, : self.stored - removed] for x in (self.keys, self.values))
        self.seen -= removed
        self.tail -= removed

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self._buffers = None
        self.is_initialized = False
        self.seen = self.tail = 0

    def offload(self) -> None:
        """Move the stored pairs to the CPU."""
        super().offload()  # type: ignore[no-untyped-call]
        self._buffers = None

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
            self._reindex(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))


class ImdcCache(Cache):
    """The KV cache of a patched model: a list of layers, full-attention ones compressed.

    Attributes:
        phase: "prefill" when the next forward call reads a prompt, "decode" when it appends to the tail. It is set
            by the patch and never guessed from shapes.
        width: columns of the prompt seen so far, left padding included: what `get_seq_length` says.
        compact: whether the memory is numbered 0..m-1; None before the first prefill.
        rows: per-row state, None before the first prefill.
        drafting: whether this is the cache of an assistant model, which takes back what the other model rejects.
    """

    def __init__(self, layers: list[MemoryLayer | SlidingLayer], *, owner: object, can_crop: bool = True) -> None:
        """`owner` is a weak reference to the model; `can_crop` whether generate() may take decoded tokens back."""
        super().__init__(layers=list(layers))
        self.layers: list[Any]
        self.owner = owner
        self._can_crop = can_crop
        self.phase = "prefill"
        self.compact: bool | None = None
        self.rows: RowState | None = None
        self.drafting = False

    @property
    def is_empty(self) -> bool:
        """Whether no prompt was read yet."""
        return self.rows is None

    @property
    def tail(self) -> int:
        """Tokens decoded since the last compression."""
        return self.get_seq_length() - self.width if self.rows is not None else 0

    @property
    def is_croppable(self) -> bool:
        """Whether generate() may decode tokens it could take back: not where decoding compresses them away."""
        return self._can_crop

    width: int = 0

    def is_full_attention(self, layer: int) -> bool:
        """Whether `layer` is compressed (the others are sliding-window layers)."""
        return isinstance(self.layers[layer], MemoryLayer)

    def kv_bytes(self) -> int:
        """Bytes of the stored keys and values over all layers, spare room of the tail not counted."""
        stored = (x for layer in self.layers for x in (layer.keys, layer.values) if x is not None)
        return sum(x.nbytes for x in stored)

    def stored_tokens(self) -> int:
        """KV pairs stored per KV head in the fullest compressed layer."""
        return max((layer.stored for layer in self.layers if isinstance(layer, MemoryLayer)), default=0)

    def take_row(self, index: int) -> Row:
        """Row `index` as views without padding, its tail included; the cache stays as it is."""
        assert self.rows is not None
        padding, tail = int(self.rows.padding[index]), self.tail
        tokens = int(self.rows.tokens[index]) + tail
        row = Row.empty(len(self.layers))
        row.tokens, row.position = tokens, int(self.rows.position[index]) + tail
        for number, layer in enumerate(self.layers):
            keys, values = layer.keys, layer.values
            if keys is None or values is None:
                continue
            skipped = padding if isinstance(layer, MemoryLayer) else max(0, keys.shape[2] - tokens)
            row.keys[number] = keys[index : index + 1, :, skipped:]
            row.values[number] = values[index : index + 1, :, skipped:]
        return row

    def load_rows(self, rows: list[Row], order: Tensor, width: int, compact: bool) -> None:
        """Replace the content by `rows`, repeated as `order` (int64 [B]) says; shorter rows are padded at the front.

        The tensors of `rows` are released layer by layer, so that no second copy of the cache builds up.
        """
        longest = 0
        for number, layer in enumerate(self.layers):
            lengths = [row.stored(number) for row in rows]
            # transformers sizes the masks of a sliding layer by the columns seen, which may all be padding.
            least = 0 if isinstance(layer, MemoryLayer) else min(width, layer.sliding_window - 1)
            keys, values = (self._stack([side[number] for side in sides], order, least) for sides in _sides(rows))
            for row in rows:
                row.keys[number] = row.values[number] = None
            if isinstance(layer, MemoryLayer):
                longest = max(lengths)
                paddings = [longest - length for length in lengths]
                layer.load(keys, values, width)
            else:
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                layer.cumulative_length = width
        state = RowState(
            tokens=torch.tensor([row.tokens for row in rows]),
            position=torch.tensor([row.position for row in rows]),
            padding=torch.tensor(paddings if longest else [0] * len(rows)),
        )
        self.rows, self.width, self.compact = state.select(order), width, compact

    @staticmethod
    def _stack(rows: list[Tensor | None], order: Tensor, least: int) -> Tensor:
        parts = [part for part in rows if part is not None]
        longest = max(least, *(part.shape[2] for part in parts))
        if order.numel() == 1 and parts[0].shape[2] == longest:
            return parts[0]
        out = parts[0].new_zeros(order.numel(), parts[0].shape[1], longest, parts[0].shape[3])
        for slot, index in enumerate(order.tolist()):
            out[slot, :, longest - parts[index].shape[2] :] = parts[index][0]
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file for `imdc.load_cache`; see `imdc.persistence.save_cache`."""
        # Persistence compares models, so it stands floors above; nothing but this call reaches up.
        from imdc.persistence import save_cache

        save_cache(self, path)

    def copy(self) -> ImdcCache:
        """An independent copy: each of several questions about one prompt can go on from its own."""
        return copy.deepcopy(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens of the tail in every layer."""
        full = next((layer for layer in self.layers if isinstance(layer, MemoryLayer)), None)
        if full is not None and tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - full.seen)
        super().crop(tokens_to_remove)

    def record_past(self, record: bool) -> None:
        """Whether sliding layers keep what leaves their window until the next `crop` (assisted decoding)."""
        for layer in self.layers:
            if isinstance(layer, SlidingLayer):
                layer.record_past = record

    def reset(self) -> None:
        """Forget everything; the next forward call reads a prompt."""
        super().reset()  # type: ignore[no-untyped-call]
        self.phase, self.rows, self.width, self.compact = "prefill", None, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.rows is not None:
            self._select_rows(torch.arange(self.rows.tokens.numel()).repeat_interleave(repeats))

    def _select_rows(self, index: Tensor) -> None:
        if self.rows is not None:
            self.rows = self.rows.select(index)


def _sides(rows: list[Row]) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
    return [row.keys for row in rows], [row.values for row in rows]
