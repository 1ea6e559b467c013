"""Device functions that several kernels share. Reference: `kernels/reference.py`.

UPCAST stands in every kernel for "bfloat16 under the interpreter": it multiplies bfloat16 bit patterns as integers and
truncates on conversion, so there values are widened before any arithmetic and rounded to nearest even by hand.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import triton
import triton.language as tl

from . import limits

LEAST_REST = tl.constexpr(limits.LEAST_REST)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def widened(x, UPCAST: tl.constexpr):
    """The value of `x` in a type that arithmetic is defined on."""
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def rounded(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Float32 `x` rounded to nearest even in DTYPE; kept in float32 (but rounded) where UPCAST holds."""
    if UPCAST:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def soft_capped(logits, softcap):
    """Logits bent into -softcap..softcap: softcap * tanh(logits / softcap).

    tanh x = 1 - 2 / (e^2x + 1) cancels near zero, where most logits lie; there its Taylor series takes over, whose
    first term left out is below 2^-24 of the whole.
    """
    x = logits / softcap
    square = x * x
    series = -17.0 / 315.0 + square * (62.0 / 2835.0)
    series = -1.0 / 3.0 + square * (2.0 / 15.0 + square * series)
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return softcap * tl.where(square < 0.0625, x + x * square * series, far)


@triton.jit
def squared_lengths(x):
    """Of the rows of `x`, in float32."""
    x = x.to(tl.float32)
    return tl.sum(x * x, axis=1)


@triton.jit
def squared_changes(b_p, b_v, b_out, UPCAST: tl.constexpr):
    """Squared lengths of what outputs change by without each value, where it has the share b_p [values, outputs]."""
    b_v = widened(b_v, UPCAST)
    b_product = tl.dot(b_v, tl.trans(b_out), input_precision="ieee")
    b_length = squared_lengths(b_v)[:, None]
    b_away = tl.maximum(b_length - 2.0 * b_product + squared_lengths(b_out)[None, :], 0.0)
    b_rest = 1.0 - b_p
    b_share = b_p / tl.maximum(b_rest, LEAST_REST)
    return tl.where(b_rest > LEAST_REST, b_share * b_share * b_away, b_length)


@triton.jit
def pooled_scores(scores, o_n, keys, reach, AVERAGE: tl.constexpr):
    """The largest of the scores o_n - reach .. o_n + reach; with AVERAGE their mean, zeros beyond the row counted."""
    OUTSIDE: tl.constexpr = 0.0 if AVERAGE else float("-inf")
    b_pooled = tl.full(o_n.shape, OUTSIDE, tl.float32)
    for shift in range(-reach, reach + 1):
        m_n = (o_n + shift >= 0) & (o_n + shift < keys)
        b_score = tl.load(scores + o_n + shift, mask=m_n, other=OUTSIDE)
        b_pooled = b_pooled + b_score if AVERAGE else tl.maximum(b_pooled, b_score)
    if AVERAGE:
        b_pooled = b_pooled / tl.cast(2 * reach + 1, tl.float32)
    return b_pooled


@triton.jit
def ordered(b_score, o_n, keys, sink_tokens, recent_tokens):
    """Unsigned integers in the order of the scores; forced keys rank above all of them, columns outside below."""
    b_score = tl.where(b_score == 0.0, 0.0, b_score)  # the two zeros are one score
    b_bits = b_score.to(tl.uint32, bitcast=True)
    b_rank = tl.where(b_bits >= 0x80000000, b_bits ^ 0xFFFFFFFF, b_bits ^ 0x80000000)
    b_rank = tl.where((o_n < sink_tokens) | (o_n >= keys - recent_tokens), 0xFFFFFFFF, b_rank).to(tl.uint32)
    return tl.where(o_n < keys, b_rank, 0).to(tl.uint32)


@triton.jit
def write_ranks(scores, ranks, keys, reach, sink_tokens, recent_tokens, TILE: tl.constexpr, AVERAGE: tl.constexpr):
    """The ranks of one row's pooled scores, int32 of the same bits; all threads of the program write them."""
    for start in range(0, keys, TILE):
        o_n = start + tl.arange(0, TILE)
        b_score = pooled_scores(scores, o_n, keys, reach, AVERAGE)
        b_rank = ordered(b_score, o_n, keys, sink_tokens, recent_tokens)
        tl.store(ranks + o_n, b_rank.to(tl.int32, bitcast=True), mask=o_n < keys)


@triton.jit
def read_ranks(ranks, o_n, keys):
    """Ranks that `write_ranks` wrote, after a barrier of the program; columns outside rank below all others."""
    return tl.load(ranks + o_n, mask=o_n < keys, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def places(b_rank, threshold, above_before, ties_before, wanted_ties):
    """Where the kept keys of a tile go, and which are kept: all above the threshold, and the first ties.

    Returns the places and the mask of the tile, and how many keys above and how many ties there are up to its end.
    """
    b_above = (b_rank > threshold).to(tl.int32)
    b_tied = (b_rank == threshold).to(tl.int32)
    o_above = above_before + tl.cumsum(b_above, axis=0) - b_above
    o_tied = ties_before + tl.cumsum(b_tied, axis=0) - b_tied
    m_kept = (b_above == 1) | ((b_tied == 1) & (o_tied < wanted_ties))
    o_place = o_above + tl.minimum(o_tied, wanted_ties)
    return o_place, m_kept, above_before + tl.sum(b_above, axis=0), ties_before + tl.sum(b_tied, axis=0)


@triton.jit
def move_rows(
    k, stride_kt, v, stride_vt, indices, new_k, stride_nt, new_v, stride_wt, start, keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Copy the keys and values at indices[start..] of one KV head to rows start.. of the new ones."""
    o_t = tl.cast(start + tl.arange(0, BLOCK_T), tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < keep
    m_d = m_t[:, None] & (o_d < D)[None, :]
    o_kept = tl.load(indices + o_t, mask=m_t, other=0)
    # Both are read before either is written, which keeps twice as much under way.
    b_k = tl.load(k + (o_kept * stride_kt)[:, None] + o_d[None, :], mask=m_d)
    b_v = tl.load(v + (o_kept * stride_vt)[:, None] + o_d[None, :], mask=m_d)
    tl.store(new_k + (o_t * stride_nt)[:, None] + o_d[None, :], b_k, mask=m_d)
    tl.store(new_v + (o_t * stride_wt)[:, None] + o_d[None, :], b_v, mask=m_d)
