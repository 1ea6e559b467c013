"""LongBench's tasks: prompts and lengths out of lm-evaluation-harness, and the rules it does not keep.

Categories, metrics, chat-template exceptions and the 13 tasks of LongBench-E are those of the official code
(https://github.com/THUDM/LongBench, `pred.py`, `eval.py`, `config/`).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from imdc.errors import ImdcError, did_you_mean

INSTALL = 'pip install -e ".[bench]"'

# Category, language, metric of lm-eval's module `metrics` (its name without "_score").
_RULES = {
    "narrativeqa": ("single-document QA", "en", "qa_f1"),
    "qasper": ("single-document QA", "en", "qa_f1"),
    "multifieldqa_en": ("single-document QA", "en", "qa_f1"),
    "multifieldqa_zh": ("single-document QA", "zh", "qa_f1_zh"),
    "hotpotqa": ("multi-document QA", "en", "qa_f1"),
    "2wikimqa": ("multi-document QA", "en", "qa_f1"),
    "musique": ("multi-document QA", "en", "qa_f1"),
    "dureader": ("multi-document QA", "zh", "rouge_zh"),
    "gov_report": ("summarization", "en", "rouge"),
    "qmsum": ("summarization", "en", "rouge"),
    "multi_news": ("summarization", "en", "rouge"),
    "vcsum": ("summarization", "zh", "rouge_zh"),
    "trec": ("few-shot", "en", "classification"),
    "triviaqa": ("few-shot", "en", "qa_f1"),
    "samsum": ("few-shot", "en", "rouge"),
    "lsht": ("few-shot", "zh", "classification"),
    "passage_count": ("synthetic", "en", "count"),
    "passage_retrieval_en": ("synthetic", "en", "retrieval"),
    "passage_retrieval_zh": ("synthetic", "zh", "retrieval_zh"),
    # The official tables count code in both languages.
    "lcc": ("code", "both", "code_sim"),
    "repobench-p": ("code", "both", "code_sim"),
}
CATEGORIES = tuple(dict.fromkeys(category for category, _, _ in _RULES.values()))
NAMES = tuple(_RULES)
NAMES_E = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
GROUPS = {"longbench": NAMES, "longbench_e": NAMES_E}

# "Chat models are better off without build prompts on these tasks" (pred.py).
_WITHOUT_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
_FIRST_LINE_ONLY = ("trec", "triviaqa", "samsum", "lsht")

# Where the prompts of lm-eval 0.4.13 end or are joined otherwise than in the official dataset2prompt.json: (lm-eval's
# text, the official one).
CORRECTIONS = {
    "triviaqa": ("{{context}}\n{{question}}", "{{context}}\n\n{{question}}"),
    "samsum": ("{{context}}\n{{question}}", "{{context}}\n\n{{question}}"),
    "passage_count": ("The final answer is:", "The final answer is: "),
    "passage_retrieval_en": ("The answer is:", "The answer is: "),
    "lcc": ("Next line of code:", "Next line of code:\n"),
    "repobench-p": ("Next line of code:", "Next line of code:\n"),
}

# Reads lm-eval's task files; a `!function` stays the text it is.
_LOADER: Any = type("_Loader", (yaml.SafeLoader,), {})
_LOADER.add_constructor("!function", lambda loader, node: node.value)


class TaskError(ImdcError, ValueError):
    """No such task, or lm-evaluation-harness is missing or another than expected."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task of LongBench.

    Attributes:
        name: as in the official code.
        category: one of `CATEGORIES`.
        language: "en", "zh", or "both" for code.
        metric: the metric's name without "_score".
        template: the prompt with `{{context}}` and `{{question}}`.
        max_new_tokens: longest answer.
        chat: whether the prompt goes into the model's chat template.
        first_line_only: whether only the answer's first line is scored.
    """

    name: str
    category: str
    language: str
    metric: str
    template: str
    max_new_tokens: int
    chat: bool
    first_line_only: bool

    def fill(self, context: str, question: str) -> str:
        """The prompt for one record; braces inside the texts stay what they are."""
        head, tail = self.frame
        return head + context + tail.replace("{{question}}", question)

    @property
    def frame(self) -> tuple[str, str]:
        """The prompt before and after the context."""
        head, _, tail = self.template.partition("{{context}}")
        return head, tail


def harness_folder() -> Path:
    """Folder of lm-eval's LongBench tasks; the package itself, which takes seconds to import, is not imported.

    Raises:
        TaskError: lm-eval is not installed, or has no LongBench.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise TaskError(f"LongBench's prompts and metrics come with lm-evaluation-harness: {INSTALL}")
    folder = Path(spec.origin).parent / "tasks" / "longbench"
    if not folder.is_dir():
        raise TaskError(f"the lm-eval that is installed has no tasks/longbench; take 0.4.13: {INSTALL}")
    return folder


@cache
def get_task(name: str) -> Task:
    """The task `name`, which must be one of `NAMES`.

    Raises:
        TaskError: lm-eval is missing, or its prompt is not the one this file corrects.
    """
    category, language, metric = _RULES[name]
    path = harness_folder() / f"{name}.yaml"
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    template = str(config["doc_to_text"])
    if name in CORRECTIONS:
        theirs, official = CORRECTIONS[name]
        if not template.endswith(theirs):
            raise TaskError(f"lm-eval's prompt of {name} no longer ends with {theirs!r}: look at it and at CORRECTIONS")
        template = template.removesuffix(theirs) + official
    return Task(
        name=name,
        category=category,
        language=language,
        metric=metric,
        template=template,
        max_new_tokens=int(config["generation_kwargs"]["max_gen_toks"]),
        chat=name not in _WITHOUT_CHAT,
        first_line_only=name in _FIRST_LINE_ONLY,
    )


def choose_tasks(text: str) -> tuple[list[Task], bool]:
    """The tasks of `--tasks`, and whether they are those of LongBench-E.

    Args:
        text: names with commas between them: "longbench", "longbench_e", tasks, or tasks of LongBench-E ("qasper_e").

    Raises:
        TaskError: a name is unknown, or LongBench and LongBench-E are mixed.
    """
    known = [*GROUPS, *NAMES, *(f"{name}_e" for name in NAMES_E)]
    names: list[str] = []
    extended: set[bool] = set()
    for word in filter(None, (word.strip() for word in text.split(","))):
        if word not in known:
            raise TaskError(f"unknown task {word!r}.{did_you_mean(word, known)} Tasks are: {', '.join(known)}")
        is_extended = word not in NAMES and word.endswith("_e")
        names += GROUPS.get(word, (word.removesuffix("_e") if is_extended else word,))
        extended.add(is_extended)
    if not names:
        raise TaskError(f"--tasks {text!r} names no task")
    if len(extended) > 1:
        raise TaskError(f"--tasks {text!r} mixes LongBench and LongBench-E, which are two benchmarks; run them apart")
    return [get_task(name) for name in dict.fromkeys(names)], extended.pop()
