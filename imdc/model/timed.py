"""What was timed, for `imdc.model.forward_speed`; written by `bench/record_forwards.py`, not by hand."""

from __future__ import annotations

# (device, dtype, head size) to milliseconds of a layer's step by forward pass, summed over memories.
MILLISECONDS: dict[tuple[str, str, int], dict[str, float]] = {
    ("NVIDIA H100 80GB HBM3", "bfloat16", 128): {"flash 4": 1.9561, "triton": 2.5202},
}
