"""`kernels/chunk_attention.py` against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import (
    CASES,
    DTYPES,
    Case,
    assert_near,
    attention_oracle,
    eager_attention,
    inside_workspace,
    poisoned_memory,
    unaligned,
)
from torch import Tensor

pytest.importorskip("triton")

from imdc.kernels import reference
from imdc.kernels._launch import Config, aligned, target_of
from imdc.kernels.chunk_attention import chunk_attention, plan_chunk_attention

RAGGED = Case(1, 2, 4, 50, 117, 64)


def check(case: Case, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    truth, truth_lse = attention_oracle(q, k, v, **case.logits)
    eager = eager_attention(q, k, v, **case.logits)
    assert_near(out, truth, eager, factor=2.0, softcap=case.softcap, summands=case.keys)
    assert lse.dtype == torch.float32
    exact = (x.float() for x in (q, k, v))
    rival_lse = reference.chunk_attention(*exact, **case.logits)[1]
    assert_near(lse, truth_lse, rival_lse, factor=4.0, softcap=case.softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case: Case, dtype: torch.dtype) -> None:
    q, k, v = case.tensors(dtype)
    with poisoned_memory():
        out, lse = chunk_attention(q, k, v, **case.logits)
    assert out.dtype == dtype
    check(case, q, k, v, out, lse)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64_where_nothing_is_aligned(case: Case) -> None:
    q, k, v = case.tensors(torch.float32)
    assert not aligned(unaligned(k)) or case.keys == 1
    with poisoned_memory():
        out, lse = chunk_attention(unaligned(q), unaligned(k), unaligned(v), **case.logits)
    check(case, q, k, v, out, lse)


@pytest.mark.parametrize("layout", [inside_workspace, unaligned], ids=["workspace", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_slices_and_nothing_beside_them(layout: Any, dtype: torch.dtype) -> None:
    q, k, v = RAGGED.tensors(dtype)
    k_slice, v_slice = (layout(x, 200) if layout is inside_workspace else layout(x) for x in (k, v))
    q_transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    with poisoned_memory():
        out, lse = chunk_attention(q_transposed, k_slice, v_slice, **RAGGED.logits)
    check(RAGGED, q, k, v, out, lse)


def test_allocates_output_in_projection_order() -> None:
    q, k, v = RAGGED.tensors(torch.float32)
    out, _ = chunk_attention(q, k, v, **RAGGED.logits)
    assert out.transpose(1, 2).is_contiguous()


def test_two_runs_give_the_same_bits() -> None:
    q, k, v = RAGGED.tensors(torch.bfloat16)
    first, second = (chunk_attention(q, k, v, **RAGGED.logits) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def bad(**changes: Any) -> dict[str, Any]:
    q, k, v = Case(1, 2, 2, 5, 9, 16).tensors(torch.float32)
    return {"q": q, "k": k, "v": v, "scale": 0.25} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 5, 16)}, r"q\.shape = \[4, 5, 16\]"),
        ({"q": torch.zeros(1, 3, 5, 16)}, r"q\.shape\[1\] = 3: must be a positive multiple of the 2 KV heads"),
        ({"q": torch.zeros(1, 4, 10, 16)}, r"q\.shape\[2\] = 10: must be 1\.\.9"),
        ({"q": torch.zeros(1, 4, 0, 16)}, r"q\.shape\[2\] = 0"),
        ({"q": torch.zeros(1, 4, 5, 16, dtype=torch.float64)}, r"q\.dtype = torch\.float64"),
        ({"k": torch.zeros(1, 2, 9, 16, dtype=torch.float16)}, r"k\.dtype = torch\.float16"),
        ({"k": torch.zeros(1, 2, 9, 32)}, r"k\.shape = \[1, 2, 9, 32\]"),
        ({"k": torch.zeros(1, 2, 16, 9).transpose(2, 3)}, r"k\.stride\(\) = .*last dimension must have stride 1"),
        ({"v": torch.zeros(1, 2, 8, 16)}, r"v\.shape = \[1, 2, 8, 16\]: must be \[1, 2, 9, 16\]"),
        ({"scale": 0.0}, r"scale = 0\.0: must be positive"),
        ({"scale": float("nan")}, r"scale = nan"),
        ({"softcap": -1.0}, r"softcap = -1\.0"),
        ({"window": 0}, r"window = 0: must be at least 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = bad(**changes)
    device = arguments["k"].device if "k" not in changes else bad()["k"].device
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        chunk_attention(**arguments)


def test_head_size_beyond_the_limit_is_named() -> None:
    q, k, v = Case(1, 1, 1, 2, 2, 264).tensors(torch.float32)
    with pytest.raises(ValueError, match=r"q\.shape\[3\] = 264: head sizes of 1\.\.256"):
        chunk_attention(q, k, v, scale=1.0)


@pytest.mark.parametrize("window", [1, 40, 129, 300])
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (64, 32)], ids=str)
def test_blocks_of_production_agree_with_float64(blocks: tuple[int, int], window: int) -> None:
    case = Case(1, 2, 4, 37, 421, 64, window=window)
    q, k, v = case.tensors(torch.float32)
    for descriptors in (True, False):
        out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], device=q.device)
        config = Config(*blocks, num_warps=8, num_stages=1, descriptors=descriptors)
        plan_chunk_attention(
            *(q, k, v, out, lse), **case.logits, target=target_of(q.device), config=config
        ).run(q.device)  # fmt: skip
        check(case, q, k, v, out, lse)
