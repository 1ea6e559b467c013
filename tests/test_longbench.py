"""`bench/longbench.py` with a tiny model: whole runs, killed runs, runs in two processes."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("rouge")

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "longbench.py"
WAYS = "full,fm,imdc:window@1/2"
Run = Callable[..., int]


@pytest.fixture
def longbench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return importlib.import_module("longbench")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official files with three short questions each, of a task of each kind of prompt."""
    folder = tmp_path_factory.mktemp("questions")
    for task in ("hotpotqa", "lcc", "samsum"):
        records = [
            {
                "_id": f"{task}{number}", "input": "What is it?", "context": "A long text. " * (20 + 4 * number),
                "answers": ["a text"], "length": 3000 + 2000 * number, "dataset": task, "language": "en",
                "all_classes": None,
            }
            for number in range(3)
        ]  # fmt: skip
        (folder / f"{task}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


def options(model: Path, questions: Path, output: Path, *others: str) -> list[str]:
    given = ["--model", str(model), "--dtype", "float32", "--data-dir", str(questions), "--output", str(output)]
    tasks = [] if "--tasks" in others else ["--tasks", "hotpotqa,lcc"]
    return [*given, *tasks, "--memory-tokens", "96", "--chunk-tokens", "64", "--schedules", WAYS, *others]


def lines(output: Path) -> list[dict[str, Any]]:
    files = sorted(output.glob("samples-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def answers(samples: Sequence[dict[str, Any]]) -> dict[tuple[str, str], tuple[str, float]]:
    """What must not depend on how a run went: predictions and scores by way and record."""
    found = {(sample["key"], sample["id"]): (sample["prediction"], sample["score"]) for sample in samples}
    assert len(found) == len(samples)
    return found


@pytest.fixture(scope="session")
def finished(tiny_model_dir: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two tasks, two questions each, in three ways, that nothing cut off."""
    output = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patching:
        patching.syspath_prepend(str(SCRIPT.parent))
        patching.delenv("WORLD_SIZE", raising=False)
        assert (
            importlib.import_module("longbench").main(options(tiny_model_dir, questions, output, "--limit", "2")) == 0
        )
    return output


def test_every_answer_is_a_line_with_its_costs(finished: Path) -> None:
    samples = lines(finished)
    assert len(answers(samples)) == 2 * 2 * 3
    for sample in samples:
        assert sample["prompt_tokens"] > 256 and len(sample["prompt_sha"]) == 16 and sample["official_prompt"]
        assert 0 <= sample["score"] <= 1 and 0 < sample["ttft_seconds"] <= sample["seconds"]
        assert sample["ttft_cpu_seconds"] > 0
        assert sample["new_tokens"] <= {"hotpotqa": 32, "lcc": 64}[sample["task"]]
        if sample["way"] == "full":
            assert "plan" not in sample
        else:
            assert sum(step[0] for step in sample["plan"]) == sample["prompt_tokens"]
            kept = sample["prompt_tokens"] // 2 if sample["way"] == "imdc:window@1/2" else 96
            assert abs(sample["memory_tokens"] - kept) <= 1 and sample["kv_bytes"] > 0
    # Another way of reading gives other answers: the schedules really ran.
    by_way = {way: [s["prediction"] for s in samples if s["way"] == way] for way in WAYS.split(",")}
    assert by_way["full"] != by_way["fm"] != by_way["imdc:window@1/2"] != by_way["full"]


def test_the_full_column_is_stock_generate(finished: Path, tiny_model_dir: Path, questions: Path) -> None:
    import torch

    from imdc.model.loading import load_model

    model, tokenizer = load_model(tiny_model_dir)
    found = next(s for s in lines(finished) if s["way"] == "full" and s["task"] == "lcc")
    records = [json.loads(line) for line in (questions / "lcc.jsonl").read_text().splitlines()]
    record = next(record for record in records if record["_id"] == found["id"])
    prompt = f"Please complete the code given below. \n{record['context']}Next line of code:\n"
    ids = torch.tensor([tokenizer(prompt).input_ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    wanted = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert found["prediction"] == wanted and found["prompt_tokens"] == ids.shape[1]


def test_the_report_has_tables_page_and_picture(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert results["answers"] == results["answers_wanted"] == 12 and not results["failed"]
    assert results["settings"]["protocol"] == "untruncated" and results["settings"]["model"] != str(finished)
    assert results["sessions"][0]["versions"]["lm-eval"] and results["sessions"][0]["machine"]["cores"]
    samples = lines(finished)
    (lcc,) = (line for line in results["lines"] if line["label"] == "lcc")
    own = [sample["score"] for sample in samples if sample["task"] == "lcc" and sample["way"] == "fm"]
    assert lcc["scores"]["fm"]["value"] == pytest.approx(100 * sum(own) / len(own))
    assert {row["bucket"] for row in results["buckets"]} >= {"0-4k", "4-8k"}
    table = (finished / "table.md").read_text(encoding="utf-8")
    assert table.startswith("# LongBench (") and "untruncated" in table.splitlines()[0]
    for wanted in (
        "| all tasks |",
        "## Share of the score of full",
        "## Share of the score of fm",
        "## Time and memory",
    ):
        assert wanted in table
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count("<table>") == len([line for line in table.splitlines() if line.startswith("## ")])
    assert "http" not in page.replace('xmlns="http', "") and "%BODY%" not in page and "%STYLE%" not in page
    assert (finished / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_starting_again_answers_nothing_twice_and_a_larger_limit_adds(
    longbench: ModuleType, finished: Path, tiny_model_dir: Path, questions: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(finished, tmp_path / "run")
    before = (output / "samples-0.jsonl").read_bytes()
    assert longbench.main(options(tiny_model_dir, questions, output, "--limit", "2")) == 0
    assert (output / "samples-0.jsonl").read_bytes() == before
    # Time is up at once: what is there stays, and the command says that it has not finished.
    assert longbench.main(options(tiny_model_dir, questions, output, "--limit", "3", "--max-minutes", "0")) == 1
    assert (output / "samples-0.jsonl").read_bytes() == before
    assert "Not finished: 12 of 18 answers." in (output / "table.md").read_text(encoding="utf-8")
    more = options(tiny_model_dir, questions, output, "--limit", "3", "--tasks", "hotpotqa")
    assert longbench.main(more) == 0
    after = (output / "samples-0.jsonl").read_bytes()
    assert after.startswith(before) and len(after.splitlines()) == 12 + 3


def test_a_folder_of_another_run_is_refused(
    longbench: ModuleType,
    finished: Path,
    tiny_model_dir: Path,
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = shutil.copytree(finished, tmp_path / "run")
    assert longbench.main(options(tiny_model_dir, questions, output, "--limit", "2", "--seed", "1")) == 2
    assert "holds a run with seed=0, not 1" in capsys.readouterr().err
    assert longbench.main(options(tiny_model_dir, questions, output, "--limit", "2", "--protocol", "official")) == 2
    assert "max_length=None, not 3500" in capsys.readouterr().err
    changed = shutil.copytree(questions, tmp_path / "questions")
    (changed / "lcc.jsonl").write_text((changed / "lcc.jsonl").read_text().replace("A long", "Another long"))
    settings = json.loads((output / "settings.json").read_text())
    older = {**settings, "default scoring": "attention"}
    (output / "settings.json").write_text(json.dumps(older))
    assert longbench.main(options(tiny_model_dir, questions, output, "--limit", "2")) == 2
    assert "holds a run with default scoring='attention', not 'output_change'" in capsys.readouterr().err
    (output / "settings.json").write_text(json.dumps({**settings, "data": "questions"}))
    assert longbench.main(options(tiny_model_dir, changed, output, "--limit", "2")) == 2
    assert "holds an answer to another prompt of lcc" in capsys.readouterr().err


def test_prompts_that_are_too_long_or_too_short_are_named(
    longbench: ModuleType, tiny_model_dir: Path, questions: Path, tmp_path: Path
) -> None:
    few = ("--tasks", "lcc", "--schedules", "full", "--min-prompt-tokens", "350", "--max-prompt-tokens", "400")
    assert longbench.main(options(tiny_model_dir, questions, tmp_path, *few)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    (answered,) = lines(tmp_path)
    short, long = sorted(results["skipped"], key=lambda one: one["prompt_tokens"])
    assert short["prompt_tokens"] < 350 <= answered["prompt_tokens"] <= 400 < long["prompt_tokens"]
    table = (tmp_path / "table.md").read_text()
    assert f"shorter than 350 tokens: lcc {short['id']} ({short['prompt_tokens']})." in table
    assert f"longer than 400 tokens: lcc {long['id']} ({long['prompt_tokens']})." in table


def test_the_official_protocol_cuts_and_says_so(
    longbench: ModuleType, tiny_model_dir: Path, questions: Path, tmp_path: Path
) -> None:
    few = ("--tasks", "lcc", "--schedules", "imdc", "--limit", "1", "--protocol", "official", "--max-length", "200")
    assert longbench.main(options(tiny_model_dir, questions, tmp_path, *few)) == 0
    (sample,) = lines(tmp_path)
    assert sample["prompt_tokens"] == 200
    table = (tmp_path / "table.md").read_text()
    assert ", official\n" in table and "cut in the middle to 200 tokens" in table


def test_samsum_ends_at_a_newline_but_not_with_its_first_token(
    longbench: ModuleType, tiny_model_dir: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    asked: list[dict[str, Any]] = []
    generate = LlamaForCausalLM.generate

    def noted(model: Any, **given: Any) -> Any:
        asked.append(given)
        return generate(model, **given)

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    few = ("--tasks", "samsum,lcc", "--schedules", "full", "--limit", "1")
    assert longbench.main(options(tiny_model_dir, questions, tmp_path, *few)) == 0
    samsum, lcc = asked
    tokens, tokenizer = samsum["input_ids"].shape[1], AutoTokenizer.from_pretrained(tiny_model_dir)
    assert samsum["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.encode("\n")[-1]]
    assert (samsum["min_length"], samsum["max_length"]) == (tokens + 1, tokens + 128)
    assert samsum["do_sample"] is False and "eos_token_id" not in lcc and "min_length" not in lcc


def test_too_little_memory_is_an_answer_without_a_score(
    longbench: ModuleType, tiny_model_dir: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    read = importlib.import_module("longbench_read")
    generate = read._generate

    def fail_unpatched(lm: Any, record: Any, ids: list[int]) -> Any:
        if "_imdc_handle" not in vars(lm.model):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB.\nSee the manual.")
        return generate(lm, record, ids)

    monkeypatch.setattr(read, "_generate", fail_unpatched)
    few = ("--tasks", "lcc", "--schedules", "full,imdc", "--limit", "1")
    assert longbench.main(options(tiny_model_dir, questions, tmp_path, *few)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    (failed,) = results["failed"]
    assert failed["way"] == "full" and failed["error"] == "CUDA out of memory. Tried to allocate 3 TiB."
    assert results["costs"]["full"]["failed"] == 1 and results["costs"]["imdc"]["answers"] == 1
    assert "Out of memory, without a score: full lcc" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on(
    longbench: ModuleType, finished: Path, tiny_model_dir: Path, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), *options(tiny_model_dir, questions, output, "--limit", "2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    samples = output / "samples-0.jsonl"
    deadline = time.monotonic() + 200
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = samples.read_bytes()
    assert 2 <= kept.count(b"\n") < 12 and not (output / "results.json").exists()
    assert longbench.main(command[2:]) == 0
    assert samples.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert answers(lines(output)) == answers(lines(finished))
    assert len((output / "sessions.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(
    finished: Path, tiny_model_dir: Path, questions: Path, tmp_path: Path
) -> None:
    # "--multi_gpu" is what makes accelerate start several processes on one host, with GPUs or without.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launch, *plain, str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    given = options(tiny_model_dir, questions, tmp_path / "run", "--limit", "2")
    done = subprocess.run(
        [*command, *given], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [len((tmp_path / "run" / f"samples-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert shares == [6, 6]
    assert answers(lines(tmp_path / "run")) == answers(lines(finished))
    results, alone = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "run", finished))
    assert results["lines"] == alone["lines"] and results["answers"] == 12
    assert [session["processes"] for session in results["sessions"]] == [2, 2]
