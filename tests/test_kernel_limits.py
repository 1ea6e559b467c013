"""`kernels/limits.py`: in how many launches a step is made, on which chips."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from imdc.kernels import compress
from imdc.kernels._launch import target
from imdc.kernels.chunk_attention import attention_config
from imdc.kernels.compress_step import one_launch_pays
from imdc.kernels.limits import OUTPUT_CHANGE, StepSizes, attention_rows, compression_in_one_launch


# Llama-3.1-8B on an H100: a chunk of one wave of programs would wait for the owners, one of eight waves hides them.
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "rows", "pays"),
    [
        ((32, 8), 4096, 8192, 16, True),
        ((32, 8), 4096, 4096, 32, True),
        ((32, 8), 4096, 8192, 33, False),
        ((32, 8), 4096, 8192, 4096, False),
        ((32, 8), 512, 4608, 16, False),
        ((4, 1), 4096, 8192, 16, False),
        ((64, 8), 8192, 12288, 16, True),
        ((64, 8), 8192, 12288, 17, False),
    ],
)
def test_one_launch_is_taken_where_the_owners_are_done_first(
    heads: tuple[int, int], queries: int, keys: int, rows: int, pays: bool
) -> None:
    q = torch.empty(1, heads[0], queries, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, heads[1], keys, 128, dtype=torch.bfloat16, device="meta")
    chip = target(9, 0)
    config = attention_config(q, k, k, chip)
    sizes = StepSizes(1, *heads, queries, keys, 128, 2, observers=rows, keep=4096, pool_kernel=15)
    assert one_launch_pays(q, k, sizes, config, chip) == pays


@pytest.mark.parametrize(
    ("dtype", "padding", "dim", "major", "scoring"),
    [
        (torch.float32, 0, 128, 9, "attention"),
        (torch.bfloat16, 4, 128, 9, "attention"),
        (torch.bfloat16, 0, 96, 8, "attention"),
        (torch.bfloat16, 0, 128, 10, OUTPUT_CHANGE),
    ],
    ids=["float32", "unaligned", "masked addresses", "two products"],
)
def test_one_launch_is_not_taken_where_its_code_would_spill(
    dtype: torch.dtype, padding: int, dim: int, major: int, scoring: str
) -> None:
    q = torch.empty(1, 32, 4096, dim, dtype=dtype, device="meta")
    k = torch.empty(1, 8, 8192, dim + padding, dtype=dtype, device="meta")[..., :dim]
    chip = target(major, 0)
    sizes = StepSizes(1, 32, 8, 4096, 8192, dim, dtype.itemsize, 1, keep=4096, pool_kernel=15, scoring=scoring)
    assert not one_launch_pays(q, k, sizes, attention_config(q, k, k, chip), chip)
    small = replace(sizes, keys=512, keep=256)
    # The launch that only compresses has no such limits but 16 bits and whole vectors.
    assert compress.one_launch_pays(q, k, small, chip) == (dtype.itemsize == 2 and padding == 0)


# Of Qwen2.5-0.5B's heads and Llama-3.1-8B's on an H100: the gaps between launches outweigh a short chain only.
@pytest.mark.parametrize(
    ("heads", "dim", "keys", "keep", "rows", "pays"),
    [
        ((14, 2), 64, 1024, 512, 16, True),
        ((32, 8), 128, 1024, 256, 16, True),
        ((32, 8), 128, 8192, 4096, 16, False),
        ((14, 2), 64, 1024, 512, 19, False),
        ((14, 2), 64, 1024, 0, 16, False),
    ],
)
def test_compression_takes_one_launch_where_steps_are_small(
    heads: tuple[int, int], dim: int, keys: int, keep: int, rows: int, pays: bool
) -> None:
    sizes = StepSizes(1, *heads, 512, keys, dim, 2, observers=rows, keep=keep, pool_kernel=15)
    assert compression_in_one_launch(sizes, 9, 132) == pays


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("chip", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_plans_know_the_rows_of_the_attention_s_blocks(chip: tuple[int, int], dim: int) -> None:
    q, k = (torch.empty(1, heads, 512, dim, dtype=torch.bfloat16, device="meta") for heads in (16, 4))
    assert attention_config(q, k, k, target(*chip)).rows == attention_rows(dim, chip[0])
