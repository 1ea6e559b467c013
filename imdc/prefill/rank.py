"""Which forward pass is fastest on a GPU: what was timed on that device, else what has been published."""

from __future__ import annotations

# Names of devices and their backends, fastest first, from `bench/results/kernel_timings-*.json`: none is timed yet.
RECORDED: dict[str, tuple[str, ...]] = {}

# TFLOP/s of causal bfloat16 attention with heads of 128 at 4096 tokens on Hopper, as published: FlashAttention 3 in
# tritonbench PR 1267, cuDNN 9.19 on an H200 in cudnn-frontend (sdpa_benchmark_training/results/h200_919_only_cudnn),
# FlashAttention 4 in pith-train PR 2; for Triton its tutorial of fused attention without a mask
# (facebookexperimental/triton PR 205), which this project's kernel resembles.
PUBLISHED_HOPPER = {"flash 3": 667.0, "varlen": 591.0, "flash 4": 572.0, "triton": 460.0}
# Heads for which those figures speak.
HOPPER_HEADS = range(64, 129)


def ranking(
    device_name: str | None, capability: tuple[int, int] | None, head_dim: int, flash: int | None
) -> tuple[tuple[str, ...], str]:
    """The backends "auto" tries on a CUDA device, fastest first, and where that order comes from.

    Args:
        device_name: name of the device, None if it is not known.
        capability: its compute capability, None if it is not known.
        head_dim: head size of the model.
        flash: generation of the FlashAttention that is installed, None if there is none.
    """
    last = ("sdpa", "reference")
    if device_name in RECORDED:
        return (*RECORDED[device_name], *last), f"timed on {device_name}"
    if capability is not None and capability[0] == 9 and head_dim in HOPPER_HEADS:
        figures = {name: PUBLISHED_HOPPER[name] for name in ("varlen", "triton")}
        if f"flash {flash}" in PUBLISHED_HOPPER:
            figures["flash"] = PUBLISHED_HOPPER[f"flash {flash}"]
        order = sorted(figures, key=lambda name: -figures[name])
        return (*order, *last), "fastest by published figures, not timed on this device"
    return ("triton", *last), "no figures to choose by for this device and head size"
