"""flash-attn as the forward pass: whichever of its generations 4, 3 and 2 is installed, behind one signature.

All of them take [B, T, H, D], align a causal mask to the bottom right and return the natural log-sum-exp [B, H, Q]
beside the output; they differ in module, in the keyword that asks for it, and in what says "no window".
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor


def flash_attention(module: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """`chunk_attention` (see `imdc.kernels.reference`) computed by `flash_attn_func` of `module`.

    Raises:
        ImportError: the package is installed but does not import here.
    """
    function = importlib.import_module(module).flash_attn_func
    names = inspect.signature(function).parameters
    # Early builds of generation 3 had no keyword for it and always returned the log-sum-exp.
    wanted = {name: True for name in ("return_lse", "return_attn_probs") if name in names}
    none = None if "return_lse" in names else -1

    def chunk_attention(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"softmax_scale": scale, "causal": True, **wanted}
        options["window_size"] = (none, none) if window is None else (window - 1, 0)
        if softcap is not None:
            options["softcap"] = softcap
        out, lse, *_ = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
        return out.transpose(1, 2), lse

    return chunk_attention
