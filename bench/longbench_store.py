"""The folder of a run: one line of JSON per answer, written at once, so that a killed run goes on where it was.

settings.json         what every answer in the folder depends on; another setting is refused
sessions.jsonl        one line per start: command, machine, versions, commit
samples-RANK.jsonl    the answers of one process; lines are added, never changed
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from imdc.config import PrefillConfig
from imdc.errors import ImdcError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

Key = tuple[str, str, str]


class StoreError(ImdcError, ValueError):
    """The folder belongs to another run, is in use, or holds a line that cannot be read."""


def key_of(sample: dict[str, Any]) -> Key:
    """What identifies an answer: its way of reading, task and record."""
    return sample["key"], sample["task"], sample["id"]


class Store:
    """The answers of one process, and all those that lie in the folder already."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Nothing is read or written before the `with` block."""
        self.folder = folder
        self._path = folder / f"samples-{rank}.jsonl"
        self._rank = rank
        self._file: TextIO | None = None

    def __enter__(self) -> Store:
        """Open the file of this process, for it alone; a line cut off by a kill is taken back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+", encoding="utf-8")
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.close()
                raise StoreError(f"{self._path} is being written by another process; wait for it") from error
        whole = _whole_bytes(self._path)
        if whole < self._path.stat().st_size:
            os.truncate(self._path, whole)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Write `settings`, or hold them against those the folder was begun with.

        Raises:
            StoreError: they differ; nothing is ever mixed or overwritten.
        """
        path = self.folder / "settings.json"
        # What no command names decides too, and changes with the version.
        settings = settings | {f"default {name}": value for name, value in PrefillConfig().as_dict().items()}
        text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        try:
            # Whole or not at all, also where several processes begin at once.
            temporary = self.folder / f".settings-{self._rank}-{os.getpid()}"
            temporary.write_text(text, encoding="utf-8")
            try:
                os.link(temporary, path)
                return
            finally:
                temporary.unlink()
        except FileExistsError:
            before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                raise StoreError(
                    f"{self.folder} holds a run with {name}={before.get(name)!r}, not {settings.get(name)!r}; "
                    f"give another --output, or the options of that run"
                )

    def note_session(self, values: dict[str, Any]) -> None:
        """Add a line to `sessions.jsonl`."""
        with (self.folder / "sessions.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def sessions(self) -> list[dict[str, Any]]:
        """All starts so far."""
        path = self.folder / "sessions.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def add(self, sample: dict[str, Any]) -> None:
        """Write one answer; it is on the disk when this returns."""
        assert self._file is not None
        self._file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def samples(self) -> dict[Key, dict[str, Any]]:
        """All answers in the folder, of all processes.

        Raises:
            StoreError: a line cannot be read.
        """
        return unite(sample for path in sorted(self.folder.glob("samples-*.jsonl")) for sample in _read(path))


def unite(samples: Iterable[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Answers by key; of two with the same one, the first."""
    found: dict[Key, dict[str, Any]] = {}
    for sample in samples:
        found.setdefault(key_of(sample), sample)
    return found


def _whole_bytes(path: Path) -> int:
    """Bytes of `path` up to its last line end."""
    data = path.read_bytes()
    return data.rfind(b"\n") + 1


def _read(path: Path) -> Iterable[dict[str, Any]]:
    # Another process may be in the middle of its last line.
    lines = path.read_bytes()[: _whole_bytes(path)].splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            sample = json.loads(line)
            key_of(sample)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}, line {number} cannot be read: {error}") from error
        yield sample
