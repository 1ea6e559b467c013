"""What the kernel tests share: inputs, float64 oracles, low-precision PyTorch to measure tolerances with, poison.

On a machine with CUDA the same tests run on the device, with longer shapes; elsewhere on Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ON_DEVICE = torch.cuda.is_available()
if not ON_DEVICE:
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = torch.device("cuda" if ON_DEVICE else "cpu")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# For the longest products of cases: the interpreter computes float16 and float32 alike, a device does not.
FEW_DTYPES = DTYPES if ON_DEVICE else (torch.bfloat16, torch.float32)
LEAST_REST = 1 / 32  # of the probability, which a key must leave to the others; see `kernels/limits.py`
LOG2E = 1.4426950408889634
HARDWARE_UNITS = 2.0 if ON_DEVICE else 0.0


@dataclass(frozen=True)
class Case:
    """One attention problem: B rows, Hkv KV heads of G query heads, Q queries, T keys, head size D."""

    batch: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    dim: int
    softcap: float | None = None
    window: int | None = None

    def __str__(self) -> str:
        name = f"B{self.batch}-H{self.kv_heads}-G{self.group}-Q{self.queries}-T{self.keys}-D{self.dim}"
        name += "" if self.softcap is None else f"-cap{self.softcap:g}"
        return name if self.window is None else f"{name}-win{self.window}"

    @property
    def logits(self) -> dict[str, Any]:
        """The keyword arguments that turn products into logits."""
        return {"scale": self.dim**-0.5, "softcap": self.softcap, "window": self.window}

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; a few keys are large, so that attention is uneven as in real models."""
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(self.batch, self.kv_heads * self.group, self.queries, self.dim, generator=generator)
        k = torch.randn(self.batch, self.kv_heads, self.keys, self.dim, generator=generator)
        v = torch.randn(self.batch, self.kv_heads, self.keys, self.dim, generator=generator)
        k[:, :, ::7] *= 3.0
        return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


# Ragged and aligned lengths, every group size, empty memory (T == Q), one-token chunks, every head size.
CASES = (
    Case(1, 2, 4, 50, 117, 64),
    Case(2, 1, 3, 33, 33, 96),
    Case(1, 1, 8, 64, 128, 128),
    Case(1, 2, 1, 1, 70, 32),
    Case(1, 1, 4, 1, 1, 16),
    Case(1, 1, 1, 65, 97, 256),
    Case(1, 1, 7, 40, 41, 80),
    Case(1, 2, 4, 50, 117, 64, softcap=5.0),
    Case(1, 1, 3, 70, 111, 32, window=17),
    Case(1, 1, 2, 70, 70, 16, window=1),
    Case(1, 1, 8, 19, 100, 64, softcap=30.0, window=64),
)
if ON_DEVICE:
    CASES += (
        Case(1, 8, 4, 1000, 3001, 128),
        Case(2, 2, 7, 777, 777, 64),
        Case(1, 2, 3, 513, 2049, 96, window=300),
        Case(1, 2, 2, 600, 1500, 256, softcap=50.0, window=700),
        Case(1, 8, 4, 1, 5000, 128),
    )


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [Q, T], written down key by key: query i stands at position T - Q + i."""
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    column = torch.arange(keys, device=device)[None, :]
    distance = position - column
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def logits_of(q: Tensor, k: Tensor, *, scale: float, softcap: float | None, window: int | None) -> Tensor:
    """Masked logits [B, Hq, Q, T] in the dtype of the inputs, every KV head repeated for its group."""
    repeated = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q @ repeated.transpose(2, 3)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~visible(q.shape[2], k.shape[2], window, q.device), float("-inf"))


def attention_oracle(q: Tensor, k: Tensor, v: Tensor, **logits: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64 throughout."""
    table = logits_of(q.double(), k.double(), **logits)
    values = v.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return table.softmax(dim=-1) @ values, torch.logsumexp(table, dim=-1)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, **logits: Any) -> Tensor:
    """What a model's eager attention computes: products in the dtype of the inputs, softmax in float32."""
    weights = logits_of(q, k, **logits).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def mass_of(
    q: Tensor,
    k: Tensor,
    *,
    rows: int,
    stride: int = 1,
    lse: Tensor | None = None,
    v: Tensor | None = None,
    out: Tensor | None = None,
    **logits: Any,
) -> Tensor:
    """Mass of every key [B, Hkv, T] from the whole matrix of probabilities, head by head.

    With `lse` [B, Hq, Q] the probabilities are powers of two of the distance to it, as on a device. With `v` and `out`
    the squared change of an output without the key takes the place of its probability.
    """
    batch, q_heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    table = logits_of(q, k, **logits)
    weights = table.softmax(dim=-1) if lse is None else torch.exp2(table * LOG2E - (lse * LOG2E)[..., None])
    voting = [row for row in range(queries - rows, queries) if (queries - 1 - row) % stride == 0]
    weights = weights[:, :, voting]
    if v is not None and out is not None:
        values = v.to(q.dtype).repeat_interleave(q_heads // kv_heads, dim=1)
        outputs = out[:, :, voting].to(q.dtype)
        lengths = values.square().sum(-1)[:, :, None]
        away = (outputs.square().sum(-1)[..., None] + lengths - 2 * outputs @ values.transpose(2, 3)).clamp_min(0)
        changes = (weights / (1 - weights)).square() * away
        weights = torch.where(1 - weights > LEAST_REST, changes, lengths)
    seen = visible(queries, keys, logits["window"], q.device)[voting].sum(dim=0)
    summed = torch.zeros(batch, kv_heads, keys, dtype=q.dtype, device=q.device)
    for head in range(q_heads):
        summed[:, head // (q_heads // kv_heads)] += weights[:, head].sum(dim=1)
    return summed / (seen * (q_heads // kv_heads)).clamp_min(1)


def masses_in_several_orders(
    case: Case,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    rows: int,
    stride: int = 1,
    v: Tensor | None = None,
    out: Tensor | None = None,
) -> list[Tensor]:
    """PyTorch's mass in float32 with the head dimensions and the heads of each group shuffled: orders of its sums.

    On a device also with logits two units too large and too small: matrix units cut off where PyTorch rounds.
    """
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(6):
        dims = torch.randperm(case.dim, generator=generator).to(q.device)
        order = torch.arange(case.kv_heads)[:, None] * case.group + torch.randperm(case.group, generator=generator)
        heads = order.flatten().to(q.device)
        queries, keys = q.float()[:, heads][..., dims], k.float()[..., dims]
        changed: dict[str, Tensor] = {}
        if v is not None and out is not None:
            changed = {"v": v.float()[..., dims], "out": out.float()[:, heads][..., dims]}
        found.append(mass_of(queries, keys, rows=rows, stride=stride, lse=lse[:, heads], **changed, **case.logits))
    off = HARDWARE_UNITS * torch.finfo(torch.float32).eps
    for wrong in (1 + off, 1 - off) if off else ():
        logits = case.logits | {"scale": case.logits["scale"] * wrong}
        changed = {} if v is None or out is None else {"v": v.float(), "out": out.float()}
        found.append(mass_of(q.float(), k.float(), rows=rows, stride=stride, lse=lse, **changed, **logits))
    return found


def assert_near(
    result: Tensor,
    truth: Tensor,
    rival: Tensor | list[Tensor],
    factor: float,
    *,
    softcap: float | None = None,
    summands: int = 1,
) -> None:
    """Check that the error against float64 is at most `factor` times that of the same PyTorch computation.

    A sum depends on its order, and one order may be lucky: where there are several rivals, which compute the same in
    several orders, the largest of their errors counts. It counts as at least half a unit in the last place of the
    largest value: on tiny shapes PyTorch may hit the truth exactly. A GPU's own exp2, log2 and division, which kernels
    use and PyTorch does not, are right to two units of float32 (ex2.approx, lg2.approx and div.full in the PTX manual);
    a cap multiplies those of its logits. And a GPU adds so many `summands` block after block, where PyTorch adds parts
    of its own choice: half a unit each, in random directions, is what a sum in any order may be off by.
    """
    assert result.shape == truth.shape
    assert torch.isfinite(result).all()
    rivals = [rival] if isinstance(rival, Tensor) else rival
    kind = rivals[0].dtype
    hardware = HARDWARE_UNITS * torch.finfo(torch.float32).eps * max(1.0, softcap or 0.0)
    walked = 0.5 * torch.finfo(torch.float32).eps * summands**0.5 if ON_DEVICE else 0.0
    floor = max(0.5 * torch.finfo(kind).eps, hardware, walked) * truth.abs().max().item()
    allowed = factor * max(floor, *((one.double() - truth).abs().max().item() for one in rivals))
    error = (result.double() - truth).abs().max().item()
    assert error <= allowed, f"error {error:.3g}, PyTorch's {allowed / factor:.3g}, allowed {allowed:.3g}"


@contextmanager
def poisoned_memory() -> Iterator[list[Tensor]]:
    """Fill what `torch.empty` and its kin return with NaN (integers: far outside any range), and list it.

    An element that a kernel forgets to write, or reads before it is written, then shows.
    """
    handed_out: list[Tensor] = []

    def poisoning(allocate: Any) -> Any:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            x: Tensor = allocate(*args, **kwargs)
            if x.is_meta:  # it stands for what is allocated later
                return x
            handed_out.append(x)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min // 2)

        return allocate_poisoned

    with (
        mock.patch.object(torch, "empty", poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoning(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poisoning(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poisoning(Tensor.new_empty)),
    ):
        yield handed_out


def inside_workspace(x: Tensor, capacity: int) -> Tensor:
    """The same values [B, H, T, D] as a slice of a buffer with room for `capacity` keys, NaN behind them."""
    batch, heads, keys, dim = x.shape
    workspace = torch.full((batch, heads, capacity, dim), float("nan"), dtype=x.dtype, device=x.device)
    workspace[:, :, :keys] = x
    return workspace[:, :, :keys]


def unaligned(x: Tensor) -> Tensor:
    """The same values with strides that are no multiple of 16 bytes."""
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 1), float("nan"), dtype=x.dtype, device=x.device)
    padded[..., :-1] = x
    return padded[..., :-1]
