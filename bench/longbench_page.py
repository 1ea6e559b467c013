"""The HTML page of a run: one file with its figures and styles, no script and no network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from longbench_report import heading, notes, tables

from imdc import __version__
from imdc.cli.report_page import style

# Bars, their gaps and the room for names, in the picture's own units.
_ROW, _BAR, _NAMES, _WIDTH, _VALUES = 26, 16, 190, 760, 190
_COLOURS = ("--memory", "--working", "--workspace", "--chunk")


def page(results: dict[str, Any], settings: dict[str, Any], session: dict[str, Any]) -> str:
    """The page of `results`; `session` says on what machine and by which versions."""
    title = heading(settings)
    average = next((line for line in results["lines"] if line["kind"] == "average"), None)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes(results, settings)]
    if average is not None:
        parts += [
            "<h2>Score, mean of all tasks</h2>",
            _bars(average["scores"], "Average score by way of reading", "{:.2f}"),
        ]
        for base, against in average["against"].items():
            label = f"Share of the score of {base}"
            parts += [f"<h2>{html.escape(label)}</h2>", _bars(against, label, "{:.3f}")]
    parts += [f"<h2>{html.escape(name)}</h2>\n{_table(rows)}" for name, rows in tables(results)]
    versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items() if version)
    machine = session["machine"]
    parts.append(
        f"<p>{html.escape(machine['gpu'] or machine['cpu'])}, {machine['threads']} threads; {html.escape(versions)}; "
        f"commit {html.escape(str(session['commit'])[:12])}.</p>"
    )
    return (
        _PAGE.replace("%TITLE%", html.escape(title))
        .replace("%STYLE%", style())
        .replace("%VERSION%", html.escape(__version__))
        .replace("%BODY%", "\n".join(parts))
    )


def _bars(cells: dict[str, Any], label: str, form: str) -> str:
    """Horizontal bars with their intervals as an SVG."""
    shown = {name: cell for name, cell in cells.items() if cell is not None}
    most = max((cell["high"] for cell in shown.values()), default=0.0) or 1.0
    scale = (_WIDTH - _NAMES - _VALUES) / most
    parts = []
    for at, (name, cell) in enumerate(shown.items()):
        top = at * _ROW + (_ROW - _BAR) / 2
        middle, text = (
            top + _BAR / 2,
            f"{form.format(cell['value'])} [{form.format(cell['low'])}, {form.format(cell['high'])}]",
        )
        low, high = _NAMES + scale * cell["low"], _NAMES + scale * cell["high"]
        parts.append(
            f'<text x="{_NAMES - 8}" y="{middle + 4:.1f}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="{_NAMES}" y="{top:.1f}" width="{scale * cell["value"]:.1f}" height="{_BAR}" '
            f'fill="var({_COLOURS[at % len(_COLOURS)]})"/>'
            f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8" '
            f'stroke="var(--ink)" fill="none"/>'
            f'<text x="{high + 8:.1f}" y="{middle + 4:.1f}">{text}</text>'
        )
    height = max(1, len(shown)) * _ROW
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {_WIDTH} {height}" '
        f'style="height:auto;max-width:{_WIDTH}px">{"".join(parts)}</svg>'
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>imdc - %TITLE%</title>
<style>%STYLE%</style>
</head>
<body>
%BODY%
<p>imdc %VERSION%</p>
</body>
</html>
"""
