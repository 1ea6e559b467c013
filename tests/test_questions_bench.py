"""bench/questions.py on a tiny model: what it plants, what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def questions() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
    try:
        import questions as module
    finally:
        sys.path.pop(0)
    return module


def test_facts_lie_at_even_distances(questions: ModuleType, byte_tokenizer: Any) -> None:
    rng = random.Random(1)
    planted = questions.facts(rng)
    assert len({question for _, question, _ in planted}) == 6
    text = "A bird flew by. It was late. " * 4000
    written = questions.document(byte_tokenizer, text, rng, 3000, planted)
    assert 2900 <= len(byte_tokenizer(written).input_ids) <= 3000
    places = [written.index(sentence) / len(written) for sentence, _, _ in planted]
    assert all(abs(place - (number + 0.5) / 6) < 0.05 for number, place in enumerate(places))
    assert all(fact in sentence and fact not in question for sentence, question, fact in planted)


def test_a_run_goes_on_where_it_stopped(
    questions: ModuleType, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("A bird flew by. It was late. " * 4000)
    output = tmp_path / "lines.jsonl"
    argv = ["--data", str(tmp_path), "--model", str(tiny_model_dir), "--output", str(output)]
    argv += ["--prompt-tokens", "800", "--chunk-tokens", "200", "--documents", "1"]
    assert questions.main([*argv, "--ways", "full", "recall"]) == 0
    first = output.read_text().splitlines()
    assert questions.main([*argv, "--ways", "full", "recall", "known"]) == 0
    lines = output.read_text().splitlines()
    assert lines[:2] == first and len(lines) == 3
    full, recall, known = map(json.loads, lines)
    assert [line["way"] for line in (full, recall, known)] == ["full", "recall", "known"]
    assert full["facts"] == known["facts"] and len(full["right"]) == 6
    assert full["kv_bytes"] > 7 * recall["kv_bytes"] == 7 * known["kv_bytes"]
    assert recall["recalled_bytes"] > 0 == known["recalled_bytes"]
    assert "One read, six questions" in capsys.readouterr().out
