"""The programs in examples/ do what their first lines say, with SmolLM2 and nothing from the hub."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imdc.model import loading

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Run = Callable[..., str]


@pytest.fixture
def run(smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example with the model that all tests share; its standard output."""
    monkeypatch.setattr(loading, "load_model", lambda path: smollm2)

    def run_here(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_here


def test_a_question_about_a_long_document(run: Run) -> None:
    said = run("long_document.py")
    assert "53124" in said
    read = re.search(r"([\d,]+) tokens read in \d+ steps .* 512 KV pairs", said)
    assert read is not None and int(read[1].replace(",", "")) > 4_000


def test_a_saved_cache_answers_here_and_in_another_process(run: Run, tmp_path: Path) -> None:
    cache = tmp_path / "python.imdc"
    assert "tokens read" in run("save_and_ask.py", "read", "--cache", str(cache))
    assert "53124" in run("save_and_ask.py", "ask", "--cache", str(cache), "--question", "1")
    command = [sys.executable, str(EXAMPLES / "save_and_ask.py"), "ask", "--cache", str(cache), "--question", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "86017" in done.stdout, done.stderr


def test_a_chat_stays_within_its_budget(run: Run) -> None:
    said = run("chat.py")
    turns = re.findall(r"\[([\d,]+) tokens in the chat, ([\d,]+) KV pairs", said)
    tokens, stored = zip(*((int(one.replace(",", "")) for one in turn) for turn in turns), strict=True)
    assert len(turns) == 3 and tokens[0] > 3_000 and list(tokens) == sorted(tokens)
    # memory_tokens, and at most 32 of an answer
    assert max(stored) <= 512 + 32
    assert "53124" in said


def test_an_observer_of_the_users_own(run: Run) -> None:
    said = run("own_observer.py").splitlines()
    assert [line.partition(":")[0] for line in said[-2:]] == ["prompt_tail", "heavy_values"]
    assert all("planned peak" in line for line in said[-2:])


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.glob("*.py")]
    assert len(names) == 4 and [name for name in names if f'run("{name}"' not in source] == []
