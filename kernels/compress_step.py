"""One layer's whole step: attention, scoring, selection and compaction, queued without waiting for the device.

In one launch (`kernels/fused_step.py`) where `one_launch_pays`, else the forward pass, this project's or a library's,
and what `kernels/compress.py` launches after it. Nothing is read back, so the host runs ahead of the device.

Allocated besides the output and the new memory: scores (4 bytes per scored key and KV head, twice where one launch
selects or with pooling), indices (8 bytes per kept key and KV head), and where the forward pass is a launch of its own
the log-sum-exp (4 bytes per query and query head).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._launch import (
    INTERPRETER,
    Config,
    Target,
    aligned,
    require_logits,
    require_queries_and_keys,
    require_same_device,
    require_tensor,
    target_of,
)
from .chunk_attention import attention_config, new_output, plan_chunk_attention
from .compress import compress
from .fused_step import plan_fused_step
from .key_mass import require_scoring
from .limits import StepSizes, fused_step_fits, step_in_one_launch
from .reference import require_selection

# The forward pass of a library, with the signature of `chunk_attention`.
Forward = Callable[..., tuple[Tensor, Tensor]]


def one_launch_pays(q: Tensor, k: Tensor, sizes: StepSizes, config: Config, target: Target) -> bool:
    """Whether to take one launch, see `kernels/limits.py`. Only for tensors that load in whole vectors."""
    fed = target == INTERPRETER or (aligned(k) and fused_step_fits(sizes.dim, sizes.element_size, target.major))
    return fed and step_in_one_launch(sizes, config.rows, target.major, target.multiprocessors)


def compress_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    keep: int,
    rows: int,
    stride: int = 1,
    scored_keys: int | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    pool_kernel: int = 1,
    pooling: str = "max",
    softcap: float | None = None,
    kept_k: Tensor | None = None,
    forward: Forward | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend, score the keys by their attention from the last `rows` queries, and keep the best `keep` of them.

    Args:
        q: queries [B, Hq, Q, D].
        k: keys [B, Hkv, T, D], memory | chunk, T >= Q.
        v: values, as `k`.
        scale: factor on the logits, positive.
        keep: keys kept per KV head, sink_tokens + recent_tokens <= keep <= scored_keys.
        rows: number of observing queries, 1..Q.
        stride: every how manyth of them votes, counted back from the last.
        scored_keys: only keys 0..scored_keys-1 can be kept; None means all T.
        sink_tokens: keys kept at the front, whatever their score.
        recent_tokens: keys kept at the end of the scored ones, whatever their score.
        pool_kernel: odd width of a pooling over neighbouring scores; 1 leaves them.
        pooling: "max" or "avg".
        softcap: as in `chunk_attention`.
        kept_k: what to keep of the keys instead of `k`, same shape: their canonical form where `k` is rotated.
        forward: a library's attention with the signature of `chunk_attention`; None takes this project's.

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
    pooled: dict[str, Any] = {"pool_kernel": pool_kernel, "pooling": pooling}
    scored = require_scoring(q, k, rows=rows, stride=stride, scored_keys=scored_keys, **pooled)
    require_selection(scored, keep, sink_tokens, recent_tokens)

    (batch, kv_heads, keys, dim), device = k.shape, q.device
    sizes = StepSizes(
        *(batch, q.shape[1], kv_heads, q.shape[2], keys, dim, q.element_size()),
        observers=rows,
        keep=keep,
        pool_kernel=pool_kernel,
    )
    logits: dict[str, Any] = {"scale": scale, "softcap": softcap}
    forced: dict[str, Any] = {"sink_tokens": sink_tokens, "recent_tokens": recent_tokens}
    voting: dict[str, Any] = {"rows": rows, **pooled}
    out = lse = None
    if forward is not None:
        # Before anything else is allocated: what the library needs besides is gone when it returns.
        out, lse = forward(q, k, v, **logits)
        require_tensor("lse", lse, tuple(q.shape[:-1]), (torch.float32,))
    mass = torch.empty(batch, kv_heads, scored, dtype=torch.float32, device=device)
    indices = torch.empty(batch, kv_heads, keep, dtype=torch.int64, device=device)
    new_k, new_v = (torch.empty(batch, kv_heads, keep, dim, dtype=k.dtype, device=device) for _ in range(2))
    if out is None or lse is None:
        target = target_of(device)
        config = attention_config(q, k, v, target)
        out = new_output(q)
        if stride == 1 and one_launch_pays(q, k, sizes, config, target):
            ranks = torch.empty(batch, kv_heads, scored, dtype=torch.int32, device=device)
            launch = plan_fused_step(
                q, k, v, source_k, out, mass, ranks, indices, new_k, new_v, config=config, **forced, **voting, **logits
            )
            launch.run(device)
            return out, new_k, new_v, indices
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=device)
        plan_chunk_attention(q, k, v, out, lse, window=None, target=target, config=config, **logits).run(device)
    if keep > 0:
        voting["stride"] = stride
        compress(q, k, v, source_k, lse, mass, indices, new_k, new_v, sizes=sizes, **forced, **voting, **logits)
    return out, new_k, new_v, indices
