"""LongBench's scores against golden cases that were worked out by hand from the official rules."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("jieba")
pytest.importorskip("rouge")

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("longbench_tasks")


@pytest.fixture
def metrics(tasks: ModuleType) -> ModuleType:
    return importlib.import_module("longbench_metrics")


# Task, prediction, answers, classes, score.
CASES = {
    # Lower case, no punctuation, no article: "cat sat" of 3 words against 2. Precision 2/3, recall 1.
    "qa_f1": ("qasper", "The cat sat down.", ["a cat, sat!"], None, 0.8),
    "qa_f1 takes the best answer": ("hotpotqa", "Paris", ["London", "Paris"], None, 1.0),
    "qa_f1 of nothing in common": ("musique", "yes", ["no"], None, 0.0),
    "qa_f1 of an article alone": ("qasper", "the", ["the"], None, 0.0),
    "qa_f1 counts a repeated word as often as both have it": ("qasper", "ab ab ab", ["ab ab"], None, 0.8),
    "triviaqa: the first line after leading newlines": ("triviaqa", "\n\nJagger\nMick", ["Jagger"], None, 1.0),
    "qasper: all lines": ("qasper", "Jagger\nMick", ["Jagger"], None, 2 / 3),
    # jieba cuts 北京大学 / 在 / 北京 / 。 and punctuation goes: one word of three, and all of the answer.
    "qa_f1_zh": ("multifieldqa_zh", "北京大学在北京。", ["北京大学"], None, 0.5),
    # The same words for ROUGE, where the full stop stays, as a fourth word: recall 1, precision 1/4.
    "rouge_zh": ("vcsum", "北京大学在北京。", ["北京大学"], None, 0.4),
    "qa_f1_zh without punctuation and blanks": ("multifieldqa_zh", "厦门 ，", ["厦门。"], None, 1.0),
    # LCS of "a b c d" and "a c d": 3 words. Recall 1, precision 3/4.
    "rouge-L f": ("gov_report", "one two three four", ["one three four"], None, 6 / 7),
    "rouge of nothing": ("qmsum", "", ["one"], None, 0.0),
    "rouge of a full stop alone": ("qmsum", ".", ["one"], None, 0.0),
    "samsum: the first line": ("samsum", "\none two\nDialogue: three", ["one two"], None, 1.0),
    # rouge recurses over a sentence's words; the official code makes a RecursionError a 0.
    "rouge without a full stop": ("gov_report", "word " * 1100, ["word " * 1100], None, 0.0),
    "count": ("passage_count", "There are 7, not 9.", ["7"], None, 0.5),
    "count without a number": ("passage_count", "seven", ["7"], None, 0.0),
    "count is of whole numbers": ("passage_count", "17", ["7"], None, 0.0),
    "retrieval": ("passage_retrieval_en", "Paragraph 3 (or 4, or 3)", ["Paragraph 3"], None, 2 / 3),
    "retrieval_zh": ("passage_retrieval_zh", "段落12", ["段落12"], None, 1.0),
    "classification": ("trec", "Date", ["Date"], ["Date", "Food"], 1.0),
    "classification: two classes named": ("trec", "Date or Food", ["Date"], ["Date", "Food"], 0.5),
    "classification: a class inside the gold one is taken out": (
        "trec",
        "Other number",
        ["Other number"],
        ["number", "Other number"],
        1.0,
    ),
    # The list is changed while it is walked: after the first removal the next entry is passed over, and stays.
    "classification: every second such class stays": (
        "trec",
        "abc",
        ["abc"],
        ["a", "b", "c", "abc"],
        0.5,
    ),
    "classification: only the first line": ("trec", "Food\nDate", ["Date"], ["Date", "Food"], 0.0),
    "code": ("lcc", "return x", ["return x"], None, 1.0),
    "code: lines with a comment or backticks are passed over": ("lcc", "```\n# no\n// no\nx = 1", ["x = 1"], None, 1.0),
    "code: leading newlines go": ("lcc", "\n\nx = 1\ny = 2", ["x = 1"], None, 1.0),
    # lm-eval would pass over the blank line and score 1. Two blanks are common: 2 * 2 / 7 = 0.571.
    "code: a line of blanks counts": ("repobench-p", "  \nx = 1", ["x = 1"], None, 0.57),
    "code: every line is a comment": ("lcc", "# a\n# b", ["x"], None, 0.0),
    # Blocks ab and cd: 2 * 4 / 9 = 0.888.
    "code: difflib, rounded to a hundredth": ("lcc", "abXcd", ["abcd"], None, 0.89),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_cases(tasks: ModuleType, metrics: ModuleType, name: str) -> None:
    task, prediction, answers, classes, wanted = CASES[name]
    got = metrics.score(tasks.get_task(task), prediction, answers, classes)
    # rouge adds 1e-8 to a denominator.
    assert got == pytest.approx(wanted, abs=1e-7)


def test_code_similarity_is_difflibs_and_not_levenshteins(metrics: ModuleType) -> None:
    # difflib takes the longest block first, QQQ, and finds nothing on either side of it: 2 * 3 / 21. Levenshtein's
    # ratio would count the five letters of the longest common subsequence: 2 * 5 / 21 = 0.48.
    assert metrics.code_similarity("QQQa.b.c.d.e.", "abcdeQQQ") == 0.29


def test_every_task_has_the_official_rules(tasks: ModuleType) -> None:
    lengths = {
        128: {"narrativeqa", "qasper", "dureader", "samsum"},
        64: {"multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"},
        512: {"gov_report", "qmsum", "multi_news", "vcsum"},
    }
    assert len(tasks.NAMES) == 21 and len(tasks.NAMES_E) == 13
    for name in tasks.NAMES:
        task = tasks.get_task(name)
        wanted = next((length for length, names in lengths.items() if name in names), 32)
        assert task.max_new_tokens == wanted, name
        assert task.template.count("{{context}}") == 1
    assert {name for name in tasks.NAMES if not tasks.get_task(name).chat} == {
        "trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p",
    }  # fmt: skip


def test_templates_end_as_the_official_ones(tasks: ModuleType) -> None:
    filled = {name: tasks.get_task(name).fill("CONTEXT", "QUESTION") for name in tasks.NAMES}
    assert filled["lcc"].endswith("CONTEXTNext line of code:\n")
    assert filled["repobench-p"].endswith("CONTEXTQUESTIONNext line of code:\n")
    assert filled["samsum"].endswith("CONTEXT\n\nQUESTION") and filled["triviaqa"].endswith("CONTEXT\n\nQUESTION")
    assert filled["trec"].endswith("CONTEXT\nQUESTION") and filled["lsht"].endswith("CONTEXT\nQUESTION")
    assert filled["passage_count"].endswith("The final answer is: ")
    assert filled["passage_retrieval_en"].endswith("The answer is: ")


def test_braces_in_a_text_stay(tasks: ModuleType) -> None:
    assert "{{question}} {x}" in tasks.get_task("lcc").fill("{{question}} {x}", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qaspr", r"unknown task 'qaspr'\. Did you mean 'qasper'\?"),
        ("longbench,qasper_e", "mixes LongBench and LongBench-E"),
        (" , ", "names no task"),
        ("narrativeqa_e", "unknown task 'narrativeqa_e'"),
    ],
)
def test_unknown_tasks_are_refused(tasks: ModuleType, text: str, message: str) -> None:
    with pytest.raises(tasks.TaskError, match=message):
        tasks.choose_tasks(text)


def test_tasks_of_a_group_are_taken_once(tasks: ModuleType) -> None:
    chosen, extended = tasks.choose_tasks("longbench_e,qasper_e")
    assert extended and [task.name for task in chosen] == list(tasks.NAMES_E)
    chosen, extended = tasks.choose_tasks("lcc, qasper")
    assert not extended and [task.name for task in chosen] == ["lcc", "qasper"]
