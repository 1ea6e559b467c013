"""Forward passes of other libraries, with the signature of `chunk_attention`: FlashAttention, PyTorch's varlen_attn.

Both return the log-sum-exp that scoring needs. Nothing of them is believed: `disagreement` compares a library with the
reference on small problems on the device, because a log-sum-exp in another order of dimensions would quietly change
what is kept. Libraries are imported when a model is patched, never in the middle of a forward pass.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import reference

Forward = Callable[..., tuple[Tensor, Tensor]]

# FlashAttention's generations, newest first: module, generation, and the generations of chips that it has kernels for.
# Generation 4 is a part of the package of 2.
FLASH_HOMES = (
    ("flash_attn.cute", 4, (9, 10)),
    ("flash_attn_interface", 3, (9,)),
    ("flash_attn", 2, (8, 9, 10, 12)),
)
_VARLEN = "torch.nn.attention.varlen"
# varlen_attn runs on cuDNN from these on; before, and on other chips or heads, it is FlashAttention 2.
_VARLEN_TORCH, _VARLEN_CUDNN, VARLEN_MAJORS = (2, 15), 92400, (9, 10)
# Largest distance of a library's result from the reference's on random inputs: a few units of bfloat16 at 1.
_MOST_ERROR = 0.05


@cache
def find_flash(major: int | None = None) -> tuple[str, int] | None:
    """(module, generation) of the newest FlashAttention that imports and runs on a chip, None if there is none.

    Args:
        major: generation of the chip; None asks for no chip in particular.
    """
    for module, generation, majors in FLASH_HOMES:
        if major is not None and major not in majors:
            continue
        try:
            # Found is not enough: a wheel for another torch or CUDA is found and does not import.
            if hasattr(importlib.import_module(module), "flash_attn_func"):
                return module, generation
        except (ImportError, OSError, RuntimeError):
            continue
    return None


def flash_attention(module: str) -> Forward:
    """`chunk_attention` (see `kernels/reference.py`) computed by `flash_attn_func` of `module`.

    All generations take [B, T, H, D], align a causal mask to the bottom right and return the natural log-sum-exp
    [B, H, Q] beside the output; they differ in the keyword that asks for it, and in what says "no window".

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


def why_not_varlen(head_dim: int, major: int | None = None) -> str | None:
    """Why `varlen_attn` does not run on cuDNN here, None if it does.

    Args:
        head_dim: head size.
        major: generation of the chip; None asks for no chip in particular.
    """
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < _VARLEN_TORCH:
        return f"varlen_attn runs on cuDNN from torch 2.15 on, this is {torch.__version__}"
    cudnn = torch.backends.cudnn.version()
    if cudnn is None or cudnn < _VARLEN_CUDNN:
        return f"varlen_attn needs cuDNN 9.24 or newer, torch has {'none' if cudnn is None else cudnn}"
    if major is not None and major not in VARLEN_MAJORS:
        return f"varlen_attn runs on cuDNN on compute capability 9 and 10, the device has {major}"
    if head_dim > 128 or head_dim % 8:
        return f"varlen_attn runs on cuDNN for head sizes up to 128 that 8 divides, not {head_dim}"
    return None


def varlen_attention(windowed: Forward) -> Forward:
    """`chunk_attention` (see `kernels/reference.py`) computed by PyTorch's `varlen_attn`; it cannot cap logits.

    Args:
        windowed: what computes sliding windows, which would leave cuDNN for FlashAttention 2.
    """
    module = importlib.import_module(_VARLEN)

    def chunk_attention(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if softcap is not None:
            raise ValueError(f"softcap = {softcap}: varlen_attn cannot cap logits; use another backend")
        if window is not None:
            return windowed(q, k, v, scale=scale, window=window)
        (batch, _, queries, _), keys = q.shape, k.shape[2]
        ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        options: dict[str, Any] = {
            "return_aux": module.AuxRequest(lse=True),
            "scale": scale,
            "window_size": (-1, 0),
            "enable_gqa": True,
            # Without it a mask aligned to the bottom right leaves cuDNN for FlashAttention 2.
            "seqused_k": torch.full((batch,), keys, dtype=torch.int32, device=q.device),
        }
        packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out, lse = module.varlen_attn(*packed, ends * queries, ends * keys, queries, keys, **options)
        out = out.unflatten(0, (batch, queries)).transpose(1, 2)
        # [H, T] in torch 2.15, which is [B, H, Q] for one row.
        return out, lse.unflatten(1, (batch, queries)).transpose(0, 1)

    return chunk_attention


@cache
def disagreement(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool = False, windowed: bool = False
) -> str | None:
    """What a library's forward pass does otherwise than the reference on small problems here, None if nothing.

    With as many queries as heads the shape of a log-sum-exp cannot tell the order of its dimensions; the numbers do.

    Args:
        name: "flash" or "varlen".
        device: where.
        dtype: of the model.
        head_dim: head size.
        softcap: whether logits are capped.
        windowed: whether a sliding window is asked for too.
    """
    try:
        forward = library_forward(name, device)
        for queries, window in product((4, 40), (None, 9) if windowed else (None,)):
            generator = torch.Generator().manual_seed(queries)
            drawn = (torch.randn(1, heads, 150, head_dim, generator=generator, device="cpu") for heads in (4, 2, 2))
            # Slices of a longer buffer, as the engine passes them.
            q, k, v = (x.to(device, dtype)[:, :, :length] for x, length in zip(drawn, (queries, 70, 70), strict=True))
            options = {"scale": head_dim**-0.5, "softcap": 20.0 if softcap else None, "window": window}
            results = zip(forward(q, k, v, **options), reference.chunk_attention(q, k, v, **options), strict=True)
            for what, (found, wanted) in zip(("output", "log-sum-exp"), results, strict=True):
                near = found.shape == wanted.shape and (found.float() - wanted.float()).abs().max() <= _MOST_ERROR
                if not near:
                    return f"its {what} is not the reference's here"
    except (RuntimeError, TypeError, ValueError, NotImplementedError, ImportError, AttributeError) as error:
        return f"it does not run here: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def library_forward(name: str, device: torch.device) -> Forward:
    """The forward pass of "flash" or "varlen" on `device`.

    Raises:
        ImportError: no FlashAttention that runs there is installed.
    """
    if name == "varlen":
        from .chunk_attention import chunk_attention

        return varlen_attention(chunk_attention)
    found = find_flash(torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None)
    if found is None:
        raise ImportError("no FlashAttention that runs on this device can be imported")
    return flash_attention(found[0])
