"""Which backend computes a prefill: one rule for the engine, which runs it, and for plans, which foresee it. No torch.

`reference` computes anything anywhere, in float32. `sdpa` takes PyTorch's fused attention operators, `triton` this
project's kernels, `flash` flash-attn with these kernels around it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Set
from dataclasses import dataclass

from imdc.errors import ConfigError

# flash-attn's generations 4, 3 and 2, newest first: (module, generation). Generation 4 is a part of the package of 2.
FLASH_HOMES = (("flash_attn.cute", 4), ("flash_attn_interface", 3), ("flash_attn", 2))
ALL_PACKAGES = frozenset({"triton", "flash-attn"})
# What `imdc.kernels` accepts; it cannot be asked without importing Triton.
MAX_HEAD_SIZE = 256

_NAMES = ("triton", "flash", "sdpa", "reference")


@dataclass(frozen=True, slots=True)
class AttentionTraits:
    """What a backend must be able to do for a model; `dtype` is a name, `softcap`: some layers cap their logits."""

    device_type: str
    dtype: str
    head_dim: int
    softcap: bool


def installed_packages() -> frozenset[str]:
    """Those of `ALL_PACKAGES` that this Python can import."""
    found = {"triton"} if importlib.util.find_spec("triton") is not None else set()
    if find_flash() is not None:
        found.add("flash-attn")
    return frozenset(found)


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
        return "the package triton is not installed (pip install triton)"
    # TRITON_INTERPRET=1 runs the kernels on the CPU: slow, for tests.
    if traits.device_type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"its kernels need a CUDA device, the model is on {traits.device_type}"
    if traits.head_dim > MAX_HEAD_SIZE:
        return f"head size {traits.head_dim} is larger than {MAX_HEAD_SIZE}"
    if name == "flash":
        if "flash-attn" not in packages:
            return "flash-attn is not installed (pip install flash-attn)"
        if traits.dtype not in ("float16", "bfloat16"):
            return f"flash-attn takes float16 and bfloat16, the model is {traits.dtype}"
    return None
