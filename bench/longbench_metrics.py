"""LongBench's scores: lm-evaluation-harness's metric functions, by the official rules where the two differ.

They differ here, and the official rule is followed (`eval.py` and `metrics.py` of THUDM/LongBench):

- lm-eval stops few-shot answers at the first newline; officially the leading newlines go first, then all but one line.
- lm-eval strips every prediction; officially nothing is stripped.
- code: lm-eval skips blank lines in front; officially only leading newlines go, and a line of blanks counts.
- code: fuzzywuzzy, which the official code calls, counts by difflib, but by python-Levenshtein where that happens to be
  installed, tens of points apart. Here it is always difflib, so that a score does not depend on the environment.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from longbench_tasks import INSTALL, Task, TaskError, harness_folder


def score(task: Task, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None) -> float:
    """The best score over `answers`, 0 to 1, as the official `scorer` counts it before the mean."""
    if task.first_line_only:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max([0.0, *(_one(task.metric, prediction, answer, all_classes) for answer in answers)])


def code_similarity(prediction: str, answer: str) -> float:
    """Similarity of the first line of code to `answer`: `fuzz.ratio` of fuzzywuzzy without python-Levenshtein / 100."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not ("`" in line or "#" in line or "//" in line)), "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def _one(metric: str, prediction: str, answer: str, all_classes: Sequence[str] | None) -> float:
    if metric == "code_sim":
        return code_similarity(prediction, answer)
    return float(getattr(_harness_metrics(), f"{metric}_score")(prediction, answer, all_classes=all_classes))


@cache
def _harness_metrics() -> Any:
    """lm-eval's `tasks/longbench/metrics.py`, loaded as lm-eval loads it: by its path.

    Raises:
        TaskError: a package it needs is missing.
    """
    spec = importlib.util.spec_from_file_location("longbench_harness_metrics", harness_folder() / "metrics.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        # fuzzywuzzy recommends python-Levenshtein; see above.
        warnings.simplefilter("ignore")
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            raise TaskError(f"LongBench's metrics need jieba, fuzzywuzzy and rouge: {INSTALL}") from error
    module.jieba.setLogLevel(logging.WARNING)
    return module
