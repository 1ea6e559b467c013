"""`kernels/compress_step.py`: the four kernels as one call, and what it allocates and asks of the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    ON_DEVICE,
    Case,
    assert_near,
    attention_oracle,
    eager_attention,
    mass_of,
    poisoned_memory,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from imdc.kernels import _launch, reference
from imdc.kernels.compress_step import compress_step

CASES = (
    Case(1, 2, 4, 50, 117, 64),
    Case(2, 1, 3, 33, 33, 96),
    Case(1, 2, 1, 1, 70, 32),
    Case(1, 1, 8, 40, 100, 16, softcap=20.0, window=64),
)


def angles(rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.arange(rows)[:, None] * 10000.0 ** -torch.linspace(0.0, 0.9, dim)
    return angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)


@pytest.mark.parametrize("pool_kernel", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case: Case, dtype: torch.dtype, pool_kernel: int) -> None:
    q, k, v = case.tensors(dtype)
    scored, rows = case.keys - case.queries // 4, min(case.queries, 12)
    keep = scored // 2
    cos, sin = angles(keep, case.dim, dtype)
    chosen = {"keep": keep, "sink_tokens": 3, "recent_tokens": 4}
    with poisoned_memory():
        out, new_k, new_v, indices = compress_step(
            q, k, v, rows=rows, scored_keys=scored, pool_kernel=pool_kernel, cos=cos, sin=sin, **chosen, **case.logits
        )
    truth, _ = attention_oracle(q, k, v, **case.logits)
    assert_near(out, truth, eager_attention(q, k, v, **case.logits), factor=2.0, softcap=case.softcap)

    exact = mass_of(q.double(), k.double(), rows=rows, **case.logits)[..., :scored]
    exact = reference.pool(exact, pool_kernel)
    exact[..., :3] = exact[..., scored - 4 :] = float("inf")
    assert (indices.diff(dim=-1) > 0).all() and (indices >= 0).all() and (indices < scored).all()
    kept = torch.zeros_like(exact, dtype=torch.bool).scatter_(-1, indices, True)
    least_kept = exact.masked_fill(~kept, float("inf")).amin(dim=-1)
    best_dropped = exact.masked_fill(kept, 0.0).amax(dim=-1)
    # Scores closer than float32 tells apart may change places; a cap multiplies the error of its logits.
    tied = 1e-5 if case.softcap is None else 1e-4
    assert (best_dropped <= least_kept * (1 + tied)).all()

    expected_k, expected_v = reference.compact(k, v, indices, cos=cos, sin=sin)
    torch.testing.assert_close(new_k, expected_k, rtol=0.0, atol=2e-6 if dtype == torch.float32 else 0.0)
    assert torch.equal(new_v, expected_v)


def test_keys_stay_as_they_are_without_cos_and_sin() -> None:
    q, k, v = CASES[0].tensors(torch.bfloat16)
    _, new_k, new_v, indices = compress_step(q, k, v, keep=40, rows=16, **CASES[0].logits)
    expected = reference.compact(k, v, indices)
    assert torch.equal(new_k, expected[0]) and torch.equal(new_v, expected[1])


class Recorder(TorchDispatchMode):
    """Lists every operator of PyTorch that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("pool_kernel", "launches"), [(1, 4), (15, 5)])
def test_allocates_and_launches_what_it_documents(
    monkeypatch: pytest.MonkeyPatch, pool_kernel: int, launches: int
) -> None:
    q, k, v = CASES[0].tensors(torch.bfloat16)
    launched: list[str] = []
    monkeypatch.setattr(_launch.Launch, "run", lambda self, device: launched.append(self.kernel.__name__))
    with Recorder() as recorder, poisoned_memory() as allocated:
        compress_step(q, k, v, keep=40, rows=16, scored_keys=100, pool_kernel=pool_kernel, **CASES[0].logits)
    assert len(launched) == len(set(launched)) == launches

    # Filling is the poison's doing; anything else, such as reading a value back, would be a wait for the device.
    assert set(recorder.called) <= {"empty", "new_empty", "empty_like", "transpose", "fill_"}
    score_bytes = 2 * 100 * 4
    expected = {
        "output": q.numel() * 2,
        "log-sum-exp": 8 * 50 * 4,
        "scores": score_bytes,
        **({"pooled scores": score_bytes} if pool_kernel > 1 else {}),
        "indices": 2 * 40 * 8,
        "new keys": 2 * 40 * 64 * 2,
        "new values": 2 * 40 * 64 * 2,
    }
    assert sorted(x.numel() * x.element_size() for x in allocated) == sorted(expected.values())


@pytest.mark.skipif(not ON_DEVICE, reason="needs a CUDA device: the interpreter has nothing to wait for")
def test_never_waits_for_the_device() -> None:
    q, k, v = CASES[0].tensors(torch.bfloat16)
    arguments: dict[str, Any] = {"keep": 40, "rows": 16, "pool_kernel": 5, **CASES[0].logits}
    compress_step(q, k, v, **arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compress_step(q, k, v, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 118}, r"keep = 118: must be 0 .*\.\.117"),
        ({"keep": 40, "scored_keys": 30}, r"keep = 40: must be 0 .*\.\.30"),
        ({"keep": 5, "sink_tokens": 6}, r"keep = 5: must be 6"),
        ({"rows": 51}, r"rows = 51: must be 1\.\.50"),
        ({"pool_kernel": 2}, r"pool_kernel = 2: must be odd"),
        ({"scored_keys": 118}, r"scored_keys = 118"),
        ({"k": torch.zeros(3, 3)}, r"k\.shape = \[3, 3\]"),
        ({"cos": torch.zeros(40, 64)}, r"sin = None"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    q, k, v = CASES[0].tensors(torch.float32)
    monkeypatch.setattr(_launch.Launch, "run", lambda self, device: pytest.fail("a kernel was launched"))
    arguments = {"q": q, "k": k, "v": v, "keep": 40, "rows": 16, **CASES[0].logits} | changes
    with pytest.raises(ValueError, match=message):
        compress_step(**arguments)
