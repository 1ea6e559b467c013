"""Bytes of the tensors that are alive, and their peak: CUDA's own count, or a dispatch mode on other devices.

PyTorch keeps no count on the CPU. The dispatch mode sees every operator's results when they come into being and learns
by weak references when their storage is freed. What an operator allocates and frees inside itself (sort buffers,
packed operands of a matrix product) stays unseen; the process's resident memory, recorded beside it, has that too.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(Protocol):
    """Bytes alive above those at the start, and their peak since the last reset."""

    def current(self) -> int:
        """Bytes alive now."""

    def take_peak(self) -> int:
        """The peak since the last call, which starts the next one from what is alive now."""

    def reserved(self) -> int | None:
        """The peak of what the allocator holds, free blocks included; None where there is no such thing."""

    def __enter__(self) -> Allocations:
        """Start to count."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""


class DispatchAllocations(TorchDispatchMode):
    """Counts storages that operators create, on any device, in the thread that enters it."""

    def __init__(self) -> None:
        """Nothing is counted before the mode is entered."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes: dict[int, int] = {}
        self._current = 0
        self._peak = 0
        self._next = 0
        self._known: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and note the storages of its results that no argument brought along."""
        for tensor in _tensors((args, kwargs)):
            self._known.setdefault(_address(tensor), tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = _address(tensor)
        # Tensors on "meta" have sizes and take no memory.
        if tensor.is_meta or storage.nbytes() == 0 or self._known.get(address) is not None:
            return
        self._known[address] = storage
        self._next += 1
        self._bytes[self._next] = storage.nbytes()
        self._current += storage.nbytes()
        self._peak = max(self._peak, self._current)
        weakref.finalize(storage, self._free, self._next).atexit = False

    def _free(self, number: int) -> None:
        self._current -= self._bytes.pop(number)

    def current(self) -> int:
        """Bytes alive now of storages created since the start."""
        return self._current

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self._peak = self._peak, self._current
        return peak

    def reserved(self) -> int | None:
        """Nothing: the CPU has no caching allocator."""
        return None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class CudaAllocations:
    """The caching allocator's own statistics of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """Count on `device`."""
        self.device = device
        self._start = 0

    def __enter__(self) -> CudaAllocations:
        """Remember what is allocated already."""
        # cuBLAS takes its workspace at its first product and keeps it: that belongs to no prefill.
        square = torch.ones(16, 16, dtype=torch.bfloat16, device=self.device)
        torch.mm(square, square)
        del square
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._start = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to undo: the allocator counts anyway."""

    def current(self) -> int:
        """Bytes allocated now above the start."""
        return torch.cuda.memory_allocated(self.device) - self._start

    def take_peak(self) -> int:
        """The allocated peak since the last call, above the start."""
        peak = torch.cuda.max_memory_allocated(self.device) - self._start
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def reserved(self) -> int | None:
        """The reserved peak since the last `take_peak`; all of it, weights included."""
        return torch.cuda.max_memory_reserved(self.device)


def allocations_of(device: torch.device) -> Allocations:
    """The counter for tensors on `device`."""
    return CudaAllocations(device) if device.type == "cuda" else DispatchAllocations()


def resident_bytes() -> int | None:
    """Resident memory of this process, of all its threads and libraries; None where /proc does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def peak_resident_bytes() -> int | None:
    """Highest resident memory of this process since `reset_peak_resident`; None where /proc does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next((line for line in file if line.startswith("VmHWM:")), None)
        return None if line is None else int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None


def reset_peak_resident() -> bool:
    """Let `peak_resident_bytes` start anew, through Linux's /proc/self/clear_refs; False where that is not possible."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        return True
    except OSError:
        return False


def return_free_heap() -> None:
    """Give freed heap pages back to the system, so that a second measurement does not start from the first's peak."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def make_resident(model: nn.Module) -> None:
    """Read one byte of every page of the weights in host memory.

    Loading maps them from their file, and what is first used while a prompt is read would count as its memory.
    """
    page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
    for tensor in (*model.parameters(), *model.buffers()):
        # A weight made of others, such as a quantised one, has no storage of its own.
        if tensor.device.type == "cpu" and type(tensor.data) is Tensor:
            torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())[::page].sum()


class PeakMemory:
    """Peak memory inside the `with` block, above what was in use at its start.

    On CUDA the peak that torch's allocator counts; elsewhere the process's resident memory, as the system counts it.

    Attributes:
        bytes: the peak; None where the system does not tell (no /proc, or its peak cannot be reset).
        kind: "allocated on cuda" or "resident", for a table's heading.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is measured before the block is entered."""
        self.bytes: int | None = None
        self._cuda = CudaAllocations(device) if device.type == "cuda" else None
        self.kind = "resident" if self._cuda is None else "allocated on cuda"
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        """Note what is in use now."""
        if self._cuda is not None:
            self._cuda.__enter__()
            return self
        return_free_heap()
        if reset_peak_resident():
            self._start = resident_bytes()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop measuring and set `bytes`."""
        peak = self._cuda.take_peak() if self._cuda is not None else peak_resident_bytes()
        if self._cuda is not None:
            self.bytes = peak
        elif peak is not None and self._start is not None:
            self.bytes = peak - self._start
