"""Times the kernels on a CUDA device, beside PyTorch's own, after checking them there.

    python bench/kernel_timings.py            # checks, then timings at Llama-3.1-8B's shape; JSON to bench/results
    python bench/kernel_timings.py --sweep    # also other block sizes of the attention kernel, at one memory

Times are medians by device events, the cache flushed before every run. TFLOP/s count what the causal mask leaves.
Shares are of a matrix product and a copy measured in the same run. Exit status: 0 if timed, 1 if a check is red (then
nothing is timed), 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from device_clock import DEVICE, Timings, describe_device
from imdc.kernels.limits import OUTPUT_CHANGE, SCORINGS
from record import RESULTS, circumstances, write
from rivals import LARGEST_ERROR, differs_from, error_of, sdpa, sdpa_in_parts
from torch import Tensor
from torch.nn.attention import SDPBackend

CHUNK, MEMORIES, KEEP, OBSERVERS, POOL = 4096, (0, 4096, 8192), 4096, 16, 15
Q_HEADS, KV_HEADS, DIM, HIDDEN, INTERMEDIATE = 32, 8, 128, 4096, 14336  # Llama-3.1-8B
SCALE = DIM**-0.5
# What a verdict should lie between.
TARGETS = {
    "forward_tflops": (450.0, math.inf),
    "compression_share_of_layer": (0.0, 0.05),
    "auto_over_fastest_backend": (1.0, 1.03),
    "strided_scoring_share_of_layer": (0.0, 0.04),
}
STRIDE = 4  # of the rows that vote where all may
# (rows, columns, warps, stages) of the attention kernel; two programs of the last two fit a multiprocessor.
WIDE = ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4))
SWEEP = (*WIDE, (64, 128, 4, 2), (64, 64, 4, 2), (64, 128, 4, 1))


def inputs(memory: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries of a chunk, and keys and values of memory | chunk, laid out as the engine passes them."""
    generator = torch.Generator(device=DEVICE).manual_seed(memory)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE, "generator": generator}
    q = torch.randn(1, CHUNK, Q_HEADS, DIM, **options).transpose(1, 2)
    k, v = (torch.randn(1, KV_HEADS, memory + CHUNK + 64, DIM, **options)[:, :, :-64] for _ in range(2))
    return q, k, v


def checks() -> Iterator[tuple[str, bool]]:
    """(what, holds) at the very shapes that are timed."""
    from imdc.kernels import reference
    from imdc.kernels.compress_step import compress_step

    options: dict[str, Any] = {"scale": SCALE, "rows": OBSERVERS, "pool_kernel": POOL}
    for memory in MEMORIES:
        q, k, v = inputs(memory)
        keep = min(KEEP, memory + CHUNK // 2)
        exact, lse = reference.chunk_attention(q, k, v, scale=SCALE)
        for scoring in SCORINGS:
            out, new_k, new_v, indices = compress_step(q, k, v, keep=keep, scoring=scoring, **options)
            error, where = error_of(out, exact), f"{scoring}, memory {memory}"
            yield f"attention, {where}: error {error:.2e}", error < LARGEST_ERROR
            changes: dict[str, Any] = {"v": v, "out": out} if scoring == OUTPUT_CHANGE else {}
            mass = reference.key_mass(q, k, lse, **options, **changes)
            lost = 1 - (mass.gather(-1, indices).sum() / mass.topk(keep, dim=-1).values.sum()).item()
            yield f"selection, {where}: {lost:.2e} lost", abs(lost) < 1e-4
            kept = reference.compact(k, v, indices)
            yield f"compaction, {where}", torch.equal(new_k, kept[0]) and torch.equal(new_v, kept[1])


def interpreting() -> bool:
    """Whether the kernels would run on Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") != "0"


def time_linear(timings: Timings) -> float:
    """The matrix products of one decoder layer on one chunk, without norms, rotary embedding and activation."""
    shapes = [(HIDDEN, (Q_HEADS + 2 * KV_HEADS) * DIM), (HIDDEN, HIDDEN), (HIDDEN, 2 * INTERMEDIATE)]
    total = 0.0
    for rows, columns in (*shapes, (INTERMEDIATE, HIDDEN)):
        x = torch.randn(CHUNK, rows, dtype=torch.bfloat16, device=DEVICE)
        w = torch.randn(columns, rows, dtype=torch.bfloat16, device=DEVICE)
        product = partial(torch.nn.functional.linear, x, w)
        total += timings.add(f"linear {rows} x {columns}", 0, product, flops=2.0 * CHUNK * rows * columns)
    return total


def time_attention(timings: Timings, q: Tensor, k: Tensor, v: Tensor, sweep: bool) -> tuple[float, float]:
    """(milliseconds, those of the fastest rival) of the forward pass; all its variants with `sweep`."""
    from imdc.kernels._launch import Config, target_of
    from imdc.kernels.chunk_attention import chunk_attention, plan_chunk_attention

    memory = k.shape[2] - CHUNK
    flops = attention_flops(memory)
    out, lse = chunk_attention(q, k, v, scale=SCALE)
    ours = timings.add("attention: triton", memory, lambda: chunk_attention(q, k, v, scale=SCALE), flops=flops)
    same = differs_from(out)
    unmerged = (lambda _: None) if memory else same
    flash = partial(sdpa, SDPBackend.FLASH_ATTENTION, q, k, v, scale=SCALE)
    rivals = [timings.add_rival("attention: sdpa flash", memory, flash, wrong=same, flops=flops)]
    # Repeated keys are for a cuDNN that takes no groups; repeating them is not counted.
    repeated_k, repeated_v = (x.repeat_interleave(Q_HEADS // KV_HEADS, dim=1) for x in (k, v))
    for form, keys, values in (("", k, v), (", repeated", repeated_k, repeated_v)):
        run = partial(sdpa_in_parts, SDPBackend.CUDNN_ATTENTION, q, keys, values, scale=SCALE)
        name = f"attention: sdpa cudnn{form}{', two parts' if memory else ''}"
        rivals.append(timings.add_rival(name, memory, run, wrong=unmerged, flops=flops))
    written = torch.empty_like(out)
    for rows, columns, warps, stages in SWEEP if sweep else ():
        for descriptors in (True, False) if (rows, columns, warps, stages) in WIDE else (True,):
            config = Config(rows, columns, warps, stages, descriptors)

            def variant(config: Config = config) -> Tensor:
                # Planned inside, so that a variant this device cannot have is listed like a rival that does not run.
                launch = plan_chunk_attention(
                    *(q, k, v, written, lse),
                    scale=SCALE,
                    softcap=None,
                    window=None,
                    target=target_of(q.device),
                    config=config,
                )
                launch.run(q.device)
                return written

            label = f"  {rows}x{columns} {warps}w {stages}s{' tma' if descriptors else ''}"
            written.fill_(float("nan"))
            timings.add_rival(label, memory, variant, wrong=same, flops=flops)
    return ours, min(rivals)


def attention_flops(memory: int) -> float:
    """Floating-point operations of the forward pass that the causal mask leaves."""
    return 4.0 * Q_HEADS * DIM * (CHUNK * memory + CHUNK * (CHUNK + 1) / 2)


def time_compression(timings: Timings, q: Tensor, k: Tensor, v: Tensor, keep: int) -> tuple[float, float]:
    """(milliseconds of scoring, pooling, selection and compaction together, those of scoring by every fourth row).

    Each is timed beside PyTorch's own. The latter counts attention alone, which one product yields.
    """
    from imdc.kernels.chunk_attention import chunk_attention
    from imdc.kernels.compact import compact
    from imdc.kernels.key_mass import key_mass
    from imdc.kernels.select import plan_select, select

    keys, memory = k.shape[2], k.shape[2] - CHUNK
    out, lse = chunk_attention(q, k, v, scale=SCALE)
    by_attention = partial(key_mass, q, k, lse, scale=SCALE)
    few = partial(by_attention, rows=OBSERVERS, v=v, out=out)
    flops = 4.0 * Q_HEADS * DIM * OBSERVERS * (keys - OBSERVERS / 2)
    total = timings.add(f"scoring: {OBSERVERS} rows", memory, few, flops=flops, gbytes=2 * k.nbytes / 1e9)
    strided = math.nan
    for stride, voters in ((1, "all rows"), (STRIDE, f"every {STRIDE}th row")):
        every, pairs = partial(by_attention, rows=CHUNK, stride=stride), attention_flops(memory) / stride
        timings.add(f"scoring: {voters}", memory, partial(every, v=v, out=out), flops=pairs)
        strided = timings.add(f"scoring: {voters}, by attention", memory, every, flops=pairs / 2)
    plain = partial(by_attention, rows=OBSERVERS)
    timings.add("scoring: by attention", memory, plain, flops=flops / 2, gbytes=k.nbytes / 1e9)
    mass = few()
    timings.add("selection: triton, no pooling", memory, lambda: select(mass, keep, sink_tokens=4))
    forced: dict[str, Any] = {"sink_tokens": 4, "recent_tokens": 0}
    indices, ranks = select(mass, keep, **forced), torch.empty_like(mass, dtype=torch.int32)
    pooled = plan_select(mass, indices.clone(), ranks=ranks, pool_kernel=POOL, **forced)
    total += timings.add(f"selection: triton, pooled over {POOL}", memory, lambda: pooled.run(q.device))
    timings.add("selection: torch.topk unsorted", memory, lambda: mass.topk(keep, sorted=False))
    timings.add("selection: torch.topk, ascending", memory, lambda: mass.topk(keep, sorted=False).indices.sort())
    index = indices[..., None].expand(1, KV_HEADS, keep, DIM)
    moved = 4 * keep * KV_HEADS * DIM * 2 / 1e9
    total += timings.add("compaction: triton", memory, lambda: compact(k, v, indices), gbytes=moved)
    timings.add("compaction: torch.gather", memory, lambda: (k.gather(2, index), v.gather(2, index)), gbytes=moved)
    return total, strided


def time_backends(timings: Timings, q: Tensor, k: Tensor, v: Tensor, keep: int) -> dict[str, float]:
    """Milliseconds of a layer's whole step under every backend, and under "auto" those of the one it takes."""
    from imdc.errors import ConfigError
    from imdc.model.backend_rule import AttentionTraits
    from imdc.prefill.backends import Backend, choose

    options: dict[str, Any] = {"scale": SCALE, "rows": OBSERVERS, "pool_kernel": POOL}

    def step(backend: Backend) -> tuple[Tensor, ...]:
        if backend.compress_step is not None:
            return backend.compress_step(q, k, v, keep=keep, sink_tokens=4, scoring=OUTPUT_CHANGE, **options)
        out, lse = backend.chunk_attention(q, k, v, scale=SCALE)
        indices = backend.select(backend.key_mass(q, k, lse, v=v, out=out, **options), keep, sink_tokens=4)
        return out, *backend.compact(k, v, indices), indices

    model = q.device, AttentionTraits(q.device.type, str(q.dtype).removeprefix("torch."), DIM, softcap=False)
    auto, memory = choose("auto", *model)[0], k.shape[2] - CHUNK
    wrong = differs_from(step(auto)[0])
    taken: dict[str, float] = {}
    for name in ("triton", "flash", "varlen", "sdpa", "reference"):
        try:
            run = partial(step, choose(name, *model)[0])
        except ConfigError as error:
            taken[name] = timings.skip(f"step: {name}", memory, str(error))
        else:
            taken[name] = timings.add_rival(f"step: {name}", memory, run, wrong=wrong)
    # Both ways of the step, whichever the cost rule takes: what the rule assumes has to be measured.
    from imdc.kernels.compress_step import plan_step

    for way, pays in (("one launch", True), ("several launches", False)):
        plan_step.forget()
        with mock.patch("imdc.kernels.compress_step.one_launch_pays", lambda *_, pays=pays, **__: pays):
            forced = partial(step, choose("triton", *model)[0])
            timings.add_rival(f"step: triton, {way}", memory, forced, wrong=wrong)
    plan_step.forget()
    return taken | {"auto": taken[auto.name]}


def time_memory(timings: Timings, memory: int, linear: float, sweep: bool) -> dict[str, Any]:
    """Every kernel and its rivals at one memory size; returns what the targets are about."""
    q, k, v = inputs(memory)
    keep = min(KEEP, memory + CHUNK // 2)
    attention, rival = time_attention(timings, q, k, v, sweep)
    compression, strided = time_compression(timings, q, k, v, keep)
    steps = time_backends(timings, q, k, v, keep)
    verdict = {
        "forward_tflops": attention_flops(memory) / attention / 1e9,
        "forward_over_fastest_rival": _ratio(attention, rival),
        "compression_share_of_layer": compression / (linear + attention + compression),
        "strided_scoring_share_of_layer": strided / (linear + attention + strided),
        "step_over_its_parts": _ratio(steps["triton"], attention + compression),
        "auto_over_fastest_backend": _ratio(steps["auto"], min(steps.values())),
    }
    timed = {name: taken for name, taken in steps.items() if name != "auto" and math.isfinite(taken)}
    for name, value in verdict.items():
        least, most = TARGETS.get(name, (0.0, math.inf))
        met = value is not None and least <= value <= most
        aim = f"  ({'meets' if met else 'MISSES'} {least}..{most})" if name in TARGETS else ""
        print(f"memory {memory:>5}: {name:<27}{'unknown' if value is None else f'{value:.3f}':>9}{aim}", flush=True)
    return {"memory": memory, **verdict, "step_milliseconds": timed}


def flash_generation() -> int | None:
    """Of the FlashAttention behind the backend "flash"; None without one."""
    from imdc.kernels.libraries import find_flash

    found = find_flash(torch.cuda.get_device_capability()[0])
    return None if found is None else found[1]


def _ratio(taken: float, other: float) -> float | None:
    """How much longer one took; None where either could not be timed."""
    return taken / other if math.isfinite(taken) and math.isfinite(other) else None


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="also time other variants of the attention kernel")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (default: bench/results)")
    parser.add_argument("--commit", help="the commit that is timed, where there is no git to ask")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernel_timings: no CUDA device here; the interpreter's times would mean nothing", file=sys.stderr)
        return 2
    if interpreting():
        print("kernel_timings: TRITON_INTERPRET is set; unset it to time compiled kernels", file=sys.stderr)
        return 2
    red = []
    for what, holds in checks():
        print(f"{'ok ' if holds else 'RED'} {what}", flush=True)
        red += [] if holds else [what]
    if red:
        print(f"kernel_timings: nothing timed, these checks are red: {'; '.join(red)}", file=sys.stderr)
        return 1

    timings = Timings()
    timings.measure_ceilings()
    print(f"{'kernel':<34}{'memory':>7}{'ms':>10}{'host ms':>9}{'TFLOP/s':>9}{'GB/s':>9}")
    linear = time_linear(timings)
    shape = {"chunk": CHUNK, "keep": KEEP, "observers": OBSERVERS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "dim": DIM}
    swept = MEMORIES[1] if options.sweep else None
    verdicts = [time_memory(timings, memory, linear, memory == swept) for memory in MEMORIES]
    record = circumstances(commit=options.commit) | {
        "device": describe_device(),
        "flash_generation": flash_generation(),
        "shape": shape,
        "matmul_tflops": timings.matmul_tflops,
        "copy_gbytes_per_second": timings.copy_gbytes,
        "verdicts": verdicts,
        "rows": timings.rows,
    }
    print(f"written to {write('kernel_timings', record, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
