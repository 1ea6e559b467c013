"""Real questions of `fidelity.py`, QA of LongBench and L-Eval, and what a question is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longbench_data import DataError, Record, in_order, read_file
from longbench_metrics import score
from longbench_tasks import get_task
from questions_data import F1, leval_documents

from imdc.cli.prompts import chat_prompt, encode_prompt

_LEVAL = "multidoc_qa"
QA_TASKS = ("qasper", "multifieldqa_en", "2wikimqa", "hotpotqa", "musique", "narrativeqa", _LEVAL)
_ENDINGS = (".jsonl", ".sample.jsonl")
# The metric of what was planted: a reply is right if it has all answers in it.
FOUND = "found"


@dataclass(frozen=True, slots=True)
class Question:
    """A record and its tokens.

    Attributes:
        record: what is asked, and the right answers.
        ids: tokens of the prompt, chat template included.
        gold: tokens whose likelihood is measured: how a right answer goes, or a text goes on. Empty is the record's
            first answer.
    """

    record: Record
    ids: list[int]
    gold: list[int] = field(default_factory=list)

    @property
    def group(self) -> str:
        """Line of the table that it counts for."""
        return self.record.task.category if self.record.task.metric == FOUND else "QA"

    def score(self, reply: str) -> float | None:
        """F1 against the best of the right answers; 1 or 0 for what was planted; None where nothing was asked."""
        record = self.record
        if not record.answers:
            return None
        if record.task.metric == FOUND:
            return float(all(answer.lower() in reply.lower() for answer in record.answers))
        return score(record.task, reply, record.answers, record.all_classes)


def qa_records(folders: Sequence[Path], tasks: Sequence[str], seed: int) -> list[Record]:
    """Records of `tasks` out of `folders`, the tasks in turn, in an order that only `seed` changes.

    Raises:
        DataError: no folder has any of the tasks, or two records have the same id.
    """
    found: dict[str, list[Record]] = {}
    for name in tasks:
        paths = [path for folder in folders for ending in _ENDINGS if (path := folder / f"{name}{ending}").is_file()]
        records = [record for path in paths for record in _read(name, path)]
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


def _read(name: str, path: Path) -> list[Record]:
    return _leval(path) if name == _LEVAL else read_file(get_task(name), path)


def _leval(path: Path) -> list[Record]:
    """Every question of L-Eval's documents in `path` as a record of its own; documents are in the file twice."""
    task = replace(F1, name=_LEVAL)
    found: dict[str, Record] = {}
    for document in leval_documents(path):
        for number, (question, answer) in enumerate(zip(document.questions, document.answers, strict=True)):
            prompt = f"{document.text}\n\n{question}"
            one = Record(task, f"{document.number}-{number}", prompt, (answer,), None, None, official=False)
            found.setdefault(one.sha, one)
    return list(found.values())
