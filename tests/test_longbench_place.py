"""Where the processes of `bench/longbench.py` run."""

from __future__ import annotations

import importlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.parametrize(("named", "device", "cpu"), [("cpu", "cpu", True), (None, "cuda:1", False)])
def test_a_named_device_is_that_of_all_processes(
    monkeypatch: pytest.MonkeyPatch, named: str | None, device: str, cpu: bool
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    asked: list[bool] = []

    def state(*, cpu: bool, timeout: timedelta) -> SimpleNamespace:
        asked.append(cpu)
        return SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cuda:1"))

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", state)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert importlib.import_module("longbench")._place(named) == (1, 2, torch.device(device)) and asked == [cpu]
