"""Device functions that compress one KV head in one program: mass, ranks, threshold, indices, rows.

Several kernels end with them: `kernels/fused_step.py` after its own attention, `kernels/compress.py` after another's.
Each part reads back what all threads of the program have written, so a barrier of the program lies between. Nothing is
shared between programs: no atomics on memory, no barrier of the grid, and two runs give the same bits.

1. mass: the keys once more, one product, probabilities, sums over the observing rows; where the change of the output
   is what counts, the values too, and a product of theirs with the outputs;
2. ranks: pooling over neighbours, and the scores as unsigned integers of the same order;
3. threshold: the `keep`-th largest rank, eight bits a pass, from a histogram of the ranks that begin alike;
4. indices: everything above the threshold and the first ties, in ascending order;
5. rows: the keys and values at these indices, moved next to each other.

Reference: `kernels/reference.py`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._attention import exponents, load_block
from ._device import move_rows, places, read_ranks, squared_changes, widened, write_ranks
from ._launch import INTERPRETED, strided
from .limits import OUTPUT_CHANGE, SCORINGS, TILE

INTERPRETED_TILE = 64  # small enough that small tests take several
CHANGE_COLUMNS = 64  # keys at most whose products and those of whose values a program holds at a time
MOVED_BYTES = 32768  # of keys, and as many of values, that a program moves at a time


@dataclass(frozen=True, slots=True)
class Rules:
    """By whose votes a step keeps what, in the words of `compress_step`; `scored_keys` is a number here."""

    scale: float
    keep: int
    rows: int
    scored_keys: int
    stride: int = 1
    sink_tokens: int = 0
    recent_tokens: int = 0
    pool_kernel: int = 1
    pooling: str = "max"
    scoring: str = SCORINGS[0]
    softcap: float | None = None


class Written(NamedTuple):
    """What compressing fills, new and contiguous.

    Attributes:
        mass: float32 [B, Hkv, scored keys], before pooling.
        ranks: int32, as `mass`: what the threshold is searched in.
        indices: int64 [B, Hkv, keep].
        new_k: [B, Hkv, keep, D].
        new_v: as `new_k`.
    """

    mass: Tensor
    ranks: Tensor
    indices: Tensor
    new_k: Tensor
    new_v: Tensor


def compression_arguments(source_k: Tensor, source_v: Tensor, written: Written, rules: Rules) -> dict[str, Any]:
    """Arguments, in order, that every kernel has which compresses KV heads."""
    return {
        **strided("source_k", source_k, ("stride_sb", "stride_sh", "stride_st")),
        **strided("source_v", source_v, ("stride_ub", "stride_uh", "stride_ut")),
        **written._asdict(),
        "scored": rules.scored_keys,
        "keep": rules.keep,
        "reach": rules.pool_kernel // 2,
        "sink_tokens": rules.sink_tokens,
        "recent_tokens": rules.recent_tokens,
    }


def compression_blocks(block_d: int, element_size: int, rules: Rules) -> dict[str, Any]:
    """Constants, in order, of such a kernel: what a program moves and looks through at a time, and how it scores."""
    return {
        "BLOCK_T": 16 if INTERPRETED else MOVED_BYTES // (block_d * element_size),
        "TILE": INTERPRETED_TILE if INTERPRETED else TILE,
        "AVERAGE": rules.pooling == "avg",
        "CHANGES": rules.scoring == OUTPUT_CHANGE,
    }


def scored_columns(columns: int, scoring: str) -> int:
    """Keys that a program scores at a time, of `columns` at most: two products take more registers than one."""
    return min(columns, CHANGE_COLUMNS) if scoring == OUTPUT_CHANGE else columns


@triton.jit
def _weigh_keys(
    b_q, b_out, b_lse, i_b, i_h, k, stride_kt, v, stride_vt, mass, observers, every, keys, scored, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr, CHANGES: tl.constexpr,
):  # fmt: skip
    """Mass of every scored key from the rows b_q; `b_lse`, to base 2, is infinite for rows that do not vote.

    With CHANGES the squared change of their outputs b_out without the key.

    The observers are the last queries of the block, and every `every`-th of them votes, counted from the last.
    """
    past = keys - observers  # observer t sees keys 0..past + t; t counts from the first observer
    o_row = tl.arange(0, BLOCK_M) // GROUP - (BLOCK_M // GROUP - observers)
    end = tl.cdiv(scored, BLOCK_N) * BLOCK_N
    whole = tl.minimum((past + 1) // BLOCK_N * BLOCK_N, end)  # every observer sees all keys below this
    for MASKED in tl.static_range(2):
        for i_n in range(whole if MASKED else 0, scored if MASKED else whole, BLOCK_N):
            i_n = tl.multiple_of(i_n, BLOCK_N)
            o_n = i_n + tl.arange(0, BLOCK_N)
            b_k = load_block(k, stride_kt, i_b, i_h, i_n, scored, D, BLOCK_D, BLOCK_N, MASKED, DESCRIPTORS)
            # Keys along the rows, so that a thread sums what it holds.
            b_s, factor = exponents(widened(b_k, UPCAST), b_q, scale, softcap, HAS_SOFTCAP, UPCAST)
            b_p = tl.exp2(b_s * factor - b_lse[None, :])
            if CHANGES:
                # After the first product, as in `_attend_range`.
                b_v = load_block(v, stride_vt, i_b, i_h, i_n, scored, D, BLOCK_D, BLOCK_N, MASKED, DESCRIPTORS)
                b_p = squared_changes(b_p, b_v, b_out, UPCAST)
            if MASKED:
                b_p = tl.where(o_n[:, None] <= past + o_row[None, :], b_p, 0.0)
            b_seeing = observers - tl.maximum(o_n - past, 0)
            b_count = tl.maximum((b_seeing + every - 1) // every, 1) * GROUP
            tl.store(mass + o_n, tl.sum(b_p, axis=1) / b_count.to(tl.float32), mask=o_n < scored)


@triton.jit
def _refine(ranks, scored, threshold, wanted, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """Eight more bits of the threshold, those from bit SHIFT on, and how many are wanted of the ranks that share them.

    Of the ranks that begin like `threshold`, the `wanted` largest are looked for.
    """
    o_bin = tl.arange(0, 256)
    b_counts = tl.zeros([256], tl.int32)
    for start in range(0, scored, TILE):
        o_n = start + tl.arange(0, TILE)
        b_rank = read_ranks(ranks, o_n, scored)
        m_alike = o_n < scored
        if SHIFT < 24:
            m_alike = m_alike & ((b_rank >> (SHIFT + 8)) == (threshold >> (SHIFT + 8)))
        b_counts += tl.histogram(((b_rank >> SHIFT) & 255).to(tl.int32), 256, mask=m_alike)
    b_above = tl.sum(b_counts, axis=0) - tl.cumsum(b_counts, axis=0)  # ranks of the bins above each
    digit = tl.max(tl.where(b_above + b_counts >= wanted, o_bin, 0), axis=0)
    wanted -= tl.sum(tl.where(o_bin > digit, b_counts, 0), axis=0)
    return threshold | (digit.to(tl.uint32) << SHIFT), wanted


@triton.jit
def compress_head(
    b_q, b_out, b_lse, i_row, kv_heads, k, stride_kt, v, stride_vt, observers, every, keys, scale, softcap,
    source_k, stride_sb, stride_sh, stride_st,
    source_v, stride_ub, stride_uh, stride_ut,
    mass, ranks, indices, new_k, new_v, scored, keep, reach, sink_tokens, recent_tokens,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, TILE: tl.constexpr, AVERAGE: tl.constexpr, CHANGES: tl.constexpr,
):  # fmt: skip
    """From the rows b_q of one KV head, the `i_row`-th of all, to what is kept of its keys: all by one program.

    `b_out`, their outputs, and `b_lse` are as in `_weigh_keys`; `k` and `v` are descriptors of all heads or pointers to
    the head's first row.
    """
    i_b = tl.cast(i_row // kv_heads, tl.int64)
    i_h = tl.cast(i_row % kv_heads, tl.int64)
    mass += i_row * tl.cast(scored, tl.int64)
    ranks += i_row * tl.cast(scored, tl.int64)
    indices += i_row * tl.cast(keep, tl.int64)
    source_k += i_b * stride_sb + i_h * stride_sh
    source_v += i_b * stride_ub + i_h * stride_uh
    new_k += i_row * tl.cast(keep, tl.int64) * D
    new_v += i_row * tl.cast(keep, tl.int64) * D
    _weigh_keys(
        b_q, b_out, b_lse, i_row // kv_heads, i_row % kv_heads, k, stride_kt, v, stride_vt,
        mass, observers, every, keys, scored, scale, softcap,
        GROUP=GROUP, D=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        HAS_SOFTCAP=HAS_SOFTCAP, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST, CHANGES=CHANGES,
    )  # fmt: skip
    tl.debug_barrier()  # the mass is written
    write_ranks(mass, ranks, scored, reach, sink_tokens, recent_tokens, TILE, AVERAGE)
    tl.debug_barrier()  # the ranks are written
    threshold = tl.full([], 0, tl.uint32)  # becomes the `keep`-th largest rank
    wanted = keep  # becomes how many of its ties are kept
    for digit in tl.static_range(4):
        threshold, wanted = _refine(ranks, scored, threshold, wanted, SHIFT=24 - 8 * digit, TILE=TILE)
    above = tl.full([], 0, tl.int32)
    ties = tl.full([], 0, tl.int32)
    for start in range(0, scored, TILE):
        o_n = start + tl.arange(0, TILE)
        b_rank = read_ranks(ranks, o_n, scored)
        o_place, m_kept, above, ties = places(b_rank, threshold, above, ties, wanted)
        tl.store(indices + o_place, o_n.to(tl.int64), mask=m_kept & (o_n < scored))
    tl.debug_barrier()  # the indices are written
    for start in range(0, keep, BLOCK_T):
        move_rows(
            source_k, stride_st, source_v, stride_ut, indices, new_k, D, new_v, D, start, keep,
            D=D, BLOCK_D=BLOCK_D, BLOCK_T=BLOCK_T,
        )  # fmt: skip
