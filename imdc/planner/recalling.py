"""What recall takes: bytes of a store, what a question reads of it, and what its device needs meanwhile.

See `imdc.prefill.recall`, which does it. With N tokens of the text, n of the question and m pairs taken back per layer:

    blocks     4 Hq n per key of the text, as much of it as `HELD_BYTES` says, and two blocks more
    selection  float32 scores 4 Hkv N, and what selecting needs
    gather     the pairs as they lie in the store and as the memory has them
"""

from __future__ import annotations

from itertools import takewhile

from imdc.config import PrefillConfig
from imdc.model.backend_rule import KERNELS
from imdc.model.shape import ModelShape
from imdc.planner.backend_bytes import selection_bytes
from imdc.planner.batch import Batch
from imdc.planner.work import Layers, Work
from imdc.units import format_bytes

# Keys that a question is compared with at once.
BLOCK_TOKENS = 4096
# Logits that are kept rather than computed a second time.
HELD_BYTES = 64 * 2**20


def blocks(tokens: int) -> list[range]:
    """Keys of each block of a text."""
    return [range(first, min(first + BLOCK_TOKENS, tokens)) for first in range(0, tokens, BLOCK_TOKENS)]


def held_blocks(q_heads: int, question_tokens: int, text_tokens: int) -> int:
    """Of how many of the first blocks the logits, float32 [heads, question, block], are kept."""
    sizes = (4 * q_heads * question_tokens * len(block) for block in blocks(text_tokens))
    fits = ((number + 1) * size <= HELD_BYTES for number, size in enumerate(sizes))
    return sum(takewhile(bool, fits))


def recalls_whole(max_positions: int | None, question_tokens: int, text_tokens: int, compact: bool) -> bool:
    """Whether a question attends to the whole text: not where keys have to share the positions of the window."""
    return not compact or max_positions is None or text_tokens <= max_positions - question_tokens


def recall_bytes(work: Work, layers: Layers) -> int:
    """Bytes that one layer allocates while it takes `layers.before` pairs back for the question of `work`."""
    shape, rows, tokens = work.shape, work.rows, work.recalled
    queries, keys = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    on_device = work.backend in KERNELS
    logits = [4 * shape.q_heads * rows * len(block) for block in blocks(tokens)]
    held = held_blocks(shape.q_heads, rows, tokens)
    block = min(tokens, BLOCK_TOKENS)
    float_copy = 0 if shape.dtype_bytes == 4 else 4 * keys * block
    side = keys * block * shape.dtype_bytes * (on_device + work.compact) + float_copy
    rest = logits[held:]
    scores, out = 4 * shape.kv_heads * tokens, rows * shape.dtype_bytes * queries
    own = 4 * rows * rows * shape.q_heads
    # While keys are compared, and on a GPU the log-sum-exp has a copy of a block; what the question attends to of
    # itself; then values are added up, and what is not kept is compared again.
    passes = (side + on_device * logits[0], own, scores + (side if rest else float_copy))
    most = sum(logits[:held]) + sum(rest[:2]) + max(passes)
    most += own + 4 * rows * (2 * queries + shape.q_heads) + rows * rows
    most += rows * shape.dtype_bytes * (queries + keys) * work.compact
    chosen = 8 * shape.kv_heads * layers.before
    gathered = keys * layers.before * shape.dtype_bytes * (3 if on_device else 4)
    return max(most, out + scores + max(selection_bytes(work, tokens, layers.before), chosen + gathered))


def moved_bytes(shape: ModelShape, config: PrefillConfig, batch: Batch, stored_tokens: int, compact: bool) -> int:
    """Bytes that the question of `batch` reads of a store, for a memory of `stored_tokens` per layer.

    All keys, all values where it attends to the whole text, the keys whose logits are not kept, and its pairs.
    """
    tokens, rows = batch.prompt_tokens, batch.question_tokens
    if config.recall == "none" or not rows or stored_tokens >= tokens:
        return 0
    again = sum(map(len, blocks(tokens)[held_blocks(shape.q_heads, rows, tokens) :]))
    values = tokens if recalls_whole(shape.max_positions, rows, tokens, compact) else 0
    sides = tokens + values + again + 2 * stored_tokens
    return shape.full_layers * sides * shape.kv_bytes_per_token // 2


def host_bytes(shape: ModelShape, batch: Batch, config: PrefillConfig) -> int:
    """Bytes for all pairs of the texts in the layers that are compressed, on the host or its disk; 0 without recall."""
    pair = shape.full_layers * shape.kv_bytes_per_token
    return 0 if config.recall == "none" else batch.rows * batch.prompt_tokens * pair


def host_notes(shape: ModelShape, batch: Batch, config: PrefillConfig, moved: int) -> list[str]:
    """What a plan says of host memory, of which a question reads `moved` bytes; nothing without recall."""
    stored = host_bytes(shape, batch, config)
    if not stored:
        return []
    reads = f"; one of {batch.question_tokens} tokens reads {format_bytes(moved)}" if moved else ""
    place = "on disk" if config.recall == "disk" else "of host memory"
    return [f"note: questions take back what each needs from {format_bytes(stored)} {place}{reads}"]
