"""What there is where a model is: the chip, Triton, and libraries that compute attention. The facts for the rule."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from contextlib import suppress

import torch

from imdc.kernels.libraries import disagreement, find_flash, why_not_varlen
from imdc.model.backend_rule import LEAST_CAPABILITY, LEAST_TRITON, LIBRARIES, AttentionTraits, Machine


def triton_missing() -> str | None:
    """Why Triton's kernels cannot run with what is installed, None if they can."""
    least = ".".join(map(str, LEAST_TRITON))
    reason = f"the package triton is not installed, or older than {least} (pip install 'triton>={least}')"
    if importlib.util.find_spec("triton") is None:
        return reason
    for package in ("triton", "pytorch-triton", "triton-windows"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found = re.findall(r"\d+", importlib.metadata.version(package))
            return None if tuple(map(int, found[:2])) >= LEAST_TRITON else reason
    # Under a name that is not known; its kernels will say themselves if it is too old.
    return None


def machine_of(device: torch.device, traits: AttentionTraits) -> Machine:
    """The machine behind `device`, with the libraries that compute what the reference computes for such a model.

    Libraries are only imported for devices that they run on, and compared once per device and kind of model.

    Args:
        device: where the model is.
        traits: what the model asks for.
    """
    rocm = torch.version.hip is not None
    nvidia = device.type == "cuda" and not rocm
    missing: dict[str, str] = {}
    triton = triton_missing()
    if triton is not None:
        missing["triton"] = triton
    if not nvidia:
        missing |= dict.fromkeys(LIBRARIES, "it needs one of NVIDIA's devices")
        # Kernels are planned for one multiprocessor where they are interpreted.
        interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
        return Machine(rocm=rocm, multiprocessors=1 if interpreted else None, missing=missing)
    capability = torch.cuda.get_device_capability(device)
    flash = find_flash(capability[0]) if capability >= LEAST_CAPABILITY else None
    reasons = {"varlen": why_not_varlen(traits.head_dim, capability[0])}
    if flash is None:
        reasons["flash"] = "no FlashAttention for this device imports (pip install --pre flash-attn-4, or flash-attn)"
    if triton is None and traits.dtype in ("float16", "bfloat16"):
        model = getattr(torch, traits.dtype), traits.head_dim, traits.softcap, traits.windowed
        for name in LIBRARIES:
            if reasons.get(name) is None and not (traits.softcap and name == "varlen"):
                reasons[name] = disagreement(name, device, *model)
    return Machine(
        capability=capability,
        device_name=torch.cuda.get_device_name(device),
        multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count,
        flash=4 if flash is None else flash[1],
        missing=missing | {name: reason for name, reason in reasons.items() if reason is not None},
    )
