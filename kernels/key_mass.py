"""Importance of every key: the share of attention it gets from the last queries of a chunk.

    mass[j] = sum over observers i that see j, and heads h of the KV group, of exp(s_hij - lse[h, i])
              / (group * number of observers that see j)

With a stride every n-th of these queries votes, counted back from the last. They are spread evenly over the text, so
what they see on average is what all of them see, for a fraction of the product.

Where the change of the output is what counts (CAOTE, arXiv 2504.14051), the sum is over the squared changes instead:
(p / (1 - p))^2 |out - v|^2 with p the probability, which takes a second product, of values and outputs.

The log-sum-exp of the forward pass turns each logit into its softmax probability at once, so one product of keys and
observing queries suffices and their matrix never leaves the registers.

A program owns BLOCK_N keys of one KV head, loads them once, and walks over the observers of the whole group in a
fixed order. It alone writes its keys' mass: no atomics, and two runs give the same bits.

Pooling over neighbouring keys crosses the borders of key blocks: in a step selection does it (`kernels/select.py`), and
here PyTorch for those who want the scores.
Layouts and reference: `kernels/reference.py`, `key_mass`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# Device code gets its types when it is compiled.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import widened
from ._launch import (
    INTERPRETER,
    Config,
    Launch,
    Target,
    common_target,
    first_that_fits,
    logit_arguments,
    require,
    require_logits,
    require_queries_and_keys,
    require_tensor,
    strided,
)
from ._observers import sum_observers
from ._plans import Planner
from .limits import OUTPUT_CHANGE, POOLINGS, SCORINGS, power_of_two
from .reference import pool, voters


# Lengths vary from step to step: specialising on them would compile the same kernel again and again.
@triton.jit(
    do_not_specialize=[
        *("stride_lb", "stride_lh", "stride_mb", "stride_mh"),
        *("first", "observers", "every", "keys", "scored", "kv_heads", "kv_rows"),
    ]
)
def _key_mass_kernel(
    q, stride_qb, stride_qh, stride_qq,
    k, stride_kb, stride_kh, stride_kt,
    v, stride_vb, stride_vh, stride_vt,
    out, stride_ob, stride_oh, stride_oq,
    lse, stride_lb, stride_lh, stride_lq,
    mass, stride_mb, stride_mh,
    step_q, step_o, step_l, first, observers, every, keys, scored, kv_heads, kv_rows, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, CHANGES: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    i_row = tl.program_id(0) % kv_rows
    i_n = tl.program_id(0) // kv_rows * BLOCK_N  # the first keys have the most observers
    i_b = tl.cast(i_row // kv_heads, tl.int64)
    i_h = tl.cast(i_row % kv_heads, tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)

    # From here on the queries are those that vote: `observers` from `first` on, in memory `step_q` elements apart.
    q += i_b * stride_qb + i_h * GROUP * stride_qh + first * tl.cast(stride_qq, tl.int64)
    k += i_b * stride_kb + i_h * stride_kh + i_n * tl.cast(stride_kt, tl.int64)
    out += i_b * stride_ob + i_h * GROUP * stride_oh + first * tl.cast(stride_oq, tl.int64)
    lse += i_b * stride_lb + i_h * GROUP * stride_lh + first * stride_lq
    mass += i_b * stride_mb + i_h * stride_mh + i_n

    m_n = o_n < scored - i_n
    p_k = k + o_n[:, None] * stride_kt + o_d[None, :]
    b_k = widened(tl.load(p_k, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0), UPCAST)
    b_v = b_k
    if CHANGES:
        p_v = v + i_b * stride_vb + i_h * stride_vh + i_n * tl.cast(stride_vt, tl.int64)
        p_v = p_v + o_n[:, None] * stride_vt + o_d[None, :]
        b_v = tl.load(p_v, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)

    # Observer t sees keys up to past + t * every; `o_first` is the first observer that sees each key.
    past = keys - 1 - (observers - 1) * every
    o_first = (tl.maximum(i_n + o_n - past, 0) + every - 1) // every
    start = (tl.maximum(i_n - past, 0) + every - 1) // every
    # From this observer on, every one sees all keys of the block: of the memory's blocks, from the first.
    seen = (tl.maximum(i_n + BLOCK_N - 1 - past, 0) + every - 1) // every
    inside = tl.minimum(start + tl.cdiv(seen - start, QUERIES) * QUERIES, observers)

    b_mass = tl.zeros([BLOCK_N], tl.float32)
    for MASKED in tl.static_range(1, -1, -1):
        b_mass = sum_observers(
            b_mass, b_k, b_v, q, stride_qh, step_q, out, stride_oh, step_o, lse, stride_lh, step_l, o_first,
            start if MASKED else inside, inside if MASKED else observers, observers, scale, softcap,
            GROUP=GROUP, D=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M,
            MASKED=MASKED, HAS_SOFTCAP=HAS_SOFTCAP, UPCAST=UPCAST, CHANGES=CHANGES,
        )  # fmt: skip
    tl.store(mass + o_n, b_mass / (tl.maximum(observers - o_first, 1) * GROUP).to(tl.float32), mask=m_n)


def _candidates(element_size: int, block_d: int, target: Target, changes: bool) -> list[tuple[Config, int]]:
    """Configurations to try in order, each with an upper bound of the shared memory it takes, in bytes.

    `bench/kernel_resources.py` says what each of them takes. Few spill registers, all of them for changes: in float32
    with heads above 128, where nothing was found that does not, and on sm_80 with heads of 96; and on sm_80 in 16 bits
    with heads of 128 for some groups, 8 to 12 bytes.
    """
    if target == INTERPRETER:
        shapes = [Config(rows=32, columns=32, num_warps=4, num_stages=1)]
    elif element_size == 4:
        shapes = [Config(16, 16 if changes or block_d > 128 else 32, num_warps=8, num_stages=1)]
    elif block_d > 128:
        shapes = [Config(64, 64, num_warps=8, num_stages=2), Config(32, 64, num_warps=8, num_stages=2)]
    else:
        shapes = [Config(64, 128, num_warps=8, num_stages=3)]
    row_bytes = (2 if changes else 1) * block_d * element_size
    return [(c, (c.columns + c.rows * c.num_stages) * row_bytes + 2048) for c in shapes]


def plan_key_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    *,
    scale: float,
    rows: int,
    stride: int = 1,
    scoring: str = SCORINGS[0],
    softcap: float | None,
    target: Target,
    config: Config | None = None,
) -> Launch:
    """The launch of `key_mass` for checked arguments, pooling left out; `config` overrides the table.

    `v` and `out` are only read where the change of the output is what counts.
    """
    batch, _, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    scored = mass.shape[2]
    voting = range(queries)[voters(queries, rows, stride)]
    if config is None:
        candidates = _candidates(q.element_size(), power_of_two(dim, least=16), target, scoring == OUTPUT_CHANGE)
        config = first_that_fits(candidates, target)
    logits = logit_arguments(q, k, config, scale=scale, softcap=softcap)
    return Launch(
        kernel=_key_mass_kernel,
        grid=(batch * kv_heads * triton.cdiv(scored, config.columns),),
        arguments={
            **strided("q", q, ("stride_qb", "stride_qh", "stride_qq")),
            **strided("k", k, ("stride_kb", "stride_kh", "stride_kt")),
            **strided("v", v, ("stride_vb", "stride_vh", "stride_vt")),
            **strided("out", out, ("stride_ob", "stride_oh", "stride_oq")),
            **strided("lse", lse, ("stride_lb", "stride_lh", "stride_lq")),
            **strided("mass", mass, ("stride_mb", "stride_mh")),
            "step_q": q.stride(2) * stride,
            "step_o": out.stride(2) * stride,
            "step_l": lse.stride(2) * stride,
            "first": voting[0],
            "observers": len(voting),
            "every": stride,
            "keys": keys,
            "scored": scored,
            "kv_heads": kv_heads,
            "kv_rows": batch * kv_heads,
            **logits,
            "CHANGES": scoring == OUTPUT_CHANGE,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def require_scoring(
    q: Tensor,
    k: Tensor,
    *,
    rows: int,
    stride: int,
    scored_keys: int | None,
    pool_kernel: int,
    pooling: str,
    scoring: str = SCORINGS[0],
) -> int:
    """Check who observes, what is scored and how it is pooled; returns the number of scored keys.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    queries, keys = q.shape[2], k.shape[2]
    require(1 <= rows <= queries, "rows", rows, f"must be 1..{queries}, the number of queries")
    require(stride >= 1, "stride", stride, "must be at least 1")
    scored = keys if scored_keys is None else scored_keys
    require(0 <= scored <= keys, "scored_keys", scored_keys, f"must be 0..{keys}, the number of keys, or None for all")
    require(pooling in POOLINGS, "pooling", repr(pooling), f"must be one of {', '.join(map(repr, POOLINGS))}")
    require(scoring in SCORINGS, "scoring", repr(scoring), f"must be one of {', '.join(map(repr, SCORINGS))}")
    require(pool_kernel >= 1 and pool_kernel % 2 == 1, "pool_kernel", pool_kernel, "must be odd and at least 1")
    return scored


@Planner
def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None,
    target: Target,
    **voting: Any,
) -> Launch:
    require_queries_and_keys(q, k)
    require_tensor("v", v, tuple(k.shape), (q.dtype,))
    require_tensor("out", out, tuple(q.shape), (q.dtype,))
    require_tensor("lse", lse, tuple(q.shape[:-1]), (torch.float32,))
    require_logits(scale, softcap)
    mass = q.new_empty(*k.shape[:2], require_scoring(q, k, **voting), dtype=torch.float32)
    voters = {name: voting[name] for name in ("rows", "stride", "scoring")}
    return plan_key_mass(q, k, v, out, lse, mass, scale=scale, softcap=softcap, target=target, **voters)


def key_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    rows: int,
    stride: int = 1,
    scored_keys: int | None = None,
    softcap: float | None = None,
    pool_kernel: int = 1,
    pooling: str = "max",
    v: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Importance of every key: the attention it gets from the last `rows` queries.

    The mean runs over the rows that can see the key, so keys inside the observers' own span are not put at a
    disadvantage.

    Args:
        q: queries [B, Hq, Q, D]; the observers are the last `rows` of them.
        k: keys [B, Hkv, T, D].
        lse: float32 [B, Hq, Q], from `chunk_attention` with the same scale and softcap.
        scale: factor on the logits, positive.
        rows: number of observing rows, 1..Q.
        stride: every how manyth of them votes, counted back from the last.
        scored_keys: only keys 0..scored_keys-1 are scored (the observers' own keys come last); None scores all.
        softcap: as in `chunk_attention`.
        pool_kernel: odd width of a pooling over neighbouring keys (SnapKV, arXiv 2404.14469); 1 leaves the mass.
        pooling: "max" or "avg"; see `pool`.
        v: values, as `k`. With them and `out` the score is the mean squared change of an output without the key.
        out: outputs, as `q`.

    Returns:
        float32 [B, Hkv, scored_keys].

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    voting: dict[str, Any] = {"rows": rows, "stride": stride, "scored_keys": scored_keys}
    voting |= {"pool_kernel": pool_kernel, "pooling": pooling}
    require((v is None) == (out is None), "out" if out is None else "v", None, "must be given where the other one is")
    voting["scoring"] = SCORINGS[0] if v is None else OUTPUT_CHANGE
    # Something must be passed for what is not read.
    v, out = k if v is None else v, q if out is None else out
    target = common_target(q=q, k=k, v=v, out=out, lse=lse)
    launch = _plan(q, k, v, out, lse, scale=scale, softcap=softcap, target=target, **voting)
    scored = k.shape[2] if scored_keys is None else scored_keys
    mass = torch.empty(*k.shape[:2], scored, dtype=torch.float32, device=q.device)
    if scored == 0:
        return mass
    launch.run(q.device, {"q": q, "k": k, "v": v, "out": out, "lse": lse, "mass": mass})
    return pool(mass, pool_kernel, pooling)
