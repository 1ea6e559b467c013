"""Positions and masks of decoded tokens: those that fit what is stored, where a caller's speak of the whole text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imdc.cache.cache import ImdcCache
from imdc.model import hf
from imdc.model.parts import Parts


def decode_inputs(parts: Parts, cache: ImdcCache, named: dict[str, Any]) -> dict[str, Any]:
    """The arguments `named` of a forward call, with positions and masks for the tokens that follow the cache.

    Args:
        parts: of the model.
        cache: filled by a prefill.
        named: at least `input_ids`, int64 [B, Q].
    """
    rows = cache.rows
    assert rows is not None, "only a filled cache decodes"
    input_ids: Tensor = named["input_ids"]
    count, device = input_ids.shape[1], input_ids.device
    start = (rows.position + cache.tail).to(device)
    positions = start[:, None] + torch.arange(count, device=device)
    return {**named, "position_ids": positions, "attention_mask": _mask(parts, cache, input_ids, positions)}


def _mask(parts: Parts, cache: ImdcCache, input_ids: Tensor, position_ids: Tensor) -> Any:
    rows = cache.rows
    assert rows is not None, "only a filled cache decodes"
    full, sliding = None in parts.windows, any(window is not None for window in parts.windows)
    seen, device = cache.get_seq_length(), input_ids.device
    column = torch.arange(seen + input_ids.shape[1], device=device)[None, :]
    full_mask = sliding_mask = None
    # Layers that differ in what they store get masks of their own; see `DecodeMasks`.
    if full and not cache.ragged and bool(rows.padding.any()):
        first = parts.full_layers[0]
        full_mask = column >= (rows.padding[:, first] + seen - cache.layers[first].stored).to(device)[:, None]
    if sliding and bool((rows.tokens < cache.width).any()):
        sliding_mask = column >= (cache.width - rows.tokens).to(device)[:, None]
    if full_mask is None and sliding_mask is None:
        return None
    if not (full and sliding):
        return full_mask if full else sliding_mask
    return hf.decode_masks(parts.config, cache, input_ids, position_ids, full_mask, sliding_mask)


class DecodeMasks:
    """Masks of full-attention layers that differ in what they store; transformers makes one for all of them.

    A layer stores [padding | memory | tail], and the new tokens follow, so that all layers end at the same token.
    """

    def __init__(self, parts: Parts, cache: ImdcCache) -> None:
        """For one forward call that appends to `cache`."""
        assert cache.rows is not None, "only a filled cache decodes"
        self.parts, self._padding = parts, cache.rows.padding

    def serves(self, module: nn.Module) -> bool:
        """Whether `module` is an attention module of the model, of a layer that is compressed."""
        return self.parts.is_compressed(module)

    def of(self, layer: int, query: Tensor, key: Tensor, *, eager: bool) -> Tensor | None:
        """The mask [B, 1, Q, T] of queries [B, Hq, Q, D] over keys [B, Hkv, T, D] of a layer.

        bool, or what is added to the logits where the attention is eager; None where every query sees every key.
        """
        queries, keys, device = query.shape[2], key.shape[2], query.device
        padding = self._padding[:, layer]
        if queries == 1 and not bool(padding.any()):
            return None
        column = torch.arange(keys, device=device)
        row = torch.arange(keys - queries, keys, device=device)
        seen = (column <= row[:, None]) & (column >= padding.to(device)[:, None, None])
        if not eager:
            return seen[:, None]
        hidden = torch.zeros((), dtype=query.dtype, device=device), torch.finfo(query.dtype).min
        return torch.where(seen[:, None], *hidden)
