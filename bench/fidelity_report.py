"""From answers to figures: scores with bootstrap intervals, paired differences to FM, time; a table and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fidelity_ways import method_of
from longbench_scores import DRAWS, ends
from longbench_ways import Amount

# Columns that carry an interval: key of a sample, factor, heading, format.
_MEASURES = (
    ("score", 100.0, "score", "{:.1f}"),
    ("gold_nats", 1.0, "nats, gold answer", "{:.3f}"),
    ("own_nats", 1.0, "nats, full's answer", "{:.3f}"),
)
_BASE = "fm"
_NOTE = (
    "Scores are F1 (QA) or the share of answers found, times 100. Nats are the mean negative log-likelihood of an "
    "answer's tokens, the right one's (for a novel's tail: of how it goes on) or the unpatched model's own; less is "
    "better. Brackets hold 95% intervals over questions drawn anew; differences are paired with FM at the same memory. "
    "Seconds are means per question."
)


def summarize(samples: Sequence[Mapping[str, Any]], names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """One line per model, group of questions and way, over the questions that every way of `names` has answered.

    Differences are paired, question by question, with FM at the same share of memory. Intervals are of 95%, from
    questions drawn anew, the same draws for all ways.
    """
    answers: dict[tuple[str, str], dict[str, dict[tuple[str, str], Mapping[str, Any]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for sample in samples:
        if sample["way"] in names:
            answers[sample["model"], sample["group"]][sample["way"]][sample["task"], sample["id"]] = sample
    lines = []
    for (model, group), by_way in answers.items():
        common = sorted(set.intersection(*(set(by_way[name]) for name in names)))
        if not common:
            continue
        draws = np.random.default_rng(seed).integers(0, len(common), (DRAWS, len(common)))
        for name in names:
            method, share = method_of(name)
            own = [by_way[name][key] for key in common]
            base = by_way.get(f"{_BASE}@{share}")
            line: dict[str, Any] = {
                "model": model,
                "questions": group,
                "method": method,
                "memory": share,
                "count": len(common),
                "prompt_tokens": [min(s["prompt_tokens"] for s in own), max(s["prompt_tokens"] for s in own)],
                "ttft_cpu_seconds": sum(s["ttft_cpu_seconds"] for s in own) / len(own),
                "ttft_seconds": sum(s["ttft_seconds"] for s in own) / len(own),
                "seconds": sum(s["seconds"] for s in own) / len(own),
            }
            for measure, factor, _, _ in _MEASURES:
                if any(s[measure] is None for s in own):
                    continue
                values = factor * np.array([s[measure] for s in own])
                line[measure] = _interval(values, draws)
                if base is not None and method != _BASE:
                    theirs = factor * np.array([base[key][measure] for key in common])
                    line[f"{measure}_against_{_BASE}"] = _interval(values - theirs, draws)
            lines.append(line)
    return lines


def _interval(values: np.ndarray, draws: np.ndarray) -> list[float]:
    """[mean, low, high] of one value per question."""
    return [round(float(one), 4) for one in (values.mean(), *ends(values[draws].mean(axis=1)))]


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines as one table, with what a reader has to know below it."""
    heads = ["model", "questions", "n", "memory", "method"]
    heads += [head for _, _, title, _ in _MEASURES for head in (title, f"- {_BASE}")]
    rows = [[*heads, "TTFT, processor", "TTFT", "with answer"]]
    for line in lines:
        row = [line["model"], line["questions"], str(line["count"]), line["memory"] or "all", line["method"]]
        for measure, _, _, form in _MEASURES:
            row += [_cell(line.get(key), form) for key in (measure, f"{measure}_against_{_BASE}")]
        row += [f"{line[clock]:.1f} s" for clock in ("ttft_cpu_seconds", "ttft_seconds", "seconds")]
        rows.append(row)
    head, *body = rows
    ruled = (head, ["---"] * 2 + ["---:"] * 2 + ["---"] + ["---:"] * (len(head) - 5), *body)
    table = "\n".join(f"| {' | '.join(row)} |" for row in ruled)
    return f"{table}\n\n{_NOTE}\n"


def _cell(interval: Sequence[float] | None, form: str) -> str:
    if interval is None:
        return ""
    mean, low, high = (form.format(one) for one in interval)
    return f"{mean} [{low}, {high}]"


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Score (nats where there is none) over memory, a curve per method, a panel per model and group of questions.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((line["model"], line["questions"]) for line in lines))
    if not panels:
        return
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.5), layout="constrained", squeeze=False
    )
    for (model, group), axis in zip(panels, axes[0], strict=True):
        own = [line for line in lines if (line["model"], line["questions"]) == (model, group)]
        measure = "score" if "score" in own[0] else "gold_nats"
        for at, method in enumerate(dict.fromkeys(line["method"] for line in own)):
            curve = [line for line in own if line["method"] == method]
            if not curve[0]["memory"]:
                axis.axhline(curve[0][measure][0], color="black", linestyle="--", label=method)
                continue
            curve.sort(key=lambda line: _share(line["memory"]))
            means, lows, highs = (np.array([line[measure][place] for line in curve]) for place in range(3))
            # Apart from each other by a little, so that the intervals can be told.
            places = [_share(line["memory"]) * 1.03**at for line in curve]
            axis.errorbar(places, means, yerr=(means - lows, highs - means), marker="o", capsize=3, label=method)
        axis.set_xscale("log", base=2)
        axis.set(title=f"{model}, {group}, n = {own[0]['count']}", xlabel="memory, share of the prompt", ylabel=measure)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _share(text: str) -> float:
    million = 1_000_000
    return Amount.parse(text).of(million) / million
