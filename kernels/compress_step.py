"""One layer's whole step: attention, scoring, selection and compaction, queued without waiting for the device.

What is one launch, and why the rest is another:

1. `chunk_attention`: logits, softmax, output and log-sum-exp in one launch. The queries x keys matrix stays on chip.
2. `key_mass`: product, softmax, causal mask, mean over observers and over the heads of the group in one launch. It
   cannot join launch 1: the probability of a key needs the log-sum-exp of its whole row, which exists only when the
   last block of that row is done, and the mass of a key needs all rows.
3. `pool`, only if `pool_kernel` > 1: a key's neighbours belong to other programs of launch 2.
4. `select`: threshold, ties, sinks, recent keys and ascending order in one launch. A key is kept or dropped in the
   light of all scores of its row, so every program of launch 2 or 3 has to be done.
5. `compact`: keys and values together, with the keys' rotation in the same pass. It uses the whole device to move
   memory; selection uses one program per row and would hold the move back.

The launches follow one another on the current stream; nothing is read back, so the host runs ahead of the device.

Allocated besides the output and the new memory: log-sum-exp (4 bytes per query and query head), scores (4 bytes per
scored key and KV head, twice with pooling) and indices (8 bytes per kept key and KV head). At Llama-3.1-8B's shape with
4096 queries, 8192 keys and 4096 kept that is 0.5 + 0.25 (0.5 with pooling) + 0.25 MiB.
"""

from __future__ import annotations

from torch import Tensor

from ._launch import require_queries_and_keys
from .chunk_attention import chunk_attention
from .compact import compact
from .key_mass import key_mass, require_scoring
from .reference import require_selection
from .rotate import require_rotation
from .select import select


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
    softcap: float | None = None,
    window: int | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
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
        pool_kernel: odd width of a max-pool over neighbouring scores; 1 leaves them.
        softcap: as in `chunk_attention`.
        window: as in `chunk_attention`.
        cos: [keep, R] cosines of the kept keys' new positions, or None to keep the keys as they are.
        sin: as `cos`.
        kept_k: what to keep of the keys instead of `k`, same shape: their canonical form where `k` is rotated.

    Returns:
        Output [B, Hq, Q, D]; kept keys and values [B, Hkv, keep, D]; kept indices, int64 [B, Hkv, keep], ascending.

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    # All of it is checked before the first launch: a bad argument must not leave half a step behind.
    require_queries_and_keys(q, k)
    scored = require_scoring(q, k, rows, scored_keys, pool_kernel)
    require_selection(scored, keep, sink_tokens, recent_tokens)
    require_rotation(k, cos, sin, keep)
    out, lse = chunk_attention(q, k, v, scale=scale, softcap=softcap, window=window)
    scores = key_mass(
        q,
        k,
        lse,
        scale=scale,
        rows=rows,
        scored_keys=scored_keys,
        softcap=softcap,
        window=window,
        pool_kernel=pool_kernel,
    )
    indices = select(scores, keep, sink_tokens=sink_tokens, recent_tokens=recent_tokens)
    new_k, new_v = compact(k if kept_k is None else kept_k, v, indices, cos=cos, sin=sin)
    return out, new_k, new_v, indices
