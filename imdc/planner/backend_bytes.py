"""What a backend allocates inside one layer, beside what the model's own code keeps alive; see `layer_bytes`."""

from __future__ import annotations

from imdc.kernels.limits import (
    OUTPUT_CHANGE,
    StepSizes,
    attention_rows,
    compression_in_one_launch,
    fused_step_fits,
    rows_per_block,
    step_in_one_launch,
)
from imdc.model.backend_rule import KERNELS
from imdc.model.shape import ModelShape
from imdc.observers import find_observer
from imdc.planner.work import Layers, Work


def turned_bytes(work: Work, layers: Layers) -> tuple[int, int]:
    """Bytes of rotated copies of keys and queries, and of the temporaries of rotating, these included."""
    shape, total = work.shape, layers.before + work.rows
    if not work.compact or (layers.window is None and shape.turns_in_windows):
        return 0, 0
    size, head = shape.dtype_bytes, shape.head_dim
    keys, queries = total * shape.kv_heads * head, work.rows * shape.q_heads * head
    turned = size * (keys + queries)
    if work.backend == "triton":
        return turned, turned
    return turned, max(rotating_bytes(shape, keys, size), size * keys + rotating_bytes(shape, queries, size))


def rotating_bytes(shape: ModelShape, elements: int, size: int) -> int:
    """Bytes that PyTorch needs to rotate so many elements of so many bytes, the result included."""
    if shape.float_rotary and size < 4:
        # Two products in float32, each of half the width, beside the result.
        return (size + 4) * elements
    return 3 * size * elements // 2


def attention_bytes(work: Work, rows: int, before: int, window: int | None) -> int:
    """Bytes of what the backend needs for `rows` queries that see `before` keys and their own, its output included.

    Those with this project's kernels need the output and the log-sum-exp only. "sdpa" attends to memory and chunk apart
    and merges: grouped queries, two outputs, their float32 sum where the dtype is shorter, log-sum-exps; through a
    window it repeats the keys and values of a block for every query head. "reference" works on one KV head in float32,
    in blocks of scores.
    """
    shape, total = work.shape, before + rows
    queries = shape.q_heads * shape.head_dim
    unit, log_sums = rows * shape.dtype_bytes, 4 * rows * shape.q_heads
    most = unit * queries + log_sums
    if work.backend == "reference":
        most += 2 * _float_copy(shape, total) + _score_blocks(shape, rows, total)
    elif work.backend == "sdpa" and window is not None and window < total:
        block = min(rows, window)
        span = min(total, block + window - 1)
        most += (2 * span + block) * queries * shape.dtype_bytes + block * span * (2 + shape.dtype_bytes)
    elif work.backend == "sdpa" and before:
        # Phi-3's queries, and those rotated here, are in the order in which they can be grouped without a copy, unless
        # it is a part of them that attends.
        whole = (shape.fused or work.compact) and rows == work.rows
        merged = (2 if whole else 3) * unit * queries
        shorter = 3 * log_sums + 4 * rows * queries + unit * queries
        most = merged + (4 * log_sums if shape.dtype_bytes == 4 else shorter)
    return most


def scoring_bytes(work: Work, candidates: int, tail: int, voting_rows: int) -> int:
    """Bytes of the observer's temporaries, scores included, where `tail` keys follow the candidates."""
    shape = work.shape
    total = candidates + tail
    observer = find_observer(work.config.observer)
    scratch = observer.scratch_bytes(candidates, shape.kv_heads, shape.head_dim)
    mass = 4 * shape.kv_heads * total
    if not work.observing_rows or work.backend in KERNELS:
        return max(scratch, 2 * mass) if scratch and not work.observing_rows else 2 * mass + scratch
    blocks = _score_blocks(shape, voting_rows, total)
    if work.config.scoring == OUTPUT_CHANGE:
        blocks = max(blocks, _change_blocks(shape, voting_rows, total))
    return scratch + mass + 4 * total + _float_copy(shape, total) + blocks


def compression_bytes(work: Work, layers: Layers) -> int:
    """Bytes of what `imdc.kernels.compress_step` allocates besides output and new memory: see there.

    Scores and indices; the log-sum-exp unless one launch does it all; ranks unless selection is a launch of its own and
    does not pool. Where the machine is not known, both of the latter.
    """
    shape, step, machine = work.shape, work.step, work.machine
    scores, ranked = 4 * shape.kv_heads * (layers.before + step.chunk_tokens), work.config.pool_kernel > 1
    log_sums = 4 * work.rows * shape.q_heads
    if machine.multiprocessors is not None:
        major = 0 if machine.capability is None else machine.capability[0]
        heads = (shape.q_heads, shape.kv_heads)
        sizes = StepSizes(
            *(1, *heads, work.rows, layers.before + work.rows, shape.head_dim, shape.dtype_bytes),
            observers=work.observing_rows,
            keep=layers.after,
            pool_kernel=work.config.pool_kernel,
            scoring=work.config.scoring,
        )
        chip = (major, machine.multiprocessors)
        fed = major == 0 or (shape.dtype_bytes == 2 and shape.head_dim % 16 == 0)
        fits = fed and (major == 0 or fused_step_fits(sizes, major))
        fused = fits and work.backend == "triton" and work.config.observation_stride == 1
        if fused and step_in_one_launch(sizes, attention_rows(shape.head_dim, major), *chip):
            log_sums, ranked = 0, True
        else:
            ranked = ranked or (fed and compression_in_one_launch(sizes, *chip))
    else:
        ranked = True
    return log_sums + (2 if ranked else 1) * scores + 8 * shape.kv_heads * layers.after


def selection_bytes(work: Work, candidates: int, kept: int) -> int:
    """Bytes of scores, their copy, masks, and either running counts of ties or the indices found."""
    if work.backend in KERNELS:
        return work.shape.kv_heads * (4 * candidates + 8 * kept)
    return work.shape.kv_heads * (11 * candidates + max(9 * candidates, 24 * kept))


def _float_copy(shape: ModelShape, keys: int) -> int:
    """Bytes of one KV head's keys in float32, where they are not in it already."""
    return 0 if shape.dtype_bytes == 4 else 4 * keys * shape.head_dim


def _score_blocks(shape: ModelShape, rows: int, keys: int) -> int:
    """Bytes of the reference kernels' score blocks: one is alive while the next is computed, under two masks."""
    group = shape.q_heads // shape.kv_heads
    block = rows_per_block(rows, group * keys)
    count = (1 if block == rows and shape.kv_heads == 1 else 2) + shape.softcap
    return block * keys * (4 * group * count + 2)


def _change_blocks(shape: ModelShape, rows: int, keys: int) -> int:
    """Bytes of the blocks in which they turn attention into changes of the output: two, a mask, lengths, outputs."""
    group = shape.q_heads // shape.kv_heads
    block = rows_per_block(rows, group * keys)
    return block * keys * (9 * group + 1) + 4 * keys + group * _float_copy(shape, block)
