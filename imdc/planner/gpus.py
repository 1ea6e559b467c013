"""A few GPUs, to say what a plan fits on and how fast it could be at best.

Memory is the total that nvidia-smi reports (NVIDIA/mig-parted, modal-labs/modal-client pull request 2797 and
akash-network/provider-configs pull request 99 quote it); the driver and the CUDA context take some hundred MiB of it.
Arithmetic is dense bfloat16 with float32 accumulation and bandwidth the peak, both from NVIDIA's documents: the H100,
H200, A100 80 GB (SXM) and L40S data sheets, and the Ada GPU architecture white paper for the RTX 4090. No program
reaches either.

The link to the host is what the same data sheets say of PCI Express in both directions together (Gen5 128 GB/s, Gen4
64 GB/s), halved; the RTX 4090 has Gen4 with 16 lanes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from imdc.errors import ConfigError, did_you_mean
from imdc.units import MIB


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: memory in bytes, dense bfloat16 FLOP per second, bytes per second.

    `host_link` are bytes per second from the host, None where that is not published.
    """

    name: str
    title: str
    memory_bytes: int
    flops: float
    bandwidth: float
    host_link: float | None = None

    def least_seconds(self, flops: float, moved_bytes: float) -> float:
        """Roofline lower bound: the longer of compute time and memory-transfer time."""
        return max(flops / self.flops, moved_bytes / self.bandwidth)

    def least_transfer(self, moved_bytes: float) -> float | None:
        """Seconds below which bytes cannot come from the host; None where its link is not known."""
        return None if self.host_link is None else moved_bytes / self.host_link


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", "H100 SXM 80 GB", 81_559 * MIB, 989.4e12, 3.35e12, 64e9),
        Gpu("h200", "H200 SXM 141 GB", 143_771 * MIB, 989.4e12, 4.8e12, 64e9),
        Gpu("a100", "A100 SXM 80 GB", 81_920 * MIB, 312e12, 2.039e12, 32e9),
        Gpu("l40s", "L40S 48 GB", 46_068 * MIB, 362.05e12, 864e9, 32e9),
        Gpu("4090", "RTX 4090 24 GB", 24_564 * MIB, 165.2e12, 1008e9, 32e9),
    )
}


def find_gpu(name: str) -> Gpu | None:
    """The GPU of that name ("H100", "rtx-4090"), or None where `name` begins like a size ("24GiB").

    Raises:
        ConfigError: it is a name, but not of a GPU in the table.
    """
    plain = re.sub(r"[\s_-]|rtx|nvidia", "", name.lower())
    if plain in GPUS:
        return GPUS[plain]
    if not name or name[:1].isdigit():
        return None
    raise ConfigError(
        f"GPU {name!r} is not in the table.{did_you_mean(plain, GPUS)} Known are {', '.join(GPUS)}; "
        f"or give its memory, such as 24GiB"
    )
