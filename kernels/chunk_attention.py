"""Attention of one chunk over memory | chunk, with the log-sum-exp that scoring needs.

    out[i] = sum_j exp(s_ij - lse[i]) v[j],   lse[i] = log sum_j exp(s_ij),   s_ij = scale * q[i] . k[j]

over the keys j that query i sees: j <= T - Q + i, and j > T - Q + i - window with a sliding window. One pass with
the online softmax (Milakov and Gimelshein, arXiv 1805.02867; tiled as in FlashAttention-2, arXiv 2307.08691).

A program owns BLOCK_M rows of one KV head (`kernels/_attention.py`). Programs with the most keys start first.

Layouts and reference: `kernels/reference.py`, `chunk_attention`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import attend
from ._device import LN2, rounded, widened
from ._launch import (
    INTERPRETER,
    Config,
    Launch,
    Target,
    aligned,
    common_target,
    descriptor,
    first_that_fits,
    logit_arguments,
    require,
    require_logits,
    require_queries_and_keys,
    require_tensor,
    strided,
)
from ._plans import Planner
from .limits import attention_rows, power_of_two


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "queries", "keys", "kv_heads", "kv_rows"])
def _chunk_attention_kernel(
    q, stride_qb, stride_qh, stride_qq,
    k, stride_kb, stride_kh, stride_kt,
    v, stride_vb, stride_vh, stride_vt,
    out, stride_ob, stride_oh, stride_oq,
    lse, stride_lb, stride_lh,
    queries, keys, kv_heads, kv_rows, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, HAS_WINDOW: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    i_row = tl.program_id(0) % kv_rows
    first_query = queries - (tl.program_id(0) // kv_rows + 1) * QUERIES  # below 0 where the queries do not fill a block
    i_b = tl.cast(i_row // kv_heads, tl.int64)
    i_h = tl.cast(i_row % kv_heads, tl.int64)

    # Rows are numbered from the block's corner: where they lie is then a constant of the thread, which keeps the
    # addresses of the epilogue out of the registers of the loop.
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
    lse += i_b * stride_lb + i_h * GROUP * stride_lh + first_query

    p_q = q + (o_query * stride_qq + o_head * stride_qh)[:, None] + o_d[None, :]
    b_q = widened(tl.load(p_q, mask=m_q, other=0.0), UPCAST)
    b_acc, b_max, b_sum = attend(
        b_q, i_row // kv_heads, i_row % kv_heads, k, stride_kt, v, stride_vt, first_query, queries, keys,
        scale, softcap, window,
        GROUP=GROUP, D=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        HAS_SOFTCAP=HAS_SOFTCAP, HAS_WINDOW=HAS_WINDOW, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST,
    )  # fmt: skip

    p_out = out + (o_query * stride_oq + o_head * stride_oh)[:, None] + o_d[None, :]
    tl.store(p_out, rounded(b_acc / b_sum[:, None], out.dtype.element_ty, UPCAST), mask=m_q)
    p_lse = lse + o_query + o_head * stride_lh
    tl.store(p_lse, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)


def _candidates(q: Tensor, k: Tensor, v: Tensor, target: Target) -> list[tuple[Config, int]]:
    """Configurations to try in order, each with an upper bound of the shared memory it takes, in bytes.

    None of them spills registers; `bench/kernel_resources.py` holds the table to that.
    """
    block_d = power_of_two(q.shape[3], least=16)
    vectors = aligned(k) and aligned(v)
    if target == INTERPRETER:
        shapes = [Config(attention_rows(block_d, 0), 32, num_warps=4, num_stages=1, descriptors=vectors)]
    elif q.element_size() == 4:
        shapes = [Config(32, 16, num_warps=8, num_stages=1)] if 64 < block_d <= 128 else [Config(16, 16, 8, 1)]
    elif not vectors:
        shapes = [Config(64 if block_d <= 128 else 32, 32, num_warps=8, num_stages=1)]
    elif target.copies_tensors and block_d > 128:
        shapes = [Config(128, 64, num_warps=8, num_stages=2, descriptors=True)]
    elif target.copies_tensors:
        shapes = [Config(128, 128, num_warps=8, num_stages=3, descriptors=True)]
    elif block_d > 128:
        shapes = [Config(64, 32, num_warps=8, num_stages=2), Config(64, 32, num_warps=8, num_stages=1)]
    elif block_d > 64:
        shapes = [Config(128, 32, num_warps=8, num_stages=3)]
    else:
        shapes = [Config(128, 64, num_warps=8, num_stages=3)]
    row_bytes = block_d * q.element_size()
    return [(c, (c.rows + 2 * c.columns * c.num_stages) * row_bytes + 2048) for c in shapes]


def attention_config(q: Tensor, k: Tensor, v: Tensor, target: Target) -> Config:
    """The blocks that attention of these tensors is computed in."""
    return first_that_fits(_candidates(q, k, v, target), target)


def plan_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    target: Target,
    config: Config | None = None,
) -> Launch:
    """The launch of `chunk_attention` for checked arguments; `config` overrides the table."""
    batch, _, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if config is None:
        config = attention_config(q, k, v, target)
    logits = logit_arguments(q, k, config, scale=scale, softcap=softcap)
    passed_k, passed_v = (descriptor(x, config.columns, logits["BLOCK_D"]) if config.descriptors else x for x in (k, v))
    return Launch(
        kernel=_chunk_attention_kernel,
        grid=(batch * kv_heads * triton.cdiv(queries, config.rows // logits["GROUP"]),),
        arguments={
            **strided("q", q, ("stride_qb", "stride_qh", "stride_qq")),
            **strided("k", k, ("stride_kb", "stride_kh", "stride_kt"), passed_k),
            **strided("v", v, ("stride_vb", "stride_vh", "stride_vt"), passed_v),
            **strided("out", out, ("stride_ob", "stride_oh", "stride_oq")),
            **strided("lse", lse, ("stride_lb", "stride_lh")),
            "queries": queries,
            "keys": keys,
            "kv_heads": kv_heads,
            "kv_rows": batch * kv_heads,
            "window": 0 if window is None else window,
            **logits,
            "HAS_WINDOW": window is not None,
            "DESCRIPTORS": config.descriptors,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def new_output(q: Tensor) -> Tensor:
    """Room for the output of the queries `q`, in the order in which the model's output projection wants it."""
    batch, heads, queries, dim = q.shape
    return torch.empty(batch, queries, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)


@Planner
def _plan(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, window: int | None, target: Target
) -> Launch:
    require_queries_and_keys(q, k)
    require_tensor("v", v, tuple(k.shape), (q.dtype,))
    require_logits(scale, softcap)
    require(window is None or window >= 1, "window", window, "must be at least 1, or None for no window")
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return plan_chunk_attention(q, k, v, new_output(q), lse, scale=scale, softcap=softcap, window=window, target=target)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Bottom-right causal grouped-query attention over memory | chunk.

    Every tensor may be a slice or a transposed view as long as its last dimension is dense; strides that are multiples
    of 16 elements load fastest.

    Args:
        q: queries [B, Hq, Q, D], D <= 256; bfloat16, float16 or float32 (float32 is computed in full, without TF32).
        k: keys [B, Hkv, T, D], T >= Q, same dtype.
        v: values, as `k`.
        scale: factor on the logits, positive.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2); None leaves them.
        window: keys further back than this are not seen; None sees all.

    Returns:
        Output [B, Hq, Q, D] in the dtype of `q`, a view of the order [B, Q, Hq, D], in which the model's output
        projection wants it, and the natural log-sum-exp of the logits, float32 [B, Hq, Q].

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    target = common_target(q=q, k=k, v=v)
    launch = _plan(q, k, v, scale=scale, softcap=softcap, window=window, target=target)
    out, lse = new_output(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    launch.run(q.device, {"q": q, "k": k, "v": v, "out": out, "lse": lse})
    return out, lse
