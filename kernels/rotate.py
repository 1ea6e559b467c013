"""Rotary embedding of keys as a launch of its own: the memory's keys take their place in a compact numbering.

    y[t] = x[t] * cos[t] + swapped(x[t]) * sin[t],   swapped(x) = (-x[R/2:R], x[0:R/2])

for the first R dimensions; the rest pass unchanged (RoFormer, arXiv 2104.09864, in Llama's half-split form). In the
interleaved form, RoFormer's own, swapped(x) = (-x[1], x[0], -x[3], x[2], ...). One read and one write of every element,
which is what bounds it.

Layouts and reference: `kernels/reference.py`, `rotate`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import rounded, widened
from ._launch import (
    FLOATS,
    INTERPRETED,
    Launch,
    common_target,
    require,
    require_tensor,
    strided,
)
from ._plans import Planner
from .limits import MAX_HEAD_SIZE, power_of_two

BLOCK = 32


@triton.jit
def _pairs(p_rows, m_t, TURNED: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr, UPCAST: tl.constexpr):
    """float32 [rows, BLOCK_H] twice: of the rows at `p_rows`, the dimensions that turn together, beside each other."""
    if INTERLEAVED:
        # In one piece: every second element by itself would be a load of its own.
        o_r = tl.arange(0, 2 * BLOCK_H)
        b_rows = tl.load(p_rows[:, None] + o_r[None, :], mask=m_t[:, None] & (o_r < TURNED)[None, :])
        b_low, b_high = tl.split(tl.reshape(b_rows, [p_rows.shape[0], BLOCK_H, 2]))
    else:
        o_h = tl.arange(0, BLOCK_H)
        m_h = m_t[:, None] & (o_h < TURNED // 2)[None, :]
        b_low = tl.load(p_rows[:, None] + o_h[None, :], mask=m_h)
        b_high = tl.load(p_rows[:, None] + TURNED // 2 + o_h[None, :], mask=m_h)
    return widened(b_low, UPCAST).to(tl.float32), widened(b_high, UPCAST).to(tl.float32)


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(do_not_specialize=["keys", "heads"])
def _rotate_kernel(
    x, stride_xb, stride_xh, stride_xt,
    out, stride_ob, stride_oh, stride_ot,
    cos, stride_ct,
    sin, stride_st,
    keys, heads,
    D: tl.constexpr, TURNED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
    INTERLEAVED: tl.constexpr, SHORT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK_T)
    i_row = tl.program_id(0) // blocks
    i_b = tl.cast(i_row // heads, tl.int64)
    i_h = tl.cast(i_row % heads, tl.int64)
    o_t = tl.cast(tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T), tl.int64)
    m_t = o_t < keys
    p_x = x + i_b * stride_xb + i_h * stride_xh + o_t * stride_xt
    p_out = out + i_b * stride_ob + i_h * stride_oh + o_t * stride_ot
    p_cos = cos + o_t * stride_ct
    p_sin = sin + o_t * stride_st

    # With SHORT tables every product and sum is rounded to the element type, as PyTorch does, so that 16-bit results
    # agree to the bit; with float32 tables of 16-bit keys the result alone is.
    DTYPE: tl.constexpr = x.dtype.element_ty
    b_low, b_high = _pairs(p_x, m_t, TURNED, BLOCK_H, INTERLEAVED, UPCAST)
    b_cos_low, b_cos_high = _pairs(p_cos, m_t, TURNED, BLOCK_H, INTERLEAVED, UPCAST)
    b_sin_low, b_sin_high = _pairs(p_sin, m_t, TURNED, BLOCK_H, INTERLEAVED, UPCAST)
    b_low_cos, b_high_sin = b_low * b_cos_low, b_high * b_sin_low
    b_high_cos, b_low_sin = b_high * b_cos_high, b_low * b_sin_high
    if SHORT:
        b_low_cos = rounded(b_low_cos, DTYPE, UPCAST).to(tl.float32)
        b_high_sin = rounded(b_high_sin, DTYPE, UPCAST).to(tl.float32)
        b_high_cos = rounded(b_high_cos, DTYPE, UPCAST).to(tl.float32)
        b_low_sin = rounded(b_low_sin, DTYPE, UPCAST).to(tl.float32)
    b_low_turned = rounded(b_low_cos - b_high_sin, DTYPE, UPCAST)
    b_high_turned = rounded(b_high_cos + b_low_sin, DTYPE, UPCAST)
    if INTERLEAVED:
        o_r = tl.arange(0, 2 * BLOCK_H)
        b_turned = tl.reshape(tl.join(b_low_turned, b_high_turned), [BLOCK_T, 2 * BLOCK_H])
        tl.store(p_out[:, None] + o_r[None, :], b_turned, mask=m_t[:, None] & (o_r < TURNED)[None, :])
    else:
        o_h = tl.arange(0, BLOCK_H)
        m_h = m_t[:, None] & (o_h < TURNED // 2)[None, :]
        tl.store(p_out[:, None] + o_h[None, :], b_low_turned, mask=m_h)
        tl.store(p_out[:, None] + TURNED // 2 + o_h[None, :], b_high_turned, mask=m_h)
    if TURNED < D:
        o_p = tl.arange(0, BLOCK_P)
        m_p = m_t[:, None] & (o_p < D - TURNED)[None, :]
        o_rest = TURNED + o_p[None, :]
        tl.store(p_out[:, None] + o_rest, tl.load(p_x[:, None] + o_rest, mask=m_p), mask=m_p)


def plan_rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, interleaved: bool = False) -> Launch:
    """The launch of `rotate` for checked arguments."""
    batch, heads, keys, dim = x.shape
    turned = cos.shape[1]
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
            "D": dim,
            "TURNED": turned,
            "BLOCK_H": power_of_two(turned // 2),
            "BLOCK_P": power_of_two(max(1, dim - turned)),
            "BLOCK_T": BLOCK,
            "INTERLEAVED": interleaved,
            "SHORT": cos.dtype == x.dtype,
            "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,
        },
        num_warps=4,
        num_stages=1,
        # The compiler narrows to 16-bit products and sums, and fused ones round once where PyTorch rounds twice.
        fused=False,
    )


@Planner
def _plan(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Launch:
    require_tensor("x", x, (None, None, None, None), FLOATS)
    dim = x.shape[3]
    require(1 <= dim <= MAX_HEAD_SIZE, "x.shape[3]", dim, f"head sizes of 1..{MAX_HEAD_SIZE} only")
    require_tensor("cos", cos, (x.shape[2], None), (x.dtype, torch.float32))
    require_tensor("sin", sin, tuple(cos.shape), (cos.dtype,))
    turned = cos.shape[1]
    require(2 <= turned <= dim and turned % 2 == 0, "cos.shape[1]", turned, f"must be even and 2..{dim}, the head size")
    return plan_rotate(x, cos, sin, torch.empty_like(x, memory_format=torch.contiguous_format), interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of the keys `x`; bit for bit what `reference.rotate` gives in 16-bit types.

    Args:
        x: keys [B, Hkv, T, D], dense in the last dimension.
        cos: [T, R] in the dtype of `x` or float32, R even and 2..D; the dimensions past R pass unchanged.
        sin: as `cos`.
        interleaved: which dimensions turn together, as in `reference.rotate`.

    Returns:
        Rotated keys [B, Hkv, T, D], contiguous.

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    common_target(x=x, cos=cos, sin=sin)
    launch = _plan(x, cos, sin, interleaved=interleaved)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        launch.run(x.device, {"x": x, "cos": cos, "sin": sin, "out": out})
    return out
