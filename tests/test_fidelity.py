"""`bench/fidelity.py` with a tiny model: whole runs, runs that were up, its methods and its figures."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_models import FAMILIES, token_ids

import imdc

pytest.importorskip("lm_eval")
pytest.importorskip("rouge")

BENCH = Path(__file__).resolve().parents[1] / "bench"
METHODS = "fm,full,one-shot,append-only,imdc:initial_memory=0.25"
NOTHING_PLANTED = [
    word for kind in ("needles", "words", "two-facts", "lines", "pairs", "tails") for word in (f"--{kind}", "0")
]
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A module of `bench/` by its name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def options(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    """Two questions and one of each planted kind, in five methods at two memories."""
    (tmp_path / "data").mkdir()
    for name, ids in (("hotpotqa.jsonl", "ab"), ("hotpotqa.sample.jsonl", "cd")):
        records = [
            {
                "_id": one, "input": f"What is {one}?", "context": f"It is {one}. " * 30, "answers": ["a text"],
                "length": 100, "dataset": "hotpotqa", "language": "en", "all_classes": None,
            }
            for one in ids
        ]  # fmt: skip
        (tmp_path / "data" / name).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (tmp_path / "book.txt").write_text("The whale rose. Nobody spoke for a while. " * 2000)
    line = {"prompt": "line a: <1>\n" * 40 + "What is in line a?", "expected_number": 1}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line))
    pairs = {
        "ordered_kv_records": [[f"key {one}", f"value {one}"] for one in range(30)],
        "key": "key 7",
        "value": "value 7",
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pairs))
    return [
        "--output", str(tmp_path / "run"), "--models", str(tiny_model_dir), "--data-dir", str(tmp_path / "data"),
        "--books", str(tmp_path / "book.txt"), "--records", "2", "--min-prompt-tokens", "200",
        "--needles", "1", "--words", "1", "--two-facts", "1", "--lines", "1", "--pairs", "1",
        "--tails", "1", "--tail-tokens", "300",
        "--longeval", str(tmp_path / "lines.jsonl"), "--pairs-file", str(tmp_path / "pairs.jsonl"),
        "--needle-tokens", "400", "--memory", "100%,1/4", "--chunk-tokens", "1/4", "--methods", METHODS,
        "--out", str(tmp_path / "results"),
    ]  # fmt: skip


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "samples-0.jsonl").read_text().splitlines()]


def test_a_run_measures_every_way_of_every_question(
    load: Load, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load("fidelity").main(options) == 0
    found = {(sample["way"], sample["task"], sample["id"]): sample for sample in answers(tmp_path)}
    assert len(found) == len(answers(tmp_path)) == 8 * (1 + 4 * 2)
    for (way, task, number), sample in found.items():
        full = found["full", task, number]
        if way.endswith("@100%"):
            # What fits is the model's own prefill, so the answer and its likelihood are the same.
            assert sample["tokens"] == full["tokens"]
            if task == "tail":
                assert sample["own_nats"] is sample["score"] is None
            else:
                assert sample["own_nats"] == pytest.approx(full["own_nats"], rel=1e-4)
            assert sample["gold_nats"] == pytest.approx(full["gold_nats"], rel=1e-4)
        elif way != "full":
            assert sample["plan"][-1][2] == pytest.approx(sample["prompt_tokens"] / 4, abs=1)
        if way.startswith("one-shot"):
            assert [step[0] for step in sample["plan"]] == [sample["prompt_tokens"]]
    assert any(
        sample["own_nats"] != found["full", task, number]["own_nats"] for (_, task, number), sample in found.items()
    )
    table = capsys.readouterr().out
    assert table.startswith("| model | questions | n |")
    groups = ("needle", "words", "two facts", "lines", "pairs", "tail")
    for words in (
        "| QA | 2 | 1/4 | imdc:initial_memory=0.25 |",
        *(f"| {group} | 1 | all | full |" for group in groups),
    ):
        assert words in table
    (result,) = (tmp_path / "results").glob("fidelity-*.json")
    assert str(tmp_path) not in result.read_text()
    assert (tmp_path / "run" / "plot.png").stat().st_size > 10_000
    # The same command finds everything there.
    assert load("fidelity").main(options) == 0
    assert len(answers(tmp_path)) == len(found)


def test_what_is_taken_back_is_measured(load: Load, options: list[str], tmp_path: Path) -> None:
    methods = "full,imdc,imdc:recall=host,imdc:recall=host:recall_every=0"
    assert load("fidelity").main([*options, *NOTHING_PLANTED, "--methods", methods]) == 0
    found = {(sample["way"], sample["id"]): sample for sample in answers(tmp_path)}
    assert len(found) == 2 * (1 + 3 * 2)
    for (way, number), sample in found.items():
        if way.endswith("@100%"):
            assert sample["tokens"] == found["full", number]["tokens"]
    others = ("", ":recall=host", ":recall=host:recall_every=0")
    numbers = [number for way, number in found if way == "full"]
    nats = {tuple(found[f"imdc{way}@1/4", number]["own_nats"] for number in numbers) for way in others}
    assert len(nats) == 3


def test_a_run_that_was_up_goes_on(load: Load, options: list[str], tmp_path: Path) -> None:
    asked = [*options, *NOTHING_PLANTED]
    assert load("fidelity").main([*asked, "--max-minutes", "0"]) == 1
    assert answers(tmp_path) == []
    assert load("fidelity").main([*asked, "--records", "1"]) == 0
    before = answers(tmp_path)
    assert len(before) == 1 + 4 * 2
    assert load("fidelity").main(asked) == 0
    assert answers(tmp_path)[: len(before)] == before and len(answers(tmp_path)) == 2 * len(before)


def test_other_data_and_other_settings_are_not_mixed(
    load: Load, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [*options, *NOTHING_PLANTED, "--methods", "full", "--records", "4"]
    assert load("fidelity").main(short) == 0
    assert load("fidelity").main([*short, "--observer", "window"]) == 2
    path = tmp_path / "data" / "hotpotqa.jsonl"
    path.write_text(path.read_text().replace("It is a.", "It is A."))
    assert load("fidelity").main(short) == 2
    assert "holds an answer to another prompt of hotpotqa a" in capsys.readouterr().err


def test_a_run_that_is_cut_off_has_needles_of_all_depths(load: Load) -> None:
    spread = load("fidelity_planted").spread
    assert spread(6) == [0, 4, 2, 1, 5, 3] and spread(0) == []
    for count in (20, 40):
        assert sorted(spread(count)) == list(range(count))
        for first in range(8, count):
            quarters = [4 * number // count for number in spread(count)[:first]]
            assert min(quarters.count(quarter) for quarter in range(4)) >= first // 8


def test_append_only_evicts_nothing_that_it_kept_once(load: Load) -> None:
    amount = load("longbench_ways").Amount.parse
    ways = load("fidelity_ways").parse_methods(
        "append-only,im:initial_memory=0.25", shares=[amount("1/2")], chunk=amount("64"), observer="prompt_tail"
    )
    assert len({way.key for way in ways}) == 2
    ids = token_ids(256)
    fallen = []
    for way in ways:
        model = FAMILIES["llama"]()
        with imdc.patch(model, way.config(256)) as handle, imdc.probe(handle) as probe:
            model(ids, past_key_values=handle.new_cache(), use_cache=True)
        pairs = probe.result.pairs[1:, ..., 1:]
        assert pairs[-1].sum(dim=-1).unique().tolist() == [128]
        fallen.append(bool((pairs.diff(dim=0) < 0).any()))
    assert fallen == [False, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods", "imcd"], "unknown method 'imcd'. Did you mean 'imdc'?"),
        (["--methods", "full:growth=sqrt"], "full is the unpatched model, which has no options"),
        (["--methods", "fm:chunk_tokens=5"], "chunk_tokens, observer follow from the method"),
        (["--methods", "fm:groth=sqrt"], "Did you mean 'growth'?"),
        (["--methods", "fm:pool_kernel=4"], "pool_kernel must be odd"),
        (["--methods", "fm,fm"], "has fm@1/4, fm@100% twice"),
        (["--methods", ","], "names no method"),
        (["--memory", "256"], "'256' is not a share of the prompt"),
        (["--memory", "5/4"], "must be above 0 and at most 1"),
        (["--tasks", "musique"], "no file of musique in data"),
        (["--tail-tokens", "20000"], "a book of 84,000 characters is too short for what is taken from it"),
        (["--lines", "2"], "lines.jsonl has 1 records, 2 are asked for"),
        (["--pairs-file", "missing/pairs.jsonl"], "--pairs-file: no file pairs.jsonl in missing"),
    ],
)
def test_bad_input_is_named(
    load: Load, options: list[str], capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert load("fidelity").main([*options, *given]) == 2
    assert message in capsys.readouterr().err


def test_a_first_memory_in_tokens_is_capped_by_the_share_of_a_short_prompt(load: Load) -> None:
    ways = load("fidelity_ways")
    amount = load("longbench_ways").Amount.parse
    (way,) = ways.parse_methods(
        "im:initial_memory=300", shares=[amount("1/8")], chunk=amount("512"), observer="prompt_tail"
    )
    assert way.config(1752).initial_memory == way.config(1752).memory_tokens == 219
    assert way.config(8000).initial_memory == 300


def test_differences_are_paired_and_over_common_questions(load: Load) -> None:
    def sample(way: str, number: int, score: float) -> dict[str, Any]:
        return {
            "model": "m", "group": "QA", "way": way, "task": "t", "id": str(number), "score": score,
            "gold_nats": 2.0 - score, "own_nats": None, "prompt_tokens": 1000 + number, "ttft_cpu_seconds": 1.0,
            "ttft_seconds": 2.0, "seconds": 3.0,
        }  # fmt: skip

    scores = [0.1, 0.9, 0.4, 0.6]
    samples = [sample("fm@1/8", number, score) for number, score in enumerate(scores)]
    samples += [sample("imdc@1/8", number, score + 0.05) for number, score in enumerate(scores[:3])]
    fixed, grown = load("fidelity_report").summarize(samples, ["fm@1/8", "imdc@1/8"], 0)
    assert fixed["count"] == grown["count"] == 3
    assert fixed["score"][0] == pytest.approx(100 * sum(scores[:3]) / 3, abs=1e-3)
    assert fixed["score"][1] < fixed["score"][0] < fixed["score"][2]
    # Every question gains alike, so the interval of the difference has no width, wide as those of the scores are.
    assert grown["score_against_fm"] == pytest.approx([5.0, 5.0, 5.0], abs=1e-3)
    assert grown["gold_nats_against_fm"] == pytest.approx([-0.05, -0.05, -0.05], abs=1e-3)
    assert "score_against_fm" not in fixed
    assert "own_nats" not in grown
    assert grown["prompt_tokens"] == [1000, 1002]
