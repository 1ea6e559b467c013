"""Plans by layout: what the host works out for one layer of a step serves the others.

The layers of a step hand over tensors of the same sizes, strides and types, and the same options. Whether these are
allowed, in how many launches and which blocks the work is done and what is allocated for it follow from nothing else.
So they are worked out once per layout, on tensors without storage, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

# Plans that each planner keeps: of several steps, with layers that hold memories of different lengths.
KEPT = 256

Plan = TypeVar("Plan")


class Layout(NamedTuple):
    """All of a tensor but its contents, its device and where it lies: of its address the bytes past a sixteenth."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """The layout of `x`."""
        return cls(x.shape, x.stride(), x.dtype, x.data_ptr() % 16)

    def ghost(self) -> Tensor:
        """A tensor of this layout without storage."""
        first = self.offset // self.dtype.itemsize
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        elements = 0 if 0 in self.shape else first + last + 1
        held = torch.empty(elements, dtype=self.dtype, device="meta")
        return held.as_strided(self.shape, self.strides, first if elements else 0)


class Planner(Generic[Plan]):
    """Makes plans by a function of tensors and options, which must not depend on what the tensors contain.

    What the function raises is not kept: arguments that are refused once are refused again.
    """

    def __init__(self, plan: Callable[..., Plan]) -> None:
        """`plan` gets tensors without storage; all options are given by name and can be compared."""

        def plan_layouts(layouts: Iterable[Layout], options: Iterable[tuple[str, Any]]) -> Plan:
            return plan(*(layout.ghost() for layout in layouts), **dict(options))

        self._kept = lru_cache(maxsize=KEPT)(plan_layouts)

    def __call__(self, *tensors: Tensor, **options: Any) -> Plan:
        """The plan for these tensors and options, made now or before."""
        return self._kept(tuple(map(Layout.of, tensors)), tuple(options.items()))

    @property
    def made(self) -> int:
        """How many plans were made since the last `forget`."""
        return self._kept.cache_info().misses

    def forget(self) -> None:
        """Make all plans anew from here on."""
        self._kept.cache_clear()
