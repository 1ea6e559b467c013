"""A line per answer, with the time that is left: readable in a terminal and in a log."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from longbench_data import Record
from longbench_ways import Way


class Progress:
    """Counts answers and guesses what remains, by each way's own time per character of prompt.

    Attributes:
        total: answers of this process, those of earlier starts included.
    """

    def __init__(self, pending: Sequence[tuple[Record, Way]], total: int) -> None:
        """Start the clock."""
        self.total = total
        self._done = total - len(pending)
        self._left: dict[str, int] = defaultdict(int)
        self._spent: dict[str, float] = defaultdict(float)
        self._read: dict[str, int] = defaultdict(int)
        for record, way in pending:
            self._left[way.key] += len(record.prompt)
        self._began = self._last = time.perf_counter()
        if self._done:
            print(f"going on: {self._done:,} of {total:,} answers are there", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._began

    def show(self, record: Record, way: Way, sample: dict[str, Any]) -> None:
        """Print what was just answered and when the rest will be."""
        now = time.perf_counter()
        self._spent[way.key] += now - self._last
        self._read[way.key] += len(record.prompt)
        self._left[way.key] -= len(record.prompt)
        took, self._last = now - self._last, now
        self._done += 1
        outcome = "out of memory" if "error" in sample else f"score {sample['score']:.2f}"
        print(
            f"[{self._done}/{self.total}] {record.task.name} {record.id}, {way.name}: {outcome}, "
            f"{sample['prompt_tokens']:,} tokens, {took:.1f} s; {timedelta(seconds=round(self.remaining()))} left",
            file=sys.stderr,
            flush=True,
        )

    def remaining(self) -> float:
        """Seconds that the rest will take."""
        overall = sum(self._spent.values()) / max(1, sum(self._read.values()))
        return sum(
            left * (self._spent[key] / self._read[key] if self._read[key] else overall)
            for key, left in self._left.items()
        )
