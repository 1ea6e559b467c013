"""What PyTorch's caching allocator adds to a prefill on a GPU: blocks larger than what lies in them.

Of a free block it splits off what is not needed, unless that is a mebibyte or less (c10/cuda/CUDACachingAllocator.cpp,
`should_split`); then the whole block counts as allocated. Where the memory keeps its size, step after step the tensors
of a layer find the blocks that fitted before. Where it grows they find others. Measured on an H100 at Llama-3.1-8B's
shape, with memory and chunks of 1,024 tokens: 49.4 MB above the tensors, of at most 67.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from imdc.model.shape import ModelShape
from imdc.units import MIB, format_bytes


def unsplit_bytes(shape: ModelShape, held: Sequence[Sequence[int]]) -> int:
    """Most that blocks may be larger than keys and values of the memory in them; the few others are not counted.

    Args:
        shape: the model.
        held: KV pairs per KV head that every compressed layer holds before the first step and after each.
    """
    token_bytes = shape.kv_heads * shape.head_dim * shape.dtype_bytes
    grown = 0
    for sizes in zip(*held, strict=True):
        # A fixed memory has another size in the steps that fill it. Tensors of a mebibyte or less come from blocks that
        # are always split.
        changes = sum(0 < before != after for before, after in pairwise(sizes))
        grown += 2 * changes > len(sizes) - 1 and max(sizes) * token_bytes > MIB
    return 2 * MIB * grown


def allocator_notes(shape: ModelShape, held: Sequence[Sequence[int]]) -> list[str]:
    """What a plan for a GPU says of it; nothing where it cannot be."""
    most = unsplit_bytes(shape, held)
    if not most:
        return []
    more = f"up to {format_bytes(most)} more"
    return [f"note: {more}, as PyTorch's allocator lends blocks that a growing memory does not fill"]
