"""Device functions of attention over one block of query rows. Reference: `kernels/reference.py`, `chunk_attention`.

A block of rows belongs to one KV head: (query, head of the group) pairs with the head running fastest, so one load of
a key block serves the whole group and the causal diagonal cuts few blocks. Blocks are counted from the last query
backwards, so that the observing queries of a step, which are the last ones, never lie across two blocks.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import triton
import triton.language as tl

from ._device import LOG2E, rounded, soft_capped, widened


@triton.jit
def load_block(
    x, stride_t, i_b, i_h, i_n, end,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows i_n.. of one KV head's keys or values, [BLOCK_N, BLOCK_D]; with BOUNDED, rows from `end` on read as zero.

    `x` is a descriptor of all heads, which bounds the rows itself, or a pointer to the head's first row.
    """
    if DESCRIPTORS:
        block = tl.reshape(x.load([i_b, i_h, i_n, 0]), [BLOCK_N, BLOCK_D])
    else:
        # The tile's corner is addressed in 64 bits as a scalar; inside the tile 32 bits suffice and save registers.
        o_n = tl.arange(0, BLOCK_N)
        o_d = tl.arange(0, BLOCK_D)
        p_x = x + i_n * tl.cast(stride_t, tl.int64) + o_n[:, None] * stride_t + o_d[None, :]
        if BOUNDED:
            block = tl.load(p_x, mask=(i_n + o_n < end)[:, None] & (o_d < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            block = tl.load(p_x)
        else:
            block = tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    return block


@triton.jit
def exponents(b_q, b_k, scale, softcap, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr):
    """(logits of b_q and b_k up to a factor, that factor), which turn a logit into a power of two."""
    b_s = tl.dot(b_q, tl.trans(widened(b_k, UPCAST)), input_precision="ieee")
    factor = scale * LOG2E
    if HAS_SOFTCAP:
        b_s = soft_capped(b_s * scale, softcap)
        factor = tl.full([], LOG2E, tl.float32)
    return b_s, factor


@triton.jit
def _attend_range(
    b_acc, b_max, b_sum, b_q, i_b, i_h, k, stride_kt, v, stride_vt, o_position, start, end, scale, softcap, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK_FUTURE: tl.constexpr,
    MASK_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys start..end, in steps of BLOCK_N; `end` itself is exact only with MASK_FUTURE."""
    for i_n in range(start, end, BLOCK_N):
        i_n = tl.multiple_of(i_n, BLOCK_N)
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_k = load_block(k, stride_kt, i_b, i_h, i_n, end, D, BLOCK_D, BLOCK_N, MASK_FUTURE, DESCRIPTORS)
        if not DESCRIPTORS:
            b_v = load_block(v, stride_vt, i_b, i_h, i_n, end, D, BLOCK_D, BLOCK_N, MASK_FUTURE, False)
        b_s, factor = exponents(b_q, b_k, scale, softcap, HAS_SOFTCAP, UPCAST)
        if MASK_FUTURE:
            b_s = tl.where(o_n[None, :] <= o_position[:, None], b_s, float("-inf"))
        if MASK_WINDOW:
            b_s = tl.where(o_n[None, :] > o_position[:, None] - window, b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1) * factor)
        b_base = b_new_max
        if MASK_WINDOW:
            # A row may see nothing of its first blocks, and exp2(-inf - -inf) is no number.
            b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_s * factor - b_base[:, None])
        b_scale = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
        b_acc = b_acc * b_scale[:, None]
        if DESCRIPTORS:
            # After the first product: two bulk copies with no use between them would wait at one barrier, and the
            # product of queries and keys would then wait for the values too.
            b_v = load_block(v, stride_vt, i_b, i_h, i_n, end, D, BLOCK_D, BLOCK_N, MASK_FUTURE, True)
        b_p = rounded(b_p, b_v.dtype, UPCAST)
        b_acc = tl.dot(b_p, widened(b_v, UPCAST), b_acc, input_precision="ieee")
        b_max = b_new_max
    return b_acc, b_max, b_sum


@triton.jit
def attend(
    b_q, i_b, i_h, k, stride_kt, v, stride_vt, first_query, queries, keys, scale, softcap, window,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention of the rows b_q [BLOCK_M, BLOCK_D], the first of which belongs to `first_query`.

    Returns the output times the sum of its powers, the maximum that they are taken from, and their sum: in base 2.
    Blocks that every row sees whole are not masked; those on the window's edge come before them, the diagonal after.
    """
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    past = keys - queries  # query i sees keys 0..past + i
    last_query = first_query + QUERIES - 1
    # Rows that are no queries are not stored; held at the position of one they see some key.
    o_query = first_query + tl.arange(0, BLOCK_M) // GROUP
    o_position = past + tl.minimum(tl.maximum(o_query, 0), last_query)

    end = past + last_query + 1
    first_query = tl.maximum(first_query, 0)
    whole = (past + first_query + 1) // BLOCK_N * BLOCK_N  # every row sees all keys below this
    start = tl.full([], 0, tl.int32)
    inside = start
    if HAS_WINDOW:
        start = tl.maximum(past + first_query - window + 1, 0) // BLOCK_N * BLOCK_N
        inside = tl.cdiv(tl.maximum(past + last_query - window + 1, 0), BLOCK_N) * BLOCK_N
        inside = tl.minimum(inside, whole)  # every row sees all keys from here on

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for PART in tl.static_range(0 if HAS_WINDOW else 1, 3):
        b_acc, b_max, b_sum = _attend_range(
            b_acc, b_max, b_sum, b_q, i_b, i_h, k, stride_kt, v, stride_vt, o_position,
            start if PART == 0 else inside if PART == 1 else whole,
            inside if PART == 0 else whole if PART == 1 else end,
            scale, softcap, window,
            D=D, BLOCK_D=BLOCK_D, BLOCK_N=BLOCK_N, MASK_FUTURE=PART == 2, MASK_WINDOW=HAS_WINDOW and PART != 1,
            HAS_SOFTCAP=HAS_SOFTCAP, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST,
        )  # fmt: skip
    return b_acc, b_max, b_sum
