"""PyTorch's own `varlen_attn` as the forward pass: from torch 2.15 on it runs on cuDNN where cuDNN can."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MODULE = "torch.nn.attention.varlen"


def find_varlen() -> str | None:
    """Why `varlen_attn` cannot serve here, None if it can: it must know groups of heads and the keys that are used."""
    try:
        parameters = inspect.signature(importlib.import_module(_MODULE).varlen_attn).parameters
    except (ImportError, AttributeError):
        return f"torch {torch.__version__} has no varlen_attn (torch 2.13 and newer have)"
    missing = {"return_aux", "enable_gqa", "seqused_k"} - parameters.keys()
    return f"varlen_attn of torch {torch.__version__} does not know {', '.join(sorted(missing))}" if missing else None


def varlen_attention() -> Callable[..., tuple[Tensor, Tensor]]:
    """`chunk_attention` (see `imdc.kernels.reference`) computed by `varlen_attn`; it cannot cap logits."""
    module = importlib.import_module(_MODULE)

    def chunk_attention(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        assert softcap is None, "the choice of the backend comes first"
        (batch, heads, queries, _), keys = q.shape, k.shape[2]
        ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        options: dict[str, Any] = {
            "return_aux": module.AuxRequest(lse=True),
            "scale": scale,
            "window_size": (-1 if window is None else window - 1, 0),
            "enable_gqa": True,
            # Without it a mask aligned to the bottom right leaves cuDNN for FlashAttention 2.
            "seqused_k": torch.full((batch,), keys, dtype=torch.int32, device=q.device),
        }
        packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out, lse = module.varlen_attn(*packed, ends * queries, ends * keys, queries, keys, **options)
        # Documented as [T, H], and returned as [H, T] by the kernels there are.
        lse = lse if lse.shape == (heads, batch * queries) else lse.transpose(0, 1)
        return (
            out.unflatten(0, (batch, queries)).transpose(1, 2),
            lse.unflatten(1, (batch, queries)).transpose(0, 1).contiguous(),
        )

    return chunk_attention
