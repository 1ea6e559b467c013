"""LongBench's records: official files (folder or data.zip), the hub, or MiniLongBench's prompts, filled in already."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longbench_tasks import Task
from record import ROOT

from imdc.errors import ImdcError

HUB = "hub"
_HUB_REPOSITORY, _HUB_FILE = "THUDM/LongBench", "data.zip"
_ENVIRONMENT = "LONGBENCH_DATA"
_BESIDE = ROOT.parent / "shared" / "data" / "minilongbench"
_NUMBERED = {"retrieval": "Paragraph ", "retrieval_zh": "段落"}


class DataError(ImdcError, ValueError):
    """A data file is missing, or a line of it is not a record."""


@dataclass(frozen=True, slots=True)
class Record:
    """One question.

    Attributes:
        task: whose it is.
        id: unique within the task.
        prompt: template filled in, not truncated, without chat template.
        answers: any of them is right.
        all_classes: labels of a classification task, else None.
        length: the official length in words (characters in Chinese) that LongBench-E sorts by; None where unknown.
        official: whether the prompt is worded as in LongBench. MiniLongBench words some tasks otherwise.
    """

    task: Task
    id: str
    prompt: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...] | None
    length: int | None
    official: bool

    @property
    def sha(self) -> str:
        """Hash of the prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


def load(tasks: Sequence[Task], source: str | None, *, extended: bool) -> tuple[dict[str, list[Record]], str]:
    """Records by task, in the order of the files, and where they come from.

    Args:
        tasks: which to read.
        source: folder, zip file or "hub"; None takes $LONGBENCH_DATA, the folder of the project's shared data, the hub.
        extended: LongBench-E, whose files end in `_e`.

    Raises:
        DataError: nothing there, no file for a task, or a line that is no record.
    """
    chosen = source or os.environ.get(_ENVIRONMENT) or (str(_BESIDE) if _BESIDE.is_dir() and not extended else HUB)
    path = _from_hub() if chosen == HUB else Path(chosen).expanduser()
    if not path.exists():
        raise DataError(f"--data-dir {chosen!r} does not exist; give a folder, LongBench's data.zip, or 'hub'")
    found, missing = {}, []
    with _Files(path) as files:
        for task in tasks:
            name = f"{task.name}_e.jsonl" if extended else f"{task.name}.jsonl"
            where = files.find(name)
            if where is None:
                missing.append(name)
            else:
                found[task.name] = list(_records(task, files.lines(where), f"{path}/{where}"))
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; leave these tasks out of --tasks, or give LongBench's data.zip"
        )
    return found, f"{_HUB_REPOSITORY} of the hub" if chosen == HUB else path.name


def read_file(task: Task, path: Path) -> list[Record]:
    """The records of one file of `task`, in its order.

    Raises:
        DataError: a line is no record.
    """
    return list(_records(task, iter(path.read_bytes().splitlines()), path.name))


def in_order(records: dict[str, list[Record]], seed: int) -> Iterator[Record]:
    """All records, shuffled within each task by `seed`, the tasks taken in turn.

    Any number of records from the front is thus a fair share of every task, and a larger one holds the smaller.
    """
    shuffled = []
    for name, group in records.items():
        mixed = list(group)
        random.Random(f"{seed} {name}").shuffle(mixed)
        shuffled.append(mixed)
    for position in range(max(map(len, shuffled), default=0)):
        yield from (group[position] for group in shuffled if position < len(group))


class _Files:
    """A folder or zip file; LongBench's zip has its files in `data/`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._zip: zipfile.ZipFile | None = None

    def __enter__(self) -> _Files:
        if not self._path.is_dir():
            try:
                self._zip = zipfile.ZipFile(self._path)
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(f"{self._path} is neither a folder nor a zip file: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def find(self, name: str) -> str | None:
        places = (name, f"data/{name}")
        if self._zip is not None:
            return next((place for place in places if place in self._zip.namelist()), None)
        return next((place for place in places if (self._path / place).is_file()), None)

    def lines(self, place: str) -> Iterator[bytes]:
        opened = self._zip.open(place) if self._zip is not None else (self._path / place).open("rb")
        with io.BufferedReader(opened) as file:  # type: ignore[type-var]
            yield from file


def _from_hub() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_HUB_REPOSITORY, _HUB_FILE, repo_type="dataset"))
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise DataError(
            f"{_HUB_FILE} of {_HUB_REPOSITORY} cannot be had from the hub ({first_line}); "
            f"give a folder or the file itself with --data-dir or ${_ENVIRONMENT}"
        ) from error


def _records(task: Task, lines: Iterator[bytes], name: str) -> Iterator[Record]:
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise DataError(f"a JSON object is expected, not {type(values).__name__}")
            record = _filled(task, values) if "prompt" in values else _official(task, values)
            _check(record)
        except (ValueError, KeyError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{name}, line {number}: {reason}") from error
        if record.id in seen:
            raise DataError(f"{name}, line {number}: {record.id!r} is there twice")
        seen.add(record.id)
        yield record


def _official(task: Task, values: dict[str, Any]) -> Record:
    # The harness's mirror calls the field `question`.
    question = _text(values, "input" if "input" in values else "question")
    length = values.get("length")
    if length is not None and not isinstance(length, int):
        raise DataError(f"length must be a whole number, not {length!r}")
    return Record(
        task=task,
        id=_text(values, "_id"),
        prompt=task.fill(_text(values, "context"), question),
        answers=_texts(values, "answers"),
        all_classes=_texts(values, "all_classes") if task.metric == "classification" else None,
        length=length,
        official=True,
    )


def _filled(task: Task, values: dict[str, Any]) -> Record:
    prompt, gold = _text(values, "prompt"), values["gold"]
    labelled = gold if isinstance(gold, dict) else {"answers": gold}
    head, tail = task.frame
    before, _, after = tail.rpartition("{{question}}")
    return Record(
        task=task,
        id=str(values["number"]),
        prompt=prompt,
        answers=_texts(labelled, "answers"),
        all_classes=_texts(labelled, "all_classes") if task.metric == "classification" else None,
        length=None,
        official=prompt.startswith(head) and before in prompt and prompt.endswith(after),
    )


def _check(record: Record) -> None:
    lead = _NUMBERED.get(record.task.metric)
    for answer in record.answers:
        if lead is not None and not (answer.startswith(lead) and answer.removeprefix(lead).strip().isdigit()):
            raise DataError(f"the answer {answer!r} is not {lead}N")


def _text(values: dict[str, Any], name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text, not {value!r}")
    return value


def _texts(values: dict[str, Any], name: str) -> tuple[str, ...]:
    value = values[name]
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise DataError(f"{name} must be a list of texts with at least one in it")
    return tuple(value)
