"""Pooling of scores over neighbouring keys (SnapKV, arXiv 2404.14469).

    max: pooled[j] = max of mass[j - w // 2 .. j + w // 2], cut off at both ends of the row
    avg: pooled[j] = sum of the same / w, so that the row counts as zero beyond its ends (`avg_pool1d` of PyTorch)

Layouts and reference: `kernels/reference.py`, `pool`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import pooled_scores
from ._launch import Launch, require, require_tensor, strided
from .limits import POOLINGS

BLOCK = 256


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(do_not_specialize=["stride_mb", "stride_mh", "stride_pb", "stride_ph", "keys", "heads", "reach"])
def _pool_kernel(
    mass, stride_mb, stride_mh, pooled, stride_pb, stride_ph, keys, heads, reach,
    BLOCK_N: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK_N)
    i_row = tl.program_id(0) // blocks
    i_b = tl.cast(i_row // heads, tl.int64)
    i_h = tl.cast(i_row % heads, tl.int64)
    o_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b_pooled = pooled_scores(mass + i_b * stride_mb + i_h * stride_mh, o_n, keys, reach, AVERAGE)
    tl.store(pooled + i_b * stride_pb + i_h * stride_ph + o_n, b_pooled, mask=o_n < keys)


def plan_pool(mass: Tensor, pooled: Tensor, *, pool_kernel: int, pooling: str) -> Launch:
    """The launch of `pool` for checked arguments."""
    batch, heads, keys = mass.shape
    return Launch(
        kernel=_pool_kernel,
        grid=(batch * heads * triton.cdiv(keys, BLOCK),),
        arguments={
            **strided("mass", mass, ("stride_mb", "stride_mh")),
            **strided("pooled", pooled, ("stride_pb", "stride_ph")),
            "keys": keys,
            "heads": heads,
            "reach": pool_kernel // 2,
            "BLOCK_N": BLOCK,
            "AVERAGE": pooling == "avg",
        },
        num_warps=4,
        num_stages=1,
    )


def pool(mass: Tensor, pool_kernel: int, pooling: str = "max") -> Tensor:
    """Pool scores over `pool_kernel` neighbouring keys; 1 returns them unchanged.

    Args:
        mass: float32 [B, Hkv, T].
        pool_kernel: odd width in keys.
        pooling: "max" or "avg".

    Returns:
        float32 [B, Hkv, T].

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    require_tensor("mass", mass, (None, None, None), (torch.float32,))
    require_pooling(pool_kernel, pooling)
    if pool_kernel == 1 or mass.numel() == 0:
        return mass
    pooled = torch.empty_like(mass, memory_format=torch.contiguous_format)
    plan_pool(mass, pooled, pool_kernel=pool_kernel, pooling=pooling).run(mass.device)
    return pooled


def require_pooling(pool_kernel: int, pooling: str) -> None:
    """Check width and kind of the pooling.

    Raises:
        ValueError: the width is even or below 1, or there is no pooling of that name.
    """
    require(pooling in POOLINGS, "pooling", repr(pooling), f"must be one of {', '.join(map(repr, POOLINGS))}")
    require(pool_kernel >= 1 and pool_kernel % 2 == 1, "pool_kernel", pool_kernel, "must be odd and at least 1")
