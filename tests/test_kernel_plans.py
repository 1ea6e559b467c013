"""`kernels/_plans.py`: checking and planning once per layout, and launches that take other tensors of one layout."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, Case, inside_workspace, unaligned
from torch import Tensor

pytest.importorskip("triton")

from imdc.kernels._launch import Launch, aligned
from imdc.kernels._plans import Layout, Planner
from imdc.kernels.chunk_attention import chunk_attention
from imdc.kernels.compact import compact
from imdc.kernels.compress_step import compress_step, plan_step
from imdc.kernels.key_mass import key_mass
from imdc.kernels.rotate import rotate
from imdc.kernels.select import select

CASE = Case(1, 1, 2, 12, 50, 16)
X = torch.zeros(2, 3, 40, 16, dtype=torch.float16, device=DEVICE)
VIEWS = {
    "whole": X,
    "slice": X[:, :, 5:20],
    "transposed": X.transpose(1, 2),
    "late": X[..., 3:],
    "repeated": X[:, :1].expand(2, 3, 40, 16),
    "empty": X[:, :, :0],
    "one number": X[0, 0, 0, 1],
    "float32": X.float(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_ghost_has_the_layout_of_its_tensor(view: Tensor) -> None:
    ghost = Layout.of(view).ghost()
    assert ghost.is_meta and Layout.of(ghost) == Layout.of(view)
    assert view.dim() < 2 or aligned(ghost) == aligned(view)


def test_a_plan_is_made_once_per_layout_and_options() -> None:
    seen: list[tuple[Any, ...]] = []

    @Planner
    def plan(x: Tensor, *, factor: float) -> int:
        assert x.is_meta
        seen.append((tuple(x.shape), factor))
        if factor < 0:
            raise ValueError("factor")
        return len(seen)

    assert [plan(torch.zeros(3, 4), factor=1.0) for _ in range(3)] == [1, 1, 1]
    others = (torch.zeros(4, 3), torch.zeros(4, 3).T, torch.zeros(3, 4).double(), torch.zeros(13)[1:].view(3, 4))
    assert [plan(x, factor=1.0) for x in others] == [2, 3, 4, 5]
    assert plan(torch.zeros(3, 4), factor=2.0) == 6 and plan.made == 6
    for _ in range(2):
        with pytest.raises(ValueError, match="factor"):
            plan(torch.zeros(3, 4), factor=-1.0)
    assert len(seen) == 8
    plan.forget()
    assert plan(torch.zeros(3, 4), factor=1.0) == 9


def results(seed: int) -> list[Tensor]:
    """What every public kernel makes of tensors of one layout."""
    q, k, v = CASE.tensors(torch.float32, seed)
    logits: dict[str, Any] = {"scale": CASE.logits["scale"]}
    out, lse = chunk_attention(q, k, v, window=20, **logits)
    step = compress_step(q, k, v, keep=18, rows=4, pool_kernel=3, **logits)
    every = compress_step(q, k, v, keep=18, rows=12, pool_kernel=3, **logits)
    mass = key_mass(q, k, lse, rows=9, **logits)
    chosen = select(mass, 11, sink_tokens=2)
    cos, sin = (x[0, 0, :, :8].contiguous() for x in (k.cos(), k.sin()))
    return [out, lse, *step, *every, mass, chosen, *compact(k, v, chosen), rotate(k, cos, sin)]


def test_a_kept_plan_serves_other_tensors_of_its_layout() -> None:
    plan_step.forget()
    first = results(0)
    assert plan_step.made == 2
    second, made = results(1), plan_step.made
    plan_step.forget()
    again = results(1)
    assert made == plan_step.made == 2
    for one, other, fresh in zip(first, second, again, strict=True):
        assert torch.equal(other, fresh) and not torch.equal(one, other)


@pytest.mark.parametrize("layout", [lambda x: inside_workspace(x, 100), unaligned], ids=["workspace", "unaligned"])
def test_another_layout_of_the_same_sizes_has_a_plan_of_its_own(layout: Any) -> None:
    plan_step.forget()
    q, k, v = CASE.tensors(torch.float32)
    options: dict[str, Any] = {"scale": 0.25, "keep": 18, "rows": 4}
    for _ in range(2):
        plain, other = compress_step(q, k, v, **options), compress_step(q, layout(k), layout(v), **options)
        assert all(torch.equal(x, y) for x, y in zip(plain, other, strict=True))
    assert plan_step.made == 2


def test_a_kept_plan_holds_no_tensor_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter holds on to what it was last run with.
    monkeypatch.setattr(Launch, "run", lambda *_: None)
    q, k, v = CASE.tensors(torch.float32)
    made = compress_step(q, k, v, scale=0.25, keep=18, rows=4)
    held = [weakref.ref(x.untyped_storage()) for x in (q, k, v, *made)]
    del q, k, v, made
    assert [reference() for reference in held] == [None] * 7


def test_tensors_on_several_devices_are_refused() -> None:
    q, k, v = CASE.tensors(torch.float32)
    with pytest.raises(ValueError, match=r"v\.device = meta: must be the device of q, "):
        chunk_attention(q, k, v.to("meta"), scale=1.0)
    with pytest.raises(ValueError, match=r"kept_k\.device = meta: must be the device of q, "):
        compress_step(q, k, v, scale=1.0, keep=3, rows=1, kept_k=k.to("meta"))
