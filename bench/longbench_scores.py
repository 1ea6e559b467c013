"""From answers to figures: means per task, category and average, with bootstrap intervals and paired ratios.

Scores are means times 100, as the official code prints them; a category is the mean of its tasks, and the averages are
over tasks ("all tasks") or, as in the official tables, over the categories of a language ("English", "Chinese").
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from longbench_tasks import CATEGORIES, Task
from longbench_ways import FULL, Way

DRAWS = 2000
_LEVEL = 0.95
LANGUAGES = {"en": "English", "zh": "Chinese"}
# LongBench-E's buckets by the official length, as its `scorer_e` names them: label, below.
BUCKETS = (("0-4k", 4000), ("4-8k", 8000), ("8k+", None))

# Time to the first token on the wall, and of the processor, which other work on the machine does not change.
CLOCKS = ("ttft_seconds", "ttft_cpu_seconds")

Table = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure, the ends of its 95% interval, and the number of records it rests on."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: a task, category or average.

    Attributes:
        label: what it is of.
        kind: "task", "category", "language" or "average".
        scores: by way, 0 to 100.
        against: by base (the unpatched model, FM) and way: the share of the base's score, over the answers both have.
    """

    label: str
    kind: str
    scores: dict[str, Cell | None]
    against: dict[str, dict[str, Cell | None]]


def lines(samples: Sequence[Mapping[str, Any]], tasks: Sequence[Task], ways: Sequence[Way], seed: int) -> list[Line]:
    """The table: tasks, their categories, averages."""
    table = _table(samples, tasks, ways)
    if not table:
        return []
    present = [task for task in tasks if task.name in table]
    names = [way.name for way in ways]
    alone = {way: {name: scores[[at]] for name, scores in table.items()} for at, way in enumerate(names)}
    alone_means = {way: _means(own, seed) for way, own in alone.items()}
    bases = base_ways(ways)
    pairs = {
        (base, way): {name: scores[[names.index(way), names.index(base)]] for name, scores in table.items()}
        for base in bases
        for way in names
        if way != base
    }
    pair_means = {pair: _means(own, seed) for pair, own in pairs.items()}
    found = []
    for label, kind, members in _groups(present):
        scores = {
            way: _cell(100 * _combine(alone_means[way], members)[0], _count(alone[way], members)) for way in names
        }
        against: dict[str, dict[str, Cell | None]] = {base: {} for base in bases}
        for (base, way), means in pair_means.items():
            against[base][way] = _ratio(_combine(means, members), _count(pairs[base, way], members))
        found.append(Line(label, kind, scores, against))
    return found


def base_ways(ways: Sequence[Way]) -> list[str]:
    """The ways that the others are held against: the unpatched model and the first FM, as far as they are there."""
    firsts = [next((way.name for way in ways if way.schedule == schedule), None) for schedule in (FULL, "fm")]
    return [name for name in firsts if name is not None and len(ways) > 1]


def buckets(samples: Sequence[Mapping[str, Any]], tasks: Sequence[Task], ways: Sequence[Way]) -> list[dict[str, Any]]:
    """LongBench-E's scores by length, the mean over tasks last; empty where no record has an official length."""
    by_place: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for sample in samples:
        if sample.get("length") is not None and sample.get("score") is not None:
            label = next(label for label, below in BUCKETS if below is None or sample["length"] < below)
            by_place[sample["task"], label, sample["key"]].append(sample["score"])
    rows: list[dict[str, Any]] = []
    for task in tasks:
        for label, _ in BUCKETS:
            means = {way.name: _mean(by_place[task.name, label, way.key]) for way in ways}
            if any(mean is not None for mean in means.values()):
                rows.append({"task": task.name, "bucket": label, "scores": means})
    for label, _ in BUCKETS:
        of_label = [row["scores"] for row in rows if row["bucket"] == label]
        if of_label:
            shown = {}
            for way in ways:
                means_of = [scores[way.name] for scores in of_label if scores[way.name] is not None]
                shown[way.name] = round(sum(means_of) / len(means_of), 2) if means_of else None
            rows.append({"task": "all tasks", "bucket": label, "scores": shown})
    return rows


def costs(samples: Sequence[Mapping[str, Any]], ways: Sequence[Way]) -> dict[str, dict[str, Any]]:
    """By way: medians and totals of time and memory; ratios of time are over the answers that both have."""
    done = {
        way.name: {(s["task"], s["id"]): s for s in samples if s["key"] == way.key and "error" not in s} for way in ways
    }
    found = {}
    for way in ways:
        own = list(done[way.name].values())
        values: dict[str, Any] = {
            "answers": len(own),
            "failed": sum(s["key"] == way.key and "error" in s for s in samples),
            "prompt_tokens": sum(s["prompt_tokens"] for s in own),
            "ttft_seconds_median": _median([s["ttft_seconds"] for s in own]),
            "ttft_cpu_seconds_median": _median([s["ttft_cpu_seconds"] for s in own]),
            "seconds_total": sum(s["seconds"] for s in own),
            "decode_tokens_per_second_median": _median([s["decode_tokens_per_second"] for s in own]),
            "peak_bytes_median": _median([s["peak_bytes"] for s in own]),
            "peak_bytes_most": max((s["peak_bytes"] for s in own if s["peak_bytes"] is not None), default=None),
            "kv_bytes_most": max((s["kv_bytes"] for s in own if "kv_bytes" in s), default=None),
            "peak_kind": own[0]["peak_kind"] if own else None,
        }
        for base in base_ways(ways):
            for clock in CLOCKS:
                values[f"{clock} against {base}"] = _share(done[way.name], done[base], clock)
        found[way.name] = values
    return found


def _share(own: Mapping[Any, Any], base: Mapping[Any, Any], clock: str) -> float | None:
    """Total time of `own` over that of `base`, for the answers that both have."""
    pairs = [(own[key][clock], base[key][clock]) for key in own.keys() & base.keys()]
    known = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
    mine, theirs = (sum(times) for times in zip(*known, strict=True)) if known else (0.0, 0.0)
    return mine / theirs if theirs else None


def _table(samples: Sequence[Mapping[str, Any]], tasks: Sequence[Task], ways: Sequence[Way]) -> Table:
    """Task to scores [way, record], NaN where a way has no answer; records are sorted, so that draws are repeatable."""
    rows = {way.key: at for at, way in enumerate(ways)}
    table = {}
    for task in tasks:
        own = [s for s in samples if s["task"] == task.name and s["key"] in rows and s.get("score") is not None]
        columns = {name: at for at, name in enumerate(sorted({s["id"] for s in own}))}
        if not columns:
            continue
        scores = np.full((len(ways), len(columns)), np.nan)
        for sample in own:
            scores[rows[sample["key"]], columns[sample["id"]]] = sample["score"]
        table[task.name] = scores
    return table


def _groups(tasks: Sequence[Task]) -> list[tuple[str, str, list[list[str]]]]:
    """Label, kind and members of each line: a mean over means of tasks."""
    found = [(task.name, "task", [[task.name]]) for task in tasks]
    by_category = {category: [task.name for task in tasks if task.category == category] for category in CATEGORIES}
    found += [(category, "category", [[name] for name in names]) for category, names in by_category.items() if names]
    for language, title in LANGUAGES.items():
        own = [[t.name for t in tasks if t.category == c and t.language in (language, "both")] for c in CATEGORIES]
        if any(task.language == language for task in tasks):
            found.append((title, "language", [names for names in own if names]))
    return [*found, ("all tasks", "average", [[task.name] for task in tasks])]


def _means(table: Table, seed: int) -> dict[str, np.ndarray]:
    """Task to means [way, 1 + DRAWS] over its records: of all of them first, then of each draw with replacement.

    The draws of a task depend on `seed`, its name and its size alone: ways and bases are drawn alike, hence paired.
    """
    found = {}
    for name, scores in table.items():
        kept = scores[:, np.isfinite(scores).all(axis=0)]
        count = kept.shape[1]
        if count == 0:
            found[name] = np.full((scores.shape[0], 1 + DRAWS), np.nan)
            continue
        rng = np.random.default_rng([seed, *name.encode()])
        drawn = kept[:, rng.integers(0, count, (DRAWS, count))].mean(axis=2)
        found[name] = np.concatenate((kept.mean(axis=1, keepdims=True), drawn), axis=1)
    return found


def _combine(means: dict[str, np.ndarray], members: list[list[str]]) -> np.ndarray:
    """Mean over groups of the mean over their tasks: [way, 1 + DRAWS]; tasks without an answer are left out."""
    inner = []
    for names in members:
        present = [means[name] for name in names if np.isfinite(means[name]).all()]
        if present:
            inner.append(np.mean(present, axis=0))
    return np.mean(inner, axis=0) if inner else np.full((next(iter(means.values())).shape[0], 1 + DRAWS), np.nan)


def _count(table: Table, members: list[list[str]]) -> int:
    """Records of which all ways of `table` have an answer."""
    return sum(int(np.isfinite(table[name]).all(axis=0).sum()) for names in members for name in names)


def _ratio(means: np.ndarray, count: int) -> Cell | None:
    mine, base = means
    # Where the base scores nothing, there is no share of it.
    return _cell(np.divide(mine, base, out=np.full_like(mine, np.nan), where=base > 0), count)


def _cell(values: np.ndarray, count: int) -> Cell | None:
    if not np.isfinite(values[0]):
        return None
    return Cell(float(values[0]), *ends(values[np.isfinite(values)]), count)


def ends(drawn: np.ndarray) -> tuple[float, float]:
    """The ends of the 95% interval of a figure, of which `drawn` are the values on records drawn anew."""
    edge = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, (edge, 1 - edge))
    return float(low), float(high)


def _mean(scores: list[float]) -> float | None:
    return round(100 * sum(scores) / len(scores), 2) if scores else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
