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

# (module, generation), newest first. Generation 4 is a part of the package of generation 2.
_HOMES = (("flash_attn.cute", 4), ("flash_attn_interface", 3), ("flash_attn", 2))


# Compute capabilities, in tens, that each generation has kernels for: 3 only has those of Hopper.
_CHIPS = {4: (9, 10), 3: (9,), 2: (8, 9, 10, 12)}


def find_flash(capability: tuple[int, int] | None = None) -> tuple[str, int] | None:
    """(module, generation) of the newest flash-attn that imports and runs on a chip, None if there is none.

    Args:
        capability: compute capability of the chip; None asks for no chip in particular.
    """
    for module, generation in _HOMES:
        if capability is not None and capability[0] not in _CHIPS[generation]:
            continue
        try:
            # Found is not enough: a wheel for another torch or CUDA is found and does not import.
            if hasattr(importlib.import_module(module), "flash_attn_func"):
                return module, generation
        except (ImportError, OSError):
            continue
    return None


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
