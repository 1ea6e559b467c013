"""Who computes attention, scores, selection and compaction: one small record of functions per backend.

`reference` is plain PyTorch in float32. `sdpa` takes PyTorch's fused attention operators that return the
log-sum-exp, and the reference for the rest. `triton` takes this project's kernels. `flash` takes flash-attn and
`varlen` PyTorch's `varlen_attn` for the forward pass, and Triton for the rest. All have the signatures of
`imdc.kernels.reference`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import imdc.kernels.reference as reference
from imdc.config import BACKENDS
from imdc.errors import ConfigError
from imdc.kernels.limits import MAX_HEAD_SIZE, head_size_supported
from imdc.prefill.flash import find_flash, flash_attention
from imdc.prefill.rank import ranking
from imdc.prefill.sdpa import sdpa_attention
from imdc.prefill.varlen import find_varlen, varlen_attention

# Backends whose forward pass is a library's.
LIBRARIES = ("flash", "varlen")
# The first Triton with tensor descriptors made on the host, which the kernels are launched with.
LEAST_TRITON = (3, 4)
# The first chips with bfloat16 and asynchronous copies.
LEAST_CAPABILITY = (8, 0)
TORCH = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
LEAST_CUDNN_TORCH = (2, 15)
# Largest distance of a library's result from the reference's on random inputs: a few units of bfloat16 at 1.
LIBRARY_ERROR = 0.05


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels of a step, with the signatures of `imdc.kernels.reference`.

    `compress_step` is the first four in one call, for observers that score by attention mass, where a backend has it.
    """

    name: str
    chunk_attention: Callable[..., tuple[Tensor, Tensor]]
    key_mass: Callable[..., Tensor]
    select: Callable[..., Tensor]
    compact: Callable[..., tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    compress_step: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class AttentionTraits:
    """What a backend must be able to do for a model, and on what.

    Attributes:
        device_type: "cuda" (also what ROCm calls itself), "cpu", "mps", "xpu".
        dtype: of the model.
        head_dim: head size.
        softcap: some layers cap their logits.
        capability: compute capability of a CUDA device; None where it is not known.
        device_name: its name.
        rocm: this PyTorch is built for AMD's devices.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    softcap: bool
    capability: tuple[int, int] | None = None
    device_name: str | None = None
    rocm: bool = False


REFERENCE = Backend(
    "reference",
    reference.chunk_attention,
    reference.key_mass,
    reference.select,
    reference.compact,
    reference.rotate,
)


SDPA = replace(REFERENCE, name="sdpa", chunk_attention=sdpa_attention)


def _triton() -> Backend:
    from imdc.kernels.chunk_attention import chunk_attention
    from imdc.kernels.compact import compact
    from imdc.kernels.compress_step import compress_step
    from imdc.kernels.key_mass import key_mass
    from imdc.kernels.rotate import rotate
    from imdc.kernels.select import select

    return Backend("triton", chunk_attention, key_mass, select, compact, rotate, compress_step)


def _library(name: str, traits: AttentionTraits) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward pass of the libraries behind "flash" and "varlen"."""
    if name == "varlen":
        return varlen_attention()
    found = find_flash(traits.capability)
    assert found is not None, "_unmet() comes first"
    return flash_attention(found[0])


@cache
def _disagreement(name: str, traits: AttentionTraits) -> str | None:
    """What a library's forward pass does otherwise than the reference on small problems here, None if nothing.

    A log-sum-exp in another order of dimensions would quietly make the scoring choose other keys. With as many queries
    as heads its shape cannot tell; the numbers do.
    """
    try:
        forward = _library(name, traits)
        for queries in (4, 40):
            generator = torch.Generator().manual_seed(queries)
            shapes = ((1, 4, queries), (1, 2, 70), (1, 2, 70))
            drawn = (torch.randn(*shape, traits.head_dim, generator=generator) for shape in shapes)
            q, k, v = (x.to(traits.device_type, traits.dtype) for x in drawn)
            options = {"scale": traits.head_dim**-0.5, "softcap": 20.0 if traits.softcap else None}
            results = zip(forward(q, k, v, **options), reference.chunk_attention(q, k, v, **options), strict=True)
            for what, (found, wanted) in zip(("output", "log-sum-exp"), results, strict=True):
                if found.shape != wanted.shape or (found.float() - wanted.float()).abs().max() > LIBRARY_ERROR:
                    return f"its {what} is not the reference's here"
    except (RuntimeError, TypeError, ValueError, NotImplementedError, ImportError) as error:
        return f"it does not run here: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _triton_version() -> str | None:
    """The version of the package that brings `triton`, None if it has a name that is not known."""
    for package in ("triton", "pytorch-triton", "triton-windows"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def _unmet(name: str, traits: AttentionTraits) -> str | None:
    """Why a backend cannot serve a model, or None if it can."""
    if name == "reference":
        return None
    if name == "sdpa":
        return "it cannot cap logits (softcap)" if traits.softcap else None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    version = _triton_version()
    if version is not None and tuple(map(int, re.findall(r"\d+", version)[:2])) < LEAST_TRITON:
        return f"triton {version} is too old for its kernels (pip install 'triton>={'.'.join(map(str, LEAST_TRITON))}')"
    # TRITON_INTERPRET=1 runs the kernels on the CPU: slow, for tests.
    if traits.device_type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"its kernels need a CUDA device, the model is on {traits.device_type}"
    if traits.rocm:
        return "its kernels are NVIDIA's, this PyTorch is built for ROCm"
    if traits.capability is not None and traits.capability < LEAST_CAPABILITY:
        return "its kernels need compute capability 8.0 or newer, the device has {}.{}".format(*traits.capability)
    if not head_size_supported(traits.head_dim):
        return f"head size {traits.head_dim} is beyond {MAX_HEAD_SIZE}, the largest that its kernels take"
    return _unmet_by_library(name, traits) if name in LIBRARIES else None


def _unmet_by_library(name: str, traits: AttentionTraits) -> str | None:
    if name == "flash" and find_flash(traits.capability) is None:
        chip = "" if traits.capability is None else " for this device"
        return f"no flash-attn{chip} imports (pip install --pre flash-attn-4, or flash-attn)"
    if name == "varlen":
        if traits.softcap:
            return "it cannot cap logits (softcap)"
        missing = find_varlen()
        if missing is not None:
            return missing
    if traits.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, the model is {traits.dtype}"
    return _disagreement(name, traits)


def _make(name: str, traits: AttentionTraits) -> Backend:
    if name in LIBRARIES:
        return replace(_triton(), name=name, chunk_attention=_library(name, traits), compress_step=None)
    return _triton() if name == "triton" else {"sdpa": SDPA, "reference": REFERENCE}[name]


def choose(name: str, traits: AttentionTraits) -> tuple[Backend, str]:
    """The backend for a model, and a sentence that says why.

    Raises:
        ConfigError: the named backend cannot serve this model here; the message says why and what can.
    """
    if name != "auto":
        reason = _unmet(name, traits)
        if reason is not None:
            usable = [other for other in BACKENDS if other != "auto" and _unmet(other, traits) is None]
            raise ConfigError(f"backend={name!r} cannot be used: {reason}; use backend='auto' or one of {usable}")
        return _make(name, traits), f"{name}: asked for"
    order: tuple[str, ...] = ("sdpa", "reference")
    source = f"first choice on {traits.device_type}"
    if traits.device_type == "cuda":
        flash = find_flash(traits.capability)
        order, source = ranking(traits.device_name, traits.capability, traits.head_dim, flash and flash[1])
        # Before 2.15 it is FlashAttention 2, which no figure speaks for.
        if "varlen" in order and TORCH < LEAST_CUDNN_TORCH:
            order = tuple(one for one in order if one != "varlen")
    passed: list[str] = []
    for candidate in order:
        reason = _unmet(candidate, traits)
        if reason is None:
            if candidate == order[0] or candidate not in ("sdpa", "reference"):
                passed.append(source)
            return _make(candidate, traits), f"{candidate}: {'; '.join(passed)}"
        passed.append(f"not {candidate}: {reason}")
    raise AssertionError("the reference backend serves every model")


def traits_of(device: torch.device, dtype: torch.dtype, config: Any, head_dim: int) -> AttentionTraits:
    """The traits that a transformers config asks of a backend, and those of the device."""
    rocm = torch.version.hip is not None
    nvidia = device.type == "cuda" and not rocm
    return AttentionTraits(
        device_type=device.type,
        dtype=dtype,
        head_dim=head_dim,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        capability=torch.cuda.get_device_capability(device) if nvidia else None,
        device_name=torch.cuda.get_device_name(device) if nvidia else None,
        rocm=rocm,
    )
