"""Which backend computes a prefill: one rule for the engine, which runs it, and for plans, which foresee it. No torch.

`reference` computes anything anywhere, in float32. `sdpa` takes PyTorch's fused attention operators, `triton` this
project's kernels, `flash` FlashAttention 4, 3 or 2 and `varlen` PyTorch's `varlen_attn` on cuDNN, both with these
kernels behind them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from imdc.errors import ConfigError
from imdc.kernels.limits import MAX_HEAD_SIZE, head_size_supported
from imdc.model.forward_speed import ranking
from imdc.model.shape import ModelShape

# Backends whose forward pass is a library's.
LIBRARIES = ("flash", "varlen")
# Backends with this project's kernels.
KERNELS = ("triton", *LIBRARIES)

_NAMES = (*KERNELS, "sdpa", "reference")

# The first chips with bfloat16 and asynchronous copies, and the first Triton whose descriptors the kernels are
# launched with.
LEAST_CAPABILITY, LEAST_TRITON = (8, 0), (3, 4)


@dataclass(frozen=True, slots=True)
class AttentionTraits:
    """What a backend must be able to do for a model.

    Attributes:
        device_type: "cuda" (also what ROCm calls itself), "cpu", "mps", "xpu".
        dtype: its name.
        head_dim: head size.
        softcap: some layers cap their logits.
        sinks: layers have attention sinks, which need the log-sum-exp of every layer.
        windowed: some layers have a sliding window.
    """

    device_type: str
    dtype: str
    head_dim: int
    softcap: bool
    sinks: bool = False
    windowed: bool = False

    @classmethod
    def of(cls, shape: ModelShape, device_type: str) -> AttentionTraits:
        """Those of a model of that shape on such a device."""
        heads, windowed = shape.head_dim, shape.sliding_layers > 0
        return cls(device_type, shape.dtype, heads, shape.softcap, shape.sinks, windowed)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a prefill will run. As it is built without arguments: a machine that has what is asked for.

    Attributes:
        capability: compute capability of a CUDA device; None where it is not known.
        device_name: its name; None where it is not known.
        multiprocessors: how many it has; None where it is not known.
        rocm: PyTorch is built for AMD's devices.
        flash: generation of the FlashAttention that is installed.
        missing: backends that cannot run there, each with the reason.
    """

    capability: tuple[int, int] | None = None
    device_name: str | None = None
    multiprocessors: int | None = None
    rocm: bool = False
    flash: int = 4
    missing: Mapping[str, str] = field(default_factory=dict)


ANY_MACHINE = Machine()


def choose_backend(name: str, traits: AttentionTraits, machine: Machine) -> tuple[str, str]:
    """(backend, a sentence that says why) for the option `backend=name`.

    Args:
        name: "auto" or a backend.
        traits: what the model asks for, and what kind of device it is on.
        machine: where the prefill will run.

    Raises:
        ConfigError: the named backend cannot serve this model there; the message says why and what can.
    """
    unmet = {other: _unmet(other, traits, machine) for other in _NAMES}
    if name != "auto":
        reason = unmet[name]
        if reason is not None:
            usable = [other for other in _NAMES if unmet[other] is None]
            raise ConfigError(f"backend={name!r} cannot be used: {reason}; use backend='auto' or one of {usable}")
        return name, f"{name}: asked for"
    order: tuple[str, ...] = ("sdpa", "reference")
    source = ""
    if traits.device_type == "cuda":
        fast = {one: f"flash {machine.flash}" if one == "flash" else one for one in KERNELS if unmet[one] is None}
        ranked, source = ranking(
            fast or {"triton": "triton"},
            device_name=machine.device_name,
            capability=machine.capability,
            head_dim=traits.head_dim,
            dtype=traits.dtype,
        )
        # Libraries that cannot serve are named too: somebody may want to install one.
        order = (*ranked, *(one for one in KERNELS if one not in ranked), *order)
    taken = next(one for one in order if unmet[one] is None)
    others = [one for one in order if one != taken and (one in KERNELS or order.index(one) < order.index(taken))]
    reasons: dict[str, list[str]] = {}
    for one in others:
        if (reason := unmet[one]) is not None:
            reasons.setdefault(reason, []).append(one)
    said = [source] if source and taken in KERNELS else []
    said += [f"not {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return taken, f"{taken}: {'; '.join(said) or f'first choice on {traits.device_type}'}"


def _unmet(name: str, traits: AttentionTraits, machine: Machine) -> str | None:
    """Why a backend cannot serve a model, or None if it can."""
    if name == "reference":
        return None
    if name == "sdpa":
        if traits.device_type not in ("cpu", "cuda"):
            return f"PyTorch's operators that return the log-sum-exp are for cpu and cuda, not {traits.device_type}"
        if traits.sinks:
            return "it gives no log-sum-exp through a sliding window, which attention sinks need"
        return "it cannot cap logits (softcap)" if traits.softcap else None
    if "triton" in machine.missing:
        return machine.missing["triton"]
    # TRITON_INTERPRET=1 runs the kernels on the CPU: slow, for tests.
    if traits.device_type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"its kernels need a CUDA device, the model is on {traits.device_type}"
    if machine.rocm:
        return "its kernels are NVIDIA's, this PyTorch is built for ROCm"
    if machine.capability is not None and machine.capability < LEAST_CAPABILITY:
        return "its kernels need compute capability 8.0 or newer, the device has {}.{}".format(*machine.capability)
    if not head_size_supported(traits.head_dim):
        return f"head size {traits.head_dim} is larger than {MAX_HEAD_SIZE}"
    if name not in LIBRARIES:
        return None
    if traits.dtype not in ("float16", "bfloat16"):
        return f"it takes float16 and bfloat16, the model is {traits.dtype}"
    if name == "varlen" and traits.softcap:
        return "it cannot cap logits (softcap)"
    return machine.missing.get(name)
