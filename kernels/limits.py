"""What the kernels take, without importing torch or Triton: the planner and the kernels ask the same functions."""

from __future__ import annotations

MAX_HEAD_SIZE = 256
# Float32 elements of one score block of the reference kernels: 16 MiB. Its exponentials and its mask are temporaries of
# that size too.
_BLOCK_ELEMENTS = 4 * 2**20
# Ways to pool scores over neighbouring keys, by the names of SnapKV's code.
POOLINGS = ("max", "avg")


def head_size_supported(head_dim: int) -> bool:
    """Whether the Triton kernels take heads of `head_dim` dimensions: every size up to 256."""
    return 1 <= head_dim <= MAX_HEAD_SIZE


def rows_per_block(rows: int, elements_per_row: int) -> int:
    """How many of `rows` query rows, with so many scores each, the reference kernels take at once."""
    return min(rows, max(1, _BLOCK_ELEMENTS // max(1, elements_per_row)))
