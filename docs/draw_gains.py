"""Draw docs/gains.svg: what each way of retaining gains or loses against a memory of fixed size, as it was measured.

    python docs/draw_gains.py

Each mark is by how much less or more likely the unpatched model's own answers are than with `fm` at the same memory,
with its 95% interval, from a result file of `bench/fidelity.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from draw_schedule import svg, text

TARGET = Path(__file__).with_name("gains.svg")
_RESULTS = TARGET.parents[1] / "bench" / "results"
# Method of bench/fidelity.py: what it is called here.
METHODS = {
    "one-shot": "compressed once, at the end",
    "imdc": "imdc",
    "imdc:layer_budget=pyramid": 'layer_budget="pyramid"',
    "imdc:layer_budget=adaptive": 'layer_budget="adaptive"',
    "imdc:layer_budget=entropy": 'layer_budget="entropy"',
    "imdc:scoring=attention": 'scoring="attention"',
    "imdc:preset=paper": 'preset="paper"',
    "append-only": "each chunk once, for good",
    "imdc:recall=host": 'recall="host"',
}

_MARK, _INK, _PALE = "#3b6ea8", "#24292f", "#57606a"
_WIDTH, _LEFT, _TOP, _ROW = 900, 230, 84, 26
_PANEL, _GAP, _NUMBERS = 235, 20, 70
_TICKS = (-0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 1.5)
LEAST, MOST = -0.6, 1.9


@dataclass(frozen=True, slots=True)
class Panel:
    """One measurement: a result file of `bench/fidelity.py` and the lines of it that count.

    Attributes:
        file: in bench/results.
        questions: which group of questions.
        title: what was measured.
    """

    file: str
    questions: str
    title: str

    def measured(self) -> tuple[int, dict[str, tuple[float, float, float]]]:
        """Questions that every method answered, and (mean, low, high) in nats a token against `fm`, by method."""
        lines = json.loads((_RESULTS / self.file).read_text(encoding="utf-8"))["lines"]
        own = [line for line in lines if line["questions"] == self.questions]
        gains = {line["method"]: tuple(line["own_nats_against_fm"]) for line in own if "own_nats_against_fm" in line}
        return own[0]["count"], {method: gains[method] for method in METHODS if method in gains}


PANELS = (
    Panel("fidelity-20261126-140634.json", "needle", "needles, SmolLM2, memory 1/16"),
    Panel("fidelity-20261127-154559.json", "QA", "real questions, Gemma 3, memory 1/8"),
)


def draw() -> str:
    """The picture as SVG text."""
    bottom = _TOP + len(METHODS) * _ROW
    lines = [text(20, 24, "Nats a token that the unpatched model's own answers cost, minus what they cost with fm:")]
    lines.append(
        text(20, 44, "left of the line is better. 95% intervals; the scale is that of square roots.", colour=_PALE)
    )
    for row, name in enumerate(METHODS.values()):
        lines.append(text(20, _TOP + row * _ROW + 17, name))
    for number, panel in enumerate(PANELS):
        lines += _panel(panel, _LEFT + number * (_PANEL + _NUMBERS + _GAP), bottom)
    return svg(_WIDTH, bottom + 50, "What each way gains or loses against fm", lines)


def _panel(panel: Panel, left: int, bottom: int) -> list[str]:
    count, gains = panel.measured()
    lines = [text(left, _TOP - 12, f"{panel.title}, n = {count}", weight="bold")]
    for tick in _TICKS:
        x, colour = _place(tick, left), _INK if tick == 0 else "#d0d7de"
        lines.append(f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="{colour}"/>')
        lines.append(text(x - 9, bottom + 18, f"{tick:g}", colour=_PALE))
    for row, method in enumerate(METHODS):
        y = _TOP + row * _ROW + 12.5
        if method not in gains:
            lines.append(text(left + _PANEL + 8, y + 4.5, "not run", colour=_PALE))
            continue
        mean, low, high = gains[method]
        lines += [
            f'<path d="M{_place(low, left):.1f} {y}H{_place(high, left):.1f}" stroke="{_MARK}" stroke-width="2"/>',
            f'<circle cx="{_place(mean, left):.1f}" cy="{y}" r="4.5" fill="{_MARK}"/>',
            text(left + _PANEL + 8, y + 4.5, signed(mean)),
        ]
    return lines


def signed(nats: float) -> str:
    """A difference with its sign, and nothing without a minus."""
    return f"{nats:+.2f}".replace("-0.00", "+0.00")


def _place(nats: float, left: float) -> float:
    """Where a difference lies: square roots show small ones and large ones."""

    def root(value: float) -> float:
        return math.copysign(math.sqrt(abs(value)), value)

    return left + _PANEL * (root(nats) - root(LEAST)) / (root(MOST) - root(LEAST))


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
