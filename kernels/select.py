"""The best keys of every row, by a search for the threshold instead of a sort.

Float32 scores are mapped to unsigned integers of the same order. The `keep`-th largest of them is found bit by bit
from the top: a bit is set if at least `keep` scores reach the value that results. All scores above the threshold are
kept, and of those equal to it the first ones that are still missing; a running count gives every kept index its
place, so the output is ascending without a sort.

One program owns one row, so it can pool over neighbouring keys first (SnapKV, arXiv 2404.14469), which scoring cannot:
there a key's neighbours belong to other programs. What it pools it writes down once, as integers. Up to RESIDENT
columns it holds the row in registers; a longer row is read again for each bit, in tiles.

Layouts and reference: `kernels/reference.py`, `select`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import ordered, places, read_ranks, write_ranks
from ._launch import INTERPRETED, Launch, common_target, require_tensor, strided
from ._plans import Planner
from .limits import power_of_two
from .reference import require_selection

RESIDENT = 16384
INTERPRETED_RESIDENT = 128  # small enough that small tests take every path
TILE = 2048


@triton.jit
def _ranks(scores, ranks, o_n, keys, sink_tokens, recent_tokens, POOLED: tl.constexpr):
    if POOLED:
        b_rank = read_ranks(ranks, o_n, keys)
    else:
        b_score = tl.load(scores + o_n, mask=o_n < keys, other=0.0)
        b_rank = ordered(b_score, o_n, keys, sink_tokens, recent_tokens)
    return b_rank


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(
    do_not_specialize=[
        *("stride_mb", "stride_mh", "stride_ib", "stride_ih"),
        *("keys", "keep", "reach", "sink_tokens", "recent_tokens", "heads"),
    ]
)
def _select_kernel(
    mass, stride_mb, stride_mh,
    indices, stride_ib, stride_ih,
    ranks, keys, keep, reach, sink_tokens, recent_tokens, heads,
    BLOCK_N: tl.constexpr, TILE: tl.constexpr, IN_REGISTERS: tl.constexpr,
    POOLED: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    i_b = tl.cast(tl.program_id(0) // heads, tl.int64)
    i_h = tl.cast(tl.program_id(0) % heads, tl.int64)
    mass += i_b * stride_mb + i_h * stride_mh
    indices += i_b * stride_ib + i_h * stride_ih
    o_n = tl.arange(0, BLOCK_N)
    if POOLED:
        ranks += tl.program_id(0) * tl.cast(keys, tl.int64)
        write_ranks(mass, ranks, keys, reach, sink_tokens, recent_tokens, TILE, AVERAGE)
        tl.debug_barrier()  # the ranks are written
    if IN_REGISTERS:
        b_rank = _ranks(mass, ranks, o_n, keys, sink_tokens, recent_tokens, POOLED)

    # The last candidate refused is the threshold plus one, so its count is that of the scores above the threshold.
    threshold = tl.full([], 0, tl.uint32)
    unit = tl.full([], 0x80000000, tl.uint32)
    above = tl.full([], 0, tl.int32)
    for _ in range(32):
        candidate = threshold | unit
        if IN_REGISTERS:
            b_reached = (b_rank >= candidate).to(tl.int32)
        else:
            b_reached = tl.zeros([BLOCK_N], tl.int32)
            for start in range(0, keys, BLOCK_N):
                b_row = _ranks(mass, ranks, start + o_n, keys, sink_tokens, recent_tokens, POOLED)
                b_reached += (b_row >= candidate).to(tl.int32)
        reached = tl.sum(b_reached, axis=0)
        threshold = tl.where(reached >= keep, candidate, threshold)
        above = tl.where(reached >= keep, above, reached)
        unit = unit >> 1
    wanted_ties = keep - above

    # Places are counted in small tiles, read once more: a scan over the whole row would not fit the registers.
    above_before = tl.full([], 0, tl.int32)
    ties_before = tl.full([], 0, tl.int32)
    for start in range(0, keys, TILE):
        o_tile = start + tl.arange(0, TILE)
        b_tile = _ranks(mass, ranks, o_tile, keys, sink_tokens, recent_tokens, POOLED)
        o_place, m_kept, above_before, ties_before = places(b_tile, threshold, above_before, ties_before, wanted_ties)
        tl.store(indices + o_place, o_tile.to(tl.int64), mask=m_kept)


def plan_select(
    scores: Tensor,
    indices: Tensor,
    *,
    sink_tokens: int,
    recent_tokens: int,
    ranks: Tensor | None = None,
    pool_kernel: int = 1,
    pooling: str = "max",
) -> Launch:
    """The launch of `select` for checked arguments, of scores pooled as in `compress_step`.

    Args:
        scores: float32 [B, Hkv, T].
        indices: int64 [B, Hkv, keep].
        sink_tokens: as in `select`.
        recent_tokens: as in `select`.
        ranks: int32 [B, Hkv, T], new and contiguous: written to where there is pooling, else not needed.
        pool_kernel: odd width in keys; 1 does not pool.
        pooling: "max" or "avg".
    """
    batch, heads, keys = scores.shape
    resident = INTERPRETED_RESIDENT if INTERPRETED else RESIDENT
    block = min(power_of_two(keys, least=resident // 8), resident)
    pooled = pool_kernel > 1
    return Launch(
        kernel=_select_kernel,
        grid=(batch * heads,),
        arguments={
            **strided("mass", scores, ("stride_mb", "stride_mh")),
            **strided("indices", indices, ("stride_ib", "stride_ih")),
            "ranks": ranks if pooled else None,
            "keys": keys,
            "keep": indices.shape[2],
            "reach": pool_kernel // 2,
            "sink_tokens": sink_tokens,
            "recent_tokens": recent_tokens,
            "heads": heads,
            "BLOCK_N": block,
            "TILE": min(TILE, block),
            "IN_REGISTERS": keys <= resident,
            "POOLED": pooled,
            "AVERAGE": pooled and pooling == "avg",
        },
        num_warps=max(4, block // 1024),
        num_stages=1,
    )


@Planner
def _plan(scores: Tensor, *, keep: int, sink_tokens: int, recent_tokens: int) -> Launch:
    require_tensor("scores", scores, (None, None, None), (torch.float32,))
    require_selection(scores.shape[2], keep, sink_tokens, recent_tokens)
    indices = scores.new_empty(*scores.shape[:2], keep, dtype=torch.int64)
    return plan_select(scores, indices, sink_tokens=sink_tokens, recent_tokens=recent_tokens)


def select(scores: Tensor, keep: int, *, sink_tokens: int = 0, recent_tokens: int = 0) -> Tensor:
    """Indices of the `keep` best keys of every row, ascending; equal scores go to the lower index.

    Args:
        scores: float32 [B, Hkv, T], finite.
        keep: keys kept per KV head, sink_tokens + recent_tokens <= keep <= T; 0 gives an empty result.
        sink_tokens: keys kept at the front, whatever their score.
        recent_tokens: keys kept at the end, whatever their score.

    Returns:
        int64 [B, Hkv, keep].

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    common_target(scores=scores)
    launch = _plan(scores, keep=keep, sink_tokens=sink_tokens, recent_tokens=recent_tokens)
    indices = torch.empty(*scores.shape[:2], keep, dtype=torch.int64, device=scores.device)
    if indices.numel() > 0:
        launch.run(scores.device, {"mass": scores, "indices": indices})
    return indices
