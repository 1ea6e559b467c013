"""Which forward pass is fastest on a GPU: what was timed on that device, else what has been published. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from imdc.model.timed import MILLISECONDS

# TFLOP/s of causal bfloat16 attention with heads of 128 at 4096 tokens on Hopper, as published: FlashAttention 3 in
# tritonbench PR 1267, cuDNN 9.19 on an H200 in cudnn-frontend (sdpa_benchmark_training/results/h200_919_only_cudnn),
# FlashAttention 4 in pith-train PR 2, FlashAttention 2 in the chart of FlashAttention 3's repository
# (assets/flash3_fp16_fwd.png); this project's kernel on an H100 (bench/results/kernel_timings-20261126-190450.json).
PUBLISHED_HOPPER = {"flash 3": 667.0, "varlen": 591.0, "flash 4": 572.0, "triton": 440.0, "flash 2": 319.0}
# Heads for which those figures speak.
HOPPER_HEADS = range(64, 129)


def ranking(
    candidates: Mapping[str, str],
    *,
    device_name: str | None,
    capability: tuple[int, int] | None,
    head_dim: int,
    dtype: str,
) -> tuple[tuple[str, ...], str]:
    """The backends among `candidates`, fastest first, and where that order comes from.

    A record counts where all candidates were timed: one that was not may be faster than all that were.

    Args:
        candidates: backends that could serve, each with the name of its forward pass ("flash 4", "triton").
        device_name: name of the device, None if it is not known.
        capability: its compute capability, None if it is not known.
        head_dim: head size of the model.
        dtype: of the model.
    """
    if len(candidates) == 1:
        return tuple(candidates), ""
    timed = MILLISECONDS.get((device_name or "", dtype, head_dim), {})
    if timed.keys() >= set(candidates.values()):
        order = sorted(candidates, key=lambda name: timed[candidates[name]])
        return tuple(order), f"fastest of {', '.join(order)} as timed on {device_name}"
    if capability is not None and capability[0] == 9 and head_dim in HOPPER_HEADS:
        order = sorted(candidates, key=lambda name: -PUBLISHED_HOPPER[candidates[name]])
        return tuple(order), f"fastest of {', '.join(order)} by published figures, not timed on this device"
    order = sorted(candidates, key=lambda name: name != "triton")
    return tuple(order), f"first of {', '.join(order)}, as there are no figures for this device and head size"
