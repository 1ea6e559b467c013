"""The kept keys and values of a step, moved next to each other.

    new_k[r] = k[indices[r]],   new_v[r] = v[indices[r]]

One launch moves both. The target is always new memory: moved in parallel within one buffer, a row could be overwritten
before it has been read.

Layouts and reference: `kernels/reference.py`, `compact`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import move_rows
from ._launch import FLOATS, Launch, common_target, require, require_tensor, strided
from ._plans import Planner
from .limits import MAX_HEAD_SIZE, power_of_two

BLOCK = 32


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(do_not_specialize=["stride_ib", "stride_ih", "keep", "heads"])
def _compact_kernel(
    source_k, stride_sb, stride_sh, stride_st,
    source_v, stride_ub, stride_uh, stride_ut,
    indices, stride_ib, stride_ih,
    new_k, stride_nb, stride_nh, stride_nt,
    new_v, stride_wb, stride_wh, stride_wt,
    keep, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keep, BLOCK_T)
    i_row = tl.program_id(0) // blocks
    i_b = tl.cast(i_row // heads, tl.int64)
    i_h = tl.cast(i_row % heads, tl.int64)
    move_rows(
        source_k + i_b * stride_sb + i_h * stride_sh, stride_st,
        source_v + i_b * stride_ub + i_h * stride_uh, stride_ut,
        indices + i_b * stride_ib + i_h * stride_ih,
        new_k + i_b * stride_nb + i_h * stride_nh, stride_nt, new_v + i_b * stride_wb + i_h * stride_wh, stride_wt,
        tl.program_id(0) % blocks * BLOCK_T, keep, D=D, BLOCK_D=BLOCK_D, BLOCK_T=BLOCK_T,
    )  # fmt: skip


def plan_compact(k: Tensor, v: Tensor, indices: Tensor, new_k: Tensor, new_v: Tensor) -> Launch:
    """The launch of `compact` for checked arguments."""
    batch, heads, keep = indices.shape
    dim = k.shape[-1]
    return Launch(
        kernel=_compact_kernel,
        grid=(batch * heads * triton.cdiv(keep, BLOCK),),
        arguments={
            **strided("source_k", k, ("stride_sb", "stride_sh", "stride_st")),
            **strided("source_v", v, ("stride_ub", "stride_uh", "stride_ut")),
            **strided("indices", indices, ("stride_ib", "stride_ih")),
            **strided("new_k", new_k, ("stride_nb", "stride_nh", "stride_nt")),
            **strided("new_v", new_v, ("stride_wb", "stride_wh", "stride_wt")),
            "keep": keep,
            "heads": heads,
            "D": dim,
            "BLOCK_D": power_of_two(dim),
            "BLOCK_T": BLOCK,
        },
        num_warps=4,
        num_stages=1,
    )


@Planner
def _plan(k: Tensor, v: Tensor, indices: Tensor) -> Launch:
    require_tensor("k", k, (None, None, None, None), FLOATS)
    batch, heads, _, dim = k.shape
    require(1 <= dim <= MAX_HEAD_SIZE, "k.shape[3]", dim, f"head sizes of 1..{MAX_HEAD_SIZE} are supported")
    require_tensor("v", v, tuple(k.shape), (k.dtype,))
    require_tensor("indices", indices, (batch, heads, None), (torch.int64,))
    kept = k.new_empty(*indices.shape, dim)
    return plan_compact(k, v, indices, kept, kept)


def compact(k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the kept keys and values.

    Args:
        k: keys [B, Hkv, T, D], dense in the last dimension; bfloat16, float16 or float32.
        v: values, as `k`.
        indices: int64 [B, Hkv, keep], each in 0..T-1. They are not read back to be checked, since that would wait for
            the device: an index outside reads foreign memory.

    Returns:
        New contiguous keys and values [B, Hkv, keep, D].

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    common_target(k=k, v=v, indices=indices)
    launch = _plan(k, v, indices)
    shape = (*indices.shape, k.shape[3])
    new_k, new_v = (k.new_empty(shape) for _ in range(2))
    if new_k.numel() > 0:
        tensors = {"source_k": k, "source_v": v, "indices": indices, "new_k": new_k, "new_v": new_v}
        launch.run(k.device, tensors)
    return new_k, new_v
