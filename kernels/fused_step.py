"""One layer's whole step as one launch: attention, scoring, pooling, selection and the gather of what is kept.

All programs attend, as in `kernels/chunk_attention.py`. The observing queries are the last ones, and where those of a
KV head fit one block of rows, one program owns all of them: with its last key block, it knows their log-sum-exps. The
programs that own observers are the first of the grid, so they start first; after attending they alone compress their
KV head, while the others still attend:

1. mass: the keys once more (they come from the L2 cache), one product, probabilities, sums over the rows;
2. ranks: pooling over neighbours, and the scores as unsigned integers of the same order;
3. threshold: the `keep`-th largest rank, eight bits a pass, from a histogram of the ranks that begin alike;
4. indices: everything above the threshold and the first ties, in ascending order;
5. rows: the keys and values at these indices, moved next to each other.

Each reads back what all threads of the program have written, so a barrier of the program lies between. Nothing is
shared between programs: no atomics on memory, no barrier of the grid, and two runs give the same bits.

The chain of an owner is longer than another program's work. `pays` compares it with what the rest of the device has to
do meanwhile; where it would be the last to finish, separate launches, which spread it over the device, are better.

Layouts and reference: `kernels/reference.py`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._attention import attend, exponents, load_block
from ._device import move_rows, ordered, places, pooled_scores, rounded, widened
from ._launch import (
    INTERPRETED,
    Config,
    Launch,
    descriptor,
    logit_arguments,
    strided,
)

TILE = 2048
INTERPRETED_TILE = 64  # small enough that small tests take several
MOVED_BYTES = 32768  # of keys, and as many of values, that a program moves at a time


@triton.jit
def _weigh_keys(
    b_q, b_lse, i_b, i_h, k, stride_kt, mass, observers, keys, scored, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Mass of every scored key from the rows b_q; `b_lse`, to base 2, is infinite for rows that are no observers."""
    past = keys - observers  # observer t sees keys 0..past + t; t counts from the first observer
    o_row = tl.arange(0, BLOCK_M) // GROUP - (BLOCK_M // GROUP - observers)
    end = tl.cdiv(scored, BLOCK_N) * BLOCK_N
    whole = tl.minimum((past + 1) // BLOCK_N * BLOCK_N, end)  # every observer sees all keys below this
    for MASKED in tl.static_range(2):
        for i_n in range(whole if MASKED else 0, scored if MASKED else whole, BLOCK_N):
            i_n = tl.multiple_of(i_n, BLOCK_N)
            o_n = i_n + tl.arange(0, BLOCK_N)
            b_k = load_block(k, stride_kt, i_b, i_h, i_n, scored, D, BLOCK_D, BLOCK_N, MASKED, DESCRIPTORS)
            # Keys along the rows, so that a thread sums what it holds.
            b_s, factor = exponents(widened(b_k, UPCAST), b_q, scale, softcap, HAS_SOFTCAP, UPCAST)
            b_p = tl.exp2(b_s * factor - b_lse[None, :])
            if MASKED:
                b_p = tl.where(o_n[:, None] <= past + o_row[None, :], b_p, 0.0)
            b_count = tl.maximum(observers - tl.maximum(o_n - past, 0), 1) * GROUP
            tl.store(mass + o_n, tl.sum(b_p, axis=1) / b_count.to(tl.float32), mask=o_n < scored)


@triton.jit
def _refine(ranks, scored, threshold, wanted, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """Eight more bits of the threshold, those from bit SHIFT on, and how many are wanted of the ranks that share them.

    Of the ranks that begin like `threshold`, the `wanted` largest are looked for.
    """
    o_bin = tl.arange(0, 256)
    b_counts = tl.zeros([256], tl.int32)
    for start in range(0, scored, TILE):
        o_n = start + tl.arange(0, TILE)
        b_rank = tl.load(ranks + o_n, mask=o_n < scored, other=0).to(tl.uint32, bitcast=True)
        m_alike = o_n < scored
        if SHIFT < 24:
            m_alike = m_alike & ((b_rank >> (SHIFT + 8)) == (threshold >> (SHIFT + 8)))
        b_counts += tl.histogram(((b_rank >> SHIFT) & 255).to(tl.int32), 256, mask=m_alike)
    b_above = tl.sum(b_counts, axis=0) - tl.cumsum(b_counts, axis=0)  # ranks of the bins above each
    digit = tl.max(tl.where(b_above + b_counts >= wanted, o_bin, 0), axis=0)
    wanted -= tl.sum(tl.where(o_bin > digit, b_counts, 0), axis=0)
    return threshold | (digit.to(tl.uint32) << SHIFT), wanted


@triton.jit
def _compress(
    mass, ranks, indices, k, stride_kt, v, stride_vt, new_k, new_v, scored, keep, reach, sink_tokens, recent_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, TILE: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """From the mass of one KV head's keys to its kept rows, all by one program."""
    tl.debug_barrier()  # the mass is written
    for start in range(0, scored, TILE):
        o_n = start + tl.arange(0, TILE)
        b_score = pooled_scores(mass, o_n, scored, reach, AVERAGE)
        b_rank = ordered(b_score, o_n, scored, sink_tokens, recent_tokens)
        tl.store(ranks + o_n, b_rank.to(tl.int32, bitcast=True), mask=o_n < scored)
    tl.debug_barrier()  # the ranks are written
    threshold = tl.full([], 0, tl.uint32)  # becomes the `keep`-th largest rank
    wanted = keep  # becomes how many of its ties are kept
    for digit in tl.static_range(4):
        threshold, wanted = _refine(ranks, scored, threshold, wanted, SHIFT=24 - 8 * digit, TILE=TILE)
    above = tl.full([], 0, tl.int32)
    ties = tl.full([], 0, tl.int32)
    for start in range(0, scored, TILE):
        o_n = start + tl.arange(0, TILE)
        b_rank = tl.load(ranks + o_n, mask=o_n < scored, other=0).to(tl.uint32, bitcast=True)
        o_place, m_kept, above, ties = places(b_rank, threshold, above, ties, wanted)
        tl.store(indices + o_place, o_n.to(tl.int64), mask=m_kept & (o_n < scored))
    tl.debug_barrier()  # the indices are written
    for start in range(0, keep, BLOCK_T):
        move_rows(
            k, stride_kt, v, stride_vt, indices, new_k, D, new_v, D, start, keep,
            D=D, BLOCK_D=BLOCK_D, BLOCK_T=BLOCK_T,
        )  # fmt: skip


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(
    do_not_specialize=[
        *("queries", "keys", "kv_heads", "kv_rows"),
        *("observers", "scored", "keep", "reach", "sink_tokens", "recent_tokens"),
    ]
)
def _fused_step_kernel(
    q, stride_qb, stride_qh, stride_qq,
    k, stride_kb, stride_kh, stride_kt,
    v, stride_vb, stride_vh, stride_vt,
    out, stride_ob, stride_oh, stride_oq,
    source_k, stride_sb, stride_sh, stride_st,
    source_v, stride_ub, stride_uh, stride_ut,
    mass, ranks, indices, new_k, new_v,
    queries, keys, kv_heads, kv_rows, observers, scored, keep, reach, sink_tokens, recent_tokens, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr, TILE: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    i_row = tl.program_id(0) % kv_rows
    first_query = queries - (tl.program_id(0) // kv_rows + 1) * QUERIES  # below 0 where the queries do not fill a block
    i_b = tl.cast(i_row // kv_heads, tl.int64)
    i_h = tl.cast(i_row % kv_heads, tl.int64)

    o_m = tl.arange(0, BLOCK_M)
    o_query = o_m // GROUP
    o_head = tl.cast(o_m % GROUP, tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_m = (o_query >= -first_query) & (o_m < QUERIES * GROUP)
    m_q = m_m[:, None] & (o_d < D)[None, :]

    q += i_b * stride_qb + i_h * GROUP * stride_qh + first_query * tl.cast(stride_qq, tl.int64)
    if not DESCRIPTORS:
        k += i_b * stride_kb + i_h * stride_kh
        v += i_b * stride_vb + i_h * stride_vh
    out += i_b * stride_ob + i_h * GROUP * stride_oh + first_query * tl.cast(stride_oq, tl.int64)

    p_q = q + (o_query * stride_qq + o_head * stride_qh)[:, None] + o_d[None, :]
    b_q = widened(tl.load(p_q, mask=m_q, other=0.0), UPCAST)
    b_acc, b_max, b_sum = attend(
        b_q, i_row // kv_heads, i_row % kv_heads, k, stride_kt, v, stride_vt, first_query, queries, keys,
        scale, softcap, 0,
        GROUP=GROUP, D=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        HAS_SOFTCAP=HAS_SOFTCAP, HAS_WINDOW=False, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST,
    )  # fmt: skip
    p_out = out + (o_query * stride_oq + o_head * stride_oh)[:, None] + o_d[None, :]
    tl.store(p_out, rounded(b_acc / b_sum[:, None], out.dtype.element_ty, UPCAST), mask=m_q)

    if tl.program_id(0) < kv_rows:
        m_observer = (o_query >= QUERIES - observers) & (o_m < QUERIES * GROUP)
        b_lse = tl.where(m_observer, b_max + tl.log2(b_sum), float("inf"))
        mass += i_row * tl.cast(scored, tl.int64)
        ranks += i_row * tl.cast(scored, tl.int64)
        kept = i_row * tl.cast(keep, tl.int64)
        _weigh_keys(
            b_q, b_lse, i_row // kv_heads, i_row % kv_heads, k, stride_kt, mass, observers, keys, scored,
            scale, softcap,
            GROUP=GROUP, D=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            HAS_SOFTCAP=HAS_SOFTCAP, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST,
        )  # fmt: skip
        _compress(
            mass, ranks, indices + kept,
            source_k + i_b * stride_sb + i_h * stride_sh, stride_st,
            source_v + i_b * stride_ub + i_h * stride_uh, stride_ut,
            new_k + kept * D, new_v + kept * D, scored, keep, reach, sink_tokens, recent_tokens,
            D=D, BLOCK_D=BLOCK_D, BLOCK_T=BLOCK_T, TILE=TILE, AVERAGE=AVERAGE,
        )  # fmt: skip


def plan_fused_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_k: Tensor,
    out: Tensor,
    mass: Tensor,
    ranks: Tensor,
    indices: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    *,
    rows: int,
    pool_kernel: int,
    pooling: str,
    sink_tokens: int,
    recent_tokens: int,
    scale: float,
    softcap: float | None,
    config: Config,
) -> Launch:
    """The launch for checked arguments, of which `mass` and the four after it are new and contiguous.

    Args:
        q: queries [B, Hq, Q, D].
        k: keys [B, Hkv, T, D].
        v: values, as `k`.
        source_k: the keys to keep some of, as `k`.
        out: output, as `q`.
        mass: float32 [B, Hkv, scored keys], before pooling.
        ranks: int32, as `mass`: what the threshold is searched in.
        indices: int64 [B, Hkv, keep].
        new_k: [B, Hkv, keep, D].
        new_v: as `new_k`.
        rows: number of observers; with all heads of a KV head at most `config.rows`.
        pool_kernel: as in `compress_step`.
        pooling: as in `compress_step`.
        sink_tokens: as in `compress_step`.
        recent_tokens: as in `compress_step`.
        scale: factor on the logits.
        softcap: as in `chunk_attention`.
        config: blocks of `chunk_attention`.
    """
    batch, _, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    logits = logit_arguments(q, k, config, scale=scale, softcap=softcap)
    block_d = logits["BLOCK_D"]
    passed_k, passed_v = (descriptor(x, config.columns, block_d) if config.descriptors else x for x in (k, v))
    return Launch(
        kernel=_fused_step_kernel,
        grid=(batch * kv_heads * triton.cdiv(queries, config.rows // logits["GROUP"]),),
        arguments={
            **strided("q", q, ("stride_qb", "stride_qh", "stride_qq")),
            **strided("k", k, ("stride_kb", "stride_kh", "stride_kt"), passed_k),
            **strided("v", v, ("stride_vb", "stride_vh", "stride_vt"), passed_v),
            **strided("out", out, ("stride_ob", "stride_oh", "stride_oq")),
            **strided("source_k", source_k, ("stride_sb", "stride_sh", "stride_st")),
            **strided("source_v", v, ("stride_ub", "stride_uh", "stride_ut")),
            "mass": mass,
            "ranks": ranks,
            "indices": indices,
            "new_k": new_k,
            "new_v": new_v,
            "queries": queries,
            "keys": keys,
            "kv_heads": kv_heads,
            "kv_rows": batch * kv_heads,
            "observers": rows,
            "scored": mass.shape[2],
            "keep": indices.shape[2],
            "reach": pool_kernel // 2,
            "sink_tokens": sink_tokens,
            "recent_tokens": recent_tokens,
            **logits,
            "DESCRIPTORS": config.descriptors,
            "BLOCK_T": 16 if INTERPRETED else MOVED_BYTES // (block_d * q.element_size()),
            "TILE": INTERPRETED_TILE if INTERPRETED else TILE,
            "AVERAGE": pooling == "avg",
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
