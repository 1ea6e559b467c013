"""Device function that sums what observing queries have of a block of keys; see `kernels/key_mass.py`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import triton
import triton.language as tl

from ._attention import exponents
from ._device import LOG2E, squared_changes, widened


@triton.jit
def sum_observers(
    b_mass, b_k, b_v, q, stride_qh, stride_qq, out, stride_oh, stride_oq, lse, stride_lh, stride_lq,
    o_first, start, end, observers, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, CHANGES: tl.constexpr,
):  # fmt: skip
    """Adds what the observers start..end have of the keys; MASKED: not all of them see all keys."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    o_m = tl.arange(0, BLOCK_M)
    o_query = o_m // GROUP
    o_head = tl.cast(o_m % GROUP, tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    for t in range(start, end, QUERIES):
        m_m = (o_query < observers - t) & (o_m < QUERIES * GROUP)
        p_q = q + t * tl.cast(stride_qq, tl.int64) + (o_query * stride_qq + o_head * stride_qh)[:, None] + o_d[None, :]
        b_q = widened(tl.load(p_q, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0), UPCAST)
        # An infinite log-sum-exp gives the rows that are no observers a probability of zero.
        b_lse = tl.load(lse + t * stride_lq + o_query * stride_lq + o_head * stride_lh, mask=m_m, other=float("inf"))
        b_s, factor = exponents(b_k, b_q, scale, softcap, HAS_SOFTCAP, UPCAST)  # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2(b_s * factor - (b_lse * LOG2E)[None, :])
        if CHANGES:
            o_out = (o_query * stride_oq + o_head * stride_oh)[:, None] + o_d[None, :]
            p_out = out + t * tl.cast(stride_oq, tl.int64) + o_out
            b_out = widened(tl.load(p_out, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0), UPCAST)
            b_p = squared_changes(b_p, b_v, b_out, UPCAST)
        if MASKED:
            b_p = tl.where((t + o_query)[None, :] >= o_first[:, None], b_p, 0.0)
        b_mass += tl.sum(b_p, axis=1)
    return b_mass
