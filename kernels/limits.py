"""What the Triton kernels take, without importing torch or Triton: the planner and the engine ask the same function."""

from __future__ import annotations

MAX_HEAD_SIZE = 256
# Ways to pool scores over neighbouring keys, by the names of SnapKV's code.
POOLINGS = ("max", "avg")


def head_size_supported(head_dim: int) -> bool:
    """Whether the Triton kernels take heads of `head_dim` dimensions: every size up to 256."""
    return 1 <= head_dim <= MAX_HEAD_SIZE
