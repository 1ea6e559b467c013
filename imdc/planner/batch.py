"""What else is alive while one prompt row is read: other rows, earlier turns, and the answer that follows.

Rows of a batch are read one after another. Meanwhile the memories of finished rows wait, and the cache of earlier turns
stays whole until the new one is complete, so that an error leaves it as it was. Then the rows are stacked, layer by
layer, into one tensor of as many rows as `generate()` works with (beams and return sequences repeat a prompt), and
decoding appends to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from imdc.config import TAIL_BLOCK, PrefillConfig
from imdc.errors import ConfigError
from imdc.model.shape import ModelShape

# Positions for one question and its answer, where nobody says how many.
DEFAULT_ROOM = 512


@dataclass(frozen=True, slots=True)
class Batch:
    """What one prefill has to read, and what follows it.

    Attributes:
        prompt_tokens: new tokens of the longest row.
        rows: prompts that differ, which are read one after another.
        cache_rows: rows of the finished cache, beams and return sequences counted; 0 stands for `rows`.
        new_tokens: tokens that `generate()` will write; 0 for a prefill by hand, without `generate()`.
        seen_tokens: tokens per row that earlier turns have read.
        stored_tokens: KV pairs per row that earlier turns left in a full-attention layer.
        stored_bytes: bytes of the whole cache of earlier turns.
        question_tokens: of a question that is put to the finished cache, which is read for that and which
            `new_tokens` answer; 0 where nothing is asked.
        recalled_tokens: of a text in host memory, from which what is read takes back its memory.
    """

    prompt_tokens: int
    rows: int = 1
    cache_rows: int = 0
    new_tokens: int = 0
    seen_tokens: int = 0
    stored_tokens: int = 0
    stored_bytes: int = 0
    question_tokens: int = 0
    recalled_tokens: int = 0

    def __post_init__(self) -> None:
        """Check what a user may have given.

        Raises:
            ConfigError: rows, new_tokens or question_tokens are out of range.
        """
        for name, least in (("rows", 1), ("new_tokens", 0), ("question_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an int of at least {least}, got {value!r}")

    @property
    def copies(self) -> int:
        """Rows of the finished cache."""
        return max(self.rows, self.cache_rows)

    @property
    def decoded_tokens(self) -> int:
        """Tokens that decoding appends to the cache: the last one that is written never gets there."""
        return max(0, self.new_tokens - 1)


@dataclass(frozen=True, slots=True)
class Kept:
    """KV pairs per row that a finished prefill stores in a layer of either kind, and their bytes.

    `full` is the mean of the full-attention layers, `fullest` the one that stores most.
    """

    shape: ModelShape
    full: int
    sliding: int
    fullest: int

    @classmethod
    def after(cls, shape: ModelShape, batch: Batch, memory_tokens: int, fullest: int = 0) -> Kept:
        """What is stored once `memory_tokens` are left in the full-attention layers on average, `fullest` at most."""
        seen = batch.seen_tokens + batch.prompt_tokens
        return cls(shape, memory_tokens, min(seen, (shape.window or 1) - 1), max(memory_tokens, fullest))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all layers."""
        shape = self.shape
        return shape.kv_bytes_per_token * (shape.full_layers * self.full + shape.sliding_layers * self.sliding)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one row in the layer that stores most."""
        shape = self.shape
        most = max(self.fullest if shape.full_layers else 0, self.sliding if shape.sliding_layers else 0)
        return shape.kv_bytes_per_token * most


def waiting_bytes(shape: ModelShape, batch: Batch, kept: Kept) -> int:
    """Bytes alive while the last row is read that no reading of a single prompt by hand has."""
    logits = shape.vocab * shape.dtype_bytes
    return batch.stored_bytes + (batch.rows - 1) * (kept.row_bytes + logits) + _id_bytes(batch)


def stacking_bytes(shape: ModelShape, batch: Batch, kept: Kept) -> tuple[int, int]:
    """(KV pairs, logits) in bytes while the rows become one cache, layer by layer.

    Rows and the old cache are whole where the first layer is stacked, and all but gone where the last one is.
    """
    logits = (2 * batch.rows + batch.copies) * shape.vocab * shape.dtype_bytes
    if batch.copies == 1:
        return batch.stored_bytes + kept.row_bytes, logits
    first = batch.stored_bytes + batch.rows * kept.row_bytes + batch.copies * kept.layer_bytes
    left = batch.rows * kept.layer_bytes + batch.stored_bytes // shape.layers
    return max(first, left + batch.copies * kept.row_bytes), logits + _id_bytes(batch)


def decoding_bytes(shape: ModelShape, batch: Batch, kept: Kept, config: PrefillConfig) -> tuple[int, int, int]:
    """(KV pairs, activations, logits) in bytes where decoding takes most.

    One layer at a time makes room or reorders its rows, in a copy, or repeats its pairs for all query heads, as
    attention with a mask does in transformers. `config.decode_tokens` reads each row anew into a second cache.
    """
    tail = batch.decoded_tokens
    limit = config.decode_tokens
    compresses = limit is not None and tail > limit
    if compresses and limit is not None:
        tail = limit + 1
    room = tail_room(tail)
    pair = batch.copies * shape.kv_bytes_per_token
    memory = batch.copies * kept.row_bytes + pair * (room * shape.full_layers + shape.sliding_layers)
    layer = batch.copies * kept.layer_bytes + pair * room
    copied = layer * (1 + shape.q_heads // shape.kv_heads)
    if compresses:
        copied = max(copied, batch.copies * (kept.row_bytes + kept.layer_bytes))
    scores = (4 + shape.dtype_bytes) * shape.q_heads * (max(kept.fullest, kept.sliding) + room)
    activations = batch.copies * (row_activations(shape) + scores)
    logits = batch.copies * row_logits(shape)
    return memory + copied, activations, logits + _id_bytes(batch)


def tail_room(tokens: int) -> int:
    """KV pairs that a layer makes room for, in whole blocks, where `tokens` are decoded."""
    return TAIL_BLOCK * -(-tokens // TAIL_BLOCK)


def row_activations(shape: ModelShape) -> int:
    """Bytes of one row's activations while a token is decoded, attention aside."""
    widths = 4 * shape.hidden + 3 * shape.intermediate * shape.experts_per_token
    return shape.dtype_bytes * widths


def row_logits(shape: ModelShape) -> int:
    """Bytes of one row's logits while a token is chosen."""
    # The model's logits, and in float32 their copy, log-softmax, sums along beams and candidates.
    return shape.vocab * (shape.dtype_bytes + 4 * 4)


def _id_bytes(batch: Batch) -> int:
    """Bytes of token ids, masks and positions [rows, tokens], int64, that `generate()` and the engine hold at once.

    `generate()` has ids, mask, positions and what it makes them from, and as much again for sequences of beams; the
    engine has each row's ids without padding. By hand there are the caller's ids alone, which were there before.
    """
    if not batch.new_tokens or batch.question_tokens:
        return 0
    tables = 12 if batch.copies > 1 else 6
    return 8 * tables * batch.copies * (batch.seen_tokens + batch.prompt_tokens)
