"""One layer's whole step: attention, scoring, selection and compaction, queued without waiting for the device.

In one launch (`kernels/fused_step.py`) where `one_launch_pays`, else the forward pass, this project's or a library's,
and what `kernels/compress.py` launches after it. Nothing is read back, so the host runs ahead of the device.

Allocated besides the output and the new memory: scores (4 bytes per scored key and KV head, twice where one launch
scores and selects or with pooling), indices (8 bytes per kept key and KV head), and where the forward pass is a launch
of its own the log-sum-exp (4 bytes per query and query head).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._compress import Rules, Written
from ._launch import (
    INTERPRETER,
    Config,
    Launch,
    Target,
    aligned,
    common_target,
    require_logits,
    require_queries_and_keys,
    require_tensor,
)
from ._plans import Planner
from .chunk_attention import attention_config, new_output, plan_chunk_attention
from .compress import plan_compression
from .fused_step import plan_fused_step
from .key_mass import require_scoring
from .limits import SCORINGS, StepSizes, fused_step_fits, step_in_one_launch
from .reference import require_selection

# The forward pass of a library, with the signature of `chunk_attention`.
Forward = Callable[..., tuple[Tensor, Tensor]]


def one_launch_pays(q: Tensor, k: Tensor, sizes: StepSizes, config: Config, target: Target) -> bool:
    """Whether to take one launch, see `kernels/limits.py`. Only for tensors that load in whole vectors."""
    fed = target == INTERPRETER or (aligned(k) and fused_step_fits(sizes, target.major))
    return fed and step_in_one_launch(sizes, config.rows, target.major, target.multiprocessors)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step launches, in order, and the tensors without storage that stand for what it allocates."""

    launches: tuple[Launch, ...]
    made: dict[str, Tensor]


@Planner
def plan_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source_k: Tensor,
    *,
    scored_keys: int | None,
    library: bool,
    target: Target,
    **options: Any,
) -> StepPlan:
    """Check a step's arguments and plan it; the log-sum-exp of a library's forward is taken to be contiguous."""
    require_queries_and_keys(q, k)
    for name, x in (("v", v), ("kept_k", source_k)):
        require_tensor(name, x, tuple(k.shape), (q.dtype,))
    require_logits(options["scale"], options["softcap"])
    scoring = {name: options[name] for name in ("rows", "stride", "pool_kernel", "pooling", "scoring")}
    rules = Rules(scored_keys=require_scoring(q, k, scored_keys=scored_keys, **scoring), **options)
    require_selection(rules.scored_keys, rules.keep, rules.sink_tokens, rules.recent_tokens)

    (batch, kv_heads, keys, dim), of_head = k.shape, k.shape[:2]
    sizes = StepSizes(
        *(batch, q.shape[1], kv_heads, q.shape[2], keys, dim, q.element_size()),
        observers=rules.rows,
        keep=rules.keep,
        pool_kernel=rules.pool_kernel,
        scoring=rules.scoring,
    )
    out, lse = new_output(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    written = Written(
        mass=q.new_empty(*of_head, rules.scored_keys, dtype=torch.float32),
        ranks=q.new_empty(*of_head, rules.scored_keys, dtype=torch.int32),
        indices=q.new_empty(*of_head, rules.keep, dtype=torch.int64),
        new_k=k.new_empty(*of_head, rules.keep, dim),
        new_v=k.new_empty(*of_head, rules.keep, dim),
    )
    launches: tuple[Launch, ...] = ()
    config = None if library else attention_config(q, k, v, target)
    if config is not None and rules.stride == 1 and one_launch_pays(q, k, sizes, config, target):
        launches = (plan_fused_step(q, k, v, source_k, out, written, rules, config),)
    else:
        logits: dict[str, Any] = {"scale": rules.scale, "softcap": rules.softcap}
        if config is not None:
            launches = (plan_chunk_attention(q, k, v, out, lse, window=None, target=target, config=config, **logits),)
        if rules.keep > 0:
            launches += plan_compression(q, k, v, source_k, out, lse, written, rules, sizes=sizes, target=target)
    made = {"out": out, "lse": lse, **written._asdict()}
    if library:
        del made["out"], made["lse"]  # the library's own
    needed = {"out", "new_k", "new_v", "indices"}.union(*(launch.tensors for launch in launches))
    return StepPlan(launches, {name: x for name, x in made.items() if name in needed})


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
    scoring: str = SCORINGS[0],
    softcap: float | None = None,
    kept_k: Tensor | None = None,
    forward: Forward | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend, score the keys by what the last `rows` queries have of them, and keep the best `keep`.

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
        scoring: "attention", or "output_change": what the outputs of these queries would change by without a key.
        softcap: as in `chunk_attention`.
        kept_k: what to keep of the keys instead of `k`, same shape: their canonical form where `k` is rotated.
        forward: a library's attention with the signature of `chunk_attention`; None takes this project's.

    Returns:
        Output [B, Hq, Q, D]; kept keys and values [B, Hkv, keep, D]; kept indices, int64 [B, Hkv, keep], ascending.

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    source_k = k if kept_k is None else kept_k
    # All of it is checked before the first launch: a bad argument must not leave half a step behind.
    plan = plan_step(
        *(q, k, v, source_k),
        scale=scale,
        keep=keep,
        rows=rows,
        stride=stride,
        scored_keys=scored_keys,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
        pool_kernel=pool_kernel,
        pooling=pooling,
        scoring=scoring,
        softcap=softcap,
        library=forward is not None,
        target=common_target(q=q, k=k, v=v, kept_k=source_k),
    )
    tensors = {"q": q, "k": k, "v": v, "source_k": source_k, "source_v": v, "scored_k": k, "scored_v": v}
    if forward is not None:
        # Before anything else is allocated: what the library needs besides is gone when it returns.
        out, lse = forward(q, k, v, scale=scale, softcap=softcap)
        planned = new_output(q)
        tensors["out"] = out if out.stride() == planned.stride() else planned.copy_(out)
        require_tensor("lse", lse, tuple(q.shape[:-1]), (torch.float32,))
        tensors["lse"] = lse.contiguous()
    for name, x in plan.made.items():
        tensors[name] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=q.device)
    for launch in plan.launches:
        launch.run(q.device, tensors)
    return tensors["out"], tensors["new_k"], tensors["new_v"], tensors["indices"]
