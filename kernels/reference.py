"""Plain PyTorch of every kernel: what the tests compare with, and the path of the `reference` backend.

Shape letters, used in all of `imdc.kernels`: B rows, Hq query heads, Hkv KV heads (Hq = G * Hkv, head h belongs to
KV head h // G), Q queries, T keys (memory | chunk), D head size.

Attention is bottom-right causal: query i (of Q) sees key j when j <= T - Q + i, and with a sliding window only when
also j > T - Q + i - window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from imdc.kernels.limits import LEAST_REST, rows_per_block
from torch import Tensor


def _row_blocks(first: int, last: int, elements_per_row: int) -> Iterator[tuple[int, int]]:
    """Cut the query rows first..last into (start, count) blocks; see `imdc.kernels.limits.rows_per_block`."""
    step = rows_per_block(last - first, elements_per_row)
    for start in range(first, last, max(1, step)):
        yield start, min(step, last - start)


def voters(queries: int, rows: int, stride: int) -> slice:
    """Those of the last `rows` of the queries that vote: every `stride`-th, counted back from the last one."""
    return slice(queries - 1 - (rows - 1) // stride * stride, queries, stride)


def _visible(first_row: int, rows: int, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [rows, keys]: which of all `keys` the rows first_row.. of `queries` may see."""
    return _seen_from(torch.arange(first_row, first_row + rows, device=device), queries, keys, window)


def _seen_from(rows: Tensor, queries: int, keys: int, window: int | None) -> Tensor:
    """Boolean [rows, keys]: which of all `keys` these `rows` of `queries` may see."""
    row = rows[:, None] + (keys - queries)
    column = torch.arange(keys, device=rows.device)[None, :]
    seen = column <= row
    return seen if window is None else seen & (column > row - window)


def _block_logits(rows: Tensor, keys: Tensor, visible: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    """Masked float32 logits [B, G, R, T] of query rows [B, G, R, D] and one KV head's float32 keys [B, T, D]."""
    logits = torch.matmul(rows.float(), keys[:, None].transpose(2, 3)).mul_(scale)
    if softcap is not None:
        logits = torch.tanh(logits.div_(softcap)).mul_(softcap)
    return logits.masked_fill_(~visible, float("-inf"))


def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Bottom-right causal grouped-query attention over memory | chunk.

    Args:
        q: queries [B, Hq, Q, D].
        k: keys [B, Hkv, T, D], T >= Q.
        v: values, as `k`.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2); None leaves them.
        window: keys further back than this are not seen; None sees all.

    Returns:
        Output [B, Hq, Q, D] in the dtype of `q`, and the natural log-sum-exp of the logits, float32 [B, Hq, Q].
    """
    batch, q_heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    out = torch.empty_like(q)
    lse = torch.empty(batch, q_heads, queries, dtype=torch.float32, device=q.device)
    for head in range(kv_heads):
        of_group = slice(head * group, (head + 1) * group)
        head_keys, head_values = k[:, head].float(), v[:, head].float()
        for first, count in _row_blocks(0, queries, batch * group * keys):
            rows = slice(first, first + count)
            visible = _visible(first, count, queries, keys, window, q.device)
            logits = _block_logits(q[:, of_group, rows], head_keys, visible, scale=scale, softcap=softcap)
            block_lse = torch.logsumexp(logits, dim=-1)
            weights = logits.sub_(block_lse[..., None]).exp_()
            out[:, of_group, rows] = torch.matmul(weights, head_values[:, None]).to(q.dtype)
            lse[:, of_group, rows] = block_lse
    return out, lse


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

    mass[j] = mean over the heads of the KV group and over the observing rows that can see j of
    exp(logit - lse). A key that no observing row sees has mass 0. `lse` comes from `chunk_attention`, so the
    probabilities are those of the full softmax and the queries x keys matrix never exists as a whole.

    With `v` and `out`, what each output would change by without the key counts instead of the attention p that the key
    gets: without key j, the output o of a row becomes o + p / (1 - p) (o - v[j]), exactly (CAOTE, arXiv 2504.14051).
    The score is the mean of the squared lengths of these changes; where p leaves less than
    `imdc.kernels.limits.LEAST_REST`, |v[j]| is taken for the length.

    Args:
        q: queries [B, Hq, Q, D]; the observers are the last `rows` of them.
        k: keys [B, Hkv, T, D].
        lse: float32 [B, Hq, Q].
        scale: factor on the logits.
        rows: number of observing rows, 1..Q.
        stride: every how manyth of them votes, counted back from the last.
        scored_keys: only keys 0..scored_keys-1 are scored (the observers' own keys come last); None scores all.
        softcap: as in `chunk_attention`.
        pool_kernel: odd width of a pooling over neighbouring keys (SnapKV, arXiv 2404.14469); 1 leaves the mass.
        pooling: "max" or "avg"; see `pool`.
        v: values, as `k`; given together with `out`.
        out: outputs, as `q`.

    Returns:
        float32 [B, Hkv, scored_keys].
    """
    batch, q_heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    voting = voters(queries, rows, stride)
    q, lse, out = q[:, :, voting], lse[:, :, voting], None if out is None else out[:, :, voting]
    numbers = torch.arange(queries, device=q.device)[voting]
    scored = keys if scored_keys is None else scored_keys
    mass = torch.zeros(batch, kv_heads, keys, dtype=torch.float32, device=q.device)
    seen = torch.zeros(keys, dtype=torch.float32, device=q.device)
    for first, count in _row_blocks(0, q.shape[2], batch * group * keys):
        visible = _seen_from(numbers[first : first + count], queries, keys, None)
        seen += visible.sum(dim=0)
        block = slice(first, first + count)
        for head in range(kv_heads):
            of_group = slice(head * group, (head + 1) * group)
            logits = _block_logits(q[:, of_group, block], k[:, head].float(), visible, scale=scale, softcap=softcap)
            weights = logits.sub_(lse[:, of_group, block, None]).exp_()
            if v is not None and out is not None:
                weights = _squared_changes(weights, v[:, head].float(), out[:, of_group, block].float())
            mass[:, head] += weights.sum(dim=(1, 2))
    mass = mass[..., :scored] / (seen[:scored] * group).clamp_min(1.0)
    return pool(mass, pool_kernel, pooling)


def _squared_changes(weights: Tensor, values: Tensor, outputs: Tensor) -> Tensor:
    """Squared lengths [B, G, R, T] of what outputs [B, G, R, D] change by without each of the values [B, T, D]."""
    lengths = torch.linalg.vector_norm(values, dim=-1).square_()[:, None, None]
    rest = 1.0 - weights
    nearly_all = rest <= LEAST_REST
    weights.div_(rest).square_()
    # No more than two blocks at a time.
    del rest
    away = torch.matmul(outputs, values[:, None].transpose(2, 3)).mul_(-2.0)
    away.add_(torch.linalg.vector_norm(outputs, dim=-1, keepdim=True).square_()).add_(lengths).clamp_min_(0.0)
    return torch.where(nearly_all, lengths, weights.mul_(away), out=weights)


def pool(mass: Tensor, pool_kernel: int, pooling: str = "max") -> Tensor:
    """Pool scores [B, Hkv, T] over `pool_kernel` neighbouring keys (odd); 1 returns them unchanged.

    "max" is cut off at the ends of the row. "avg" divides by the whole width everywhere, so that the row counts as
    zero beyond its ends, as in the code of the IMDC paper (`avg_pool1d` with its default count_include_pad).
    """
    if pool_kernel == 1:
        return mass
    if pooling == "avg":
        return torch.nn.functional.avg_pool1d(mass, pool_kernel, stride=1, padding=pool_kernel // 2)
    return torch.nn.functional.max_pool1d(mass, pool_kernel, stride=1, padding=pool_kernel // 2)


def require_selection(keys: int, keep: int, sink_tokens: int, recent_tokens: int) -> None:
    """Check how many of `keys` are to be kept.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    for name, tokens in (("sink_tokens", sink_tokens), ("recent_tokens", recent_tokens)):
        if tokens < 0:
            raise ValueError(f"{name} = {tokens}: must be at least 0")
    forced = sink_tokens + recent_tokens
    if not forced <= keep <= keys:
        raise ValueError(f"keep = {keep}: must be {forced} (sink_tokens + recent_tokens)..{keys} (the keys)")


def select(scores: Tensor, keep: int, *, sink_tokens: int = 0, recent_tokens: int = 0) -> Tensor:
    """Indices of the `keep` best keys of every row, ascending; equal scores go to the lower index.

    The first `sink_tokens` and the last `recent_tokens` keys are always kept.

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
    total = scores.shape[-1]
    require_selection(total, keep, sink_tokens, recent_tokens)
    if keep == 0:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.int64, device=scores.device)
    ranked = scores.clone()
    ranked[..., :sink_tokens] = float("inf")
    ranked[..., total - recent_tokens :] = float("inf")
    # A threshold and its ties instead of a sort: several times faster, and ascending by itself.
    least = ranked.kthvalue(total - keep + 1, dim=-1, keepdim=True).values
    above, ties = ranked > least, ranked == least
    room = keep - above.sum(dim=-1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(dim=-1) <= room))
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], keep)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of x [..., T, D] by cos, sin [T, R], R <= D.

    The dimensions r and r + R/2 turn together (the half-split form of Llama), or with `interleaved` 2r and 2r + 1 (that
    of the RoFormer paper, arXiv 2104.09864, in GLM, Cohere and ERNIE). Only the first R dimensions turn (partial rotary
    of Phi). Tables of the dtype of `x` turn it in that dtype, as most models of transformers do; float32 tables turn a
    shorter `x` in float32 and round once, as OLMo 2, Cohere and ERNIE do.
    """
    width = cos.shape[-1]
    half = width // 2
    first, second = slice(0, half), slice(half, width)
    if interleaved:
        first, second = slice(0, width, 2), slice(1, width, 2)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Into the result by halves: whole products of a long memory would be the peak of a step.
    for own, other, sign in ((first, second, -1), (second, first, 1)):
        if cos.dtype == x.dtype:
            torch.mul(x[..., own], cos[..., own], out=out[..., own])
            out[..., own].add_(x[..., other] * sin[..., own], alpha=sign)
        else:
            turned = x[..., own] * cos[..., own]
            out[..., own] = turned.add_(x[..., other] * sin[..., own], alpha=sign)
    out[..., width:] = x[..., width:]
    return out


def compact(k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the kept keys and values.

    Args:
        k: keys [B, Hkv, T, D].
        v: values, as `k`.
        indices: int64 [B, Hkv, keep].

    Returns:
        New contiguous keys and values [B, Hkv, keep, D].
    """
    index = indices[..., None].expand(*indices.shape, k.shape[-1])
    return torch.gather(k, 2, index), torch.gather(v, 2, index)
