"""Who computes attention, scores, selection and compaction: one small record of functions per backend.

`reference` is plain PyTorch in float32. `sdpa` takes PyTorch's fused attention operators that return the
log-sum-exp, and the reference for the rest. `triton` takes this project's kernels. `flash` takes FlashAttention and
`varlen` PyTorch's `varlen_attn` for the forward pass, and Triton for the rest. All have the signatures of
`imdc.kernels.reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

import imdc.kernels.reference as reference
from imdc.errors import ConfigError
from imdc.kernels.libraries import library_forward
from imdc.model.backend_rule import LIBRARIES, AttentionTraits, choose_backend
from imdc.model.machine import machine_of


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels of a step, with the signatures of `imdc.kernels.reference`.

    `compress_step` is the first four in one call, for observers that score as the config says, where a backend has it.
    """

    name: str
    chunk_attention: Callable[..., tuple[Tensor, Tensor]]
    key_mass: Callable[..., Tensor]
    select: Callable[..., Tensor]
    compact: Callable[..., tuple[Tensor, Tensor]]
    rotate: Callable[..., Tensor]
    compress_step: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None


REFERENCE = Backend(
    "reference",
    reference.chunk_attention,
    reference.key_mass,
    reference.select,
    reference.compact,
    reference.rotate,
)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention with log-sum-exp for equal head counts; causal only for as many keys as queries."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif q.dtype == torch.float32:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        lse = lse[..., : q.shape[2]]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return out, lse


def _sdpa_window(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Sliding-window attention in query blocks of one window, so that masks stay [window, 2 * window]."""
    queries, keys = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for first in range(0, queries, window):
        rows = slice(first, min(first + window, queries))
        last_key = keys - queries + rows.stop
        first_key = max(0, keys - queries + first - window + 1)
        row = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + (keys - queries)
        column = torch.arange(first_key, last_key, device=q.device)[None, :]
        mask = (column <= row) & (column > row - window)
        out[:, :, rows] = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, rows],
            k[:, :, first_key:last_key].repeat_interleave(group, dim=1),
            v[:, :, first_key:last_key].repeat_interleave(group, dim=1),
            attn_mask=mask,
            scale=scale,
        )
    return out


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """`chunk_attention` from PyTorch's fused operators.

    The memory is seen by every query, so its part needs no mask; the chunk's part is square and causal. The two are
    merged by their log-sum-exps, and no mask of queries x keys is ever built. With a sliding window the
    log-sum-exp is not computed and comes back empty: window layers are never scored.
    """
    if softcap is not None:
        raise ConfigError(f"backend='sdpa' cannot cap logits (softcap={softcap}); use backend='reference' or 'auto'")
    if window is not None and window < k.shape[2]:
        return _sdpa_window(q, k, v, scale, window), q.new_empty(0, dtype=torch.float32)
    kv_heads, queries = k.shape[1], q.shape[2]
    group, memory = q.shape[1] // kv_heads, k.shape[2] - queries
    grouped = rearrange(q, "b (h g) q d -> (b h) g q d", h=kv_heads)
    chunk_k, chunk_v = (rearrange(x[:, :, memory:], "b h t d -> (b h) 1 t d").expand(-1, group, -1, -1) for x in (k, v))
    out, lse = _fused(grouped, chunk_k, chunk_v, scale, causal=True)
    out, lse = (rearrange(x, "(b h) g ... -> b (h g) ...", h=kv_heads) for x in (out, lse))
    if memory == 0:
        return out, lse
    stacked = rearrange(q, "b (h g) q d -> b h (g q) d", h=kv_heads)
    far, far_lse = _fused(stacked, k[:, :, :memory], v[:, :, :memory], scale, causal=False)
    far, far_lse = (rearrange(x, "b h (g q) ... -> b (h g) q ...", g=group) for x in (far, far_lse))
    total = torch.logaddexp(lse, far_lse)
    merged = out.float().mul_((lse - total).exp_()[..., None])
    merged.addcmul_(far, (far_lse - total).exp_()[..., None])
    return merged.to(q.dtype), total


SDPA = replace(REFERENCE, name="sdpa", chunk_attention=sdpa_attention)


def _triton() -> Backend:
    from imdc.kernels.chunk_attention import chunk_attention
    from imdc.kernels.compact import compact
    from imdc.kernels.compress_step import compress_step
    from imdc.kernels.key_mass import key_mass
    from imdc.kernels.rotate import rotate
    from imdc.kernels.select import select

    return Backend("triton", chunk_attention, key_mass, select, compact, rotate, compress_step)


def _with_library(name: str, device: torch.device) -> Backend:
    """Triton's kernels behind the forward pass of "flash" or "varlen"."""
    own, forward = _triton(), library_forward(name, device)
    assert own.compress_step is not None, "Triton's backend has it"
    return replace(
        own, name=name, chunk_attention=forward, compress_step=functools.partial(own.compress_step, forward=forward)
    )


def make_backend(name: str, device: torch.device) -> Backend:
    """The backend of that name on `device`, which `imdc.model.backend_rule` has found to be able to serve."""
    if name in LIBRARIES:
        return _with_library(name, device)
    return _triton() if name == "triton" else {"sdpa": SDPA, "reference": REFERENCE}[name]


def choose(name: str, device: torch.device, traits: AttentionTraits) -> tuple[Backend, str]:
    """The backend for a model here, and a sentence that says why.

    Args:
        name: "auto" or a backend.
        device: where the model is.
        traits: what the model asks for.

    Raises:
        ConfigError: the named backend cannot serve this model here; the message says why and what can.
    """
    chosen, why = choose_backend(name, traits, machine_of(device, traits))
    return make_backend(chosen, device), why
