"""Every kernel compiles for sm_80, sm_90 and sm_100 without spilling and within shared memory. Needs no GPU.

In processes of their own: here Triton interprets, and what it interprets it cannot compile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed (pip install triton)", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "kernel_resources.py"
# ptxas lets a thread have 255 registers; an SM has 65,536.
MOST_REGISTERS, REGISTER_FILE = 255, 65_536

MEASURED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import kernel_resources as resources
from imdc.kernels._launch import Config, target
from imdc.kernels.chunk_attention import plan_chunk_attention

def measure(capability, *config):
    q, k = (torch.empty(1, heads, 4096, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    launch = plan_chunk_attention(
        q, k, k, q, torch.empty(1, 32, 4096, device="meta"), scale=0.1, softcap=None, window=None,
        target=target(*divmod(capability, 10)), config=Config(*config),
    )
    return resources.measure("chunk_attention", "", launch, capability)
"""
SPILLING = """
measured = measure(80, 128, 64, 4, 3)
assert measured.spilled_bytes > 0 and not measured.sound, measured
"""
# Nothing of these spills: without looking at how blocks are fed, all of them would pass.
SLOW = """
for capability, config, fault in (
    (80, (128, 32, 8, 1), "blocks are copied 0 iterations ahead"),
    (90, (128, 128, 8, 1, True), "blocks are copied 0 iterations ahead"),
    (90, (128, 128, 8, 2, True), "blocks are copied 1 iterations ahead, at least 2"),
    (80, (32, 32, 4, 3), "32 rows share a load of the keys"),
    (90, (32, 32, 4, 3, True), "no matrix instruction of sm_90"),
    (90, (128, 32, 8, 3, True), "wgmma of 32 columns"),
    (100, (128, 128, 8, 1, True), "blocks are copied 0 iterations ahead"),
    (100, (32, 32, 4, 3, True), "no matrix instruction of sm_100"),
):
    measured = measure(capability, *config)
    assert measured.spilled_bytes == measured.stack_bytes == 0, measured
    assert any(fault in one for one in measured.faults) and not measured.sound, measured
"""
# The keys and values of one iteration side by side: what the compiler makes of it is one barrier for both.
ONE_BARRIER = """
import kernel_pipeline
body = ["scf.for", "  ttng.wait_barrier %a", *["  ttng.async_tma_copy_global_to_local %k"] * 2]
body += ["  ttng.warp_group_dot !ttg.memdesc<128x128xbf16> * !ttg.memdesc<128x128xbf16>"] * 2
code = "\\n".join([*["ttng.async_tma_copy_global_to_local"] * 4, *body, "}"] * 2)
found = kernel_pipeline.faults({"ttgir": code, "ptx": "wgmma.mma_async.sync.aligned.m64n128k16"}, "", 90, 128)
assert found == ["2 copies wait at 1 barriers"], found
found = kernel_pipeline.faults({"ttgir": code, "ptx": ""}, "wgmma.mma_async instructions are serialized", 90, 128)
assert "wgmma is serialised" in found, found
"""

# Rotated keys are what PyTorch gives only if every product is rounded before it is added.
ROUNDED = """
import triton
from imdc.kernels.rotate import plan_rotate
from triton.backends.compiler import GPUTarget

def fused(capability, dtype, **options):
    x, turns = torch.empty(1, 8, 64, 128, dtype=dtype, device="meta"), torch.empty(64, 128, dtype=dtype, device="meta")
    launch = plan_rotate(x, turns, turns, x)
    target = GPUTarget("cuda", capability, 32)
    code = triton.compile(resources.source_of(launch), target=target, options=launch.options | options).asm["ptx"]
    return "fma" in code

# sm_80 multiplies bfloat16 by fusing with nothing.
for capability, dtype in ((80, torch.float16), (90, torch.bfloat16), (90, torch.float16), (100, torch.bfloat16)):
    assert not fused(capability, dtype), (capability, dtype)
assert fused(90, torch.bfloat16, enable_fp_fusion=True)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=280
    )


# One after the other they take longer than a test may, on a slow machine.
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_production_configurations_neither_spill_nor_overflow(capability: int, tmp_path: Path) -> None:
    path = tmp_path / "resources.json"
    done = run(str(SCRIPT), "--quick", "--capability", str(capability), "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    kernels = {"chunk_attention", "fused_step", "compress", "key_mass", "select", "compact", "rotate"}
    assert {(row["kernel"], row["capability"]) for row in rows} == {(kernel, capability) for kernel in kernels}
    for row in rows:
        assert row["spilled_bytes"] == row["stack_bytes"] == 0, row
        assert row["faults"] == [], row
        assert row["shared_bytes"] <= {80: 163, 90: 227, 100: 227}[row["capability"]] * 1024, row
        assert 0 < row["registers"] <= MOST_REGISTERS, row
        assert row["registers"] * row["num_warps"] * 32 <= REGISTER_FILE, row
    attention = {row["case"] for row in rows if row["kernel"] == "chunk_attention"}
    assert {"D=64 bf16 G=4", "D=128 bf16 G=4"} <= attention or capability == 100


@pytest.mark.parametrize(
    "code", [SPILLING, SLOW, ONE_BARRIER, ROUNDED], ids=["spilling", "slow", "one barrier", "rounding left out"]
)
def test_unsound_code_is_found_out(code: str) -> None:
    done = run("-I", "-c", MEASURED + code, str(SCRIPT.parent))
    assert done.returncode == 0, done.stderr


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set; unset it" in done.stderr
