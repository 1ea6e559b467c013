"""Tables of `imdc profile`: the peak of every step, all schedules side by side, and what became of the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from imdc.units import ends_of, format_bytes, format_percent, format_tokens

if TYPE_CHECKING:
    from imdc.prefill.recording import ProbeResult
    from imdc.profiler.measure import MeasuredPrefill


def steps_table(prefill: MeasuredPrefill, shown: int = 8) -> Table:
    """First and last steps of a prefill, predicted against measured."""
    # Without the second space between columns both tables fit into 80 columns.
    title = f"{prefill.name}: peak of every step above the weights"
    table = Table(title=title, title_justify="left", collapse_padding=True)
    for heading in ("step", "chunk", "memory before", "after", "measured", "predicted", "off by", "seconds"):
        table.add_column(heading, justify="right")
    count = len(prefill.steps)
    for end in ends_of(prefill.steps, shown):
        if end is None:
            table.add_row(*["..."] * 8)
            continue
        number, measured = end
        step = measured.step
        table.add_row(
            f"{number + 1}/{count}",
            format_tokens(step.chunk_tokens),
            format_tokens(step.memory_before),
            format_tokens(step.memory_after),
            format_bytes(measured.peak_bytes),
            format_bytes(measured.predicted.above_weights),
            format_percent(measured.error),
            f"{measured.seconds:.2f}",
        )
    return table


def summary_table(prefills: Sequence[MeasuredPrefill]) -> Table:
    """One row per prefill: peak measured and predicted, what CUDA reserved or the process took, and time."""
    table = Table(title="Peak above the weights", title_justify="left", collapse_padding=True)
    table.add_column("")
    other = "reserved" if any(prefill.reserved_bytes is not None for prefill in prefills) else "resident"
    for heading in ("steps", "measured", "predicted", "off by", other, "seconds", "tokens/s"):
        table.add_column(heading, justify="right")
    for prefill in prefills:
        taken = prefill.reserved_bytes if prefill.reserved_bytes is not None else prefill.resident_bytes
        table.add_row(
            prefill.name,
            str(len(prefill.steps)),
            format_bytes(prefill.peak_bytes),
            format_bytes(prefill.predicted_bytes),
            format_percent(prefill.error),
            "unknown" if taken is None else format_bytes(taken),
            f"{prefill.seconds:.2f}",
            f"{prefill.tokens_per_second:,.0f}",
        )
    return table


def probe_table(name: str, result: ProbeResult, shown: int = 8) -> Table:
    """First and last steps, all compressed layers together: what survived, and what the finished memory is of.

    "left at the end" is the share of the chunk's own KV pairs, "of the memory" that of the finished memory.
    """
    table = Table(title=f"{name}: what reading did to the memory", title_justify="left", collapse_padding=True)
    for heading in ("step", "chunk", "retention", "attention kept", "left at the end", "of the memory"):
        table.add_column(heading, justify="right")
    values = result.to_dict()
    retention, mass = (share.nanmean(dim=1) for share in (result.retention, result.mass_kept))
    count = len(result.steps)
    for end in ends_of(result.steps, shown):
        if end is None:
            table.add_row(*["..."] * 6)
            continue
        number, step = end
        shares = (retention[number], mass[number], values["survival"][-1][number], values["origins"][-1][number + 1])
        table.add_row(f"{number + 1}/{count}", format_tokens(step.chunk_tokens), *(_percent(share) for share in shares))
    return table


def age_line(name: str, result: ProbeResult) -> str:
    """How old the memory is, as one sentence; empty where no layer was compressed."""
    ages = [result.ages(layer).flatten() for layer, places in enumerate(result.places) if places is not None]
    if not ages:
        return ""
    half = int(torch.cat(ages).median()) + 1
    tokens = f"the last {format_tokens(half)} of {format_tokens(result.prompt_tokens)} tokens"
    return f"{name}: half of the memory is of {tokens}"


def _percent(share: Any) -> str:
    # A share is None or NaN where there is none, such as of the memory before the first step.
    return "" if share is None or share != share else f"{100 * float(share):.1f}%"
