"""What recall takes: bytes of a store, what a question reads of it, and what its device needs meanwhile.

See `imdc.prefill.recall`, which does it. With N tokens of the text, n of the question and m pairs taken back per layer:

    blocks     4 Hq n per key of the text, as much of it as `HELD_BYTES` says, and two blocks more
    selection  float32 scores 4 Hkv N, and what selecting needs
    gather     the pairs as they lie in the store and as the memory has them

A store in eight bits has scales besides (`imdc.cache.int8`); what is read of it becomes float32 on the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from imdc.config import INT8_GROUP, SUMMARY_TOKENS, PrefillConfig
from imdc.model.backend_rule import KERNELS
from imdc.model.shape import ModelShape
from imdc.planner.backend_bytes import rotating_bytes, selection_bytes
from imdc.planner.batch import Batch
from imdc.planner.work import Layers, Work
from imdc.units import format_bytes

# Keys that a question is compared with at once.
BLOCK_TOKENS = 4096
# Logits that are kept rather than computed a second time.
HELD_BYTES = 64 * 2**20
# A step and a zero, float32.
_SCALE_BYTES = 8


def read_blocks(tokens: int) -> list[range]:
    """Keys of each block of a text that is read at once; blocks with a mean each are smaller, see `summaries`."""
    return [range(first, min(first + BLOCK_TOKENS, tokens)) for first in range(0, tokens, BLOCK_TOKENS)]


def summaries(tokens: int) -> int:
    """Blocks of a text whose keys have one mean each."""
    return -(-tokens // SUMMARY_TOKENS)


def compared_blocks(kept: int, tokens: int) -> int:
    """How many of these blocks a token of an answer compares its query with, key by key; 0 where it is with all.

    Twice as many keys as are taken, where these are half of the text or less. By the mean keys of blocks of 16 tokens
    what an answer needs was found as by all keys, with a quarter of the keys compared where an eighth was taken; by
    bounds of what a block may hold (Quest, arXiv 2406.10774) it was not: see docs/DESIGN.md.
    """
    compared = -(-2 * kept // SUMMARY_TOKENS)
    return compared if 2 * compared <= summaries(tokens) else 0


def held_blocks(q_heads: int, question_tokens: int, text_tokens: int) -> int:
    """Of how many of the first blocks the logits, float32 [heads, question, block], are kept."""
    sizes = (4 * q_heads * question_tokens * len(block) for block in read_blocks(text_tokens))
    fits = ((number + 1) * size <= HELD_BYTES for number, size in enumerate(sizes))
    return sum(takewhile(bool, fits))


def recalls_whole(max_positions: int | None, question_tokens: int, text_tokens: int, compact: bool) -> bool:
    """Whether a question attends to the whole text: not where keys have to share the positions of the window."""
    return not compact or max_positions is None or text_tokens <= max_positions - question_tokens


def recall_bytes(work: Work, layers: Layers, following: int = 0) -> int:
    """Bytes that one layer allocates while it takes `layers.before` pairs back for the question of `work`.

    Where `work` is a token of an answer, `following` is how many tokens follow the text by then, that one included; it
    does not attend to the whole text.
    """
    shape, rows, tokens = work.shape, work.rows, work.recalled
    following, renews = following or rows, following > 0
    queries, keys = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    on_device = work.backend in KERNELS
    logits = [4 * shape.q_heads * rows * len(block) for block in read_blocks(tokens)]
    held = held_blocks(shape.q_heads, rows, tokens)
    block = min(tokens, BLOCK_TOKENS)
    float_copy = 0 if shape.dtype_bytes == 4 else 4 * keys * block
    # Keys as they are turned: in eight bits they are float32 by then.
    turned, there = shape.dtype_bytes, on_device * max(_side_bytes(shape, work.config, block))
    side = there + turned * keys * block * work.compact + float_copy
    if work.config.recall_dtype == "int8":
        turned, there = 4, there + 4 * keys * block
        float_copy = side = there
    turning = 0
    if work.compact:
        # In halves beside the result, with their tables, when there are logits of the blocks before.
        before = [sum(logits[: min(number, held)]) + sum(logits[held:number][-1:]) for number in range(len(logits))]
        tables = 2 * shape.rotary * (4 if shape.float_rotary else turned)
        each = there // block + rotating_bytes(shape, keys, turned) + tables
        turning = max(done + each * len(one) for done, one in zip(before, read_blocks(tokens), strict=True))
    rest, best = logits[held:], compared_blocks(layers.before, tokens) if renews else 0
    whole = not renews and recalls_whole(shape.max_positions, rows, tokens, work.compact)
    scores, out = 4 * shape.kv_heads * tokens, rows * shape.dtype_bytes * queries * whole
    own = 4 * rows * following * shape.q_heads
    # While keys are compared, and on a GPU the log-sum-exp has a copy of a block; what the question attends to of
    # itself; then values are added up, and what is not kept is compared again.
    passes = (side + on_device * logits[0], own, scores + (side if rest else whole * float_copy))
    every_key = max(sum(logits[:held]) + sum(rest[:2]) + max(passes), turning)
    most = _best_blocks_bytes(work, best) if best else every_key
    most += own + 4 * rows * ((1 + whole) * queries + shape.q_heads) + rows * following
    # What was rotated for another place was turned back before it is turned to where it is compared.
    most += renews * shape.dtype_bytes * (rows * queries + following * keys) * work.compact
    chosen = 8 * shape.kv_heads * layers.before
    gathered = _gathering_bytes(work, layers.before)
    return max(most, out + scores + max(selection_bytes(work, tokens, layers.before), chosen + gathered))


def _best_blocks_bytes(work: Work, blocks: int) -> int:
    """Bytes alive while a query is compared with the means of all blocks, then with the keys of so many of them."""
    shape, tokens, part = work.shape, blocks * SUMMARY_TOKENS, min(blocks * SUMMARY_TOKENS, BLOCK_TOKENS)
    width, each = shape.kv_heads * shape.head_dim, summaries(work.recalled)
    logit, on_device = 4 * shape.q_heads * work.rows, work.backend in KERNELS
    at_once = min(each, BLOCK_TOKENS)
    # Turned in float32: the result and half of it beside the tables, or what these are computed from; of each token
    # for the means, and of each key for the others, since each head has tokens of its own.
    table, turns = 4 * shape.rotary, work.compact
    means = at_once * (2 * width * on_device + 4 * width + turns * max(6 * width + 2 * table, 9 * table // 2))
    turning = turns * max(6 * width + 2 * table * shape.kv_heads, 9 * table * shape.kv_heads // 2)
    if work.config.recall_dtype == "int8":
        gathered, scales = 9 * width + 8 * shape.kv_heads, _key_scale_bytes(shape, work.recalled) * on_device
    else:
        gathered, scales = (shape.dtype_bytes + 4) * width, 0
    keys = part * max(gathered, 4 * width + turning) + scales
    # Tokens of the blocks, and which of them there are.
    indices = 9 * shape.kv_heads * tokens
    return max(logit * each + means, 3 * logit * each, indices + 2 * logit * tokens + keys)


def _gathering_bytes(work: Work, kept: int) -> int:
    """Bytes alive while `kept` pairs are taken: keys, and values both as they lie in the store and as they will be."""
    shape = work.shape
    pairs = kept * shape.kv_heads * shape.head_dim
    if work.config.recall_dtype == "model":
        return 3 * pairs * shape.dtype_bytes
    # Codes, their numbers in float32 and the steps or zeros of each, by the group of each; scales.
    keys = 9 * pairs + 8 * kept * shape.kv_heads + _key_scale_bytes(shape, work.recalled) * (work.backend in KERNELS)
    values = _side_bytes(shape, work.config, kept)[1] + pairs * (4 + 2 * shape.dtype_bytes)
    return max(keys, values)


def _side_bytes(shape: ModelShape, config: PrefillConfig, tokens: int) -> tuple[int, int]:
    """Bytes that keys and values of so many tokens take in the store, in one layer; the first one begins a group."""
    if config.recall_dtype == "model":
        half = tokens * shape.kv_bytes_per_token // 2
        return half, half
    width = shape.kv_heads * shape.head_dim
    return width * tokens + _key_scale_bytes(shape, tokens), tokens * (width + _SCALE_BYTES * shape.kv_heads)


def _key_scale_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes of the scales of the keys of so many tokens in eight bits, in one layer."""
    return _SCALE_BYTES * shape.kv_heads * shape.head_dim * -(-tokens // INT8_GROUP)


def _mean_key_bytes(shape: ModelShape, blocks: int) -> int:
    """Bytes of the mean keys of so many blocks, bfloat16, in one layer."""
    return 2 * shape.kv_heads * shape.head_dim * blocks


def storing_bytes(work: Work) -> int:
    """Bytes that one layer allocates while it puts the pairs of a chunk in eight bits; 0 where it does not."""
    config, shape = work.config, work.shape
    if config.recall == "none" or config.recall_dtype == "model" or work.recalled:
        return 0
    width = shape.kv_heads * shape.head_dim
    waiting, stored, left = _grouped(work)
    filled = -(-stored // INT8_GROUP) * INT8_GROUP
    # What waited and the chunk in one, the same filled up to whole groups, and what will wait.
    copies = (waiting + work.step.chunk_tokens) * (waiting > 0) + filled * (filled > stored) + left
    # Numbers in float32, and their codes.
    return _side_bytes(shape, config, work.step.chunk_tokens)[1] + width * (copies * shape.dtype_bytes + 5 * filled)


def sending_bytes(work: Work) -> int:
    """Bytes of a chunk that a GPU holds until the host has them, and of keys that wait for the next chunk."""
    config, shape, tokens = work.config, work.shape, work.step.chunk_tokens
    if config.recall == "none" or work.recalled:
        return 0
    on_device, stored, waits = work.backend in KERNELS, tokens, 0
    if config.recall_dtype == "int8":
        waiting, stored, left = _grouped(work)
        waits = shape.full_layers * max(waiting, left) * shape.kv_bytes_per_token // 2
    return waits + on_device * (_side_bytes(shape, config, stored)[0] + _side_bytes(shape, config, tokens)[1])


def _grouped(work: Work) -> tuple[int, int, int]:
    """Tokens whose keys waited for the chunk of a step, go to the store with it, and wait for the next one."""
    waiting = work.step.start % INT8_GROUP
    found = waiting + work.step.chunk_tokens
    left = 0 if work.last else found % INT8_GROUP
    return waiting, found - left, left


def moved_bytes(shape: ModelShape, config: PrefillConfig, batch: Batch, stored: Sequence[int], compact: bool) -> int:
    """Bytes that the question of `batch` reads of a store, for layers that have kept `stored` tokens each.

    All keys, all values where it attends to the whole text, the keys whose logits are not kept, and its pairs.
    """
    tokens, rows = batch.prompt_tokens, batch.question_tokens
    if config.recall == "none" or not rows:
        return 0
    found = _compared_bytes(shape, config, rows, tokens)
    if recalls_whole(shape.max_positions, rows, tokens, compact):
        found += _side_bytes(shape, config, tokens)[1]
    return sum(found + _gathered_bytes(shape, config, tokens, kept) for kept in stored if kept < tokens)


def renewal_moved_bytes(shape: ModelShape, config: PrefillConfig, batch: Batch, stored: Sequence[int]) -> int:
    """Bytes that an answer reads of a store each time when it takes its pairs back anew: keys, and those pairs."""
    tokens = batch.prompt_tokens
    if config.recall == "none" or not config.recall_every:
        return 0
    alike = Counter(kept for kept in stored if kept < tokens)
    return sum(layers * _renewed_bytes(shape, config, tokens, kept) for kept, layers in alike.items())


def _renewed_bytes(shape: ModelShape, config: PrefillConfig, tokens: int, kept: int) -> int:
    """What one layer reads for that: means and the keys of the best blocks or all keys, and `kept` pairs."""
    if compared := compared_blocks(kept, tokens):
        keys = _gathered_key_bytes(shape, config, tokens, compared * SUMMARY_TOKENS)
        read = _mean_key_bytes(shape, summaries(tokens)) + keys
    else:
        read = _compared_bytes(shape, config, 1, tokens)
    return read + _gathered_bytes(shape, config, tokens, kept)


def _compared_bytes(shape: ModelShape, config: PrefillConfig, rows: int, tokens: int) -> int:
    """Bytes of the keys of a text that `rows` queries are compared with, in one layer; some are read twice."""
    read = [_side_bytes(shape, config, len(block))[0] for block in read_blocks(tokens)]
    return sum(read) + sum(read[held_blocks(shape.q_heads, rows, tokens) :])


def _gathered_bytes(shape: ModelShape, config: PrefillConfig, tokens: int, stored_tokens: int) -> int:
    """Bytes that are read of a text of `tokens` where so many pairs of one layer are taken."""
    keys = _gathered_key_bytes(shape, config, tokens, stored_tokens)
    return keys + _side_bytes(shape, config, stored_tokens)[1]


def _gathered_key_bytes(shape: ModelShape, config: PrefillConfig, tokens: int, keys: int) -> int:
    """Bytes that are read of a text of `tokens` for any so many keys of one layer."""
    if config.recall_dtype == "int8":
        # Of any groups, and the scales of all.
        return shape.kv_heads * shape.head_dim * keys + _key_scale_bytes(shape, tokens)
    return _side_bytes(shape, config, keys)[0]


def host_bytes(shape: ModelShape, batch: Batch, config: PrefillConfig) -> int:
    """Bytes for all pairs of the texts in the layers that are compressed, on the host or its disk; 0 without recall.

    And for the mean keys of their blocks, where answers take back anew.
    """
    if config.recall == "none":
        return 0
    means = _mean_key_bytes(shape, summaries(batch.prompt_tokens)) if config.recall_every else 0
    return batch.rows * shape.full_layers * (means + sum(_side_bytes(shape, config, batch.prompt_tokens)))


def host_notes(shape: ModelShape, batch: Batch, config: PrefillConfig, moved: int, renewed: int) -> list[str]:
    """What a plan says of host memory, of which a question reads `moved` bytes; nothing without recall.

    `renewed` are the bytes that its answer reads each time when it takes its pairs back anew.
    """
    stored = host_bytes(shape, batch, config)
    if not stored:
        return []
    reads = f"; one of {batch.question_tokens} tokens reads {format_bytes(moved)}" if moved else ""
    if renewed:
        reads += f", and its answer {format_bytes(renewed)} every {config.recall_every} tokens"
    place = "on disk" if config.recall == "disk" else "of host memory"
    kind = "" if config.recall_dtype == "model" else f" ({config.recall_dtype})"
    return [f"note: questions take back what each needs from {format_bytes(stored)} {place}{kind}{reads}"]
