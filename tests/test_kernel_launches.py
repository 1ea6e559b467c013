"""What one layer of a step queues for the device with Triton's kernels: counted, so that it does not grow unnoticed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, ON_DEVICE
from tiny_models import FAMILIES, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from imdc.kernels import chunk_attention
from imdc.kernels._launch import Launch
from imdc.kernels.compress_step import plan_step

import imdc
from imdc.prefill.step import StepRun

# Operators that only describe memory, or ask the allocator for some.
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "as_strided", "slice", "view", "transpose", "expand"}
FREE |= {"unsqueeze", "select", "alias"}


class Counting(TorchDispatchMode):
    """Counts the operators of PyTorch that run inside and cost a launch or a wait."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(ON_DEVICE, reason="counts what is queued; nothing of it needs a device")
@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({"observation_tokens": 4}, ["_fused_step_kernel"]),
        ({"observation_tokens": 4, "observation_stride": 2}, ["_chunk_attention_kernel", "_compress_kernel"]),
        (
            {"observer": "all_queries"},
            ["_chunk_attention_kernel", "_key_mass_kernel", "_select_kernel", "_compact_kernel"],
        ),
    ],
    ids=["one", "two", "four"],
)
def test_a_layer_queues_its_kernels_and_six_operators(
    options: dict[str, Any], kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four copies into the workspace, and two that count what survived; nothing is read back before the step ends."""
    layers: list[tuple[list[str], Counter[str]]] = []
    attend = StepRun.attend

    def counted(self: StepRun, *arguments: Any, **named: Any) -> torch.Tensor:
        seen: Counter[str] = Counter()
        layers.append(([], seen))
        with Counting(seen):
            return attend(self, *arguments, **named)

    monkeypatch.setattr(StepRun, "attend", counted)
    monkeypatch.setattr(Launch, "run", lambda self, *_: layers[-1][0].append(self.kernel.__name__))
    chunk_attention._plan.forget()
    plan_step.forget()
    model = FAMILIES["llama"](num_hidden_layers=2).to(DEVICE)
    ids = token_ids(210).to(DEVICE)
    sizes: dict[str, Any] = {"memory_tokens": 90, "chunk_tokens": 70, "recent_tokens": 8, "schedule": "fm"}
    with imdc.patch(model, backend="triton", **sizes, **options) as handle:
        model(ids, logits_to_keep=1, past_key_values=handle.new_cache())
    assert len(layers) == 6
    # The layers of a step share one plan: one of the first step, in which nothing is dropped, two of the others.
    assert chunk_attention._plan.made == 1 and plan_step.made == 2
    # The first step drops nothing; the last two do, in both layers.
    for launched, seen in layers[2:]:
        assert launched == kernels
        assert seen == {"copy_": 4, "lt": 1, "count_nonzero": 1}
