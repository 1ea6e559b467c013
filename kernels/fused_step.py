"""One layer's whole step as one launch: attention, scoring, pooling, selection and the gather of what is kept.

All programs attend, as in `kernels/chunk_attention.py`. The observing queries are the last ones, and where those of a
KV head fit one block of rows, one program owns all of them: with its last key block, it knows their log-sum-exps. The
programs that own observers are the first of the grid, so they start first; after attending they alone compress their
KV head (`kernels/_compress.py`), while the others still attend. The keys that they read once more come from the L2
cache.

The chain of an owner is longer than another program's work. `kernels/limits.py` compares it with what the rest of the
device has to do meanwhile; where it would be the last to finish, separate launches, which spread it over the device,
are better.

Layouts and reference: `kernels/reference.py`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._attention import attend
from ._compress import Rules, Written, compress_head, compression_arguments, compression_blocks, scored_columns
from ._device import rounded, widened
from ._launch import Config, Launch, descriptor, logit_arguments, require, strided


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
    scored_k, scored_v,
    out, stride_ob, stride_oh, stride_oq,
    source_k, stride_sb, stride_sh, stride_st,
    source_v, stride_ub, stride_uh, stride_ut,
    mass, ranks, indices, new_k, new_v, scored, keep, reach, sink_tokens, recent_tokens,
    queries, keys, kv_heads, kv_rows, observers, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, TILE: tl.constexpr, AVERAGE: tl.constexpr, CHANGES: tl.constexpr,
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
    b_out = rounded(b_acc / b_sum[:, None], out.dtype.element_ty, UPCAST)
    tl.store(p_out, b_out, mask=m_q)

    if tl.program_id(0) < kv_rows:
        m_observer = (o_query >= QUERIES - observers) & (o_m < QUERIES * GROUP)
        b_lse = tl.where(m_observer, b_max + tl.log2(b_sum), float("inf"))
        compress_head(
            b_q, b_out, b_lse, i_row, kv_heads,
            k if scored_k is None else scored_k, stride_kt, v if scored_v is None else scored_v, stride_vt,
            observers, 1, keys, scale, softcap,
            source_k, stride_sb, stride_sh, stride_st,
            source_v, stride_ub, stride_uh, stride_ut,
            mass, ranks, indices, new_k, new_v, scored, keep, reach, sink_tokens, recent_tokens,
            GROUP=GROUP, D=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_S,
            HAS_SOFTCAP=HAS_SOFTCAP, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST,
            BLOCK_T=BLOCK_T, TILE=TILE, AVERAGE=AVERAGE, CHANGES=CHANGES,
        )  # fmt: skip


def plan_fused_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_k: Tensor,
    out: Tensor,
    written: Written,
    rules: Rules,
    config: Config,
) -> Launch:
    """The launch for checked arguments.

    Args:
        q: queries [B, Hq, Q, D].
        k: keys [B, Hkv, T, D].
        v: values, as `k`.
        source_k: the keys to keep some of, as `k`.
        out: output, as `q`.
        written: what it fills besides.
        rules: with a stride of 1; the observers with all heads of a KV head are at most `config.rows`.
        config: blocks of `chunk_attention`.

    Raises:
        ValueError: the observers do not fit one block of rows.
    """
    batch, _, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    logits = logit_arguments(q, k, config, scale=rules.scale, softcap=rules.softcap)
    fit = config.rows // logits["GROUP"]
    require(rules.rows <= fit, "rows", rules.rows, f"one launch has at most {fit} observers with these blocks")
    block_d = logits["BLOCK_D"]
    passed_k, passed_v = (descriptor(x, config.columns, block_d) if config.descriptors else x for x in (k, v))
    columns = scored_columns(config.columns, rules.scoring)
    # A descriptor says how large its blocks are; where both walks take the same ones it serves twice.
    again = config.descriptors and columns != config.columns
    scored_k, scored_v = (descriptor(x, columns, block_d) if again else None for x in (k, v))
    return Launch(
        kernel=_fused_step_kernel,
        grid=(batch * kv_heads * triton.cdiv(queries, config.rows // logits["GROUP"]),),
        arguments={
            **strided("q", q, ("stride_qb", "stride_qh", "stride_qq")),
            **strided("k", k, ("stride_kb", "stride_kh", "stride_kt"), passed_k),
            **strided("v", v, ("stride_vb", "stride_vh", "stride_vt"), passed_v),
            "scored_k": scored_k,
            "scored_v": scored_v,
            **strided("out", out, ("stride_ob", "stride_oh", "stride_oq")),
            **compression_arguments(source_k, v, written, rules),
            "queries": queries,
            "keys": keys,
            "kv_heads": kv_heads,
            "kv_rows": batch * kv_heads,
            "observers": rules.rows,
            **logits,
            "DESCRIPTORS": config.descriptors,
            "BLOCK_S": columns,
            **compression_blocks(block_d, q.element_size(), rules),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
