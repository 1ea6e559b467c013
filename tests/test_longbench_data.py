"""`bench/longbench.py`'s records, ways of reading, protocols and figures: what needs no model."""

from __future__ import annotations

import importlib
import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

pytest.importorskip("lm_eval")

BENCH = Path(__file__).resolve().parents[1] / "bench"


def module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module(f"longbench_{name}")


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module(monkeypatch, "data")


@pytest.fixture
def tasks(data: ModuleType) -> ModuleType:
    return importlib.import_module("longbench_tasks")


@pytest.fixture
def ways(data: ModuleType) -> ModuleType:
    return importlib.import_module("longbench_ways")


@pytest.fixture
def scores(data: ModuleType) -> ModuleType:
    return importlib.import_module("longbench_scores")


def official(number: int, **others: Any) -> dict[str, Any]:
    record = {
        "_id": f"id{number}", "input": "Who?", "context": f"Text {number}.", "answers": ["Me"], "length": 3999 + number,
        "dataset": "qasper", "language": "en", "all_classes": None,
    }  # fmt: skip
    return {**record, **others}


def write(path: Path, *records: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def test_official_records_from_a_folder_and_from_its_zip_are_the_same(
    data: ModuleType, tasks: ModuleType, tmp_path: Path
) -> None:
    write(tmp_path / "data" / "qasper.jsonl", official(0), official(1))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(tmp_path / "data" / "qasper.jsonl", "data/qasper.jsonl")
    chosen = [tasks.get_task("qasper")]
    from_folder, _ = data.load(chosen, str(tmp_path), extended=False)
    from_zip, name = data.load(chosen, str(tmp_path / "data.zip"), extended=False)
    assert from_folder == from_zip and name == "data.zip"
    first, second = from_zip["qasper"]
    assert "Article: Text 0.\n\n Answer" in first.prompt and first.prompt.endswith("Question: Who?\n\nAnswer:")
    assert (first.id, first.answers, first.length, second.length) == ("id0", ("Me",), 3999, 4000)
    assert first.official and first.sha != second.sha


def test_prompts_that_are_filled_in_stay_as_they_are(data: ModuleType, tasks: ModuleType, tmp_path: Path) -> None:
    prompt = tasks.get_task("trec").fill("Question: a\nType: Date", "Question: b\nType:")
    gold = {"all_classes": ["Date", "Food"], "answers": ["Food"]}
    reworded = {"task": "trec", "number": 2, "prompt": "Which type? b", "gold": gold}
    write(tmp_path / "trec.jsonl", {"task": "trec", "number": 0, "prompt": prompt, "gold": gold}, reworded)
    (found,) = data.load([tasks.get_task("trec")], str(tmp_path), extended=False)[0].values()
    assert [(one.id, one.prompt, one.official) for one in found] == [("0", prompt, True), ("2", "Which type? b", False)]
    assert found[0].answers == ("Food",) and found[0].all_classes == ("Date", "Food") and found[0].length is None


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("qasper", "{", r"qasper\.jsonl, line 2: "),
        ("qasper", "[]", "line 2: a JSON object is expected, not list"),
        ("qasper", json.dumps(official(0)), "line 2: 'id0' is there twice"),
        ("qasper", json.dumps(official(1, answers=[])), "line 2: answers must be a list of texts with at least one"),
        ("qasper", json.dumps(official(1, answers="Me")), "line 2: answers must be a list of texts"),
        ("qasper", json.dumps(official(1, context=None)), "line 2: context must be a text, not None"),
        ("qasper", json.dumps(official(1, length="7")), "line 2: length must be a whole number, not '7'"),
        ("qasper", json.dumps({"_id": "1", "context": "x"}), "line 2: no field 'question'"),
        ("trec", json.dumps(official(1)), "line 2: all_classes must be a list"),
        ("passage_retrieval_en", json.dumps(official(1)), "line 2: the answer 'Me' is not Paragraph N"),
    ],
)
def test_a_malformed_line_is_named(
    data: ModuleType, tasks: ModuleType, tmp_path: Path, task: str, line: str, message: str
) -> None:
    good = official(0, all_classes=["Me"], answers=["Paragraph 1" if task.startswith("passage") else "Me"])
    (tmp_path / f"{task}.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(data.DataError, match=message):
        data.load([tasks.get_task(task)], str(tmp_path), extended=False)


def test_missing_files_are_named(data: ModuleType, tasks: ModuleType, tmp_path: Path) -> None:
    chosen = [tasks.get_task("qasper"), tasks.get_task("lcc")]
    with pytest.raises(data.DataError, match="does not exist"):
        data.load(chosen, str(tmp_path / "no"), extended=False)
    write(tmp_path / "qasper.jsonl", official(0))
    with pytest.raises(data.DataError, match=r"lacks lcc\.jsonl; leave"):
        data.load(chosen, str(tmp_path), extended=False)
    with pytest.raises(data.DataError, match=r"lacks qasper_e\.jsonl, lcc_e\.jsonl"):
        data.load(chosen, str(tmp_path), extended=True)
    with pytest.raises(data.DataError, match="neither a folder nor a zip file"):
        data.load(chosen, str(tmp_path / "qasper.jsonl"), extended=False)
    with pytest.raises(data.DataError, match=r"cannot be had from the hub .*LONGBENCH_DATA"):
        data.load(chosen, "hub", extended=False)


def test_minilongbench_is_read_whole(data: ModuleType, tasks: ModuleType, data_dir: Path) -> None:
    chosen, _ = tasks.choose_tasks("longbench")
    found, _ = data.load(chosen, str(data_dir / "minilongbench"), extended=False)
    assert len(found) == 21 and sum(map(len, found.values())) == 124
    # MiniLongBench words these otherwise; all the others agree with the templates here, corrections included.
    reworded = {name for name, records in found.items() if not all(record.official for record in records)}
    assert reworded == {"narrativeqa", "qasper", "multi_news"}


def test_the_draw_takes_tasks_in_turn_and_a_larger_one_holds_the_smaller(
    data: ModuleType, tasks: ModuleType, tmp_path: Path
) -> None:
    write(tmp_path / "qasper.jsonl", *(official(number) for number in range(8)))
    write(tmp_path / "lcc.jsonl", *(official(number) for number in range(3)))
    found, _ = data.load([tasks.get_task("qasper"), tasks.get_task("lcc")], str(tmp_path), extended=False)
    order = [(record.task.name, record.id) for record in data.in_order(found, 0)]
    assert [name for name, _ in order] == ["qasper", "lcc"] * 3 + ["qasper"] * 5
    assert len(set(order)) == 11
    assert order == [(record.task.name, record.id) for record in data.in_order(found, 0)]
    assert order != [(record.task.name, record.id) for record in data.in_order(found, 1)]


def parse(ways: ModuleType, text: str, **others: Any) -> Any:
    given = {"observer": "prompt_tail", "memory": ways.Amount.parse("2048"), "chunk": ways.Amount.parse("512")}
    return ways.parse_ways(text, **{**given, "options": {}, **others})


def test_ways_of_reading(ways: ModuleType) -> None:
    full, fm, aware, blind = parse(ways, "full, fm,imdc@1/8,imdc:window@25%", options={"balance": "bytes"})
    assert full.config(10_000) is None and full.aware and full.key == "full"
    assert (fm.config(10_000).memory_tokens, fm.config(10_000).chunk_tokens) == (2048, 512)
    assert (aware.config(10_000).memory_tokens, aware.config(10_000).observer) == (1250, "prompt_tail")
    assert (blind.config(10_000).memory_tokens, blind.config(10_000).observer) == (2500, "window")
    assert aware.aware and not blind.aware and blind.config(10_000).balance == "bytes"
    whole, never = parse(ways, "imdc@1/8+recall,fm:window+recall0")
    assert whole.config(8192).recall == "host" and whole.config(8192).recall_every > 0
    assert never.config(8192).recall_every == 0 and never.config(8192).memory_tokens == 2048
    assert whole.name == "imdc@1/8+recall" and whole.key != aware.key
    # Sinks and recent tokens are always kept: of a short prompt there is something to choose beside them.
    assert aware.config(100).memory_tokens == 4 + 32 + 32
    assert len({way.key for way in (full, fm, aware, blind)}) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imcd", r"unknown schedule 'imcd'\. Did you mean 'imdc'\?"),
        ("imdc:windw", r"unknown observer 'windw'\. Did you mean 'window'\?"),
        ("full@1/8", "full is the unpatched model"),
        ("imdc@1/0", "neither a number of tokens nor a share"),
        ("imdc@3/2", "must be above 0 and at most 1"),
        ("imdc@much", "neither a number of tokens nor a share"),
        ("imdc@8", "memory_tokens=8 is smaller than sink_tokens"),
        ("imdc@1@2", "is not SCHEDULE"),
        ("imdc,imdc@2048", "has 'imdc' twice"),
        (",", "names no schedule"),
    ],
)
def test_ways_that_cannot_be_are_refused(ways: ModuleType, text: str, message: str) -> None:
    from imdc.errors import ImdcError

    with pytest.raises(ImdcError, match=message):
        parse(ways, text)


def test_the_official_protocol_cuts_the_middle(
    data: ModuleType, monkeypatch: pytest.MonkeyPatch, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = module(monkeypatch, "prompt")
    assert prompt.cut_middle(byte_tokenizer, "abcdefghij", 10) == "abcdefghij"
    assert prompt.cut_middle(byte_tokenizer, "abcdefghij", 6) == "abchij"
    # int(7 / 2) of either end, as the official code has it.
    assert prompt.cut_middle(byte_tokenizer, "abcdefghij", 7) == "abchij"
    assert prompt.official_length(32768, None) == 31500 and prompt.official_length(8192, 100) == 100
    with pytest.raises(prompt.WindowError, match="window is 5000 tokens, for which LongBench has no max_length"):
        prompt.official_length(5000, None)


def sample(way: Any, task: str, number: int, score: float | None, length: int | None = None) -> dict[str, Any]:
    values = {"way": way.name, "key": way.key, "task": task, "id": str(number), "length": length, "prompt_tokens": 100}
    if score is None:
        return {**values, "error": "out of memory"}
    first = 2.0 if way.name == "full" else 1.0
    costs = {"ttft_seconds": first, "ttft_cpu_seconds": 2 * first**2, "seconds": 3.0, "decode_tokens_per_second": 10.0}
    return {**values, **costs, "score": score, "peak_bytes": 1000 * number, "peak_kind": "resident"}


def test_figures_are_means_of_means(tasks: ModuleType, ways: ModuleType, scores: ModuleType) -> None:
    chosen = [tasks.get_task(name) for name in ("qasper", "narrativeqa", "multifieldqa_zh", "lcc")]
    full, imdc = parse(ways, "full,imdc")
    given = {"qasper": (1.0, 0.0), "narrativeqa": (0.6,), "multifieldqa_zh": (0.2,), "lcc": (0.4, 0.6, 0.5)}
    samples = [sample(full, task, at, score) for task, group in given.items() for at, score in enumerate(group)]
    samples += [sample(imdc, task, at, score / 2) for task, group in given.items() for at, score in enumerate(group)]
    lines = {line.label: line for line in scores.lines(samples, chosen, [full, imdc], 0)}
    value = {label: line.scores["full"].value for label, line in lines.items()}
    assert value["qasper"] == pytest.approx(50) and value["single-document QA"] == pytest.approx((50 + 60 + 20) / 3)
    # Code counts in both languages; the averages of a language are over its categories.
    assert value["English"] == pytest.approx(((50 + 60) / 2 + 50) / 2)
    assert value["Chinese"] == pytest.approx((20 + 50) / 2)
    assert value["all tasks"] == pytest.approx((50 + 60 + 20 + 50) / 4)
    assert lines["all tasks"].scores["full"].count == 7 and lines["lcc"].scores["imdc"].count == 3
    # A way that always has half the score has half of it in every draw, since pairs are drawn together.
    half = lines["all tasks"].against["full"]["imdc"]
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    spread = lines["all tasks"].scores["full"]
    assert spread.low < spread.value < spread.high
    assert lines["narrativeqa"].scores["full"].low == lines["narrativeqa"].scores["full"].high
    assert scores.lines(samples, chosen, [full, imdc], 0) == list(lines.values())


def test_ratios_are_over_what_both_have_answered(tasks: ModuleType, ways: ModuleType, scores: ModuleType) -> None:
    full, imdc = parse(ways, "full,imdc")
    samples = [sample(full, "qasper", 0, 0.8), sample(full, "qasper", 1, None)]
    samples += [sample(imdc, "qasper", 0, 0.4), sample(imdc, "qasper", 1, 1.0)]
    (line, *_) = scores.lines(samples, [tasks.get_task("qasper")], [full, imdc], 0)
    assert line.scores["full"].value == pytest.approx(80) and line.scores["imdc"].value == pytest.approx(70)
    assert line.against["full"]["imdc"].value == pytest.approx(0.5) and line.against["full"]["imdc"].count == 1
    costs = scores.costs(samples, [full, imdc])
    assert costs["full"]["failed"] == 1 and costs["imdc"]["answers"] == 2
    assert costs["imdc"]["ttft_seconds against full"] == pytest.approx(1 / 2)
    assert costs["imdc"]["ttft_cpu_seconds against full"] == pytest.approx(1 / 4)
    assert scores.lines([], [tasks.get_task("qasper")], [full, imdc], 0) == []


def test_buckets_of_longbench_e(tasks: ModuleType, ways: ModuleType, scores: ModuleType) -> None:
    (full,) = parse(ways, "full")
    lengths = {3999: 1.0, 4000: 0.5, 7999: 0.25, 8000: 0.125}
    samples = [sample(full, "qasper", at, score, length) for at, (length, score) in enumerate(lengths.items())]
    samples.append(sample(full, "lcc", 0, 0.5, 100))
    rows = scores.buckets(samples, [tasks.get_task("qasper"), tasks.get_task("lcc")], [full])
    found = {(row["task"], row["bucket"]): row["scores"]["full"] for row in rows}
    # Rounded to two digits, as the official scorer_e does.
    assert found == {
        ("qasper", "0-4k"): 100.0,
        ("qasper", "4-8k"): 37.5,
        ("qasper", "8k+"): 12.5,
        ("lcc", "0-4k"): 50.0,
        ("all tasks", "0-4k"): 75.0,
        ("all tasks", "4-8k"): 37.5,
        ("all tasks", "8k+"): 12.5,
    }
    assert scores.buckets([sample(full, "qasper", 0, 1.0)], [tasks.get_task("qasper")], [full]) == []


def test_a_line_that_was_cut_off_is_taken_back_and_any_other_is_named(data: ModuleType, tmp_path: Path) -> None:
    store = importlib.import_module("longbench_store")
    good = json.dumps({"key": "full", "task": "lcc", "id": "0"}) + "\n"
    path = tmp_path / "samples-0.jsonl"
    path.write_text(good + '{"key": "fu')
    with store.Store(tmp_path, 0) as opened:
        assert len(opened.samples()) == 1 and path.read_text() == good
        with pytest.raises(store.StoreError, match="is being written by another process"), store.Store(tmp_path, 0):
            pass
        opened.add({"key": "fm", "task": "lcc", "id": "0"})
        assert set(opened.samples()) == {("full", "lcc", "0"), ("fm", "lcc", "0")}
    path.write_text(good + "nonsense\n" + good)
    with store.Store(tmp_path, 0) as opened, pytest.raises(store.StoreError, match=r"samples-0\.jsonl, line 2"):
        opened.samples()
