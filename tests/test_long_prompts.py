"""`bench/long_prompts.py` without a GPU: what it refuses, its figures, and whole runs where the CPU stands in."""

from __future__ import annotations

import gc
import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import build, token_ids
from torch.nn.attention import SDPBackend

import imdc
from imdc.errors import ImdcError
from imdc.profiler.allocations import DispatchAllocations

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "long_prompts.py"
TOKENS = 240
MODULES = ("long_prompts", "time_by_kernel", "record", "device_clock", "peak_memory")
SHORT = ["--prompt-tokens", "120"]
SETTING = ["--setting", "32,64", "--dtype", "float32"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("long_prompts")


@pytest.fixture
def faked_device(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the script believe that a tiny model on the CPU is a large one on a CUDA device.

    Bytes are those that operators return, seconds those of the CPU, and a large matrix product runs at 1 GFLOP/s.
    """
    ids = token_ids(TOKENS)
    model = build("llama")

    def ceilings(timings: Any) -> None:
        timings.matmul_tflops, timings.copy_gbytes = 1e-3, 2.0

    monkeypatch.setattr(bench, "load", lambda args: (model, ids[:, : max(args.prompt_tokens)]))
    monkeypatch.setattr(bench, "describe_device", lambda: {"name": "none"})
    monkeypatch.setattr(
        bench, "FULL", {"full-cudnn": SDPBackend.FLASH_ATTENTION, "full-flash": SDPBackend.CUDNN_ATTENTION}
    )
    monkeypatch.setattr(bench, "STOCK_CHUNK", 32)
    monkeypatch.setattr(bench.Timings, "measure_ceilings", ceilings)
    with DispatchAllocations() as counter:
        for name, stands_in in {
            "is_available": lambda: True,
            "get_device_name": lambda: "none",
            "empty_cache": lambda: None,
            "synchronize": lambda: None,
            "memory_allocated": counter.current,
            "reset_peak_memory_stats": counter.take_peak,
            "max_memory_allocated": lambda: counter._peak,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stands_in)
        # The script collects garbage before each reading: that of the tests is much, and none of its concern.
        gc.freeze()
        yield
        gc.unfreeze()


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    record: dict[str, Any] = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return record


def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert capsys.readouterr() == ("", "long_prompts: error: no CUDA device here\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--ways", "imcd"], "invalid choice: 'imcd'"),
        (["--prompt-tokens", "0"], "--prompt-tokens: must be at least 1, got 0"),
        (["--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["--setting", "4096"], "'4096' is not CHUNK,MEMORY, such as 512,4096"),
        (["--dtype", "float31"], "invalid choice: 'float31'"),
        (["--backend", "tritom"], "long_prompts: error: backend must be one of"),
        (["--setting", "0,64"], "long_prompts: error: chunk_tokens"),
    ],
)
def test_bad_input_is_named_before_anything_is_asked_of_the_device(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    try:
        status: Any = bench.main(given)
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    assert status == 2 and output.out == ""
    assert message in output.err.splitlines()[-1]


def test_kernels_that_are_not_installed_are_named(
    bench: ModuleType, faked_device: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert bench.main(["--liger"]) == 2
    assert capsys.readouterr().err == "long_prompts: error: --liger needs liger-kernel (pip install liger-kernel)\n"


def test_the_command_of_a_gpu_session_is_understood(bench: ModuleType) -> None:
    script = SCRIPT.with_name("on_gpu.sh").read_text().replace("\\\n", " ")
    (line,) = (line for line in script.splitlines() if "bench/long_prompts.py" in line)
    words = shlex.split(line[line.index("bench/long_prompts.py") : line.index("2>&1")])[1:]
    args = bench._parser().parse_args(words)
    assert args.profile and len(list(bench.rows_of(args))) == len(args.ways)


def test_every_setting_is_read_in_our_ways_only_and_nothing_twice(bench: ModuleType) -> None:
    words = "--prompt-tokens 9000 400 9000 --ways fm full-flash fm --setting 64,128 64,64 64,128"
    args = bench._parser().parse_args(shlex.split(words))
    rows = [(row.prompt_tokens, row.way, row.setting) for row in bench.rows_of(args)]
    short = [(400, "fm", (64, 128)), (400, "fm", (64, 64)), (400, "full-flash", None)]
    assert rows == short + [(9000, *rest) for _, *rest in short]


def test_figures_of_a_row(bench: ModuleType) -> None:
    row = bench.Row("full-flash", 1000, seconds=[4.0, 1.0, 2.0], peak_bytes=400, predicted_bytes=300, flops=3 * 10**12)
    # 3 TFLOP at 6 TFLOP/s are half a second, a quarter of the median.
    value = row.as_json(6.0)
    assert value["median_seconds"] == 2.0 and value["floor_seconds"] == 0.5 and value["share_of_floor"] == 0.25
    assert value["error"] == -0.25 and value["failed"] is None
    failed = bench.Row("full-flash", 1000, failed="RuntimeError: no").as_json(6.0)
    assert {name for name, value in failed.items() if value} == {"way", "prompt_tokens", "failed"}


def test_the_floor_of_full_attention_is_that_of_its_products(bench: ModuleType) -> None:
    # So long that imdc would do less.
    tokens = 20_000
    model, row = build("llama"), bench.Row("chunked", tokens)
    bench.foresee(model, row)
    matrices = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    pairs = tokens * (tokens + 1) // 2
    # Query times key and probability times value, in 3 layers with 4 heads of 16; logits of the last token only.
    assert row.flops == 2 * tokens * matrices + 2 * 2 * pairs * 3 * 4 * 16 + 2 * 64 * 128
    # The planner knows nothing of prompts that transformers reads in chunks.
    assert row.predicted_bytes is None


def test_a_whole_run_writes_what_it_measured(
    bench: ModuleType, faked_device: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = ("imdc", "fm", "full-cudnn", "chunked")
    words = ["--prompt-tokens", str(TOKENS), "120", *SETTING, "--repeats", "2", "--no-warm-up"]
    assert bench.main([*words, "--ways", *ways, "--commit", "abc", "--out", str(tmp_path)]) == 0
    record = written(tmp_path)
    assert record["commit"] == "abc" and record["device"] == {"name": "none"}
    assert record["options"]["setting"] == [[32, 64]] and record["matmul_tflops"] == 1e-3
    rows = {(row["prompt_tokens"], row["way"]): row for row in record["rows"]}
    assert list(rows) == [(tokens, way) for tokens in (120, TOKENS) for way in ways]
    shown = capsys.readouterr().out.splitlines()
    for (_, way), row in rows.items():
        assert len(row["seconds"]) == (1 if way == "chunked" else 2) and min(row["seconds"]) > 0.0
        assert row["failed"] is None and row["kernels"] == []
        assert bool(row["backend"]) is (row["setting"] is not None) is (way in bench.OURS)
        # What is measured is what the plan speaks of; of a tiny model it leaves out as much as this.
        assert way == "chunked" or abs(row["error"]) < 0.1
        floor = f"floor {100 * row['share_of_floor']:.0f}% of that"
        assert [line for line in shown if f"{row['median_seconds']:.3f} s" in line and floor in line]
    # A memory bounds what a longer prompt takes, and nothing else does.
    growth = {way: rows[TOKENS, way]["peak_bytes"] / rows[120, way]["peak_bytes"] for way in ways}
    assert max(growth["imdc"], growth["fm"]) < 1.2 and min(growth["full-cudnn"], growth["chunked"]) > 1.7


def test_a_later_token_takes_what_more_of_them_take_longer(
    bench: ModuleType, faked_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    class Slow:
        def generate(self, ids: torch.Tensor, *, max_new_tokens: int, **_: Any) -> None:
            now[0] += 5.0 + 2.0 * max_new_tokens

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    row = bench.Row("chunked", 4)
    bench.read(Slow(), token_ids(4), row)
    bench.read(Slow(), token_ids(4), row, new_tokens=9)
    # The second reading is not one more to the first token.
    assert row.seconds == [7.0] and row.token_seconds == 2.0


def test_later_tokens_are_timed_and_what_recall_stores_is_counted(
    bench: ModuleType, faked_device: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SHORT, *SETTING, "--repeats", "1", "--no-warm-up", "--new-tokens", "9", "--out", str(tmp_path)]
    assert bench.main([*words, "--ways", "imdc", "imdc+recall", "chunked"]) == 0
    plain, recall, chunked = written(tmp_path)["rows"]
    assert None not in (plain["seconds_per_token"], recall["seconds_per_token"], chunked["seconds_per_token"])
    assert plain["host_bytes"] is plain["recalled_bytes"] is chunked["host_bytes"] is None
    # Keys and values of 3 layers with 2 heads of 16 in float32, for every token before the sixteen that ask.
    assert recall["host_bytes"] >= 2 * 3 * 2 * 16 * 4 * (120 - 16) and recall["recalled_bytes"] > 0
    assert capsys.readouterr().out.count(" ms a token)") == 3
    # Sixteen ask, not the 64 that a plan takes for a question it is told nothing of. (The host is the device here, so
    # what is measured has the store in it.)
    options = {"recall": "host", "chunk_tokens": 32, "memory_tokens": 64}
    planned = imdc.plan(build("llama"), 120 - 16, new_tokens=1, question_tokens=16, **options)
    assert recall["predicted_bytes"] == planned.peak.above_weights


def test_what_fails_is_written_beside_what_was_measured(
    bench: ModuleType, faked_device: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def plan(*_: Any, **__: Any) -> None:
        raise ImdcError("no plan\nfor this")

    monkeypatch.setattr(imdc, "plan", plan)
    words = [*SHORT, *SETTING, "--repeats", "1", "--no-warm-up", "--ways", "full-flash", "fm", "--out", str(tmp_path)]
    assert bench.main(words) == 1
    flash, fm = written(tmp_path)["rows"]
    assert flash["seconds"] == [] and flash["failed"].startswith("RuntimeError: ")
    assert len(fm["seconds"]) == 1 and fm["failed"] == "ImdcError: no plan"
    assert capsys.readouterr().out.count(": FAILED ") == 2


def test_a_profiled_run_shows_where_the_time_goes(
    bench: ModuleType, faked_device: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    profiles: list[None] = []

    @contextmanager
    def kernels() -> Iterator[dict[str, list[Any]]]:
        profiles.append(None)
        yield {"_fused_step_kernel": [1.0, 7]}

    monkeypatch.setattr(bench, "time_by_kernel", kernels)
    words = [*SHORT, *SETTING, "--repeats", "1", "--ways", "imdc", "--profile", "--out", str(tmp_path)]
    assert bench.main(words) == 0
    (row,) = written(tmp_path)["rows"]
    # Neither the profiler's own run nor the first, which warms up, is among those that are timed.
    assert len(profiles) == len(row["seconds"]) == 1
    assert [(one["kind"], one["calls"]) for one in row["kernels"]] == [("no kernel running", 0), ("fused step", 7)]
    assert sum(one["share"] for one in row["kernels"]) == pytest.approx(1.0)
    assert "fused step                     0.0000 s    0.0%" in capsys.readouterr().out
