"""`kernels/_launch.py`: what importing does, how configurations are chosen, how tensors are judged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE

pytest.importorskip("triton")

from imdc.kernels._compress import Rules, Written
from imdc.kernels._launch import Config, aligned, common_target, first_that_fits, target
from imdc.kernels.chunk_attention import attention_config, plan_chunk_attention
from imdc.kernels.compact import plan_compact
from imdc.kernels.compress import plan_compress
from imdc.kernels.fused_step import plan_fused_step
from imdc.kernels.key_mass import plan_key_mass
from imdc.kernels.rotate import plan_rotate
from imdc.kernels.select import plan_select

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=280)


def test_the_reference_needs_no_triton() -> None:
    done = run("import sys; sys.modules['triton'] = None; import imdc.kernels.reference")
    assert done.returncode == 0, done.stderr


def test_importing_the_kernels_asks_for_no_device() -> None:
    modules = ", ".join(f"imdc.kernels.{path.stem}" for path in sorted((ROOT / "kernels").glob("[!_]*.py")))
    code = f"""
import torch, triton
def touched(*_): raise SystemExit("the driver was asked for")
type(triton.runtime.driver).active = property(touched)
torch.cuda._lazy_init = touched
import {modules}
try:
    triton.runtime.driver.active
except SystemExit:
    print("the trap works")
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the trap works\n"


def test_an_interpreter_asked_for_too_late_is_refused() -> None:
    done = run("import triton, os; os.environ['TRITON_INTERPRET'] = '1'; import imdc.kernels.select")
    assert done.returncode == 1
    assert "set it before the first import of triton" in done.stderr


def test_the_first_candidate_that_fits_is_taken() -> None:
    large, small = Config(128, 128, 8, 2), Config(64, 64, 4, 2)
    candidates = [(large, 160 * 1024), (small, 90 * 1024)]
    assert first_that_fits(candidates, target(9, 0)) is large
    assert first_that_fits(candidates, target(8, 9)) is small
    with pytest.raises(ValueError, match=r"capability 8\.6 offers 101376 bytes .* smallest configuration takes 163840"):
        first_that_fits(candidates[:1], target(8, 6))


def test_chips_have_the_shared_memory_of_their_generation() -> None:
    kib = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
    assert {chip: target(*chip).shared_bytes // 1024 for chip in kib} == kib
    assert {chip for chip in kib if target(*chip).copies_tensors} == {(9, 0), (10, 0)}
    with pytest.raises(ValueError, match=r"compute_capability = 7\.5: must be at least 8\.0"):
        target(7, 5)


@pytest.mark.parametrize("dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("chip", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_every_chip_has_a_configuration(chip: tuple[int, int], dtype: torch.dtype, dim: int) -> None:
    q, k = (torch.empty(1, heads, 512, dim, dtype=dtype, device="meta") for heads in (16, 4))
    lse = torch.empty(1, 16, 512, device="meta")
    for softcap in (None, 50.0):
        launch = plan_chunk_attention(q, k, k, q, lse, scale=1.0, softcap=softcap, window=None, target=target(*chip))
        assert list(launch.arguments) == [parameter for parameter in launch.kernel.arg_names]


def test_programs_are_counted_where_the_grid_has_room() -> None:
    # A grid takes 2^31 - 1 programs along x but 65,535 along y: a batch of short rows has more of those.
    wide = torch.empty(70_000, 1, 64, 16, device="meta")
    indices = torch.empty(70_000, 1, 40, dtype=torch.int64, device="meta")
    cos, lse = torch.empty(64, 16, device="meta"), torch.empty(70_000, 1, 64, device="meta")
    ranks, kept = torch.empty(70_000, 1, 64, dtype=torch.int32, device="meta"), wide[:, :, :40]
    chip, logits = target(9, 0), {"scale": 1.0, "softcap": None}
    written, rules = Written(lse, ranks, indices, kept, kept), Rules(scale=1.0, keep=40, rows=1, scored_keys=64)
    for launch in (
        plan_chunk_attention(wide, wide, wide, wide, lse, window=None, target=chip, **logits),
        plan_key_mass(wide, wide, wide, wide, lse, lse, rows=1, target=chip, **logits),
        plan_fused_step(wide, wide, wide, wide, wide, written, rules, attention_config(wide, wide, wide, chip)),
        plan_compress(wide, wide, wide, wide, wide, lse, written, rules, Config(16, 64, 4, 1)),
        plan_select(lse, indices, sink_tokens=0, recent_tokens=0),
        plan_compact(wide, wide, indices, kept, kept),
        plan_rotate(wide, cos, cos, wide),
    ):
        assert launch.grid[0] >= 70_000 and all(size == 1 for size in launch.grid[1:]), launch.kernel


def test_a_group_larger_than_a_block_is_named() -> None:
    q, k = (torch.empty(1, heads, 8, 64, dtype=torch.bfloat16, device="meta") for heads in (200, 1))
    lse = torch.empty(1, 200, 8, device="meta")
    with pytest.raises(ValueError, match=r"q\.shape\[1\] = 200: at most 128 query heads per KV head"):
        plan_chunk_attention(q, k, k, q, lse, scale=1.0, softcap=None, window=None, target=target(9, 0))


def test_alignment_is_seen() -> None:
    x = torch.zeros(2, 3, 32, 64, dtype=torch.bfloat16, device=DEVICE)
    assert aligned(x) and aligned(x[:, :, 5:20]) and aligned(x.transpose(1, 2))
    assert (
        not aligned(x[..., 1:]) and not aligned(x[..., :40].contiguous()) and not aligned(x[:, :1].expand(2, 3, 32, 64))
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="here the device is the right one")
def test_a_cpu_tensor_is_refused_where_triton_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imdc.kernels._launch.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"x\.device = cpu: Triton kernels need a CUDA device .* sdpa or reference"):
        common_target(x=torch.zeros(3))
