"""Positions and masks of decoded tokens: those that fit what is stored, where a caller's speak of the whole text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    if full and bool(rows.padding.any()):
        full_mask = column >= (rows.padding + seen - cache.stored_tokens()).to(device)[:, None]
    if sliding and bool((rows.tokens < cache.width).any()):
        sliding_mask = column >= (cache.width - rows.tokens).to(device)[:, None]
    if full_mask is None and sliding_mask is None:
        return None
    if not (full and sliding):
        return full_mask if full else sliding_mask
    return hf.decode_masks(parts.config, cache, input_ids, position_ids, full_mask, sliding_mask)
