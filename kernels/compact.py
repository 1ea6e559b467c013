"""The kept keys and values of a step, moved next to each other.

    new_k[r] = k[indices[r]] (rotated to position r of cos and sin, if given),   new_v[r] = v[indices[r]]

One launch moves both; the rotation rides along because the key is in registers anyway. The target is always another
piece of memory: moved in parallel, a row could be overwritten before it has been read.

Layouts and reference: `kernels/reference.py`, `compact`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import copy_rows
from ._launch import (
    FLOATS,
    Launch,
    copy_arguments,
    require,
    require_apart,
    require_same_device,
    require_tensor,
    strided,
)
from .limits import MAX_HEAD_SIZE
from .rotate import require_rotation

BLOCK = 32


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(do_not_specialize=["stride_ib", "stride_ih", "keep", "heads"])
def _compact_kernel(
    k, stride_kb, stride_kh, stride_kt,
    v, stride_vb, stride_vh, stride_vt,
    indices, stride_ib, stride_ih,
    cos, stride_ct,
    sin, stride_st,
    new_k, stride_nb, stride_nh, stride_nt,
    new_v, stride_wb, stride_wh, stride_wt,
    keep, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TURNED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keep, BLOCK_T)
    i_row = tl.program_id(0) // blocks
    i_b = tl.cast(i_row // heads, tl.int64)
    i_h = tl.cast(i_row % heads, tl.int64)
    o_t = tl.cast(tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T), tl.int64)
    m_t = o_t < keep
    o_kept = tl.load(indices + i_b * stride_ib + i_h * stride_ih + o_t, mask=m_t, other=0)
    copy_rows(
        k + i_b * stride_kb + i_h * stride_kh + o_kept * stride_kt,
        new_k + i_b * stride_nb + i_h * stride_nh + o_t * stride_nt,
        m_t,
        cos + o_t * stride_ct,
        sin + o_t * stride_st,
        D=D,
        BLOCK_D=BLOCK_D,
        TURNED=TURNED,
        BLOCK_H=BLOCK_H,
        BLOCK_P=BLOCK_P,
        UPCAST=UPCAST,
    )
    copy_rows(
        v + i_b * stride_vb + i_h * stride_vh + o_kept * stride_vt,
        new_v + i_b * stride_wb + i_h * stride_wh + o_t * stride_wt,
        m_t,
        cos,
        sin,
        D=D,
        BLOCK_D=BLOCK_D,
        TURNED=0,
        BLOCK_H=BLOCK_H,
        BLOCK_P=BLOCK_P,
        UPCAST=UPCAST,
    )


def plan_compact(
    k: Tensor, v: Tensor, indices: Tensor, cos: Tensor | None, sin: Tensor | None, new_k: Tensor, new_v: Tensor
) -> Launch:
    """The launch of `compact` for checked arguments."""
    batch, heads, keep = indices.shape
    return Launch(
        kernel=_compact_kernel,
        grid=(batch * heads * triton.cdiv(keep, BLOCK),),
        arguments={
            **strided("k", k, ("stride_kb", "stride_kh", "stride_kt")),
            **strided("v", v, ("stride_vb", "stride_vh", "stride_vt")),
            **strided("indices", indices, ("stride_ib", "stride_ih")),
            **strided("cos", k if cos is None else cos, ("stride_ct",)),
            **strided("sin", k if sin is None else sin, ("stride_st",)),
            **strided("new_k", new_k, ("stride_nb", "stride_nh", "stride_nt")),
            **strided("new_v", new_v, ("stride_wb", "stride_wh", "stride_wt")),
            "keep": keep,
            "heads": heads,
            **copy_arguments(k, 0 if cos is None else cos.shape[1], BLOCK),
        },
        num_warps=4,
        num_stages=1,
    )


def compact(
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    out_k: Tensor | None = None,
    out_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the kept keys and values; with cos and sin, kept key r is also rotated to row r of them.

    Args:
        k: keys [B, Hkv, T, D], dense in the last dimension; bfloat16, float16 or float32.
        v: values, as `k`.
        indices: int64 [B, Hkv, keep], each in 0..T-1. They are not read back to be checked, since that would wait for
            the device: an index outside reads foreign memory.
        cos: [keep, R] cosines of the kept keys' new positions in the dtype of `k`, or None.
        sin: as `cos`; both or neither.
        out_k: where the keys go, [B, Hkv, keep, D], apart from `k` and `v` in memory; None allocates it.
        out_v: where the values go, as `out_k`.

    Returns:
        The kept keys and values, [B, Hkv, keep, D].

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    require_tensor("k", k, (None, None, None, None), FLOATS)
    batch, heads, _, dim = k.shape
    require(1 <= dim <= MAX_HEAD_SIZE, "k.shape[3]", dim, f"head sizes of 1..{MAX_HEAD_SIZE} are supported")
    require_tensor("v", v, tuple(k.shape), (k.dtype,))
    require_tensor("indices", indices, (batch, heads, None), (torch.int64,))
    keep = indices.shape[2]
    require_rotation(k, cos, sin, keep)
    new_k = k.new_empty(batch, heads, keep, dim) if out_k is None else out_k
    new_v = v.new_empty(batch, heads, keep, dim) if out_v is None else out_v
    for name, x in (("v", v), ("indices", indices), ("out_k", new_k), ("out_v", new_v)):
        require_same_device("k", k, name, x)
    for name, x in (("out_k", new_k), ("out_v", new_v)):
        require_tensor(name, x, (batch, heads, keep, dim), (k.dtype,))
        require_apart("k", k, name, x)
        require_apart("v", v, name, x)
    require_apart("out_k", new_k, "out_v", new_v)
    if new_k.numel() > 0:
        plan_compact(k, v, indices, cos, sin, new_k, new_v).run(k.device)
    return new_k, new_v
