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
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from imdc.cache.cache import ImdcCache
from imdc.cache.rows import Taken
from imdc.cache.store import HostStore
from imdc.config import PrefillConfig
from imdc.errors import ConfigError, UnsupportedCallError
from imdc.kernels.reference import pool, rotate
from imdc.model.parts import Parts
from imdc.model.shape import ModelShape
from imdc.planner import recalling
from imdc.planner.batch import Batch
from imdc.prefill.backends import Backend
from imdc.units import format_bytes


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
        *,
        keep: int,
        scale: float,
        softcap: float | None,
        attends: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The `keep` best pairs of the text for the question, on its device, and what the question attends to.

        Args:
            layer: number of a full-attention layer.
            q: queries [1, Hq, n, D] of the question, or of the last tokens of it and its answer; rotated as the stored
                keys are.
            own_k: keys [1, Hkv, o, D] of all that follows the text, rotated as `q`; o >= n.
            own_v: its values, as `own_k`.
            keep: pairs to take per KV head, fewer than there are.
            scale: factor on the logits.
            softcap: cap of the logits, or None.
            attends: whether the queries are a question's, which attend to the whole text; values are read for that
                alone. An answer's are not, and what its question took keeps the scores that it had.

        Returns:
            Keys and values [1, Hkv, keep, D], in the order of the text; and the attention output [1, Hq, n, D] over
            the whole text, None where keys had to share positions or the queries do not attend.
        """
        began = time.perf_counter()
        scores, out = self._attend(layer, q, own_k, own_v, scale, softcap, attends)
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

    def _attend(
        self, layer: int, q: Tensor, own_k: Tensor, own_v: Tensor, scale: float, softcap: float | None, attends: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Scores float32 [1, Hkv, tokens] of the text's keys, and the attention output of `take`."""
        window = self.parts.trained_window
        kv_heads, rows, owned = own_k.shape[1], q.shape[2], own_k.shape[2]
        whole = attends and recalling.recalls_whole(window, owned, self.store.tokens, self.compact)
        span = min(self.store.tokens, window - owned)
        if self.compact:
            places = torch.arange(span, span + owned, device=q.device)
            q, own_k = self._turned(layer, q, places[owned - rows :]), self._turned(layer, own_k, places)
        # [Hkv, group * n, D]: one matrix product per KV head and block.
        asking = rearrange(q[0].float(), "(h g) n d -> h (g n) d", h=kv_heads)
        future = torch.ones(rows, owned, dtype=torch.bool, device=q.device).triu(owned - rows + 1)
        own = _logits(asking, own_k[0], scale, softcap)
        own = own.view(*own.shape[:1], -1, rows, owned).masked_fill(future, float("-inf")).view(own.shape)
        lse = own.logsumexp(dim=-1)
        blocks, held = recalling.blocks(self.store.tokens), list[Tensor]()
        kept = recalling.held_blocks(q.shape[1], rows, self.store.tokens)
        for block in blocks:
            logits = self._block(layer, block, asking, span, scale, softcap)
            lse = torch.logaddexp(lse, logits.logsumexp(dim=-1))
            if len(held) < kept:
                held.append(logits)
        out = torch.matmul((own - lse[..., None]).exp_(), own_v[0].float()) if whole else q.new_empty(0)
        highest = torch.empty(kv_heads, self.store.tokens, dtype=torch.float32, device=q.device)
        for number, block in enumerate(blocks):
            logits = held[number] if number < kept else self._block(layer, block, asking, span, scale, softcap)
            shares = logits.sub_(lse[..., None]).exp_()
            highest[:, block.start : block.stop] = shares.amax(dim=1)
            if whole:
                out.baddbmm_(shares, self._values(layer, block, q.device))
        scores = pool(highest[None], self.config.pool_kernel, self.config.pooling)
        return scores, rearrange(out, "h (g n) d -> 1 (h g) n d", n=rows).to(q.dtype) if whole else None

    def _values(self, layer: int, block: range, device: torch.device) -> Tensor:
        """Values float32 [Hkv, block, D] of the tokens of `block`."""
        return self._read("values", layer, block, device)[0].float()

    def _block(
        self, layer: int, block: range, asking: Tensor, span: int, scale: float, softcap: float | None
    ) -> Tensor:
        """Logits float32 [Hkv, group * n, block] of the keys of `block`."""
        keys = self._read("keys", layer, block, asking.device)
        if self.compact:
            places = torch.arange(block.start, block.stop, device=asking.device)
            keys = self._turned(layer, keys, places * span // self.store.tokens)
        return _logits(asking, keys[0], scale, softcap)

    def _read(self, side: str, layer: int, block: range, device: torch.device) -> Tensor:
        """Keys or values [1, Hkv, block, D] of the tokens of `block`."""
        states, moved = self.store.block(side, layer, block, device)
        self.moved_bytes += moved
        return states.transpose(1, 2)

    def _turned(self, layer: int, states: Tensor, positions: Tensor) -> Tensor:
        tables: Any = self.parts.rotary(layer, positions, states.dtype)
        return states if tables is None else rotate(states, *tables)


def check_recall(config: PrefillConfig, cache: ImdcCache, tokens: int) -> None:
    """Refuse turns of so many `tokens` that would leave a text and its store apart.

    Raises:
        UnsupportedCallError: a prompt of forward() with recall, or another turn over a text that has a store.
    """
    if cache.is_empty and config.recall != "none" and cache.store is None and tokens > 1:
        raise UnsupportedCallError(
            f"recall={config.recall!r} is for generate(), handle.read() and handle.ask(); leave it out for forward()"
        )
    if cache.store is not None and not cache.is_empty and not cache.is_branch:
        raise UnsupportedCallError(
            "the cache belongs to a document with a store, to which nothing can be added; ask it with handle.ask()"
        )
    if cache.is_branch and cache.asked:
        raise UnsupportedCallError(
            f"the cache is that of a call with recall={config.recall!r}, which cannot go on: what it took back is "
            f"about its own question; pass the whole conversation as input_ids and no cache"
        )


def text_store(parts: Parts, config: PrefillConfig, tokens: int, available: int | None) -> HostStore | None:
    """An empty store for a text of `tokens`, where the config asks for one and a model has layers to compress.

    Args:
        parts: of the model.
        config: the options.
        tokens: of the text.
        available: bytes of host memory that are free, None where that is not known.

    Raises:
        ConfigError: it would take more than `recall_limit`, or than there is, or its folder cannot be used.
    """
    if config.recall == "none" or not parts.full_layers:
        return None
    shape = ModelShape.from_model(parts.model)
    needed, int8 = recalling.host_bytes(shape, Batch(tokens), config), config.recall_dtype == "int8"
    if config.recall_limit is not None and needed > config.recall_limit:
        raise ConfigError(
            f"recall={config.recall!r} stores {format_bytes(needed)} for {tokens} tokens, more than "
            f"recall_limit={config.recall_limit} bytes; raise it, read a shorter document, or leave recall out"
        )
    if config.recall == "disk":
        folder = Path(tempfile.gettempdir() if config.recall_dir is None else config.recall_dir)
        if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
            raise ConfigError(
                f"recall_dir={os.fspath(folder)!r} is no folder that can be written to; name one with recall_dir"
            )
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ConfigError(
                f"recall='disk' stores {format_bytes(needed)} for {tokens} tokens, and {os.fspath(folder)!r} has "
                f"{format_bytes(free)} free; name a folder on another disk with recall_dir, or read a shorter document"
            )
        return HostStore(parts.full_layers, tokens, folder, int8=int8)
    if config.recall_limit is None and available is not None and needed > available:
        raise ConfigError(
            f"recall={config.recall!r} stores {format_bytes(needed)} for {tokens} tokens, and only "
            f"{format_bytes(available)} of host memory are available; take recall='disk', or read a shorter document"
        )
    return HostStore(parts.full_layers, tokens, int8=int8)


def _logits(asking: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """float32 [Hkv, rows, T] of queries [Hkv, rows, D] and keys [Hkv, T, D]."""
    logits = torch.matmul(asking, keys.float().transpose(1, 2)).mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
