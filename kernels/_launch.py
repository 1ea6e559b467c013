"""What every Triton launcher shares: argument checks, the target's limits, configurations, and the launch itself.

Nothing here asks Triton for its active driver, so importing needs no GPU, and the ahead-of-time compiler of
`bench/kernel_resources.py` can plan the very launches that production makes.

Configurations are a fixed table, not an autotuner: the first of a kernel's candidates that fits the target's shared
memory is used. A prefill then never pauses to time variants, two runs launch the same code, and the spill test can
compile everything that is ever launched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .limits import COPYING_MAJORS, MAX_HEAD_SIZE, power_of_two

# Triton's own device functions are compiled or interpreted for good when Triton is first imported.
INTERPRETED: bool = not isinstance(tl.sum, JITFunction)
if not INTERPRETED and os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}:
    raise ImportError(
        "TRITON_INTERPRET was set after triton had been imported; set it before the first import of triton"
    )

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Target:
    """The chip a launch is planned for: compute capability, shared memory per program in bytes, multiprocessors."""

    major: int
    minor: int
    shared_bytes: int
    multiprocessors: int

    @property
    def copies_tensors(self) -> bool:
        """Whether the chip has both the bulk tensor copy engine and shared memory enough to feed it."""
        return self.major in COPYING_MAJORS


@dataclass(frozen=True, slots=True)
class Config:
    """Block sizes and resources of one kernel: `rows` x `columns` is the block one step of a program works on.

    `descriptors` loads keys and values by the bulk tensor copy engine instead of one address per element.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


@dataclass(frozen=True)
class Launch:
    """One kernel launch, planned but not made: `arguments` is in the order of the kernel's signature.

    Without `fused` no product and sum are computed as one, which would leave out the rounding between them.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int
    fused: bool = True

    @cached_property
    def options(self) -> dict[str, Any]:
        """Compile options; fused multiply-add is named because Triton's default for it changes with versions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fused}

    @cached_property
    def tensors(self) -> Mapping[str, Tensor | TensorDescriptor]:
        """Those of the arguments that are tensors or descriptors of tensors."""
        return {name: x for name, x in self.arguments.items() if isinstance(x, Tensor | TensorDescriptor)}

    def run(self, device: torch.device, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Launch without waiting.

        Args:
            device: where, on its current stream.
            tensors: by argument, what takes the place of every tensor it was planned with, and has its layout.
        """
        arguments = self.arguments
        if tensors is not None:
            arguments = {**arguments, **{name: _in_place_of(x, tensors[name]) for name, x in self.tensors.items()}}
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.kernel[self.grid](**arguments, **self.options)
        else:
            self.kernel[self.grid](**arguments, **self.options)


def _in_place_of(planned: Tensor | TensorDescriptor, x: Tensor) -> Tensor | TensorDescriptor:
    """What is passed for `x` where `planned` was for a tensor of its layout."""
    if isinstance(planned, Tensor):
        return x
    # Copied, because a new descriptor would check once more what it says of the layout.
    descriptor = copy(planned)
    descriptor.base = x
    return descriptor


INTERPRETER = Target(major=0, minor=0, shared_bytes=2**30, multiprocessors=1)

# KiB of shared memory that one program can ask for (CUDA programming guide, table of compute capabilities); PyTorch
# tells it only since 2.7. Chips of these generations that are not named have the least of them.
_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED_KIB = 99


# Multiprocessors of the largest card of a generation (A100, H100 SXM, B200), for plans without a device.
_MULTIPROCESSORS = {8: 108, 9: 132, 10: 148}
_LEAST_MULTIPROCESSORS = 58  # L4


def target(major: int, minor: int, multiprocessors: int | None = None) -> Target:
    """The target of a CUDA compute capability, with the multiprocessors of the device or of the generation's best card.

    Raises:
        ValueError: the chip is older than 8.0, which is the first with bfloat16 and asynchronous copies.
    """
    least = "must be at least 8.0; use the sdpa or reference backend"
    require(major >= 8, "device.compute_capability", f"{major}.{minor}", least)
    if multiprocessors is None:
        multiprocessors = _MULTIPROCESSORS.get(major, _LEAST_MULTIPROCESSORS)
    return Target(major, minor, 1024 * _SHARED_KIB.get((major, minor), _LEAST_SHARED_KIB), multiprocessors)


@cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return target(properties.major, properties.minor, properties.multi_processor_count)


def target_of(device: torch.device) -> Target:
    """The target behind `device`: a CUDA device, or the interpreter where Triton runs on it."""
    if INTERPRETED:
        return INTERPRETER
    return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)


def common_target(**tensors: Tensor) -> Target:
    """The target of the device that all of these tensors are on.

    Raises:
        ValueError: they are on several devices, or on one that Triton does not run on; the message names one of them.
    """
    (first, x), *others = tensors.items()
    device = x.device
    for name, other in others:
        if other.device != device:
            raise ValueError(f"{name}.device = {other.device}: must be the device of {first}, {device}")
    if not INTERPRETED and device.type != "cuda":
        raise ValueError(
            f"{first}.device = {device}: Triton kernels need a CUDA device (or TRITON_INTERPRET=1 set before triton is "
            "imported); on others use the sdpa or reference backend"
        )
    return target_of(device)


def first_that_fits(candidates: Sequence[tuple[Config, int]], target: Target) -> Config:
    """The first candidate whose shared memory, given in bytes beside it, fits the target.

    Raises:
        ValueError: not one of them fits.
    """
    for config, shared_bytes in candidates:
        if shared_bytes <= target.shared_bytes:
            return config
    least = min(shared_bytes for _, shared_bytes in candidates)
    raise ValueError(
        f"device: compute capability {target.major}.{target.minor} offers {target.shared_bytes} bytes of shared "
        f"memory and the smallest configuration takes {least}; use another backend on it"
    )


def aligned(x: Tensor) -> bool:
    """Whether `x` loads in whole vectors, or through a descriptor: it starts at 16 bytes, its strides are sixteens.

    Triton knows of a stride only whether 16 divides it; otherwise it loads element by element.
    """
    strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    sixteens = all(stride % 16 == 0 and stride > 0 for size, stride in strides if size > 1)
    return sixteens and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of the aligned tensor x [B, H, T, D] that loads blocks [1, 1, rows, columns].

    What a block has beyond T or D reads as zero.
    """
    batch, heads, keys, dim = x.shape
    # Dimensions of size one are never stepped over, and may carry any stride.
    stride_t = x.stride(2) if keys > 1 else power_of_two(dim, least=16)
    stride_h = x.stride(1) if heads > 1 else stride_t * keys
    stride_b = x.stride(0) if batch > 1 else stride_h * heads
    return TensorDescriptor(x, list(x.shape), [stride_b, stride_h, stride_t, 1], [1, 1, rows, columns])


def strided(name: str, x: Tensor, strides: Sequence[str], passed: Any = None) -> dict[str, Any]:
    """Kernel arguments of a tensor, in order: itself, or what is `passed` for it, and the strides so named."""
    return {name: x if passed is None else passed, **dict(zip(strides, x.stride(), strict=False))}


def logit_arguments(q: Tensor, k: Tensor, config: Config, *, scale: float, softcap: float | None) -> dict[str, Any]:
    """Kernel arguments, in order, of what turns queries and keys into logits and of the blocks they come in.

    Raises:
        ValueError: the query heads of a KV head do not fit a block of rows.
    """
    group, dim = q.shape[1] // k.shape[1], q.shape[3]
    rule = f"at most {config.rows} query heads per KV head fit this dtype and device; use the sdpa or reference backend"
    require(group <= config.rows, "q.shape[1]", q.shape[1], rule)
    return {
        "scale": float(scale),
        "softcap": float(softcap or 0.0),
        "GROUP": group,
        "D": dim,
        "BLOCK_D": power_of_two(dim, least=16),
        "BLOCK_M": config.rows,
        "BLOCK_N": config.columns,
        "HAS_SOFTCAP": softcap is not None,
        "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
    }


def require(holds: bool, argument: str, value: object, rule: str) -> None:
    """Raise a `ValueError` naming the argument, its value and the rule it breaks, unless the rule holds.

    Raises:
        ValueError: `holds` is false.
    """
    if not holds:
        raise ValueError(f"{argument} = {value}: {rule}")


def require_tensor(argument: str, x: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> None:
    """Check rank, sizes (None matches any), dtype, and that the last dimension is dense.

    Raises:
        ValueError: naming the argument, what it is and what it must be.
    """
    sizes = tuple(x.shape)
    wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
    fits = len(sizes) == len(shape) and all(b in (None, a) for a, b in zip(sizes, shape, strict=True))
    require(fits, f"{argument}.shape", list(sizes), f"must be {wanted}")
    require(x.dtype in dtypes, f"{argument}.dtype", x.dtype, f"must be one of {', '.join(map(str, dtypes))}")
    dense = x.stride(-1) == 1 or x.shape[-1] <= 1
    require(dense, f"{argument}.stride()", x.stride(), "the last dimension must have stride 1; call .contiguous()")


def require_queries_and_keys(q: Tensor, k: Tensor) -> None:
    """Check queries [B, Hq, Q, D] against keys [B, Hkv, T, D]: dtypes, head counts, Q <= T, the head size.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    require_tensor("q", q, (None, None, None, None), FLOATS)
    batch, q_heads, queries, dim = q.shape
    require_tensor("k", k, (batch, None, None, dim), (q.dtype,))
    kv_heads, keys = k.shape[1], k.shape[2]
    require(1 <= dim <= MAX_HEAD_SIZE, "q.shape[3]", dim, f"head sizes of 1..{MAX_HEAD_SIZE} are supported")
    require(batch >= 1, "q.shape[0]", batch, "must be at least 1")
    whole = kv_heads >= 1 and q_heads >= 1 and q_heads % kv_heads == 0
    require(whole, "q.shape[1]", q_heads, f"must be a positive multiple of the {kv_heads} KV heads")
    require(1 <= queries <= keys, "q.shape[2]", queries, f"must be 1..{keys}, the number of keys")


def require_logits(scale: float, softcap: float | None) -> None:
    """Check what turns products of queries and keys into logits.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    require(0.0 < scale < float("inf"), "scale", scale, "must be positive and finite")
    capped = softcap is None or 0.0 < softcap < float("inf")
    require(capped, "softcap", softcap, "must be positive and finite, or None for no cap")
