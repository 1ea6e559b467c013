"""`bench/record_forwards.py`: from timings to the table that "auto" reads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from imdc.model import forward_speed, timed

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("record_forwards")


def result(**steps: tuple[float, ...]) -> dict[str, Any]:
    """A timing at two memories, of which varlen_attn failed at the second."""
    columns = [dict(zip(steps, column, strict=True)) for column in zip(*steps.values(), strict=True)]
    columns[-1].pop("varlen", None)
    return {
        "device": {"name": "NVIDIA H100"},
        "flash_generation": 3,
        "shape": {"dim": 128},
        "verdicts": [{"step_milliseconds": column} for column in columns],
    }


def test_timings_become_the_table_that_auto_reads(
    recorder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = result(triton=(1.0, 2.0), flash=(9.0, 9.0), varlen=(0.1, 0.1), sdpa=(5.0, 5.0))
    new = result(triton=(1.5, 2.0), flash=(1.0, 2.0))
    for day, record in ((1, old), (2, new)):
        (tmp_path / f"kernel_timings-2026120{day}-000000.json").write_text(json.dumps(record))
    table = tmp_path / "timed.py"
    assert recorder.main(["--results", str(tmp_path), "--table", str(table)]) == 0
    written: dict[str, Any] = {}
    exec(compile(table.read_text(), str(table), "exec"), written)
    # The later run counts; a forward pass that failed at one memory is no candidate.
    assert written["MILLISECONDS"] == {("NVIDIA H100", "bfloat16", 128): {"flash 3": 3.0, "triton": 3.5}}
    monkeypatch.setattr(forward_speed, "MILLISECONDS", written["MILLISECONDS"])
    place: dict[str, Any] = {"device_name": "NVIDIA H100", "capability": (9, 0), "head_dim": 128, "dtype": "bfloat16"}
    order, why = forward_speed.ranking({"triton": "triton", "flash": "flash 3"}, **place)
    assert order == ("flash", "triton") and "as timed on NVIDIA H100" in why


def test_the_table_in_the_package_is_what_the_results_say(recorder: ModuleType) -> None:
    paths = sorted((ROOT / "bench" / "results").glob("kernel_timings-*.json"))
    assert Path(timed.__file__).read_text(encoding="utf-8") == recorder.written(recorder.collect(paths))


def test_without_timings_nothing_is_written(recorder: ModuleType, tmp_path: Path) -> None:
    assert recorder.main(["--results", str(tmp_path), "--table", str(tmp_path / "timed.py")]) == 2
    assert not (tmp_path / "timed.py").exists()
