"""Predicted bytes of steps that Triton's kernels compute, against what their launchers allocate."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_cases import DEVICE, ON_DEVICE
from tiny_models import FAMILIES, token_ids

from imdc.config import PrefillConfig
from imdc.model.backend_rule import ANY_MACHINE, Machine
from imdc.model.shape import ModelShape
from imdc.planner.layer_bytes import Work, phases
from imdc.profiler.measure import measure
from imdc.schedule import Step

# Many keys and few rows: the peak lies where the scores and indices of a step are alive.
SIZES: dict[str, Any] = {"backend": "triton", "memory_tokens": 1000, "chunk_tokens": 50, "schedule": "fm"}


@pytest.mark.parametrize(
    "options",
    [
        {"observation_tokens": 4},
        {"observation_tokens": 4, "pool_kernel": 1},
        {"observation_tokens": 4, "observation_stride": 2, "pool_kernel": 1},
        {"observer": "all_queries", "pool_kernel": 1},
        {"observer": "all_queries", "positions": "compact"},
    ],
    ids=["one launch", "one launch, no pooling", "two launches", "four launches", "four launches, compact"],
)
def test_prediction_is_the_measured_peak_with_triton(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from imdc.kernels._launch import Launch

    if not ON_DEVICE:
        # What is allocated does not depend on what is computed, and the interpreter holds on to tensors.
        monkeypatch.setattr(Launch, "run", lambda *_: None)
    model = FAMILIES["llama"](num_hidden_layers=2, intermediate_size=8, max_position_embeddings=4096).to(DEVICE)
    ids = token_ids(1200).to(DEVICE)
    measured = measure(model, ids, PrefillConfig(**SIZES | options))
    assert measured.backend == "triton"
    dropping = [step for step in measured.steps if step.step.memory_after < step.step.attended_tokens]
    assert len(dropping) == 4
    for step in dropping:
        assert step.predicted.phase == "compression"
        assert step.error == pytest.approx(0.0, abs=0.005)


def step_bytes(machine: Machine, backend: str = "triton", **options: Any) -> int:
    """What one call that attends, scores and selects allocates, of Llama-3.1-8B's heads."""
    shape = ModelShape(
        family="llama", layers=32, hidden=4096, intermediate=14336, q_heads=32, kv_heads=8, head_dim=128, vocab=128256,
        max_positions=131072, rotary=128, dtype="bfloat16", dtype_bytes=2,
    )  # fmt: skip
    config = PrefillConfig(observer="window", **options)
    work = Work(shape, config, Step(0, 0, 4096, 4096, 4096), 0, False, backend, False, machine=machine)
    [layers] = work.kinds
    [phase] = [phase for phase in phases(work, layers) if phase.name == "compression"]
    return phase.scoring


def test_plans_know_which_way_a_step_is_launched() -> None:
    h100 = Machine(capability=(9, 0), multiprocessors=132)
    scores, log_sums, indices = 4 * 8 * 8192, 4 * 32 * 4096, 8 * 8 * 4096
    assert step_bytes(h100) == 2 * scores + indices
    assert step_bytes(h100, "flash") == log_sums + 2 * scores + indices
    assert step_bytes(h100, pool_kernel=1) == 2 * scores + indices
    assert step_bytes(h100, "flash", pool_kernel=1) == log_sums + scores + indices
    assert step_bytes(h100, observation_tokens=64, pool_kernel=1) == log_sums + scores + indices
    assert step_bytes(h100, observation_stride=2) == log_sums + 2 * scores + indices
    # Where the chip is not known, the most of it.
    assert step_bytes(ANY_MACHINE, pool_kernel=1) == log_sums + 2 * scores + indices
