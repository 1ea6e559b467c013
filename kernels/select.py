"""The best keys of every row, by a search for the threshold instead of a sort.

Float32 scores are mapped to unsigned integers of the same order. The `keep`-th largest of them is found bit by bit
from the top: a bit is set if at least `keep` scores reach the value that results. All scores above the threshold are
kept, and of those equal to it the first ones that are still missing; a running count gives every kept index its
place, so the output is ascending without a sort.

One program owns one row. Up to RESIDENT columns it holds the row in registers; a longer row is read again for each
bit, in tiles.

Layouts and reference: `kernels/reference.py`, `select`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import ordered, places
from ._launch import INTERPRETED, Launch, require_tensor, strided
from .limits import power_of_two
from .reference import require_selection

RESIDENT = 16384
INTERPRETED_RESIDENT = 128  # small enough that small tests take every path
TILE = 2048


@triton.jit
def _ranks(scores, o_n, keys, sink_tokens, recent_tokens):
    b_score = tl.load(scores + o_n, mask=o_n < keys, other=0.0)
    return ordered(b_score, o_n, keys, sink_tokens, recent_tokens)


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(
    do_not_specialize=[
        *("stride_sb", "stride_sh", "stride_ib", "stride_ih"),
        *("keys", "keep", "sink_tokens", "recent_tokens", "heads"),
    ]
)
def _select_kernel(
    scores, stride_sb, stride_sh,
    indices, stride_ib, stride_ih,
    keys, keep, sink_tokens, recent_tokens, heads,
    BLOCK_N: tl.constexpr, TILE: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    i_b = tl.cast(tl.program_id(0) // heads, tl.int64)
    i_h = tl.cast(tl.program_id(0) % heads, tl.int64)
    scores += i_b * stride_sb + i_h * stride_sh
    indices += i_b * stride_ib + i_h * stride_ih
    o_n = tl.arange(0, BLOCK_N)
    if IN_REGISTERS:
        b_rank = _ranks(scores, o_n, keys, sink_tokens, recent_tokens)

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
                b_row = _ranks(scores, start + o_n, keys, sink_tokens, recent_tokens)
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
        b_tile = _ranks(scores, o_tile, keys, sink_tokens, recent_tokens)
        o_place, m_kept, above_before, ties_before = places(b_tile, threshold, above_before, ties_before, wanted_ties)
        tl.store(indices + o_place, o_tile.to(tl.int64), mask=m_kept)


def plan_select(scores: Tensor, indices: Tensor, *, sink_tokens: int, recent_tokens: int) -> Launch:
    """The launch of `select` for checked arguments; `indices` has a column per kept key."""
    batch, heads, keys = scores.shape
    resident = INTERPRETED_RESIDENT if INTERPRETED else RESIDENT
    block = min(power_of_two(keys, least=resident // 8), resident)
    return Launch(
        kernel=_select_kernel,
        grid=(batch * heads,),
        arguments={
            **strided("scores", scores, ("stride_sb", "stride_sh")),
            **strided("indices", indices, ("stride_ib", "stride_ih")),
            "keys": keys,
            "keep": indices.shape[2],
            "sink_tokens": sink_tokens,
            "recent_tokens": recent_tokens,
            "heads": heads,
            "BLOCK_N": block,
            "TILE": min(TILE, block),
            "IN_REGISTERS": keys <= resident,
        },
        num_warps=max(4, block // 1024),
        num_stages=1,
    )


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
    require_tensor("scores", scores, (None, None, None), (torch.float32,))
    batch, heads, keys = scores.shape
    require_selection(keys, keep, sink_tokens, recent_tokens)
    indices = torch.empty(batch, heads, keep, dtype=torch.int64, device=scores.device)
    if indices.numel() > 0:
        launch = plan_select(scores, indices, sink_tokens=sink_tokens, recent_tokens=recent_tokens)
        launch.run(scores.device)
    return indices
