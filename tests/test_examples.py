"""The programs in examples/ run as their first lines say, with SmolLM2 and nothing from the hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from imdc.model.loading import SMOLLM2_INSTALL, find_smollm2_gguf

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_smollm2_gguf() is None, reason=f"SmolLM2 is not installed: {SMOLLM2_INSTALL}"),
]


def run(name: str, *arguments: str) -> str:
    """Standard output of an example, which has to end well."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_question_about_a_long_document() -> None:
    said = run("long_document.py")
    assert "53124" in said
    read = re.search(r"([\d,]+) tokens read in \d+ steps .* 512 KV pairs", said)
    assert read is not None and int(read[1].replace(",", "")) > 4_000


def test_a_saved_cache_answers_in_another_process(tmp_path: Path) -> None:
    cache = tmp_path / "python.imdc"
    assert "tokens read" in run("save_and_ask.py", "read", "--cache", str(cache))
    assert "53124" in run("save_and_ask.py", "ask", "--cache", str(cache), "--question", "1")
    assert "86017" in run("save_and_ask.py", "ask", "--cache", str(cache), "--question", "2")


def test_a_chat_stays_within_its_budget() -> None:
    said = run("chat.py")
    turns = re.findall(r"\[([\d,]+) tokens in the chat, ([\d,]+) KV pairs", said)
    tokens, stored = zip(*((int(one.replace(",", "")) for one in turn) for turn in turns), strict=True)
    assert len(turns) == 3 and tokens[0] > 3_000 and list(tokens) == sorted(tokens)
    # memory_tokens, and at most 32 of an answer
    assert max(stored) <= 512 + 32
    assert "53124" in said


def test_an_observer_of_the_users_own() -> None:
    said = run("own_observer.py").splitlines()
    assert [line.partition(":")[0] for line in said[-2:]] == ["prompt_tail", "heavy_values"]
    assert all("planned peak" in line for line in said[-2:])


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in EXAMPLES if f'run("{name}"' not in source] == []
