"""What is left of a patch after it is taken back, after failures and after many calls: nothing."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, build, greedy, token_ids
from torch import Tensor
from traces import TIGHT, FailingAt, trace_of

import imdc
from imdc.prefill.patch import PatchHandle


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_leaves_no_trace(family: str) -> None:
    model = FAMILIES[family]()
    before = trace_of(model)
    with imdc.patch(model, **TIGHT):
        assert trace_of(model) != before
        with FailingAt(model.model.layers[1], 2, RuntimeError), pytest.raises(RuntimeError):
            greedy(model, token_ids())
        greedy(model, token_ids())
    assert trace_of(model) == before


def test_the_trace_shows_a_removal_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    before = trace_of(model)
    handle = imdc.patch(model, **TIGHT)
    with monkeypatch.context() as patched:
        patched.setattr(PatchHandle, "remove", lambda self: None)
        with handle:
            greedy(model, token_ids())
        left = {key for key, value in trace_of(model).items() if key not in before or value != before[key]}
    assert {"._imdc_handle", ".forward", ".generate", "attention", "masks", "overlays"} <= left
    handle.remove()
    assert trace_of(model) == before


def live_things() -> tuple[int, int, int]:
    """Objects that Python tracks, tensors among them, and the bytes that those hold."""
    gc.collect()
    things = gc.get_objects()
    tensors = [thing for thing in things if issubclass(type(thing), Tensor)]
    return len(things), len(tensors), sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def left_by_500_prefills() -> tuple[int, int, int]:
    """What `live_things` counts more of after the last prefill than after the twentieth."""
    model = build("llama", num_hidden_layers=1)
    ids = token_ids(40)
    limits = {"memory_tokens": 16, "chunk_tokens": 16, "sink_tokens": 1, "recent_tokens": 4}
    with torch.no_grad(), imdc.patch(model, **limits) as handle:
        for number in range(500):
            model(ids, past_key_values=handle.new_cache(), logits_to_keep=1)
            if number in (10, 20):
                # Twice: the first count fills caches of its own, which are no leak of a prefill.
                things, tensors, held = live_things()
        after = live_things()
    return after[0] - things, after[1] - tensors, after[2] - held


def test_500_prefills_leave_nothing_behind() -> None:
    # In a process of its own: what other tests left running makes objects too.
    command = [sys.executable, "-W", "ignore", "-c", "import test_leftovers as t; print(*t.left_by_500_prefills())"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    things, tensors, held = map(int, done.stdout.split()[-3:])
    # One object kept by every prefill would make 479.
    assert things < 100
    assert (tensors, held) == (0, 0)


def test_100_patches_leave_nothing_behind() -> None:
    model = build("llama", num_hidden_layers=1)
    before, things = trace_of(model), 0
    for number in range(100):
        with imdc.patch(model, memory_tokens=16, chunk_tokens=16, sink_tokens=1, recent_tokens=4):
            greedy(model, token_ids(20))
        if number == 10:
            gc.collect()
            things = len(gc.get_objects())
    gc.collect()
    assert len(gc.get_objects()) - things < 90
    assert trace_of(model) == before
