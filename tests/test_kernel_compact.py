"""`kernels/compact.py` and `kernels/rotate.py` against the reference, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, inside_workspace, poisoned_memory, unaligned
from torch import Tensor

pytest.importorskip("triton")

from imdc.kernels import reference
from imdc.kernels.compact import compact, plan_compact
from imdc.kernels.rotate import plan_rotate, rotate

# Head size, and how many of its dimensions turn: all, an odd multiple of a power of two, partial rotary.
SIZES = [(64, 64), (96, 96), (128, 128), (80, 32), (128, 64), (16, 16), (20, 6), (256, 256)]


def tensors(dim: int, dtype: torch.dtype, keys: int = 77, keep: int = 41) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    k, v = (torch.randn(2, 3, keys, dim, generator=generator).to(DEVICE, dtype) for _ in range(2))
    order = torch.rand(2, 3, keys, generator=generator).argsort(dim=-1)[..., :keep]
    return k, v, order.sort(dim=-1).values.to(DEVICE)


def angles(rows: int, turned: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0..rows-1; the two halves differ, which Llama's do not, to tell them apart."""
    frequencies = 10000.0 ** -torch.linspace(0.0, 0.9, turned)
    angle = torch.arange(rows)[:, None] * frequencies
    return angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)


def assert_rotated(result: Tensor, expected: Tensor) -> None:
    if result.dtype == torch.float32:
        # A fused multiply-add on the device rounds once where PyTorch rounds twice.
        torch.testing.assert_close(result, expected, rtol=0.0, atol=4 * torch.finfo(torch.float32).eps * 4)
    else:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 20, 64, 80, 96, 256])
def test_compact_agrees_with_the_reference(dim: int, dtype: torch.dtype) -> None:
    k, v, indices = tensors(dim, dtype)
    with poisoned_memory():
        kept_k, kept_v = compact(k, v, indices)
    expected_k, expected_v = reference.compact(k, v, indices)
    assert torch.equal(kept_k, expected_k) and torch.equal(kept_v, expected_v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("dim", "turned"), SIZES)
def test_rotate_agrees_with_the_reference(dim: int, turned: int, interleaved: bool, dtype: torch.dtype) -> None:
    x, _, _ = tensors(dim, dtype)
    for kind in {dtype, torch.float32}:
        cos, sin = angles(x.shape[2], turned, kind)
        with poisoned_memory():
            assert_rotated(rotate(x, cos, sin, interleaved), reference.rotate(x, cos, sin, interleaved))


@pytest.mark.parametrize("layout", [lambda x: inside_workspace(x, 100), unaligned], ids=["workspace", "unaligned"])
def test_moves_between_slices(layout: Any) -> None:
    k, v, indices = tensors(64, torch.bfloat16)
    cos, sin = angles(41, 64, torch.bfloat16)
    stores = [torch.full((2, 3, 60, 64), float("nan"), dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    new_k, new_v = (store[:, :, 7 : 7 + 41] for store in stores)
    plan_compact(layout(k), layout(v), indices, new_k, new_v).run(k.device)
    expected_k, expected_v = reference.compact(k, v, indices)
    assert torch.equal(new_k, expected_k) and torch.equal(new_v, expected_v)
    plan_rotate(layout(expected_k), cos, sin, new_k).run(k.device)
    assert torch.equal(new_k, reference.rotate(expected_k, cos, sin))
    for store in stores:
        assert store[:, :, :7].isnan().all() and store[:, :, 48:].isnan().all()


def test_every_row_has_its_own_indices() -> None:
    k, v, _ = tensors(16, torch.float32)
    indices = torch.arange(6, device=DEVICE).view(2, 3, 1) * 10
    kept_k, kept_v = compact(k, v, indices)
    for row in range(2):
        for head in range(3):
            assert torch.equal(kept_k[row, head, 0], k[row, head, (row * 3 + head) * 10])
            assert torch.equal(kept_v[row, head, 0], v[row, head, (row * 3 + head) * 10])


def test_nothing_kept_is_an_empty_memory() -> None:
    k, v, indices = tensors(16, torch.float32)
    kept_k, kept_v = compact(k, v, indices[..., :0])
    assert kept_k.shape == kept_v.shape == (2, 3, 0, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": torch.zeros(2, 3, 4, dtype=torch.int32)}, r"indices\.dtype = torch\.int32"),
        ({"indices": torch.zeros(2, 2, 4, dtype=torch.int64)}, r"indices\.shape = \[2, 2, 4\]: must be \[2, 3, \*\]"),
        ({"v": torch.zeros(2, 3, 9, 32)}, r"v\.shape"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_of_compact_are_named(changes: dict[str, Any], message: str) -> None:
    shape = (2, 3, 9, 16)
    given = {"k": torch.zeros(shape), "v": torch.zeros(shape), "indices": torch.zeros(2, 3, 4, dtype=torch.int64)}
    arguments = {name: x.to(DEVICE) for name, x in (given | changes).items()}
    with pytest.raises(ValueError, match=message):
        compact(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cos": torch.zeros(3, 16)}, r"cos\.shape = \[3, 16\]: must be \[9, \*\]"),
        ({"sin": torch.zeros(9, 8)}, r"sin\.shape = \[9, 8\]: must be \[9, 16\]"),
        ({"cos": torch.zeros(9, 7), "sin": torch.zeros(9, 7)}, r"cos\.shape\[1\] = 7: must be even and 2\.\.16"),
        ({"cos": torch.zeros(9, 18), "sin": torch.zeros(9, 18)}, r"cos\.shape\[1\] = 18"),
        ({"cos": torch.zeros(9, 16).half()}, r"cos\.dtype = torch\.float16"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_of_rotate_are_named(changes: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(2, 3, 9, 16), "cos": torch.zeros(9, 16), "sin": torch.zeros(9, 16)}
    with pytest.raises(ValueError, match=message):
        rotate(**{name: x.to(DEVICE) for name, x in (given | changes).items()})
