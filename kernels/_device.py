"""Device functions that several kernels share. Reference: `kernels/reference.py`.

UPCAST stands in every kernel for "bfloat16 under the interpreter": it multiplies bfloat16 bit patterns as integers and
truncates on conversion, so there values are widened before any arithmetic and rounded to nearest even by hand.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import triton
import triton.language as tl

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
def copy_rows(
    p_source,
    p_target,
    m_rows,
    p_cos,
    p_sin,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Copy rows of D elements from p_source [rows] to p_target [rows], rotating the first TURNED of them.

    TURNED = 0 copies as is. Every product and sum is rounded to the element type, as PyTorch does in
    `reference.rotate`, so that 16-bit results agree to the bit.
    """
    DTYPE: tl.constexpr = p_source.dtype.element_ty
    if TURNED == 0:
        o_d = tl.arange(0, BLOCK_D)
        m_d = m_rows[:, None] & (o_d < D)[None, :]
        tl.store(p_target[:, None] + o_d[None, :], tl.load(p_source[:, None] + o_d[None, :], mask=m_d), mask=m_d)
    else:
        HALF: tl.constexpr = TURNED // 2
        o_h = tl.arange(0, BLOCK_H)
        m_h = m_rows[:, None] & (o_h < HALF)[None, :]
        o_low = o_h[None, :]
        o_high = HALF + o_h[None, :]
        b_low = widened(tl.load(p_source[:, None] + o_low, mask=m_h), UPCAST).to(tl.float32)
        b_high = widened(tl.load(p_source[:, None] + o_high, mask=m_h), UPCAST).to(tl.float32)
        b_cos_low = widened(tl.load(p_cos[:, None] + o_low, mask=m_h), UPCAST).to(tl.float32)
        b_cos_high = widened(tl.load(p_cos[:, None] + o_high, mask=m_h), UPCAST).to(tl.float32)
        b_sin_low = widened(tl.load(p_sin[:, None] + o_low, mask=m_h), UPCAST).to(tl.float32)
        b_sin_high = widened(tl.load(p_sin[:, None] + o_high, mask=m_h), UPCAST).to(tl.float32)
        b_low_turned = rounded(b_low * b_cos_low, DTYPE, UPCAST).to(tl.float32)
        b_low_turned -= rounded(b_high * b_sin_low, DTYPE, UPCAST).to(tl.float32)
        b_high_turned = rounded(b_high * b_cos_high, DTYPE, UPCAST).to(tl.float32)
        b_high_turned += rounded(b_low * b_sin_high, DTYPE, UPCAST).to(tl.float32)
        tl.store(p_target[:, None] + o_low, rounded(b_low_turned, DTYPE, UPCAST), mask=m_h)
        tl.store(p_target[:, None] + o_high, rounded(b_high_turned, DTYPE, UPCAST), mask=m_h)
        if TURNED < D:
            o_p = tl.arange(0, BLOCK_P)
            m_p = m_rows[:, None] & (o_p < D - TURNED)[None, :]
            o_rest = TURNED + o_p[None, :]
            tl.store(p_target[:, None] + o_rest, tl.load(p_source[:, None] + o_rest, mask=m_p), mask=m_p)
