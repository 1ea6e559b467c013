"""Addresses past 2^31 elements, which memories of over a million keys reach, and kernels that compile only once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE, unaligned
from torch import Tensor

pytest.importorskip("triton")

from imdc.kernels._launch import target_of
from imdc.kernels.chunk_attention import chunk_attention, plan_chunk_attention
from imdc.kernels.compact import compact, plan_compact
from imdc.kernels.compress_step import compress_step
from imdc.kernels.key_mass import key_mass
from imdc.kernels.rotate import plan_rotate, rotate

BENCH = Path(__file__).resolve().parents[1] / "bench"
HEADS, ROWS, DIM = 3, 300, 16
# Strides fit 32 bits; the last row or head does not.
ROW_STRIDE, HEAD_STRIDE = 2**23, 2**30 + 16


@pytest.fixture(scope="module")
def buffer() -> Tensor:
    """5 GB; on a CPU only the pages that are written take memory."""
    elements = ROW_STRIDE * ROWS
    assert elements > 2**31 and 2 * HEAD_STRIDE > 2**31
    try:
        return torch.empty(elements, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no room for {2 * elements} bytes: {error}")


def far_rows(buffer: Tensor, x: Tensor, place: int, stride: int = ROW_STRIDE) -> Tensor:
    """The values [1, 1, T, D] with rows `stride` apart; buffers of other places do not touch them."""
    return buffer[64 * place :].as_strided(tuple(x.shape), (16, 16, stride, 1)).copy_(x)


def far_unaligned_rows(buffer: Tensor, x: Tensor, place: int) -> Tensor:
    """As `far_rows`, but apart by what is no multiple of 16: loaded without descriptors."""
    return far_rows(buffer, x, place, ROW_STRIDE - 1)


def far_heads(buffer: Tensor, x: Tensor, place: int) -> Tensor:
    """The values [1, H, T, D] with heads HEAD_STRIDE apart; buffers of other places do not touch them."""
    return buffer[2**16 * place :].as_strided(tuple(x.shape), (16, HEAD_STRIDE, DIM, 1)).copy_(x)


# On a CPU an address computed in 32 bits ends this process: it lies outside all memory.
@pytest.mark.parametrize(
    ("spread", "pack", "heads"),
    [(far_rows, Tensor.contiguous, 1), (far_unaligned_rows, unaligned, 1), (far_heads, Tensor.contiguous, HEADS)],
    ids=["rows", "unaligned rows", "heads"],
)
def test_elements_may_lie_beyond_32_bits(
    buffer: Tensor, spread: Callable[..., Tensor], pack: Callable[[Tensor], Tensor], heads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Packed to be loaded in the same way: a device has other blocks for unaligned keys, which sum in another order.
    q, k, v = (pack(torch.randn(1, heads, ROWS, DIM, generator=generator).to(DEVICE, torch.float16)) for _ in range(3))
    far_q, far_k, far_v = (spread(buffer, x, place) for place, x in enumerate((q, k, v)))

    expected, expected_lse = chunk_attention(q, k, v, scale=0.25)
    out, lse = chunk_attention(far_q, far_k, far_v, scale=0.25)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert torch.equal(key_mass(far_q, far_k, lse, scale=0.25, rows=290), key_mass(q, k, lse, scale=0.25, rows=290))

    step, far_step = (compress_step(*x, scale=0.25, keep=40, rows=8) for x in ((q, k, v), (far_q, far_k, far_v)))
    assert all(torch.equal(x, y) for x, y in zip(step, far_step, strict=True))

    indices = torch.arange(1, ROWS, 2, device=DEVICE).expand(1, heads, -1).contiguous()
    expected_k, expected_v = compact(k, v, indices)
    kept_k, kept_v = compact(far_k, far_v, indices)
    assert torch.equal(kept_k, expected_k) and torch.equal(kept_v, expected_v)
    cos, sin = torch.randn(2, ROWS, DIM, generator=generator).to(DEVICE, torch.float16)
    turned = rotate(k, cos, sin)
    assert torch.equal(rotate(far_k, cos, sin), turned)

    target, chip = spread(buffer, torch.full_like(q, float("nan")), 0), target_of(q.device)
    options = {"scale": 0.25, "softcap": None, "window": None, "target": chip}
    plan_chunk_attention(q, k, v, target, lse, **options).run(q.device)
    assert torch.equal(target, expected)
    plan_rotate(k, cos, sin, target.fill_(float("nan"))).run(q.device)
    assert torch.equal(target, turned)
    every = torch.arange(ROWS, device=DEVICE).expand(1, heads, -1).contiguous()
    plan_compact(k, v, every, target.fill_(float("nan")), torch.empty_like(v)).run(q.device)
    assert torch.equal(target, k)


COMPILED_ONCE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import kernel_resources as resources
from imdc.kernels._compress import Rules, Written
from imdc.kernels._launch import target
from imdc.kernels.chunk_attention import attention_config, plan_chunk_attention
from imdc.kernels.compact import plan_compact
from imdc.kernels.fused_step import plan_fused_step
from imdc.kernels.key_mass import plan_key_mass
from imdc.kernels.rotate import plan_rotate
from imdc.kernels.select import plan_select

def ghost(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

seen = {}
steps = (0, 4096, 1024, 8192), (1024, 3001, 1031, 8192), (1031, 1, 1032, 8193), (4097, 17, 4097, 2**20)
for memory, chunk, keep, capacity in steps:
    keys = memory + chunk
    q = ghost(1, chunk, 32, 128).transpose(1, 2)  # as the projection leaves it
    k, v = (ghost(1, 8, capacity, 128)[:, :, :keys] for _ in range(2))  # the workspace all layers share
    out, lse = ghost(1, chunk, 32, 128).transpose(1, 2), ghost(1, 32, chunk, dtype=torch.float32)
    mass, indices = ghost(1, 8, keys, dtype=torch.float32), ghost(1, 8, keep, dtype=torch.int64)
    kept, cos = ghost(1, 8, keep, 128), ghost(keys, 128)
    ranks, chip = ghost(1, 8, keys, dtype=torch.int32), target(9, 0)
    logits = {"scale": 0.1, "softcap": None}
    forced = {"sink_tokens": 4, "recent_tokens": 32}
    for launch in (
        plan_chunk_attention(q, k, v, out, lse, window=None, target=chip, **logits),
        plan_key_mass(q, k, v, out, lse, mass, rows=min(64, chunk), scoring="output_change", target=chip, **logits),
        plan_fused_step(
            q, k, v, k, out, Written(mass, ranks, indices, kept, kept),
            Rules(
                rows=min(16, chunk), keep=keep, scored_keys=keys, pool_kernel=15, scoring="output_change",
                **forced, **logits,
            ),
            attention_config(q, k, v, chip),
        ),
        plan_select(mass, indices, **forced),
        plan_select(mass, indices, ranks=ranks, pool_kernel=15, **forced),
        plan_compact(k, v, indices, kept, kept),
        plan_rotate(k, cos, cos, ghost(1, 8, keys, 128)),
        plan_rotate(q, cos[memory:], cos[memory:], ghost(1, 32, chunk, 128)),
    ):
        source = resources.source_of(launch)
        # Selection has a kernel for every power of two up to the length of the row, with pooling and without.
        name, given = launch.kernel.__name__, launch.arguments
        name = name, (given["BLOCK_N"], given["POOLED"]) if "select" in name else ()
        seen.setdefault(name, set()).add(repr((source.signature, source.constants, source.attrs)))
for name, kinds in seen.items():
    assert len(kinds) == 1, (name, kinds)
assert len(seen) == 5 + 2 * 3, list(seen)
"""


def test_steps_of_other_lengths_compile_nothing_new() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-I", "-c", COMPILED_ONCE, str(BENCH)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
