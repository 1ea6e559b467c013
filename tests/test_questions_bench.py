"""bench/questions.py on a tiny model: what it plants, what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import imdc


@pytest.fixture(scope="module")
def questions() -> ModuleType:
    return of_bench("questions")


@pytest.fixture(scope="module")
def data() -> ModuleType:
    return of_bench("questions_data")


def of_bench(name: str) -> ModuleType:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def test_facts_lie_at_even_distances(data: ModuleType, byte_tokenizer: Any) -> None:
    rng = random.Random(1)
    planted = data.facts(rng)
    assert len({question for _, question, _ in planted}) == 6
    text = "A bird flew by. It was late. " * 4000
    written = data.page(byte_tokenizer, text, rng, 3000, planted)
    assert 2900 <= len(byte_tokenizer(written).input_ids) <= 3000
    places = [written.index(sentence) / len(written) for sentence, _, _ in planted]
    assert all(abs(place - (number + 0.5) / 6) < 0.05 for number, place in enumerate(places))
    assert all(fact in sentence and fact not in question for sentence, question, fact in planted)


def test_a_run_goes_on_where_it_stopped(
    questions: ModuleType, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "book.txt").write_text("A bird flew by. It was late. " * 4000)
    output = tmp_path / "lines.jsonl"
    argv = ["--books", str(tmp_path), "--models", str(tiny_model_dir), "--output", str(output)]
    argv += ["--prompt-tokens", "800", "--chunk-tokens", "200", "--documents", "1"]
    assert questions.main([*argv, "--ways", "full", "recall"]) == 0
    first = output.read_text().splitlines()
    assert questions.main([*argv, "--ways", "full", "recall", "known", "own"]) == 0
    lines = output.read_text().splitlines()
    assert lines[:2] == first and len(lines) == 4
    full, recall, known, own = map(json.loads, lines)
    assert [line["way"] for line in (full, recall, known, own)] == ["full", "recall", "known", "own"]
    assert full["facts"] == known["facts"] and len(full["scores"]) == 6
    assert full["read_cpu_seconds"] > 0 and len(full["question_cpu_seconds"]) == 6
    assert full["kv_bytes"] > 7 * recall["kv_bytes"] == 7 * known["kv_bytes"]
    assert (own["reads"], known["reads"]) == (6, 1) and own["kv_bytes"] == known["kv_bytes"]
    assert recall["recalled_bytes"] > 0 == known["recalled_bytes"]
    shown = capsys.readouterr().out
    assert "One read, many questions" in shown
    # Nobody watches, so nothing is cut to the width of a terminal.
    assert all(heading in shown for heading in ("documents", "of full's [95%]", "in common", "all in s"))
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_figures_compare_the_documents_that_full_attention_read_too() -> None:
    def line(way: str, seed: int, *scores: float) -> dict[str, Any]:
        return {
            "model": "m", "data": "d", "way": way, "share": 8, "seed": seed, "scores": list(scores),
            "answers": [f"{score}" for score in scores], "read_seconds": 4.0, "question_seconds": [1.0, 3.0],
        }  # fmt: skip

    lines = [line("full", 0, 1.0, 1.0), line("recall", 0, 1.0, 0.0), line("recall", 1, 1.0, 1.0)]
    full, recall = of_bench("questions_report").figures(lines)
    assert (full.memory, full.of_full, full.score) == ("all", (1.0, 1.0, 1.0), 2.0)
    assert (recall.memory, recall.documents, recall.questions, recall.score) == ("1/8", 2, 4, 3.0)
    # Of the second document nobody knows what full attention answers.
    assert (recall.of_full, recall.in_common, recall.alike) == ((0.5, 0.5, 0.5), 1.0, 0.5)
    assert (recall.read_seconds, recall.question_seconds, recall.all_in_seconds) == (4.0, 2.0, 4.0)

    # Three documents of which two are answered in full: drawn anew there may be all three, or none.
    more = [line("full", seed, 1.0, 1.0) for seed in (0, 1, 2)]
    more += [line("known", 0, 1.0, 1.0), line("known", 1, 1.0, 1.0), line("known", 2, 0.0, 0.0)]
    *_, known = of_bench("questions_report").figures(more)
    assert known.of_full == (pytest.approx(2 / 3), 0.0, 1.0) and known.in_common == 4.0
    # Where full attention answers something else, nothing is in common.
    *_, other = of_bench("questions_report").figures([line("full", 0, 1.0, 0.0), line("recall", 0, 0.0, 1.0)])
    assert other.of_full == (1.0, 1.0, 1.0) and other.in_common == 0.0
    *_, none = of_bench("questions_report").figures([line("full", 0, 0.0, 0.0), line("recall", 0, 0.0, 1.0)])
    assert none.of_full is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_store_in_eight_bits_finds_the_same_facts(
    questions: ModuleType, data: ModuleType, smollm2: tuple[Any, Any], data_dir: Path
) -> None:
    sizes = argparse.Namespace(data="haystacks", books=data_dir / "books", documents=1, prompt_tokens=1024)
    (one,) = data.documents(sizes, smollm2[1])
    model, int8 = (questions.measure(*smollm2, one, way, 8, 512) for way in ("recall", "recall int8"))
    assert int8["scores"] == model["scores"] and sum(model["scores"]) >= 4
    options = {"recall": "host", "recall_dtype": "int8", "recall_every": 0}
    planned = imdc.plan(smollm2[0], int8["tokens"], **options).to_dict()["host_bytes"]
    # Of float32, with the scales of heads of 64 dimensions.
    assert int8["host_bytes"] == planned < 0.275 * model["host_bytes"]
    assert int8["recalled_bytes"] < 0.3 * model["recalled_bytes"]


@pytest.mark.parametrize(
    ("reply", "named"),
    [
        ("(B) Their subconscious knew", "B"),
        ("B", "B"),
        ("B.", "B"),
        ("The answer is BD.", "BD"),
        ("D, B", "BD"),
        ("(A) and (C)", "AC"),
        ("A bird flew by", ""),
        ("Data science", ""),
        ("", ""),
    ],
)
def test_letters_are_those_that_a_reply_names(reply: str, named: str, data: ModuleType) -> None:
    assert data.letters(reply) == named


def test_documents_of_leval_are_read_and_scored(
    questions: ModuleType, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {
        "input": "A bird flew by. " * 20,
        "instructions": ["Why?\n(A) So\n(B) No", "When?"],
        "outputs": ["(B) No", "AC"],
    }
    longer = {**record, "input": "A bird flew by. " * 200}
    (tmp_path / "coursera.jsonl").write_text("\n".join(json.dumps(one) for one in (longer, record, record)))
    output = tmp_path / "lines.jsonl"
    argv = ["--data", "coursera", "--leval", str(tmp_path), "--models", str(tiny_model_dir), "--output", str(output)]
    argv += ["--prompt-tokens", "500", "--chunk-tokens", "200", "--documents", "1", "--ways", "full", "generic"]
    assert questions.main([*argv, "--max-minutes", "0"]) == 1
    assert not output.exists() and "--max-minutes is up" in capsys.readouterr().err
    assert questions.main(argv) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["data"], line["seed"], line["way"]) for line in lines] == [
        ("coursera", 1, "full"),
        ("coursera", 1, "generic"),
    ]
    assert all(len(line["scores"]) == 2 and line["facts"] == ["(B) No", "AC"] for line in lines)
    output.write_text(json.dumps({"right": [True]}))
    assert questions.main(argv) == 2 and "lines of another version" in capsys.readouterr().err


def test_answers_are_scored_by_the_metric_of_their_document(data: ModuleType) -> None:
    def one(metric: str, answer: str) -> Any:
        return data.Document(0, "", ("?",), (answer,), metric, 8)

    assert one("found", "Lisbon").score(0, "it is lisbon.") == 1.0 and one("found", "Lisbon").score(0, "Osaka") == 0.0
    assert one("letters", "(B) No").score(0, "B") == 1.0 and one("letters", "BD").score(0, "B") == 0.0
    assert one("f1", "the red house").score(0, "a red house") == 1.0 and 0 < one("f1", "red house").score(0, "red") < 1
