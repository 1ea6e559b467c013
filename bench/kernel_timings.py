"""Times the kernels on a CUDA device, beside PyTorch's own, after checking them there.

    python bench/kernel_timings.py            # checks, then timings at Llama-3.1-8B's shape; JSON to bench/results
    python bench/kernel_timings.py --sweep    # also other block sizes of the attention kernel

Times are medians by device events, the cache flushed before every run. TFLOP/s count what the causal mask leaves.
Shares are of a matrix product and a copy measured in the same run. Exit status: 0 if timed, 1 if a check is red (then
nothing is timed), 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from record import ROOT, circumstances, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

CHUNK, MEMORIES, KEEP, OBSERVERS, POOL = 4096, (0, 4096, 8192), 4096, 64, 15
Q_HEADS, KV_HEADS, DIM, HIDDEN, INTERMEDIATE = 32, 8, 128, 4096, 14336  # Llama-3.1-8B
SCALE = DIM**-0.5
TARGET_TFLOPS, TARGET_SHARE = 450.0, 0.05
# Largest error by norm that a bfloat16 result may show against float64; the tests hold the kernels to tighter bounds.
LARGEST_ERROR = 1e-2


@dataclass
class Timings:
    """What has been measured so far: ceilings, and a row per kernel and rival."""

    milliseconds: Callable[[Callable[[], Any]], float]
    matmul_tflops: float = 0.0
    copy_gbytes: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, memory: int, run: Callable[[], Any], *, flops: float = 0.0, gbytes: float = 0.0) -> float:
        """Time `run`; a rival that does not take the shape is listed with its reason and counts as infinite."""
        try:
            taken = self.milliseconds(run)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            self.rows.append({"name": name, "memory": memory, "unavailable": str(error).splitlines()[0]})
            print(f"{name:<34}{memory:>7}  unavailable: {str(error).splitlines()[0][:80]}", flush=True)
            return float("inf")
        row: dict[str, Any] = {"name": name, "memory": memory, "milliseconds": taken}
        if flops:
            row["tflops"] = flops / taken / 1e9
            row["share_of_matmul"] = row["tflops"] / self.matmul_tflops
        if gbytes:
            row["gbytes_per_second"] = gbytes / taken * 1e3
            row["share_of_copy"] = row["gbytes_per_second"] / self.copy_gbytes
        self.rows.append(row)
        rates = f"{row.get('tflops', 0):>9.1f}{row.get('gbytes_per_second', 0):>9.0f}"
        print(f"{name:<34}{memory:>7}{taken:>10.4f}{rates}", flush=True)
        return taken


def inputs(memory: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries of a chunk and keys and values of memory | chunk."""
    generator = torch.Generator(device="cuda").manual_seed(memory)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "generator": generator}
    q = torch.randn(1, Q_HEADS, CHUNK, DIM, **options)
    k, v = (torch.randn(1, KV_HEADS, memory + CHUNK, DIM, **options) for _ in range(2))
    return q, k, v


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """PyTorch's fused attention, bottom-right causal."""
    with sdpa_kernel(backend):
        if q.shape[2] == k.shape[2]:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        mask: Any = causal_lower_right(q.shape[2], k.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def sdpa_in_parts(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Memory without a mask and the chunk with a causal one, unmerged: for backends without bottom-right masks."""
    memory = k.shape[2] - q.shape[2]
    with sdpa_kernel(backend):
        far = scaled_dot_product_attention(q, k[:, :, :memory], v[:, :, :memory], enable_gqa=True)
        near = scaled_dot_product_attention(q, k[:, :, memory:], v[:, :, memory:], is_causal=True, enable_gqa=True)
    return far, near


def checks() -> Iterator[tuple[str, bool]]:
    """(what, holds) at the very shapes that are timed."""
    from imdc.kernels import reference
    from imdc.kernels.compress_step import compress_step

    for memory in MEMORIES:
        q, k, v = inputs(memory)
        keep = min(KEEP, memory + CHUNK // 2)
        out, new_k, new_v, indices = compress_step(q, k, v, scale=SCALE, keep=keep, rows=OBSERVERS, pool_kernel=POOL)
        exact, lse = reference.chunk_attention(q, k, v, scale=SCALE)
        error = (out.double() - exact.double()).norm() / exact.double().norm()
        yield f"attention, memory {memory}: error {error:.2e}", bool(error < LARGEST_ERROR)
        mass = reference.key_mass(q, k, lse, scale=SCALE, rows=OBSERVERS, pool_kernel=POOL)
        best = mass.topk(keep, dim=-1).values.sum()
        lost = 1 - (mass.gather(-1, indices).sum() / best).item()
        yield f"selection, memory {memory}: mass lost {lost:.2e}", abs(lost) < 1e-4
        kept = reference.compact(k, v, indices)
        yield f"compaction, memory {memory}", torch.equal(new_k, kept[0]) and torch.equal(new_v, kept[1])


def tests_pass() -> bool:
    """Whether the kernels' tests pass on this device."""
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_kernel_*.py"))
    # `python -m pytest` would put the repository root on the path, where ./kernels shadows Hugging Face's `kernels`.
    start = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "-q", "-x", *files]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def measure_ceilings(timings: Timings) -> None:
    """A large matrix product and a large copy."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    timings.matmul_tflops = 2 * 8192**3 / timings.milliseconds(lambda: a @ b) / 1e9
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    timings.copy_gbytes = 2 * source.nbytes / 1e9 / timings.milliseconds(lambda: target.copy_(source)) * 1e3
    print(f"matrix product {timings.matmul_tflops:.0f} TFLOP/s, copy {timings.copy_gbytes:.0f} GB/s")


def time_linear(timings: Timings) -> float:
    """The matrix products of one decoder layer on one chunk, without norms, rotary embedding and activation."""
    shapes = [(HIDDEN, (Q_HEADS + 2 * KV_HEADS) * DIM), (HIDDEN, HIDDEN), (HIDDEN, 2 * INTERMEDIATE)]
    total = 0.0
    for rows, columns in (*shapes, (INTERMEDIATE, HIDDEN)):
        x = torch.randn(CHUNK, rows, dtype=torch.bfloat16, device="cuda")
        w = torch.randn(columns, rows, dtype=torch.bfloat16, device="cuda")
        product = partial(torch.nn.functional.linear, x, w)
        total += timings.add(f"linear {rows} x {columns}", 0, product, flops=2.0 * CHUNK * rows * columns)
    return total


def time_memory(timings: Timings, memory: int, linear: float, sweep: bool) -> dict[str, Any]:
    """Every kernel and its rivals at one memory size; returns what the targets are about."""
    from imdc.kernels._launch import Config, target_of
    from imdc.kernels.chunk_attention import chunk_attention, plan_chunk_attention
    from imdc.kernels.compact import compact
    from imdc.kernels.compress_step import compress_step
    from imdc.kernels.key_mass import key_mass
    from imdc.kernels.pool import pool
    from imdc.kernels.select import select

    q, k, v = inputs(memory)
    keys, keep = k.shape[2], min(KEEP, memory + CHUNK // 2)
    pairs = CHUNK * memory + CHUNK * (CHUNK + 1) / 2
    flops = 4.0 * Q_HEADS * DIM * pairs
    out, lse = chunk_attention(q, k, v, scale=SCALE)
    attention = timings.add("attention: triton", memory, lambda: chunk_attention(q, k, v, scale=SCALE), flops=flops)
    rivals = [
        timings.add("attention: sdpa flash", memory, lambda: sdpa(SDPBackend.FLASH_ATTENTION, q, k, v), flops=flops)
    ]
    cudnn, form = (sdpa_in_parts, ", two parts") if memory else (sdpa, "")
    run = partial(cudnn, SDPBackend.CUDNN_ATTENTION, q, k, v)
    rivals.append(timings.add(f"attention: sdpa cudnn{form}", memory, run, flops=flops))
    for rows, columns, warps, stages in ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 128, 4, 2)):
        for descriptors in (True, False) if sweep else ():
            config = Config(rows, columns, warps, stages, descriptors)
            try:
                launch = plan_chunk_attention(
                    q, k, v, out, lse, scale=SCALE, softcap=None, window=None, target=target_of(q.device), config=config
                )
            except ValueError as error:
                print(f"{config}: {error}")
                continue
            label = f"  {rows}x{columns} {warps}w {stages}s{' tma' if descriptors else ''}"
            timings.add(label, memory, partial(launch.run, q.device), flops=flops)

    score_flops = 2.0 * Q_HEADS * DIM * OBSERVERS * (keys - OBSERVERS / 2)
    score = {"scale": SCALE, "rows": OBSERVERS}
    scoring = timings.add(
        f"scoring: {OBSERVERS} rows",
        memory,
        lambda: key_mass(q, k, lse, **score),
        flops=score_flops,
        gbytes=k.nbytes / 1e9,
    )
    every = {"scale": SCALE, "rows": CHUNK}
    timings.add("scoring: all rows", memory, lambda: key_mass(q, k, lse, **every), flops=flops / 2)
    mass = key_mass(q, k, lse, **score)
    pooling = timings.add(f"pooling over {POOL}", memory, lambda: pool(mass, POOL), gbytes=2 * mass.nbytes / 1e9)
    selection = timings.add("selection: triton", memory, lambda: select(mass, keep, sink_tokens=4))
    timings.add("selection: torch.topk unsorted", memory, lambda: mass.topk(keep, sorted=False))
    timings.add("selection: torch.topk, ascending", memory, lambda: mass.topk(keep, sorted=False).indices.sort())
    indices = select(mass, keep, sink_tokens=4)
    index = indices[..., None].expand(1, KV_HEADS, keep, DIM)
    moved = 4 * keep * KV_HEADS * DIM * 2 / 1e9
    compaction = timings.add("compaction: triton", memory, lambda: compact(k, v, indices), gbytes=moved)
    timings.add("compaction: torch.gather", memory, lambda: (k.gather(2, index), v.gather(2, index)), gbytes=moved)
    step = timings.add(
        "compress_step", memory, lambda: compress_step(q, k, v, keep=keep, pool_kernel=POOL, sink_tokens=4, **score)
    )
    overhead = scoring + pooling + selection + compaction
    return {
        "memory": memory,
        "forward_tflops": flops / attention / 1e9,
        "forward_over_fastest_rival": attention / min(rivals),
        "compression_share_of_layer": overhead / (linear + attention + overhead),
        "step_over_its_parts": step / (attention + overhead),
    }


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="also time other block sizes of the attention kernel")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernel_timings: no CUDA device here; the interpreter's times would mean nothing", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("kernel_timings: TRITON_INTERPRET is set; unset it to time compiled kernels", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    red = [] if tests_pass() else ["the kernels' tests"]
    for what, holds in checks():
        print(f"{'ok ' if holds else 'RED'} {what}", flush=True)
        red += [] if holds else [what]
    if red:
        print(f"kernel_timings: nothing timed, these checks are red: {'; '.join(red)}", file=sys.stderr)
        return 1

    timings = Timings(lambda run: float(do_bench(run, warmup=50, rep=300, return_mode="median")))
    measure_ceilings(timings)
    print(f"{'kernel':<34}{'memory':>7}{'ms':>10}{'TFLOP/s':>9}{'GB/s':>9}")
    linear = time_linear(timings)
    verdicts = [time_memory(timings, memory, linear, options.sweep) for memory in MEMORIES]
    for verdict in verdicts:
        fast = verdict["forward_tflops"] >= TARGET_TFLOPS
        cheap = verdict["compression_share_of_layer"] <= TARGET_SHARE
        print(
            f"memory {verdict['memory']}: forward {verdict['forward_tflops']:.0f} TFLOP/s "
            f"({'meets' if fast else 'misses'} {TARGET_TFLOPS:.0f}), {verdict['forward_over_fastest_rival']:.2f}x the "
            f"fastest rival's time; scoring, selection and compaction {verdict['compression_share_of_layer']:.1%} of "
            f"the layer ({'meets' if cheap else 'misses'} {TARGET_SHARE:.0%})"
        )
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True)
    shape = {"chunk": CHUNK, "keep": KEEP, "observers": OBSERVERS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "dim": DIM}
    record = circumstances() | {
        "device": {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": driver.stdout.strip() if driver.returncode == 0 else None,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "shape": shape,
        "matmul_tflops": timings.matmul_tflops,
        "copy_gbytes_per_second": timings.copy_gbytes,
        "verdicts": verdicts,
        "rows": timings.rows,
    }
    print(f"written to {write('kernel_timings', record)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
