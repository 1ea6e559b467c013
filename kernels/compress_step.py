"""One layer's whole step: attention, scoring, selection and compaction, queued without waiting for the device.

In one launch (`kernels/fused_step.py`) where `one_launch_pays`, else in four or, with pooling, five:

1. `chunk_attention`: output and log-sum-exp; the queries x keys matrix stays on chip.
2. `key_mass`: product, softmax, causal mask, and mean over observers and heads of the group.
3. `pool`, only if `pool_kernel` > 1: a key's neighbours belong to other programs of launch 2.
4. `select`: threshold, ties, sinks, recent keys and ascending order.
5. `compact`: keys and values together, spread over the whole device.

Nothing is read back, so the host runs ahead of the device.

Allocated besides the output and the new memory: scores (4 bytes per scored key and KV head, twice in one launch or with
pooling), indices (8 bytes per kept key and KV head), and in separate launches the log-sum-exp (4 bytes per query and
query head).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import (
    INTERPRETER,
    Config,
    Target,
    aligned,
    power_of_two,
    require_logits,
    require_queries_and_keys,
    require_same_device,
    require_tensor,
    target_of,
)
from .chunk_attention import attention_config, new_output, plan_chunk_attention
from .compact import plan_compact
from .fused_step import TILE, plan_fused_step
from .key_mass import plan_key_mass, require_scoring
from .pool import plan_pool
from .reference import require_selection
from .select import plan_select

# What a multiprocessor does in a clock, for the comparison in `one_launch_pays`. Products: half of the dense bfloat16
# peak that the A100, H100 and B200 data sheets give, per multiprocessor and clock; about what the kernels are estimated
# to reach. Moved bytes: half of the 64 bytes that a multiprocessor takes from the L2 cache. Clocks of a load that the
# next one waits for: an access of the L2 cache. None of them has been measured by this project.
_FLOPS_PER_CLOCK = {8: 1024.0, 9: 2048.0, 10: 4096.0}
_MOVED_BYTES_PER_CLOCK = 32.0
_LOAD_CLOCKS = 700.0


def one_launch_pays(
    q: Tensor, k: Tensor, *, rows: int, keep: int, pool_kernel: int, config: Config, target: Target
) -> bool:
    """Whether the observers of a KV head fit one program, and that program is done before the rest of the device.

    Only for 16-bit tensors that load in whole vectors.

    The owner of a KV head's observers attends to all keys, multiplies with all of them once more, reads their scores
    `pool_kernel` times to pool them, four times to find the threshold and once to place the kept ones, and moves those:
    a chain of work for one multiprocessor. Meanwhile the others attend, on as many multiprocessors as there are. The
    chain is compared with all work shared out evenly: where it is longer, the step would wait for it, and separate
    launches spread scoring and moving over the device.
    """
    batch, q_heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    block_queries = config.rows // (q_heads // kv_heads)
    # Elsewhere the compiler runs out of registers for one kernel that does it all; the interpreter has no such limit.
    fed = q.element_size() == 2 and aligned(k)
    if rows > block_queries or not (fed or target == INTERPRETER):
        return False
    flops_per_clock = _FLOPS_PER_CLOCK.get(target.major, _FLOPS_PER_CLOCK[8])
    block_d = power_of_two(dim, least=16)
    product = 2.0 * config.rows * block_d / flops_per_clock  # clocks of one product of a block of rows with one key
    moved = 4.0 * keep * dim * q.element_size() / _MOVED_BYTES_PER_CLOCK  # keys and values, read and written
    selected = keys / TILE * (pool_kernel + 5) * _LOAD_CLOCKS
    chain = 3.0 * product * keys + selected + moved
    blocks = batch * kv_heads * -(-queries // block_queries)
    mean_keys = keys - queries / 2
    everything = 2.0 * product * mean_keys * blocks + batch * kv_heads * (product * keys + selected + moved)
    return chain <= everything / target.multiprocessors


def compress_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    keep: int,
    rows: int,
    scored_keys: int | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    pool_kernel: int = 1,
    pooling: str = "max",
    softcap: float | None = None,
    kept_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend, score the keys by their attention from the last `rows` queries, and keep the best `keep` of them.

    Args:
        q: queries [B, Hq, Q, D].
        k: keys [B, Hkv, T, D], memory | chunk, T >= Q.
        v: values, as `k`.
        scale: factor on the logits, positive.
        keep: keys kept per KV head, sink_tokens + recent_tokens <= keep <= scored_keys.
        rows: number of observing queries, 1..Q.
        scored_keys: only keys 0..scored_keys-1 can be kept; None means all T.
        sink_tokens: keys kept at the front, whatever their score.
        recent_tokens: keys kept at the end of the scored ones, whatever their score.
        pool_kernel: odd width of a pooling over neighbouring scores; 1 leaves them.
        pooling: "max" or "avg".
        softcap: as in `chunk_attention`.
        kept_k: what to keep of the keys instead of `k`, same shape: their canonical form where `k` is rotated.

    Returns:
        Output [B, Hq, Q, D]; kept keys and values [B, Hkv, keep, D]; kept indices, int64 [B, Hkv, keep], ascending.

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    # All of it is checked once, before the first launch: a bad argument must not leave half a step behind.
    require_queries_and_keys(q, k)
    source_k = k if kept_k is None else kept_k
    for name, x in (("v", v), ("kept_k", source_k)):
        require_tensor(name, x, tuple(k.shape), (q.dtype,))
        require_same_device("q", q, name, x)
    require_logits(scale, softcap)
    scored = require_scoring(q, k, rows, scored_keys, pool_kernel, pooling)
    require_selection(scored, keep, sink_tokens, recent_tokens)

    (batch, kv_heads, _, dim), device = k.shape, q.device
    target = target_of(device)
    config = attention_config(q, k, v, target)
    logits: dict[str, Any] = {"scale": scale, "softcap": softcap}
    forced: dict[str, Any] = {"sink_tokens": sink_tokens, "recent_tokens": recent_tokens}
    out = new_output(q)
    mass = torch.empty(batch, kv_heads, scored, dtype=torch.float32, device=device)
    indices = torch.empty(batch, kv_heads, keep, dtype=torch.int64, device=device)
    new_k, new_v = (torch.empty(batch, kv_heads, keep, dim, dtype=k.dtype, device=device) for _ in range(2))
    if keep > 0 and one_launch_pays(q, k, rows=rows, keep=keep, pool_kernel=pool_kernel, config=config, target=target):
        ranks = torch.empty(batch, kv_heads, scored, dtype=torch.int32, device=device)
        pooled: dict[str, Any] = {"pool_kernel": pool_kernel, "pooling": pooling}
        options: dict[str, Any] = {"rows": rows, "config": config, **pooled, **forced, **logits}
        plan_fused_step(q, k, v, source_k, out, mass, ranks, indices, new_k, new_v, **options).run(device)
        return out, new_k, new_v, indices

    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=device)
    plan_chunk_attention(q, k, v, out, lse, window=None, target=target, config=config, **logits).run(device)
    if keep == 0:
        return out, new_k, new_v, indices
    plan_key_mass(q, k, lse, mass, rows=rows, target=target, **logits).run(device)
    scores = mass
    if pool_kernel > 1:
        scores = torch.empty_like(mass)
        plan_pool(mass, scores, pool_kernel=pool_kernel, pooling=pooling).run(device)
    plan_select(scores, indices, **forced).run(device)
    plan_compact(source_k, v, indices, new_k, new_v).run(device)
    return out, new_k, new_v, indices
