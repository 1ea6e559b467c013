"""Take back from host memory or a file what a question needs: the pairs of the whole text that it attends to most.

For one layer, with queries q_r (r = 0..n-1) of a question of n tokens, keys k_j of the text (j = 0..N-1) and of the
question itself, and p the softmax over all of these that r may see:

    score_j = max over r and over the query heads of a KV group of p_rj

Pooled over neighbours, the best are taken, and the sinks. A chunk that is read is scored by the mean instead; here
one token of the question in one head may be all that looks for the answer, and a mean over all of them drowns it. No
latest tokens of the text are forced in: the question is no continuation of them. While the question is read it
attends to all of them, exactly: with what is taken back alone, what it asks in the upper layers is distorted by what
the lower ones lack. The answer then attends to what was taken back. Keys and values come from host memory in blocks;
of the logits, float32 [Hq, n, N], as much is held as `imdc.planner.recalling` says, and the rest is computed twice.

Compact positions may number less than N keys, so for scoring neighbours share a position, in the manner of SelfExtend
(arXiv 2401.01325): key j is at floor(j * S / N) and the question begins at S, with as many positions S as the model's
window has besides the question. The question then attends to what was taken back, in each layer. What is taken back is
numbered 0..m-1 as any memory is.

A token of an answer is compared with every key only where the memory holds much of the text. Elsewhere with the mean
key of each block of the text first, then with the keys of the blocks whose mean it attends to most; see
`imdc.planner.recalling.compared_blocks`. The question, which sees all keys, leaves the means behind.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from imdc.cache.rows import Taken
from imdc.cache.store import HostStore, write_means
from imdc.config import SUMMARY_TOKENS, PrefillConfig
from imdc.kernels.reference import pool, rotate
from imdc.model.parts import Parts
from imdc.planner import recalling
from imdc.prefill.backends import Backend
from imdc.prefill.softmax import Softmax


@dataclass(frozen=True, slots=True)
class _Asked:
    """Queries as they are compared with the keys of a text.

    Attributes:
        queries: float32 [Hkv, group * n, D].
        rows: n.
        tokens: of the text.
        span: positions that these are turned to; keys share them where there are fewer.
        softmax: how logits become weights.
    """

    queries: Tensor
    rows: int
    tokens: int
    span: int
    softmax: Softmax

    def places(self, tokens: Tensor) -> Tensor:
        """Where keys of these tokens are turned to."""
        return tokens * self.span // self.tokens

    def logits(self, keys: Tensor) -> Tensor:
        """float32 [Hkv, group * n, T] of keys [Hkv, T, D]."""
        cap = self.softmax.softcap
        logits = torch.matmul(self.queries, keys.float().transpose(1, 2)).mul_(self.softmax.scale)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def log_sums(self, own: Tensor) -> Tensor:
        """Log-sum-exp float32 [Hkv, group * n] of the logits `own` [Hkv, group * n, o], and of attention sinks."""
        lse = own.logsumexp(dim=-1)
        return self.softmax.with_sinks(lse.view(-1, self.rows)).view(lse.shape)


@dataclass(slots=True)
class Recall:
    """What a question takes back from `store`, layer by layer; one object for all layers.

    Attributes:
        taken: what a question took in each layer, to be held against what its answer attends to; with renewals only.
        moved_bytes: bytes of keys and values that were read from the store so far.
        seconds: wall-clock time that this took, scores and selection included.
    """

    store: HostStore
    parts: Parts
    config: PrefillConfig
    backend: Backend
    compact: bool
    taken: dict[int, Taken] = field(default_factory=dict)
    moved_bytes: int = 0
    seconds: float = 0.0

    def replaces(self, stored: int) -> bool:
        """Whether a layer that stores so many pairs of the text takes others back: not where it stores all."""
        return stored < self.store.tokens

    def take(
        self,
        layer: int,
        q: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        softmax: Softmax,
        *,
        keep: int,
        attends: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The `keep` best pairs of the text for the question, on its device, and what the question attends to.

        Args:
            layer: number of a full-attention layer.
            q: queries [1, Hq, n, D] of the question, or of the last tokens of it and its answer; rotated as the stored
                keys are.
            own_k: keys [1, Hkv, o, D] of all that follows the text, rotated as `q`; o >= n.
            own_v: its values, as `own_k`.
            softmax: how logits become weights in this layer.
            keep: pairs to take per KV head, fewer than there are.
            attends: whether the queries are a question's, which attend to the whole text; values are read for that
                alone. An answer's are not, and what its question took keeps the scores that it had.

        Returns:
            Keys and values [1, Hkv, keep, D], in the order of the text; and the attention output [1, Hq, n, D] over
            the whole text, None where keys had to share positions or the queries do not attend.
        """
        began = time.perf_counter()
        asked, own = self._asked(layer, q, own_k, softmax)
        blocks = 0 if attends or layer not in self.store.means else recalling.compared_blocks(keep, self.store.tokens)
        if blocks:
            scores, out = self._in_best_blocks(layer, asked, own, blocks), None
        else:
            scores, out = self._attend(layer, asked, own, own_v, q.dtype, attends)
        if not attends and layer in self.taken:
            before = self.taken[layer]
            where = before.places.to(scores.device, torch.int64)
            scores.scatter_reduce_(-1, where, before.scores.to(scores.device), "amax")
        places: Tensor = self.backend.select(
            scores,
            keep,
            sink_tokens=self.config.sink_tokens,
            recent_tokens=0,
        )
        if attends and self.config.recall_every:
            self.taken[layer] = Taken(places.to("cpu", torch.int32), scores.gather(-1, places).cpu())
        places = places.to("cpu").transpose(1, 2)
        keys, values = (self._taken(side, layer, places, q) for side in ("keys", "values"))
        self.seconds += time.perf_counter() - began
        return keys, values, out

    def _taken(self, side: str, layer: int, places: Tensor, like: Tensor) -> Tensor:
        """Keys or values [1, Hkv, m, D] of the tokens `places` [1, m, Hkv], as `like` in dtype and device."""
        states, moved = self.store.gather(side, layer, places, like.device)
        self.moved_bytes += moved
        return states.transpose(1, 2).to(like.dtype, memory_format=torch.contiguous_format).contiguous()

    def _asked(self, layer: int, q: Tensor, own_k: Tensor, softmax: Softmax) -> tuple[_Asked, Tensor]:
        """The queries, and their logits float32 [Hkv, group * n, o] of the o keys that follow the text."""
        rows, owned, kv_heads = q.shape[2], own_k.shape[2], own_k.shape[1]
        span = min(self.store.tokens, self.parts.trained_window - owned)
        if self.compact:
            places = torch.arange(span, span + owned, device=q.device)
            q, own_k = self._turned(layer, q, places[owned - rows :]), self._turned(layer, own_k, places)
            grown = self.parts.query_scale(places[owned - rows :], q.dtype)
            q = q if grown is None else q.mul_(grown)
        # One matrix product per KV head and block.
        queries = rearrange(q[0].float(), "(h g) n d -> h (g n) d", h=kv_heads)
        asked = _Asked(queries, rows, self.store.tokens, span, softmax)
        future = torch.ones(rows, owned, dtype=torch.bool, device=q.device).triu(owned - rows + 1)
        own = asked.logits(own_k[0])
        own = own.view(kv_heads, -1, rows, owned).masked_fill(future, float("-inf")).view(own.shape)
        return asked, own

    def _attend(
        self, layer: int, asked: _Asked, own: Tensor, own_v: Tensor, dtype: torch.dtype, attends: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Scores float32 [1, Hkv, tokens] of the text's keys, and the attention output of `take` in `dtype`."""
        (kv_heads, queries, owned), device, tokens = own.shape, own.device, asked.tokens
        whole = attends and recalling.recalls_whole(self.parts.trained_window, owned, tokens, self.compact)
        lse = asked.log_sums(own)
        blocks, held = recalling.read_blocks(tokens), list[Tensor]()
        kept = recalling.held_blocks(kv_heads * queries // asked.rows, asked.rows, tokens)
        # Rows and threads that ask at once find the same means.
        summarises = self.config.recall_every > 0 and layer not in self.store.means
        means = self.store.room_for_means(layer, own_v) if summarises else None
        for block in blocks:
            logits = self._block(layer, block, asked, means)
            lse = torch.logaddexp(lse, logits.logsumexp(dim=-1))
            if len(held) < kept:
                held.append(logits)
        if means is not None:
            self.store.means[layer] = means
        out = torch.matmul((own - lse[..., None]).exp_(), own_v[0].float()) if whole else own.new_empty(0)
        highest = torch.empty(kv_heads, tokens, dtype=torch.float32, device=device)
        for number, block in enumerate(blocks):
            logits = held[number] if number < kept else self._block(layer, block, asked)
            shares = logits.sub_(lse[..., None]).exp_()
            highest[:, block.start : block.stop] = shares.amax(dim=1)
            if whole:
                out.baddbmm_(shares, self._read("values", layer, block, device)[0].float())
        scores = pool(highest[None], self.config.pool_kernel, self.config.pooling)
        return scores, rearrange(out, "h (g n) d -> 1 (h g) n d", n=asked.rows).to(dtype) if whole else None

    def _in_best_blocks(self, layer: int, asked: _Asked, own: Tensor, count: int) -> Tensor:
        """Scores as of `_attend`, of the keys of `count` blocks for each KV head; 0 for all others.

        The blocks are those whose mean keys get most of what a query would give to means alone, as a highest share.
        """
        (kv_heads, _, dim), device, last = asked.queries.shape, own.device, asked.tokens - 1
        found = []
        for block in recalling.read_blocks(recalling.summaries(asked.tokens)):
            means, moved = self.store.mean_keys(layer, block, device)
            self.moved_bytes += moved
            means = means.transpose(1, 2).float()
            if self.compact:
                middles = torch.arange(block.start, block.stop, device=device) * SUMMARY_TOKENS + SUMMARY_TOKENS // 2
                means = self._turned(layer, means, asked.places(middles.clamp_(max=last)))
            found.append(asked.logits(means[0]))
        del means
        of_means = torch.cat(found, dim=-1)
        best = of_means.softmax(dim=-1).amax(dim=1).topk(count).indices.sort().values
        # What the other blocks get, each as if all its keys were the mean: shares would be too large without.
        others = of_means.scatter_(-1, best[:, None].expand(-1, of_means.shape[1], -1), float("-inf"))
        rest = others.logsumexp(dim=-1).add_(math.log(SUMMARY_TOKENS))
        tokens = (best[..., None] * SUMMARY_TOKENS + torch.arange(SUMMARY_TOKENS, device=device)).flatten(1)
        beyond = tokens > last
        tokens.clamp_(max=last)
        found = []
        for part in tokens.split(recalling.BLOCK_TOKENS, dim=1):
            keys = self._taken("keys", layer, part.to("cpu").T[None], asked.queries)
            if self.compact:
                # Each head has tokens of its own: all of them in one row.
                places = asked.places(part.flatten())
                keys = self._turned(layer, keys.view(1, 1, -1, dim), places).view(keys.shape)
            found.append(asked.logits(keys[0]))
        logits = torch.cat(found, dim=-1).masked_fill_(beyond[:, None], float("-inf"))
        del keys, found
        lse = torch.logaddexp(torch.logaddexp(asked.log_sums(own), logits.logsumexp(dim=-1)), rest)
        highest = torch.zeros(kv_heads, asked.tokens, dtype=torch.float32, device=device)
        highest.scatter_reduce_(1, tokens, logits.sub_(lse[..., None]).exp_().amax(dim=1), "amax")
        return pool(highest[None], self.config.pool_kernel, self.config.pooling)

    def _block(self, layer: int, block: range, asked: _Asked, means: Tensor | None = None) -> Tensor:
        """Logits float32 [Hkv, group * n, block] of the keys of `block`, whose mean keys go to `means`."""
        keys = self._read("keys", layer, block, asked.queries.device)
        if means is not None:
            write_means(means, block.start, keys)
        if self.compact:
            tokens = torch.arange(block.start, block.stop, device=keys.device)
            keys = self._turned(layer, keys, asked.places(tokens))
        return asked.logits(keys[0])

    def _read(self, side: str, layer: int, block: range, device: torch.device) -> Tensor:
        """Keys or values [1, Hkv, block, D] of the tokens of `block`."""
        states, moved = self.store.block(side, layer, block, device)
        self.moved_bytes += moved
        return states.transpose(1, 2)

    def _turned(self, layer: int, states: Tensor, positions: Tensor) -> Tensor:
        tables: Any = self.parts.rotary(layer, positions, states.dtype)
        return states if tables is None else rotate(states, *tables)
