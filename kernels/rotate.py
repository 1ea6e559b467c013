"""Rotary embedding of keys as a launch of its own: the memory's keys take their place in a compact numbering.

    y[t] = x[t] * cos[t] + swapped(x[t]) * sin[t],   swapped(x) = (-x[R/2:R], x[0:R/2])

for the first R dimensions; the rest pass unchanged (RoFormer, arXiv 2104.09864, in Llama's half-split form). One read
and one write of every element, which is what bounds it.

Layouts and reference: `kernels/reference.py`, `rotate`.
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

BLOCK = 32


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(do_not_specialize=["keys", "heads"])
def _rotate_kernel(
    x, stride_xb, stride_xh, stride_xt,
    out, stride_ob, stride_oh, stride_ot,
    cos, stride_ct,
    sin, stride_st,
    keys, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TURNED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK_T)
    i_row = tl.program_id(0) // blocks
    i_b = tl.cast(i_row // heads, tl.int64)
    i_h = tl.cast(i_row % heads, tl.int64)
    o_t = tl.cast(tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T), tl.int64)
    copy_rows(
        x + i_b * stride_xb + i_h * stride_xh + o_t * stride_xt,
        out + i_b * stride_ob + i_h * stride_oh + o_t * stride_ot,
        o_t < keys,
        cos + o_t * stride_ct,
        sin + o_t * stride_st,
        D=D,
        BLOCK_D=BLOCK_D,
        TURNED=TURNED,
        BLOCK_H=BLOCK_H,
        BLOCK_P=BLOCK_P,
        UPCAST=UPCAST,
    )


def plan_rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Launch:
    """The launch of `rotate` for checked arguments."""
    batch, heads, keys, _ = x.shape
    return Launch(
        kernel=_rotate_kernel,
        grid=(batch * heads * triton.cdiv(keys, BLOCK),),
        arguments={
            **strided("x", x, ("stride_xb", "stride_xh", "stride_xt")),
            **strided("out", out, ("stride_ob", "stride_oh", "stride_ot")),
            **strided("cos", cos, ("stride_ct",)),
            **strided("sin", sin, ("stride_st",)),
            "keys": keys,
            "heads": heads,
            **copy_arguments(x, cos.shape[1], BLOCK),
        },
        num_warps=4,
        num_stages=1,
    )


def require_rotation(k: Tensor, cos: Tensor | None, sin: Tensor | None, rows: int) -> None:
    """Check cos and sin [rows, R] for keys `k`: R even, 2..D, and the dtype and device of `k`; or None, both of them.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    if cos is None or sin is None:
        require(cos is sin, "sin", "None" if sin is None else "given", "give both cos and sin or neither")
        return
    require_tensor("cos", cos, (rows, None), (k.dtype,))
    require_tensor("sin", sin, tuple(cos.shape), (k.dtype,))
    require_same_device("k", k, "cos", cos)
    require_same_device("k", k, "sin", sin)
    turned, dim = cos.shape[1], k.shape[-1]
    require(2 <= turned <= dim and turned % 2 == 0, "cos.shape[1]", turned, f"must be even and 2..{dim}, the head size")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotary embedding of the keys `x`; bit for bit what `reference.rotate` gives in 16-bit types.

    Args:
        x: keys [B, Hkv, T, D], dense in the last dimension.
        cos: [T, R], R <= D and even, in the dtype of `x`; the dimensions past R pass unchanged.
        sin: as `cos`.
        out: where the result goes, shape and dtype of `x`, apart from it in memory; None allocates it.

    Returns:
        Rotated keys [B, Hkv, T, D].

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    require_tensor("x", x, (None, None, None, None), FLOATS)
    require(1 <= x.shape[3] <= MAX_HEAD_SIZE, "x.shape[3]", x.shape[3], f"head sizes of 1..{MAX_HEAD_SIZE} only")
    require_rotation(x, cos, sin, x.shape[2])
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    require_tensor("out", out, tuple(x.shape), (x.dtype,))
    require_same_device("x", x, "out", out)
    require_apart("x", x, "out", out)
    if x.numel() > 0:
        plan_rotate(x, cos, sin, out).run(x.device)
    return out
