"""Draw docs/schedule.svg: the steps of the schedules "fm", "im" and "imdc", computed by imdc itself.

    python docs/draw_schedule.py

Each bar is one step of a prefill: the KV pairs of memory that it starts with, and on top the chunk of the prompt that
it reads. The settings are imdc's defaults.
"""

from __future__ import annotations

from pathlib import Path

from imdc.config import PrefillConfig
from imdc.schedule import Step, build_steps

TARGET = Path(__file__).with_name("schedule.svg")
PROMPT_TOKENS = 32_768
PANELS = {
    "fm": "FM: fixed memory, equal chunks",
    "im": "IM: memory grows, equal chunks",
    "imdc": "IMDC: memory grows, chunks shrink",
}

_MEMORY, _CHUNK, _INK, _PALE = "#3b6ea8", "#f2a54a", "#24292f", "#57606a"
_WIDTH, _HEIGHT = 900, 330
_LEFT, _TOP, _PLOT_HEIGHT = 20, 78, 200
_PANEL, _GAP = 270, 25


def draw() -> str:
    """The picture as SVG text."""
    steps = {name: build_steps(PROMPT_TOKENS, PrefillConfig(schedule=name)) for name in PANELS}
    tallest = max(step.attended_tokens for panel in steps.values() for step in panel)
    config = PrefillConfig()
    caption = (
        f"{PROMPT_TOKENS:,} prompt tokens, chunk_tokens={config.chunk_tokens}, memory_tokens={config.memory_tokens}: "
        f"each bar is one of {len(steps['imdc'])} steps"
    )
    lines = [text(_LEFT, 24, caption)]
    x = _LEFT
    for colour, label in ((_MEMORY, "memory: KV pairs kept per layer and head"), (_CHUNK, "chunk: tokens being read")):
        lines += [f'<rect x="{x}" y="36" width="12" height="12" fill="{colour}"/>', text(x + 18, 47, label)]
        x += 340
    for number, (name, title) in enumerate(PANELS.items()):
        lines += _panel(_LEFT + number * (_PANEL + _GAP), title, steps[name], tallest)
    return svg(_WIDTH, _HEIGHT, "Memory and chunk of every step, by schedule", lines)


def svg(width: int, height: int, label: str, lines: list[str]) -> str:
    """A picture of these elements on white, as SVG text; `label` says what it shows."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{label}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *lines, "</svg>", ""])


def text(x: float, y: float, words: str, *, colour: str = _INK, weight: str = "normal") -> str:
    """A line of text that begins at x, y."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-weight="{weight}">{words}</text>'


def _panel(left: int, title: str, steps: tuple[Step, ...], tallest: int) -> list[str]:
    """Bars of one schedule, its level and its title; `tallest` tokens reach the top of the plot."""
    bottom = _TOP + _PLOT_HEIGHT
    pitch = _PANEL / len(steps)
    highest = max(step.attended_tokens for step in steps)

    def height(tokens: int) -> float:
        return _PLOT_HEIGHT * tokens / tallest

    lines = []
    for step in steps:
        x, base = left + step.index * pitch, bottom - height(step.memory_before)
        if step.memory_before:
            lines.append(_bar(x, base, pitch, height(step.memory_before), _MEMORY))
        lines.append(_bar(x, base - height(step.chunk_tokens), pitch, height(step.chunk_tokens), _CHUNK))
    level = bottom - height(highest)
    lines += [
        f'<path d="M{left} {level:.1f}H{left + _PANEL}" stroke="{_INK}" stroke-dasharray="4 3"/>',
        text(left, level - 6, f"at most {highest:,} tokens"),
        f'<path d="M{left} {bottom}H{left + _PANEL}" stroke="{_PALE}"/>',
        text(left, bottom + 20, title, weight="bold"),
        text(left, bottom + 38, "first step to last step, left to right", colour=_PALE),
    ]
    return lines


def _bar(x: float, y: float, pitch: float, height: float, colour: str) -> str:
    return f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{pitch - 2:.1f}" height="{height:.1f}" fill="{colour}"/>'


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
