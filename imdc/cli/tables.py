"""Tables and progress bars of commands that read a document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from imdc.units import ends_of, format_bytes, format_tokens

if TYPE_CHECKING:
    from imdc.cli.answer import Reading
    from imdc.report import PrefillReport, StepReport


@contextmanager
def reading_progress(prompt_tokens: int) -> Iterator[Callable[[StepReport], None]]:
    """A bar on stderr while a prompt is read; yields the `on_step` that moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Reading", total=prompt_tokens, detail="")
        seconds, before = 0.0, 0

        def on_step(step: StepReport) -> None:
            nonlocal seconds, before
            seconds += step.seconds
            read = before + step.tokens_read
            detail = (
                f"step {step.index + 1}/{step.step_count}  {read:,} tokens  "
                f"{read / seconds:,.0f} tokens/s  memory {format_bytes(step.kv_bytes)}"
            )
            progress.update(task, completed=read, detail=detail)
            if step.tokens_read == step.prompt_tokens:
                # With recall a prompt is read in two parts.
                before = read
            if read == prompt_tokens:
                progress.update(task, description="Read")

        yield on_step


def steps_table(report: PrefillReport, rows: int = 6) -> Table:
    """First and last steps of a prefill: what was read and what was kept."""
    table = Table(title="What was read and kept (KV pairs per layer and KV head)", title_justify="left")
    for heading in ("step", "chunk read", "memory before", "memory after", "stored", "seconds"):
        table.add_column(heading, justify="right")
    for end in ends_of(report.steps, rows):
        if end is None:
            table.add_row(*["..."] * 6)
            continue
        _, step = end
        table.add_row(
            f"{step.index + 1}/{step.step_count}",
            format_tokens(step.chunk_tokens),
            format_tokens(step.memory_before),
            format_tokens(step.memory_after),
            format_bytes(step.kv_bytes),
            f"{step.seconds:.2f}",
        )
    return table


def costs_table(readings: Mapping[str, Reading]) -> Table:
    """Time and memory of one or several ways to read the same prompt, side by side."""
    table = Table()
    table.add_column("")
    for name in readings:
        table.add_column(name, justify="right")
    kinds = " / ".join(dict.fromkeys(reading.peak_kind for reading in readings.values()))
    table.add_row("prompt tokens", *(format_tokens(reading.prompt_tokens) for reading in readings.values()))
    table.add_row("time to first token", *(f"{reading.first_token_seconds:.1f} s" for reading in readings.values()))
    table.add_row("total time", *(f"{reading.seconds:.1f} s" for reading in readings.values()))
    table.add_row(
        f"peak memory above the weights ({kinds})",
        *("unknown" if r.peak_bytes is None else format_bytes(r.peak_bytes) for r in readings.values()),
    )
    table.add_row(
        "KV cache after reading",
        *("not measured" if r.report is None else format_bytes(r.report.kv_bytes) for r in readings.values()),
    )
    hosts = [0 if r.report is None else r.report.host_bytes for r in readings.values()]
    if any(hosts):
        table.add_row("all KV pairs, on the host", *(format_bytes(size) for size in hosts))
        spent = [0.0 if r.report is None else r.report.recall_seconds for r in readings.values()]
        table.add_row("time to take back from there", *(f"{seconds:.1f} s" for seconds in spent))
    return table
