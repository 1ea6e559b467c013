"""Where a GPU's time goes, by kinds of kernels, from torch.profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile

# The first kind whose pattern is in a kernel's name; what matches none is elementwise or small.
KINDS = (
    ("fused step", r"_fused_step"),
    ("attention", r"_attention_kernel|chunk_attention|flash|fmha|cudnn.*sdpa|sdpa"),
    ("scoring and compaction", r"_key_mass|_select|_compact|_compress|_rotate"),
    # cuBLAS adds up the parts of a product in a kernel of its own, and has others for one row.
    ("matrix products", r"gemm|gemv|nvjet|cutlass|matmul|sm90_xmma|splitK"),
    ("copies", r"copy|Memcpy|memcpy|CatArray"),
    ("sums and norms", r"reduce|Reduce|norm"),
)
OTHER, GAPS = "elementwise and other", "no kernel running"


@contextmanager
def time_by_kernel() -> Iterator[dict[str, list[Any]]]:
    """Yields a dict that holds, once the block has ended, microseconds and calls by name of kernel."""
    found: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0])
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield found
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA":
            one = found[event.name]
            one[0] += event.device_time_total
            one[1] += 1


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), OTHER)


def shares(kernels: dict[str, list[Any]], seconds: float) -> list[dict[str, Any]]:
    """Seconds, share of the wall clock, calls and the dearest kernels of each kind, and what none of them fills."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, (microseconds, calls) in sorted(kernels.items(), key=lambda item: -item[1][0]):
        kind = kinds.setdefault(kind_of(name), {"seconds": 0.0, "calls": 0, "dearest": []})
        kind["seconds"] += microseconds / 1e6
        kind["calls"] += calls
        if len(kind["dearest"]) < 8:
            kind["dearest"].append({"name": name[:160], "seconds": microseconds / 1e6, "calls": calls})
    idle = max(0.0, seconds - sum(kind["seconds"] for kind in kinds.values()))
    kinds[GAPS] = {"seconds": idle, "calls": 0, "dearest": []}
    ordered = sorted(kinds.items(), key=lambda item: -item[1]["seconds"])
    return [{"kind": name, "share": value["seconds"] / seconds, **value} for name, value in ordered]
