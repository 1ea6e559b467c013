"""Which backend computes a prefill: one rule for the engine, which runs it, and for plans, which foresee it. No torch.

`reference` computes anything anywhere, in float32. `sdpa` takes PyTorch's fused attention operators, `triton` this
project's kernels, `flash` flash-attn with these kernels around it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass

from imdc.errors import ConfigError
from imdc.kernels.limits import MAX_HEAD_SIZE, head_size_supported

# flash-attn's generations 4, 3 and 2, newest first: (module, generation). Generation 4 is a part of the package of 2.
FLASH_HOMES = (("flash_attn.cute", 4), ("flash_attn_interface", 3), ("flash_attn", 2))
ALL_PACKAGES = frozenset({"triton", "flash-attn"})

_NAMES = ("triton", "flash", "sdpa", "reference")


# The first chips with bfloat16 and asynchronous copies, and the first Triton whose descriptors the kernels are
# launched with.
LEAST_CAPABILITY, LEAST_TRITON = (8, 0), (3, 4)


@dataclass(frozen=True, slots=True)
class AttentionTraits:
    """What a backend must be able to do for a model, and on what.

    Attributes:
        device_type: "cuda" (also what ROCm calls itself), "cpu", "mps", "xpu".
        dtype: its name.
        head_dim: head size.
        softcap: some layers cap their logits.
        capability: compute capability of a CUDA device; None where it is not known.
        rocm: this PyTorch is built for AMD's devices.
    """

    device_type: str
    dtype: str
    head_dim: int
    softcap: bool
    capability: tuple[int, int] | None = None
    rocm: bool = False


def installed_packages() -> frozenset[str]:
    """Those of `ALL_PACKAGES` that this Python can import; of Triton in a release that the kernels work with."""
    found = {"triton"} if _has_triton() else set()
    if find_flash() is not None:
        found.add("flash-attn")
    return frozenset(found)


def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    for package in ("triton", "pytorch-triton", "triton-windows"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found = re.findall(r"\d+", importlib.metadata.version(package))
            return tuple(map(int, found[:2])) >= LEAST_TRITON
    # Under a name that is not known; its kernels will say themselves if it is too old.
    return True


def find_flash() -> tuple[str, int] | None:
    """(module, generation) of the newest flash-attn that is installed, None if there is none."""
    for module, generation in FLASH_HOMES:
        try:
            if importlib.util.find_spec(module) is not None:
                return module, generation
        except ModuleNotFoundError:
            continue
    return None


def choose_backend(name: str, traits: AttentionTraits, packages: Set[str]) -> tuple[str, str]:
    """(backend, a sentence that says why) for the option `backend=name`.

    Args:
        name: "auto" or a backend.
        traits: what the model asks for, and where it is.
        packages: of `ALL_PACKAGES`, those that are installed where the prefill will run.

    Raises:
        ConfigError: the named backend cannot serve this model there; the message says why and what can.
    """
    if name != "auto":
        reason = _unmet(name, traits, packages)
        if reason is not None:
            usable = [other for other in _NAMES if _unmet(other, traits, packages) is None]
            raise ConfigError(f"backend={name!r} cannot be used: {reason}; use backend='auto' or one of {usable}")
        return name, f"{name}: asked for"
    # flash-attn is asked for by name until it has been timed beside Triton on a GPU.
    order = ("triton", "sdpa", "reference") if traits.device_type == "cuda" else ("sdpa", "reference")
    passed: list[str] = []
    for candidate in order:
        reason = _unmet(candidate, traits, packages)
        if reason is None:
            why = "; ".join(passed) if passed else f"first choice on {traits.device_type}"
            return candidate, f"{candidate}: {why}"
        passed.append(f"not {candidate}: {reason}")
    raise AssertionError("the reference backend serves every model")


def _unmet(name: str, traits: AttentionTraits, packages: Set[str]) -> str | None:
    """Why a backend cannot serve a model, or None if it can."""
    if name == "reference":
        return None
    if name == "sdpa":
        if traits.device_type not in ("cpu", "cuda"):
            return f"PyTorch's operators that return the log-sum-exp are for cpu and cuda, not {traits.device_type}"
        return "it cannot cap logits (softcap)" if traits.softcap else None
    if "triton" not in packages:
        least = ".".join(map(str, LEAST_TRITON))
        return f"the package triton is not installed, or older than {least} (pip install 'triton>={least}')"
    # TRITON_INTERPRET=1 runs the kernels on the CPU: slow, for tests.
    if traits.device_type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"its kernels need a CUDA device, the model is on {traits.device_type}"
    if traits.rocm:
        return "its kernels are NVIDIA's, this PyTorch is built for ROCm"
    if traits.capability is not None and traits.capability < LEAST_CAPABILITY:
        return "its kernels need compute capability 8.0 or newer, the device has {}.{}".format(*traits.capability)
    if not head_size_supported(traits.head_dim):
        return f"head size {traits.head_dim} is larger than {MAX_HEAD_SIZE}"
    if name == "flash":
        if "flash-attn" not in packages:
            return "flash-attn is not installed (pip install flash-attn)"
        if traits.dtype not in ("float16", "bfloat16"):
            return f"flash-attn takes float16 and bfloat16, the model is {traits.dtype}"
    return None
