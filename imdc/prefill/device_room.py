"""Chunks by what the device has room for: before a prefill whose chunks are "auto", and after one that ran out."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import torch

from imdc.config import PrefillConfig
from imdc.model.parts import Parts
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch
from imdc.planner.fit import fit_chunk, limit_bytes, smaller_chunk


def fitting_chunk(
    parts: Parts, config: PrefillConfig, batch: Batch, backend: str, *, asked: bool = False, ahead: bool = False
) -> int:
    """The largest mean chunk whose peak stays within `memory_limit`.

    Args:
        parts: the model.
        config: options with chunk_tokens="auto".
        batch: what is read, and what is there already.
        backend: who computes attention.
        asked: whether a document's cache is asked, see `imdc.planner.fit.fit_chunk`.
        ahead: whether what `batch` says is stored is not there yet.

    Raises:
        ConfigError: nothing fits, or what the limit is a share of is not known.
    """
    shape, device = ModelShape.from_model(parts.model), parts.device()
    there = 0 if ahead else batch.stored_bytes
    known = _device_bytes(shape, device, there) if isinstance(config.memory_limit, float) else None
    limit = limit_bytes(config, known)
    return fit_chunk(shape, batch, replace(config, backend=backend), limit, device=device.type, asked=asked)


def chunk_after_shortage(parts: Parts, config: PrefillConfig, batch: Batch, backend: str, chunk: int) -> int:
    """The mean chunk to begin again with after one of `chunk` tokens ran out of memory, which a warning says."""
    shape, device = ModelShape.from_model(parts.model), parts.device()
    limit = _device_bytes(shape, device, batch.stored_bytes)
    smaller = smaller_chunk(shape, batch, replace(config, backend=backend), chunk, limit, device=device.type)
    warnings.warn(
        f"imdc: out of memory with chunks of {chunk} tokens; the prefill starts again with {smaller}",
        RuntimeWarning,
        stacklevel=2,
    )
    return smaller


def _device_bytes(shape: ModelShape, device: torch.device, stored: int) -> int | None:
    """What the device has for weights, `stored` bytes of caches and what comes on top; None where it does not tell."""
    free = free_bytes(device)
    return None if free is None else free + shape.weights + stored


def free_bytes(device: torch.device) -> int | None:
    """What the device has free for a prefill; None where the system does not tell."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if not hasattr(module, "mem_get_info"):
            return None
        # The caching allocator holds blocks that it would use again.
        unused = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0] + unused)
    try:
        # Linux counts what it can reclaim, such as cached files, as available.
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
