"""Long prompts on a GPU: time to the first token and peak memory of every way to read, side by side in one run.

    python bench/long_prompts.py --prompt-tokens 32768 131072 --ways imdc fm full-cudnn full-flash chunked
    python bench/long_prompts.py --prompt-tokens 1048576 --ways imdc fm --repeats 1
    python bench/long_prompts.py --prompt-tokens 131072 --ways imdc fm --setting 1024,1024 1024,8192
    python bench/long_prompts.py --prompt-tokens 131072 --ways imdc imdc+recall full-flash --new-tokens 33
    python bench/long_prompts.py --prompt-tokens 32768 --ways imdc --profile --liger

The model is Llama-3.1-8B's shape with random weights made on the device, whose bytes and time are those of the real
one. "full-cudnn" and "full-flash" are the unpatched model with PyTorch's fused attention held to that backend,
"chunked" is generate(prefill_chunk_size=4096) of transformers, "imdc+recall" keeps what is evicted in host memory.
Every way calls generate() for one token, and with --new-tokens once more for so many; bytes are the allocator's above
the weights. Times are medians, and the ways take turns; "chunked" is read once. `floor` is the time that products,
attention and scoring of a way would take at the rate of a large matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import begin
import torch
from device_clock import Timings, describe_device
from inputs import positive, setting
from peak_memory import LLAMA, load
from record import RESULTS, circumstances, options, write
from time_by_kernel import shares, time_by_kernel
from torch.nn.attention import SDPBackend, sdpa_kernel

import imdc
from imdc.config import PrefillConfig
from imdc.errors import ImdcError
from imdc.units import GIB

OURS: dict[str, dict[str, Any]] = {
    **{schedule: {"schedule": schedule} for schedule in ("imdc", "im", "fm")},
    "imdc+recall": {"schedule": "imdc", "recall": "host"},
}
FULL = {"full-cudnn": SDPBackend.CUDNN_ATTENTION, "full-flash": SDPBackend.FLASH_ATTENTION}
WAYS = (*OURS, *FULL, "chunked")
STOCK_CHUNK = 4096
WARM_UP_TOKENS = 20_480


@dataclass(slots=True)
class Row:
    """One way to read one prompt, and what was measured of it."""

    way: str
    prompt_tokens: int
    config: PrefillConfig | None = None
    backend: str = ""
    seconds: list[float] = field(default_factory=list)
    token_seconds: float | None = None
    peak_bytes: int = 0
    host_bytes: int = 0
    recalled_bytes: int = 0
    predicted_bytes: int | None = None
    flops: int | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    failed: str = ""

    @property
    def setting(self) -> tuple[int, int] | None:
        """(chunk, memory) in tokens, None for the unpatched model."""
        return None if self.config is None else (int(self.config.chunk_tokens), self.config.memory_tokens or 0)

    def as_json(self, tflops: float) -> dict[str, Any]:
        """Values for the result file; `tflops` is the rate of a large matrix product."""
        median = statistics.median(self.seconds) if self.seconds else None
        floor = None if self.flops is None else self.flops / tflops / 1e12
        return {
            "way": self.way,
            "prompt_tokens": self.prompt_tokens,
            "setting": self.setting,
            "backend": self.backend,
            "seconds": self.seconds,
            "median_seconds": median,
            "floor_seconds": floor,
            # 1 where nothing but that arithmetic would take time.
            "share_of_floor": floor / median if floor and median else None,
            "seconds_per_token": self.token_seconds,
            "peak_bytes": self.peak_bytes or None,
            "host_bytes": self.host_bytes or None,
            "recalled_bytes": self.recalled_bytes or None,
            "predicted_bytes": self.predicted_bytes,
            "error": self.predicted_bytes / self.peak_bytes - 1 if self.predicted_bytes and self.peak_bytes else None,
            "kernels": self.kernels,
            "failed": self.failed or None,
        }


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """Every way that was asked for, shortest prompts first.

    Raises:
        ConfigError: a setting or backend that cannot work.
    """
    for tokens in sorted(set(args.prompt_tokens)):
        for way in dict.fromkeys(args.ways):
            if way not in OURS:
                yield Row(way, tokens)
                continue
            for chunk, memory in dict.fromkeys(args.setting):
                sizes = {"chunk_tokens": chunk, "memory_tokens": memory}
                yield Row(way, tokens, PrefillConfig(backend=args.backend, **sizes, **OURS[way]))


@contextmanager
def ready(model: Any, row: Row) -> Iterator[dict[str, Any]]:
    """The model as `row` reads with it; yields the options that generate() needs for it."""
    if row.config is not None:
        with imdc.patch(model, row.config) as handle:
            yield {}
            if handle.report is not None:
                row.backend = handle.report.backend
                row.host_bytes, row.recalled_bytes = handle.report.host_bytes, handle.report.recalled_bytes
        return
    with sdpa_kernel([FULL[row.way]]) if row.way in FULL else nullcontext():
        yield {} if row.way in FULL else {"prefill_chunk_size": STOCK_CHUNK}


def read(model: Any, ids: torch.Tensor, row: Row, *, new_tokens: int = 1, profiled: bool = False) -> None:
    """One reading of the prompt and `new_tokens`; its seconds and bytes go into `row`, or those of a later token."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    generate: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    try:
        with ready(model, row) as more, time_by_kernel() if profiled else nullcontext() as kernels:
            began = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), **generate, **more)
            torch.cuda.synchronize()
            taken = time.perf_counter() - began
    except (RuntimeError, ImdcError) as error:
        row.failed = reason(error)
        return
    if kernels is not None:
        row.kernels = shares(kernels, taken)
        return
    if new_tokens > 1:
        row.token_seconds = (taken - statistics.median(row.seconds)) / (new_tokens - 1)
        return
    row.seconds.append(taken)
    row.peak_bytes = max(row.peak_bytes, torch.cuda.max_memory_allocated() - before)


def reason(error: Exception) -> str:
    """One line for the result file."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def foresee(model: Any, row: Row) -> None:
    """What the planner says of `row`, bytes above the weights and arithmetic."""
    # With recall a prompt's last tokens are its question.
    asking = row.config.observation_tokens if row.config is not None and row.config.recall != "none" else 0
    try:
        planned = imdc.plan(model, row.prompt_tokens - asking, row.config, new_tokens=1, question_tokens=asking)
    except ImdcError as error:
        # What has been measured is written all the same.
        row.failed = reason(error)
        return
    if row.config is not None:
        row.predicted_bytes, row.flops = planned.peak.above_weights, planned.flops
        return
    row.flops = planned.unpatched.flops
    if row.way in FULL:
        row.predicted_bytes = planned.unpatched.above_weights


def show(row: Row, tflops: float) -> None:
    """One line, while the run goes on."""
    value = row.as_json(tflops)
    if row.failed:
        print(f"{row.prompt_tokens:>8} {row.way:<11}{row.setting}: FAILED {row.failed}", flush=True)
        return
    share, error = (value[name] for name in ("share_of_floor", "error"))
    floor = "" if share is None else f"floor {100 * share:.0f}% of that, "
    planned = "" if error is None else f", planned {100 * error:+.1f}%"
    later = "" if row.token_seconds is None else f", then {1e3 * row.token_seconds:.1f} ms a token"
    stored = "" if not row.host_bytes else f", {row.host_bytes / GIB:.2f} GiB on the host"
    print(
        f"{row.prompt_tokens:>8} {row.way:<11}{row.setting} {row.backend}: {value['median_seconds']:.3f} s "
        f"({len(row.seconds)} runs, {floor}{row.peak_bytes / GIB:.2f} GiB above weights{planned}{stored}{later})",
        flush=True,
    )
    for one in row.kernels:
        print(f"    {one['kind']:<28}{one['seconds']:>9.4f} s {100 * one['share']:>6.1f}%", flush=True)


def measure(model: Any, ids: torch.Tensor, rows: Sequence[Row], args: argparse.Namespace, tflops: float) -> None:
    """Read the prompt in every way of `rows`, which are of one length, and print a line for each."""
    prompt = ids[:, : rows[0].prompt_tokens]
    if args.warm_up:
        # Compiles kernels and builds handles on a short prompt of the same sizes.
        for row in rows:
            read(model, prompt[:, :WARM_UP_TOKENS], Row(row.way, row.prompt_tokens, row.config))
    for repeat in range(args.repeats):
        shift = repeat * len(rows) // args.repeats
        for row in (*rows[shift:], *rows[:shift]):
            if not row.failed and not (row.way == "chunked" and repeat):
                read(model, prompt, row)
    for row in rows:
        if not row.failed:
            foresee(model, row)
            if args.new_tokens > 1:
                read(model, prompt, row, new_tokens=args.new_tokens)
            if args.profile:
                read(model, prompt, row, profiled=True)
        show(row, tflops)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when all was measured, 1 where a way failed, 2 after bad input or without a CUDA device."""
    return begin.run(_parser().parse_args(argv), benchmark, "long_prompts")


def benchmark(args: argparse.Namespace) -> int:
    """Measure what `args` asks for, and write it; returns the exit status.

    Raises:
        ImdcError: what is asked for cannot be done here.
    """
    rows = list(rows_of(args))
    if not torch.cuda.is_available():
        raise ImdcError("no CUDA device here")
    if args.liger:
        use_liger()
    started = circumstances(commit=args.commit)
    timings = Timings()
    timings.measure_ceilings()
    model, ids = load(args)
    for _, group in groupby(rows, lambda row: row.prompt_tokens):
        measure(model, ids, list(group), args, timings.matmul_tflops)
    result = {
        **started,
        "device": describe_device(),
        "options": options(args),
        "matmul_tflops": timings.matmul_tflops,
        "copy_gbytes_per_second": timings.copy_gbytes,
        "rows": [row.as_json(timings.matmul_tflops) for row in rows],
    }
    print(f"Written to {write('long_prompts', result, args.out)}")
    return 1 if any(row.failed for row in rows) else 0


def use_liger() -> None:
    """Let models of Llama's family that are made from now on compute with liger-kernel.

    Raises:
        ImdcError: it is not installed.
    """
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise ImdcError("--liger needs liger-kernel (pip install liger-kernel)") from error
    apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="long_prompts.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt-tokens", type=positive, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--setting", type=setting, nargs="+", default=[(4096, 4096)], metavar="CHUNK,MEMORY")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument(
        "--new-tokens", type=positive, default=1, help="of one more answer, whose later tokens are timed"
    )
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, by kinds of kernels")
    parser.add_argument("--liger", action="store_true", help="with the norms, rotary embedding and MLP of liger-kernel")
    parser.add_argument("--model", default=LLAMA, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--commit", help="the commit that is timed, where there is no git to ask")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    # Of several devices, what CUDA_VISIBLE_DEVICES makes the first: times and bytes are those of the current one.
    parser.set_defaults(device="cuda", threads=None)
    return parser


if __name__ == "__main__":
    sys.exit(main())
