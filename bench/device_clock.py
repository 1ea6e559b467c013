"""Times work on a CUDA device and keeps the rows that come of it."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

DEVICE = "cuda"
# Longer than the host takes to queue any of the runs: a millisecond at 2 GHz.
SPIN_CYCLES = 2_000_000
FLUSHED_BYTES = 256 * 2**20  # five times the L2 cache of an H100
MATMUL_SIZE, COPIED_FLOATS = 8192, 2**28
LEAST_RUNS, MOST_RUNS, RUNS_MILLISECONDS = 10, 100, 200.0

Clock = Callable[[Callable[[], Any]], tuple[float, float]]


def median_times(run: Callable[[], Any]) -> tuple[float, float]:
    """Median milliseconds of `run`: on the device by its events, and on the host to queue it.

    Before every run the cache is flushed, and the device spins while the host queues the run behind it: what the
    events then enclose is the device's time alone, however slowly Python launches.
    """
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=DEVICE)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> tuple[float, float]:
        flushed.zero_()
        torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        begun = time.perf_counter()
        run()
        queued = time.perf_counter()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), (queued - begun) * 1e3

    warm = [once()[0] for _ in range(5)]
    runs = min(MOST_RUNS, max(LEAST_RUNS, int(RUNS_MILLISECONDS / max(min(warm), 1e-3))))
    device, host = zip(*(once() for _ in range(runs)), strict=True)
    return statistics.median(device), statistics.median(host)


@dataclass
class Timings:
    """What has been measured so far: ceilings, and a row per kernel and rival."""

    clock: Clock = median_times
    matmul_tflops: float = 0.0
    copy_gbytes: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def measure_ceilings(self) -> None:
        """A large matrix product and a large copy, which everything else is a share of."""
        a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        self.matmul_tflops = 2 * MATMUL_SIZE**3 / self.clock(lambda: a @ b)[0] / 1e9
        source = torch.randn(COPIED_FLOATS, device=DEVICE)
        target = torch.empty_like(source)
        self.copy_gbytes = 2 * source.nbytes / 1e9 / self.clock(lambda: target.copy_(source))[0] * 1e3
        print(f"matrix product {self.matmul_tflops:.0f} TFLOP/s, copy {self.copy_gbytes:.0f} GB/s")

    def add(self, name: str, memory: int, run: Callable[[], Any], *, flops: float = 0.0, gbytes: float = 0.0) -> float:
        """Time `run`; returns its milliseconds on the device."""
        taken, host = self.clock(run)
        row: dict[str, Any] = {"name": name, "memory": memory, "milliseconds": taken, "host_milliseconds": host}
        if flops:
            row["tflops"] = flops / taken / 1e9
            row["share_of_matmul"] = row["tflops"] / self.matmul_tflops
        if gbytes:
            row["gbytes_per_second"] = gbytes / taken * 1e3
            row["share_of_copy"] = row["gbytes_per_second"] / self.copy_gbytes
        self.rows.append(row)
        rates = f"{row.get('tflops', 0):>9.1f}{row.get('gbytes_per_second', 0):>9.0f}"
        print(f"{name:<34}{memory:>7}{taken:>10.4f}{host:>9.4f}{rates}", flush=True)
        return taken

    def add_rival(
        self, name: str, memory: int, run: Callable[[], Any], *, wrong: Callable[[Any], str | None], flops: float = 0.0
    ) -> float:
        """Time `run` if it runs and is not `wrong`; else list it with the reason, as infinitely slow."""
        try:
            reason = wrong(run())
            if reason is None:
                return self.add(name, memory, run, flops=flops)
        except Exception as error:  # Whatever stops a rival must not cost the other rows.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return self.skip(name, memory, reason)

    def skip(self, name: str, memory: int, reason: str) -> float:
        """List what cannot be timed here, as infinitely slow."""
        self.rows.append({"name": name, "memory": memory, "unavailable": reason})
        print(f"{name:<34}{memory:>7}  unavailable: {reason[:100]}", flush=True)
        return float("inf")


def describe_device() -> dict[str, Any]:
    """Name, limits and software of the CUDA device in use."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        driver = done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
