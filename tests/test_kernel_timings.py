"""`bench/kernel_timings.py` without a GPU: what it refuses, and that its parts fit together."""

from __future__ import annotations

import importlib.util
import os
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
    spec = importlib.util.spec_from_file_location("kernel_timings", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernel_timings", module)
    spec.loader.exec_module(module)
    small = {"CHUNK": 32, "MEMORIES": (0, 32), "KEEP": 32, "OBSERVERS": 8, "Q_HEADS": 4, "KV_HEADS": 2, "DIM": 16}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)

    def inputs(memory: int) -> tuple[torch.Tensor, ...]:
        shapes = ((1, 4, 32, 16), (1, 2, memory + 32, 16), (1, 2, memory + 32, 16))
        return tuple(torch.randn(shape, device=DEVICE).to(torch.bfloat16) for shape in shapes)

    monkeypatch.setattr(module, "inputs", inputs)
    return module


def test_without_a_gpu_it_says_so_and_exits_with_2() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr and done.stdout == ""


def test_red_checks_keep_it_from_timing(
    timings: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(timings, "measure_ceilings", lambda _: pytest.fail("it timed"))
    monkeypatch.setattr(timings, "tests_pass", lambda: False)
    monkeypatch.setattr(timings, "checks", lambda: iter([("this", True)]))
    assert timings.main([]) == 1
    monkeypatch.setattr(timings, "tests_pass", lambda: True)
    monkeypatch.setattr(timings, "checks", lambda: iter([("this", True), ("that", False)]))
    assert timings.main([]) == 1
    assert "nothing timed, these checks are red: that" in capsys.readouterr().err


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

    def milliseconds(run: object) -> float:
        assert callable(run)
        run()
        return float(next(ticks))

    measured = timings.Timings(milliseconds, matmul_tflops=1.0, copy_gbytes=1.0)
    for memory in timings.MEMORIES:
        verdict = timings.time_memory(measured, memory, linear=100.0, sweep=False)
        assert 0.0 < verdict["compression_share_of_layer"] < 1.0
    names = {row["name"].split(":")[0] for row in measured.rows}
    assert names == {"attention", "scoring", "pooling over 15", "selection", "compaction", "compress_step"}
    ours = [row for row in measured.rows if "triton" in row["name"]]
    assert len(ours) == 6 and all("milliseconds" in row for row in ours)


def test_flops_count_what_the_mask_leaves(timings: ModuleType) -> None:
    measured = timings.Timings(lambda run: 1.0, matmul_tflops=1.0, copy_gbytes=1.0)
    timings.time_memory(measured, 32, linear=1.0, sweep=False)
    [row] = [row for row in measured.rows if row["name"] == "attention: triton"]
    pairs = sum(32 + i + 1 for i in range(32))
    assert row["tflops"] == pytest.approx(4 * 4 * timings.DIM * pairs / 1e9)
