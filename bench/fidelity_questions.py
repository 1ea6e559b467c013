"""What `fidelity.py` asks: real questions about real texts, and facts planted in novels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needle
from longbench_data import DataError, Record, in_order, read_file
from longbench_metrics import score
from longbench_tasks import Task, get_task

from imdc.cli.prompts import chat_prompt, encode_prompt

QA_TASKS = ("qasper", "multifieldqa_en", "2wikimqa", "hotpotqa", "musique", "narrativeqa")
_ENDINGS = (".jsonl", ".sample.jsonl")
_NEEDLE = Task(
    name="needle",
    category="needle",
    language="en",
    metric="found",
    template="",
    max_new_tokens=32,
    chat=False,
    first_line_only=False,
)


@dataclass(frozen=True, slots=True)
class Question:
    """A record and the tokens of its prompt, chat template included."""

    record: Record
    ids: list[int]

    @property
    def group(self) -> str:
        """Line of the table that it counts for."""
        return "needle" if self.record.task is _NEEDLE else "QA"

    def score(self, prediction: str) -> float:
        """F1 of a QA answer against the best of the gold answers; 1 or 0 for a needle."""
        record = self.record
        if record.task is _NEEDLE:
            return float(any(answer in prediction for answer in record.answers))
        return score(record.task, prediction, record.answers, record.all_classes)


def qa_records(folders: Sequence[Path], tasks: Sequence[str], seed: int) -> list[Record]:
    """Records of `tasks` out of `folders`, the tasks in turn, in an order that only `seed` changes.

    Raises:
        DataError: no folder has any of the tasks, or two records have the same id.
    """
    found: dict[str, list[Record]] = {}
    for name in tasks:
        paths = [path for folder in folders for ending in _ENDINGS if (path := folder / f"{name}{ending}").is_file()]
        records = [record for path in paths for record in read_file(get_task(name), path)]
        if len({record.id for record in records}) < len(records):
            raise DataError(f"{name}: two records have the same id in {', '.join(path.name for path in paths)}")
        if records:
            found[name] = records
    if not found:
        names = ", ".join(folder.name for folder in folders)
        raise DataError(f"no file of {', '.join(tasks)} in {names}; give --data-dir a folder with TASK.jsonl files")
    return list(in_order(found, seed))


def qa_questions(tokenizer: Any, records: Sequence[Record], limit: int, tokens: tuple[int, int]) -> list[Question]:
    """The first `limit` of `records` whose prompts have a length within `tokens`, chat template included."""
    chosen: list[Question] = []
    for record in records:
        # No text has more tokens than characters, nor, in these languages, fewer than an eighth of them.
        if len(chosen) == limit or not tokens[0] <= len(record.prompt) <= 8 * tokens[1]:
            continue
        ids = encode_prompt(tokenizer, chat_prompt(tokenizer, record.prompt, None))
        if tokens[0] <= len(ids) <= tokens[1]:
            chosen.append(Question(record, ids))
    return chosen


def needle_questions(tokenizer: Any, books: Path, samples: int, prompt_tokens: int, seed: int) -> list[Question]:
    """Needles of `bench/needle.py`: its samples at this length and seed.

    Raises:
        ImdcError: no books, or one is too short.
    """
    if not samples:
        return []
    wanted = argparse.Namespace(data=books, samples=samples, prompt_tokens=prompt_tokens, seed=seed)
    questions = []
    for number, sample in enumerate(needle.make_samples(tokenizer, wanted)):
        record = Record(
            task=_NEEDLE,
            id=f"{prompt_tokens}-{number}",
            prompt=sample.haystack.prompt,
            answers=(sample.haystack.needle.answer,),
            all_classes=None,
            length=None,
            official=True,
        )
        questions.append(Question(record, encode_prompt(tokenizer, record.prompt)))
    return questions
