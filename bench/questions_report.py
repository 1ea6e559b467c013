"""From the lines of `questions.py` to figures: scores and seconds by way of reading, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from longbench_scores import DRAWS, ends
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figures:
    """What one way of reading found in the documents that it read.

    Attributes:
        model: its name.
        data: what was read.
        way: of reading.
        memory: share of a document that it retains.
        documents: how many were read.
        score: sum over the questions.
        questions: how many were asked.
        of_full: score as a share of what full attention has on the same documents, and the ends of its 95% interval,
            from documents drawn anew; None where that was not run, or has nothing.
        in_common: score of the questions that both ways answer, the lower of the two for each; None without "full".
        alike: answers that are full attention's word for word, as a share; None without "full".
        read_seconds: mean of a document's reading, over all of its readings.
        question_seconds: mean of a question, reading not counted.
        all_in_seconds: the same with the question's share of the reading.
    """

    model: str
    data: str
    way: str
    memory: str
    documents: int
    score: float
    questions: int
    of_full: tuple[float, float, float] | None
    in_common: float | None
    alike: float | None
    read_seconds: float
    question_seconds: float
    all_in_seconds: float


def document_of(line: dict[str, Any]) -> tuple[str, str, int]:
    """Which document was read by which model."""
    return line["model"], line["data"], line["seed"]


def figures(lines: Sequence[dict[str, Any]]) -> Iterator[Figures]:
    """By model, data, way and memory."""
    groups: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["model"], line["data"], line["way"], line["share"]), []).append(line)
    full = {document_of(line): line for line in lines if line["way"] == "full"}
    for (model, data, way, share), group in groups.items():
        count = sum(len(line["scores"]) for line in group)
        # Over the same documents alone.
        both = [(line, full[document_of(line)]) for line in group if document_of(line) in full]
        pairs = [(line["scores"], base["scores"]) for line, base in both]
        answers = [pair for line, base in both for pair in zip(line["answers"], base["answers"], strict=True)]
        read = sum(line["read_seconds"] for line in group)
        each = sum(sum(line["question_seconds"]) for line in group) / count
        yield Figures(
            model,
            data,
            way,
            memory="all" if way == "full" else f"1/{share}",
            documents=len(group),
            score=sum(sum(line["scores"]) for line in group),
            questions=count,
            of_full=_share(pairs),
            in_common=sum(min(scores) for pair in pairs for scores in zip(*pair, strict=True)) if pairs else None,
            alike=sum(own == base for own, base in answers) / len(answers) if answers else None,
            read_seconds=read / len(group),
            question_seconds=each,
            all_in_seconds=read / count + each,
        )


def _share(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float, float] | None:
    """(share, low, high): each document's first scores against its second ones; None where those are nothing."""
    sums = np.array([[sum(scores) for scores in pair] for pair in pairs]).reshape(-1, 2)
    own, base = sums.sum(axis=0)
    if not base:
        return None
    draws = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    drawn_own, drawn_base = sums[draws].sum(axis=1).T
    return float(own / base), *ends(drawn_own[drawn_base > 0] / drawn_base[drawn_base > 0])


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Scores and seconds; the last column has its share of the reading in it."""
    shown = Table(title="One read, many questions", title_justify="left")
    left = ("model", "data", "way")
    figured = (
        "memory",
        "documents",
        "score",
        "of",
        "of full's [95%]",
        "in common",
        "alike",
        "read s",
        "question s",
        "all in s",
    )
    for heading in (*left, *figured):
        shown.add_column(heading, justify="left" if heading in left else "right")
    for one in figures(lines):
        ratio = "" if one.of_full is None else "{:.2f} [{:.2f}, {:.2f}]".format(*one.of_full)
        common = "" if one.in_common is None else _points(one.in_common)
        alike = "" if one.alike is None else f"{one.alike:.2f}"
        times = (f"{seconds:.2f}" for seconds in (one.read_seconds, one.question_seconds, one.all_in_seconds))
        cells = (one.memory, str(one.documents), _points(one.score), str(one.questions), ratio, common, alike, *times)
        shown.add_row(one.model, one.data, one.way, *cells)
    return shown


def _points(score: float) -> str:
    return f"{score:.0f}" if score == int(score) else f"{score:.1f}"


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Share of the answers that were right over the seconds of a question, a point for each way, a panel for each data.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = list(figures(lines))
    panels = list(dict.fromkeys((one.model, one.data) for one in found))
    if not panels:
        return
    canvas, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), layout="constrained", squeeze=False)
    for (model, data), axis in zip(panels, axes[0], strict=True):
        own = [one for one in found if (one.model, one.data) == (model, data)]
        for one in own:
            axis.scatter(one.all_in_seconds, one.score / one.questions, color="black" if one.way == "full" else None)
            axis.annotate(
                f"{one.way} {one.memory}",
                (one.all_in_seconds, one.score / one.questions),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize="small",
            )
        axis.set(
            title=f"{model}, {data}, {max(one.questions for one in own)} questions",
            xlabel="seconds per question, its share of the reading included",
            ylabel="score",
            # Room for the names at the right.
            xlim=(0, 1.25 * max(one.all_in_seconds for one in own)),
            ylim=(-0.05, 1.05),
        )
    canvas.savefig(path, dpi=150)
    pyplot.close(canvas)
