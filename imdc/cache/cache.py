"""The compressed KV cache that `generate()` works with: one layer per layer of the model, and the state of its rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from imdc.cache.layers import Mark, MemoryLayer, SlidingLayer
from imdc.cache.rows import Row, RowState
from imdc.cache.store import HostStore
from imdc.cache.turn import Turn
from imdc.errors import UnsupportedCallError
from imdc.model import hf


class ImdcCache(hf.Cache):
    """The KV cache of a patched model: a list of layers, full-attention ones compressed.

    Attributes:
        phase: "prefill" when the next forward call begins a turn, "decode" when it appends to the tail.
        width: columns of the prompt seen so far, left padding included: what `get_seq_length` says.
        rows: per-row state, None before the first prefill.
        turn: of the generate() call that is running, None outside of one.
        anew: per row the whole text, int64 [n], where the next turn does not fit what is stored.
        is_branch: whether it belongs to a question, whose turn drops nothing; see `imdc.cache.branch`.
        asked: whether that turn is over.
        store: all pairs of the text in host memory or a file, where questions take back what was evicted; None without
            recall.
    """

    def __init__(self, windows: Sequence[int | None], *, owner: object, can_crop: bool = True) -> None:
        """An empty cache.

        Args:
            windows: per layer the sliding window in tokens, None for a compressed full-attention layer.
            owner: weak reference to the model.
            can_crop: whether generate() may take decoded tokens back.
        """
        super().__init__(layers=[MemoryLayer() if window is None else SlidingLayer(window) for window in windows])
        self.layers: list[Any]
        self.owner = owner
        self._can_crop = can_crop
        self.phase, self.width = "prefill", 0
        self.rows: RowState | None = None
        self.turn: Turn | None = None
        self.anew: dict[int, Tensor] = {}
        self._open = False

    @property
    def is_empty(self) -> bool:
        """Whether no prompt was read yet."""
        return self.rows is None

    @property
    def tail(self) -> int:
        """Tokens decoded since the last compression."""
        return self.get_seq_length() - self.width if self.rows is not None else 0

    @property
    def compact(self) -> bool:
        """Whether the memory of any row is numbered 0..m-1."""
        return self.rows is not None and bool(self.rows.compact.any())

    @property
    def is_croppable(self) -> bool:
        """Whether generate() may decode tokens that it takes back later.

        Not where decoding compresses them away; candidates of assisted decoding are never compressed.
        """
        return self._can_crop or (self.turn is not None and self.turn.assisted)

    is_branch: bool = False
    asked: bool = False
    store: HostStore | None = None

    def kv_bytes(self) -> int:
        """Bytes of the stored keys and values over all layers, spare room of the tail not counted."""
        return sum(x.nbytes for layer in self.layers for x in (layer.keys, layer.values) if x is not None)

    def held_bytes(self) -> int:
        """Bytes of the tensors behind the stored keys and values, spare room included."""
        tensors = (x for layer in self.layers for x in (layer.keys, layer.values) if x is not None)
        return sum(x.untyped_storage().nbytes() for x in tensors)

    def stored_tokens(self) -> int:
        """KV pairs that the longest row stores per KV head and compressed layer: the average, rounded up, unpadded."""
        full, rows = self._full, self.rows
        unused = 0 if rows is None else int(rows.padding[:, full].sum(dim=1).min())
        stored: int = sum(self.layers[i].stored for i in full)
        return -(-(stored - unused) // max(1, len(full)))

    @property
    def _full(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, MemoryLayer)]

    @property
    def ragged(self) -> bool:
        """Whether the compressed layers differ in what they store or in their padding: each has its own mask."""
        full, rows = self._full, self.rows
        if rows is None:
            return False
        padding = rows.padding[:, full]
        return len({self.layers[i].stored for i in full}) > 1 or bool((padding != padding[:, :1]).any())

    def take_row(self, index: int) -> Row:
        """Row `index` as views without padding, its tail included; the cache stays as it is."""
        assert self.rows is not None
        padding, tail = self.rows.padding[index].tolist(), self.tail
        tokens = int(self.rows.tokens[index]) + tail
        row = Row.empty(len(self.layers))
        row.tokens, row.position = tokens, int(self.rows.position[index]) + tail
        row.compact = bool(self.rows.compact[index])
        row.question = self.rows.question[index][self.rows.question[index] >= 0]
        for number, layer in enumerate(self.layers):
            keys, values = layer.keys, layer.values
            if keys is None or values is None:
                continue
            skipped = padding[number] if isinstance(layer, MemoryLayer) else max(0, keys.shape[2] - tokens)
            row.keys[number] = keys[index : index + 1, :, skipped:]
            row.values[number] = values[index : index + 1, :, skipped:]
        return row

    def load_rows(self, rows: list[Row], order: Tensor, width: int) -> None:
        """Replace the content by `rows`, repeated as `order` (int64 [B]) says; shorter rows are padded at the front.

        The tensors of `rows` are released layer by layer, so that no second copy of the cache builds up. Where that is
        cut off (out of memory, an interrupt) the cache becomes empty: it then reads its whole history anew.
        """
        try:
            self._load_rows(rows, order, width)
        except BaseException:
            self.reset()
            raise

    def _load_rows(self, rows: list[Row], order: Tensor, width: int) -> None:
        paddings: list[list[int]] = []
        for number, layer in enumerate(self.layers):
            lengths = [row.stored(number) for row in rows]
            # transformers sizes the masks of a sliding layer by the columns seen, which may all be padding.
            least = 0 if isinstance(layer, MemoryLayer) else min(width, layer.sliding_window - 1)
            sides = [row.keys[number] for row in rows], [row.values[number] for row in rows]
            keys, values = (self._stack(side, order, least) for side in sides)
            for row in rows:
                row.keys[number] = row.values[number] = None
            if isinstance(layer, MemoryLayer):
                paddings.append([max(lengths) - length for length in lengths])
                layer.load(keys, values, width)
            else:
                paddings.append([0] * len(rows))
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                layer.cumulative_length = width
        state = RowState.of(rows, paddings)
        self.rows, self.width = state.select(order), width

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

    def copy(self) -> ImdcCache:
        """An independent copy: each of several questions about one prompt can go on from its own."""
        return copy.deepcopy(self)

    @property
    def drafting(self) -> bool:
        """Whether an assistant model drafts from this cache."""
        return self.turn is not None and self.turn.drafting

    @property
    def expected_new_tokens(self) -> int | None:
        """Tokens that the running generate() call will add at most; None where that is not known."""
        return None if self.turn is None else self.turn.new_tokens

    @contextmanager
    def during(self, turn: Turn) -> Iterator[None]:
        """Let forward calls know of the generate() call that is running.

        An assistant goes on drafting from its cache; any other call begins a turn, which is taken back where the call
        ends before its tokens were read.
        """
        before = self.phase
        if self.is_empty or not turn.drafting:
            self.phase = "prefill"
        self.turn = turn
        self._record_past(turn.drafting or turn.assisted)
        try:
            yield
        finally:
            self.turn = None
            if not turn.reached or self.phase == "prefill":
                self.phase = before
            if not turn.drafting:
                self._record_past(False)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens in every layer; prompt tokens only where nothing was dropped.

        Raises:
            UnsupportedCallError: the number is positive, or memory would have to be cut that has dropped KV pairs.
        """
        if tokens_to_remove > 0:
            raise UnsupportedCallError(
                f"crop({tokens_to_remove}) names a length to keep; pass minus the number of tokens to remove"
            )
        removed, tail = -tokens_to_remove, self.tail
        if removed > tail:
            self._check_whole(removed)
        super().crop(tokens_to_remove)
        if removed > tail and self.rows is not None:
            # Not in place: what was made in inference mode could not be written outside it.
            self.rows.tokens = self.rows.tokens - (removed - tail)
            self.rows.position = self.rows.position - (removed - tail)
            self.width -= removed - tail
            if self.width == 0:
                self.reset()

    def _check_whole(self, removed: int) -> None:
        if self.store is not None:
            raise UnsupportedCallError(
                f"crop({-removed}) would cut tokens of the document, which its store keeps; read the shorter one "
                f"instead"
            )
        layers = [layer for layer in self.layers if isinstance(layer, MemoryLayer)]
        if removed > self.get_seq_length() or any(layer.stored != layer.seen for layer in layers):
            raise UnsupportedCallError(
                f"crop({-removed}) would cut {removed} tokens, but only the {self.tail} decoded since the last "
                f"compression can be removed; read the prompt again instead"
            )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append to a layer's tail, as the forward of a patched model asks.

        Raises:
            UnsupportedCallError: the model is not patched. Its positions and masks would be those of the whole prompt.
        """
        if not self._open:
            raise UnsupportedCallError(
                f"{hf.CACHE_NAME} is an ImdcCache, which only the patched model can go on from; call "
                f"imdc.patch(model) first, or pass no cache"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Let all layers append the same tokens, or none: where that is cut off, every layer is put back."""
        marks: list[Mark] = [layer.mark() for layer in self.layers]
        self._open = True
        try:
            yield
        except BaseException:
            for layer, mark in zip(self.layers, marks, strict=True):
                layer.rewind(mark)
            raise
        finally:
            self._open = False

    def _record_past(self, record: bool) -> None:
        """Whether sliding layers keep what leaves their window until the next `crop` (assisted decoding)."""
        for layer in self.layers:
            if isinstance(layer, SlidingLayer):
                layer.record_past = record
                if not record:
                    layer.trim()

    def reset(self) -> None:
        """Forget everything; the next forward call reads a prompt."""
        super().reset()  # type: ignore[no-untyped-call]
        self.phase, self.rows, self.width, self.store = "prefill", None, 0, None

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
            self._select_rows(torch.arange(self.rows.tokens.numel(), device="cpu").repeat_interleave(repeats))

    def _select_rows(self, index: Tensor) -> None:
        if self.rows is not None:
            self.rows = self.rows.select(index)
