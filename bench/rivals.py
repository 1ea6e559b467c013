"""PyTorch's fused attention as a rival of the kernels, and what makes a rival comparable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

# Largest error by norm that a bfloat16 result may show against float64; the tests hold the kernels to tighter bounds.
LARGEST_ERROR = 1e-2


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    """PyTorch's fused attention, bottom-right causal."""
    with sdpa_kernel(backend):
        if q.shape[2] == k.shape[2]:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        mask: Any = causal_lower_right(q.shape[2], k.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def sdpa_in_parts(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    """Memory without a mask and the chunk with a causal one, unmerged: for backends without bottom-right masks."""
    memory = k.shape[2] - q.shape[2]
    with sdpa_kernel(backend):
        near = scaled_dot_product_attention(
            q, k[:, :, memory:], v[:, :, memory:], is_causal=True, scale=scale, enable_gqa=True
        )
        if memory == 0:
            return near
        return scaled_dot_product_attention(q, k[:, :, :memory], v[:, :, :memory], scale=scale, enable_gqa=True), near


def error_of(out: Tensor, exact: Tensor) -> float:
    """Distance by norm, as a share of the exact result's."""
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def differs_from(exact: Tensor) -> Callable[[Any], str | None]:
    """What is wrong with a rival's result: a rival that computes something else is no rival."""

    def wrong(result: Any) -> str | None:
        error = error_of(result[0] if isinstance(result, tuple) else result, exact)
        return None if error < LARGEST_ERROR else f"its result is off by {error:.2e}"

    return wrong
