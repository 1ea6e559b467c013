"""What follows a forward pass whose log-sum-exps are known, such as a library's: score, select and keep.

In one launch with a program per KV head where `kernels/limits.py` says that it is done sooner (small steps, whose time
is that of launching), else in three, which spread the work over the device:

1. `key_mass`: product, softmax, causal mask, and mean over observers and heads of the group.
2. `select`: pooling, threshold, ties, sinks, recent keys and ascending order.
3. `compact`: keys and values together.

Layouts and reference: `kernels/reference.py`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._compress import Rules, Written, compress_head, compression_arguments, compression_blocks, scored_columns
from ._device import LOG2E, widened
from ._launch import (
    INTERPRETER,
    Config,
    Launch,
    Target,
    aligned,
    descriptor,
    logit_arguments,
    strided,
)
from .compact import plan_compact
from .key_mass import plan_key_mass
from .limits import OUTPUT_CHANGE, StepSizes, compression_in_one_launch, compression_rows, power_of_two
from .select import plan_select


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(
    do_not_specialize=[
        *("stride_lb", "stride_lh", "queries", "keys", "kv_heads"),
        *("observers", "every", "scored", "keep", "reach", "sink_tokens", "recent_tokens"),
    ]
)
def _compress_kernel(
    q, stride_qb, stride_qh, stride_qq,
    k, stride_kb, stride_kh, stride_kt,
    v, stride_vb, stride_vh, stride_vt,
    out, stride_ob, stride_oh, stride_oq,
    lse, stride_lb, stride_lh,
    source_k, stride_sb, stride_sh, stride_st,
    source_v, stride_ub, stride_uh, stride_ut,
    mass, ranks, indices, new_k, new_v, scored, keep, reach, sink_tokens, recent_tokens,
    queries, keys, kv_heads, observers, every, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr, TILE: tl.constexpr, AVERAGE: tl.constexpr, CHANGES: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    i_row = tl.program_id(0)
    i_b = tl.cast(i_row // kv_heads, tl.int64)
    i_h = tl.cast(i_row % kv_heads, tl.int64)
    first_query = queries - QUERIES  # below 0 where the queries do not fill the block

    o_m = tl.arange(0, BLOCK_M)
    o_query = o_m // GROUP
    o_head = tl.cast(o_m % GROUP, tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    b_back = QUERIES - 1 - o_query  # counted from the last query
    m_votes = (b_back < observers) & (b_back % every == 0) & (o_m < QUERIES * GROUP)

    q += i_b * stride_qb + i_h * GROUP * stride_qh + first_query * tl.cast(stride_qq, tl.int64)
    lse += i_b * stride_lb + i_h * GROUP * stride_lh + first_query
    if not DESCRIPTORS:
        k += i_b * stride_kb + i_h * stride_kh
        v += i_b * stride_vb + i_h * stride_vh
    p_q = q + (o_query * stride_qq + o_head * stride_qh)[:, None] + o_d[None, :]
    b_q = widened(tl.load(p_q, mask=m_votes[:, None] & (o_d < D)[None, :], other=0.0), UPCAST)
    b_out = b_q
    if CHANGES:
        out += i_b * stride_ob + i_h * GROUP * stride_oh + first_query * tl.cast(stride_oq, tl.int64)
        p_out = out + (o_query * stride_oq + o_head * stride_oh)[:, None] + o_d[None, :]
        b_out = widened(tl.load(p_out, mask=m_votes[:, None] & (o_d < D)[None, :], other=0.0), UPCAST)
    # An infinite log-sum-exp gives the rows that do not vote a probability of zero.
    b_lse = tl.load(lse + o_query + o_head * stride_lh, mask=m_votes, other=float("inf")) * LOG2E
    compress_head(
        b_q, b_out, b_lse, i_row, kv_heads, k, stride_kt, v, stride_vt, observers, every, keys, scale, softcap,
        source_k, stride_sb, stride_sh, stride_st,
        source_v, stride_ub, stride_uh, stride_ut,
        mass, ranks, indices, new_k, new_v, scored, keep, reach, sink_tokens, recent_tokens,
        GROUP=GROUP, D=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        HAS_SOFTCAP=HAS_SOFTCAP, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST,
        BLOCK_T=BLOCK_T, TILE=TILE, AVERAGE=AVERAGE, CHANGES=CHANGES,
    )  # fmt: skip


def compression_config(q: Tensor, k: Tensor, v: Tensor, sizes: StepSizes, target: Target) -> Config:
    """The blocks of the one launch that compresses: all observers of a KV head, and a block of keys."""
    rows = compression_rows(sizes)
    if target == INTERPRETER:
        return Config(rows, 32, num_warps=4, num_stages=1, descriptors=aligned(k) and aligned(v))
    # On Blackwell a block of 128 keys puts some registers on the stack.
    columns = 64 if power_of_two(q.shape[3], least=16) > 128 or target.major == 10 else 128
    columns = scored_columns(columns, sizes.scoring)
    # There, where two products of so many rows fit four warps, eight put some on the stack.
    few = rows <= 64 and 64 < sizes.dim <= 128
    warps = 4 if target.major == 10 and sizes.scoring == OUTPUT_CHANGE and few else 8
    return Config(rows, columns, num_warps=warps, num_stages=2, descriptors=target.copies_tensors and aligned(v))


def plan_compress(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_k: Tensor,
    out: Tensor,
    lse: Tensor,
    written: Written,
    rules: Rules,
    config: Config,
) -> Launch:
    """The one launch for checked arguments.

    Args:
        q: queries [B, Hq, Q, D].
        k: keys [B, Hkv, T, D].
        v: values, as `k`.
        source_k: the keys to keep some of, as `k`.
        out: output of the forward pass, as `q`.
        lse: float32 [B, Hq, Q].
        written: what it fills.
        rules: the observers with all heads of a KV head are at most `config.rows`.
        config: blocks, from `compression_config`.
    """
    logits = logit_arguments(q, k, config, scale=rules.scale, softcap=rules.softcap)
    block_d = logits["BLOCK_D"]
    passed_k, passed_v = (descriptor(x, config.columns, block_d) if config.descriptors else x for x in (k, v))
    return Launch(
        kernel=_compress_kernel,
        grid=(k.shape[0] * k.shape[1],),
        arguments={
            **strided("q", q, ("stride_qb", "stride_qh", "stride_qq")),
            **strided("k", k, ("stride_kb", "stride_kh", "stride_kt"), passed_k),
            **strided("v", v, ("stride_vb", "stride_vh", "stride_vt"), passed_v),
            **strided("out", out, ("stride_ob", "stride_oh", "stride_oq")),
            **strided("lse", lse, ("stride_lb", "stride_lh")),
            **compression_arguments(source_k, v, written, rules),
            "queries": q.shape[2],
            "keys": k.shape[2],
            "kv_heads": k.shape[1],
            "observers": rules.rows,
            "every": rules.stride,
            **logits,
            "DESCRIPTORS": config.descriptors,
            **compression_blocks(block_d, q.element_size(), rules),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def one_launch_pays(q: Tensor, k: Tensor, sizes: StepSizes, target: Target) -> bool:
    """Whether to compress in one launch. Only 16-bit tensors that load in whole vectors do, except when interpreted."""
    fed = q.element_size() == 2 and aligned(k)
    return (fed or target == INTERPRETER) and compression_in_one_launch(sizes, target.major, target.multiprocessors)


def plan_compression(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_k: Tensor,
    out: Tensor,
    lse: Tensor,
    written: Written,
    rules: Rules,
    *,
    sizes: StepSizes,
    target: Target,
) -> tuple[Launch, ...]:
    """The launches, in order, for checked arguments: one or several, as `sizes` make it worth while.

    Args:
        q: queries [B, Hq, Q, D].
        k: keys [B, Hkv, T, D].
        v: values, as `k`.
        source_k: the keys to keep some of, as `k`.
        out: output of the forward pass, as `q`.
        lse: float32 [B, Hq, Q].
        written: what they fill; several launches need no `ranks` without pooling.
        rules: of which `keep` is at least 1.
        sizes: those of the step.
        target: the chip.
    """
    if one_launch_pays(q, k, sizes, target):
        config = compression_config(q, k, v, sizes, target)
        return (plan_compress(q, k, v, source_k, out, lse, written, rules, config),)
    logits: dict[str, Any] = {"scale": rules.scale, "softcap": rules.softcap}
    forced: dict[str, Any] = {"sink_tokens": rules.sink_tokens, "recent_tokens": rules.recent_tokens}
    pooled: dict[str, Any] = {"pool_kernel": rules.pool_kernel, "pooling": rules.pooling}
    voters: dict[str, Any] = {"rows": rules.rows, "stride": rules.stride, "scoring": rules.scoring}
    return (
        plan_key_mass(q, k, v, out, lse, written.mass, target=target, **voters, **logits),
        plan_select(written.mass, written.indices, ranks=written.ranks, **pooled, **forced),
        plan_compact(source_k, v, written.indices, written.new_k, written.new_v),
    )
