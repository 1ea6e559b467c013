"""`bench/kernel_timings.py` without a GPU: what it refuses, and that its parts fit together."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_cases import DEVICE, ON_DEVICE

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "kernel_timings.py"


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, at a shape the interpreter can bear."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("record", "device_clock", "rivals", "kernel_timings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("kernel_timings")
    small = {"CHUNK": 32, "MEMORIES": (0, 32), "KEEP": 32, "OBSERVERS": 8, "HIDDEN": 64, "INTERMEDIATE": 64}
    for name, value in {**small, "Q_HEADS": 4, "KV_HEADS": 2, "DIM": 16, "SCALE": 0.25, "DEVICE": str(DEVICE)}.items():
        monkeypatch.setattr(module, name, value)
    clock = sys.modules["device_clock"]
    for name, value in {"DEVICE": str(DEVICE), "MATMUL_SIZE": 64, "COPIED_FLOATS": 64, "FLUSHED_BYTES": 64}.items():
        monkeypatch.setattr(clock, name, value)
    return module


class Event:
    """Stands in for a CUDA event on machines without CUDA: a tick of 3 ms."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        Event.now += 3.0
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def faked_device(timings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the script believe that the interpreter's machine is a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(timings, "interpreting", lambda: False)


def test_without_a_gpu_it_says_so_and_exits_with_2() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr and done.stdout == ""


def test_red_checks_keep_it_from_timing(
    timings: ModuleType, faked_device: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timings.Timings, "measure_ceilings", lambda _: pytest.fail("it timed"))
    monkeypatch.setattr(timings, "checks", lambda: iter([("this", True), ("that", False)]))
    assert timings.main([]) == 1
    assert "nothing timed, these checks are red: that" in capsys.readouterr().err


@pytest.mark.skipif(ON_DEVICE, reason="on a device the script itself is run")
def test_a_whole_run_writes_what_it_measured(
    timings: ModuleType, faked_device: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timings, "describe_device", lambda: {"name": "none"})
    monkeypatch.setattr(sys.modules["record"], "circumstances", dict)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(sys.modules["device_clock"], "MOST_RUNS", 3)
    monkeypatch.setattr(sys.modules["device_clock"], "LEAST_RUNS", 2)
    # The interpreter runs all blocks alike, so one of them stands for the sweep.
    monkeypatch.setattr(timings, "SWEEP", [one for one in timings.SWEEP if one == (64, 64, 4, 2)])
    assert timings.main(["--out", str(tmp_path), "--commit", "abc", "--sweep"]) == 0
    [path] = tmp_path.iterdir()
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["commit"] == "abc" and record["device"] == {"name": "none"}
    assert [verdict["memory"] for verdict in record["verdicts"]] == [0, 32]
    unavailable = {row["name"] for row in record["rows"] if "unavailable" in row}
    assert {"step: flash", "step: varlen", "attention: sdpa cudnn"} <= unavailable
    assert record["flash_generation"] is None
    assert record["verdicts"][1]["step_milliseconds"] == {"triton": 3.0, "sdpa": 3.0, "reference": 3.0}
    timed = {row["name"]: row for row in record["rows"] if "unavailable" not in row}
    assert {
        "step: triton",
        "step: triton, one launch",
        "step: triton, several launches",
        "step: sdpa",
        "step: reference",
        "attention: sdpa flash",
        "attention: triton",
        "  64x64 4w 2s tma",
    } <= set(timed)
    assert all(row["milliseconds"] == 3.0 and row["host_milliseconds"] > 0 for row in timed.values())


@pytest.mark.skipif(ON_DEVICE, reason="on a device the script itself is run")
def test_the_interpreter_is_refused(timings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert timings.main([]) == 2


def test_its_checks_hold_and_can_fail(timings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(holds for _, holds in timings.checks())
    monkeypatch.setattr(timings, "LARGEST_ERROR", 1e-9)
    assert not all(holds for _, holds in timings.checks())


def test_every_kernel_and_rival_is_timed(timings: ModuleType) -> None:
    ticks = iter(range(1, 1000))

    def clock(run: object) -> tuple[float, float]:
        assert callable(run)
        run()
        return float(next(ticks)), 0.1

    measured = timings.Timings(clock, matmul_tflops=1.0, copy_gbytes=1.0)
    for memory in timings.MEMORIES:
        verdict = timings.time_memory(measured, memory, linear=100.0, sweep=False)
        assert 0.0 < verdict["compression_share_of_layer"] < 1.0
        assert 0.0 < verdict["strided_scoring_share_of_layer"] < 1.0
        assert verdict["step_over_its_parts"] > 0.0 and verdict["auto_over_fastest_backend"] >= 1.0
    names = {row["name"].split(":")[0] for row in measured.rows}
    assert names == {"attention", "scoring", "selection", "compaction", "step"}
    ours = [row for row in measured.rows if "triton" in row["name"]]
    voters = {row["name"]: row["tflops"] for row in measured.rows if row["name"].startswith("scoring: every")}
    assert voters.keys() == {"scoring: every 4th row", "scoring: every 4th row, by attention"}
    assert len(ours) == 14 and all("milliseconds" in row for row in ours)


def test_flops_count_what_the_mask_leaves(timings: ModuleType) -> None:
    measured = timings.Timings(lambda run: (1.0, 1.0), matmul_tflops=1.0, copy_gbytes=1.0)
    timings.time_memory(measured, 32, linear=1.0, sweep=False)
    [row] = [row for row in measured.rows if row["name"] == "attention: triton"]
    pairs = sum(32 + i + 1 for i in range(32))
    assert row["tflops"] == pytest.approx(4 * 4 * timings.DIM * pairs / 1e9)


def test_a_rival_that_fails_or_computes_something_else_is_not_timed(timings: ModuleType) -> None:
    measured = timings.Timings(lambda run: pytest.fail("it was timed"))
    exact = torch.randn(4, 4)
    wrong = timings.differs_from(exact)
    assert measured.add_rival("off", 0, lambda: exact * 1.1, wrong=wrong) == float("inf")
    assert measured.add_rival("broken", 0, lambda: 1 // 0, wrong=wrong) == float("inf")
    reasons = {row["name"]: row["unavailable"] for row in measured.rows}
    assert "off by 1.00e-01" in reasons["off"] and "ZeroDivisionError" in reasons["broken"]


@pytest.mark.skipif(ON_DEVICE, reason="a device keeps its own time")
def test_times_are_medians_of_enough_runs(timings: ModuleType, faked_device: None) -> None:
    runs: list[int] = []
    device, host = sys.modules["device_clock"].median_times(lambda: runs.append(1))
    assert device == 3.0 and host > 0.0
    assert len(runs) == 5 + int(200 / 3)


def test_the_script_for_a_gpu_session_is_sound() -> None:
    script = SCRIPT.with_name("on_gpu.sh")
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    named = re.findall(r"tests/test_\w+\.py(?:::\w+)?", script.read_text())
    assert named
    for name in named:
        path, _, test = name.partition("::")
        assert f"def {test}" in (SCRIPT.parents[1] / path).read_text()


@pytest.mark.parametrize(
    ("statuses", "code", "shown"),
    [
        ((0, 0), 0, "verified:\n  a0\n  a1\nNOT verified:\n  nothing\n"),
        ((0, 124), 1, "verified:\n  a0\nNOT verified:\n  a1: ran out of time\n"),
        ((1, 124), 1, "verified:\n  nothing\nNOT verified:\n  a0: exit status 1\n  a1: ran out of time\n"),
    ],
)
def test_a_gpu_session_that_ran_out_of_time_is_red(statuses: tuple[int, ...], code: int, shown: str) -> None:
    script = SCRIPT.with_name("on_gpu.sh").read_text()
    functions = script[script.index("judge() {") : script.index("# Most valuable first.")]
    calls = "\n".join(f"judge a{i} {status}" for i, status in enumerate(statuses))
    lines = f"set -uo pipefail\nverified=()\nunverified=()\n{functions}\n{calls}\nreport"
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, shown, "")
