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

SPILLING = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import kernel_resources as resources
from imdc.kernels._launch import Config, target
from imdc.kernels.chunk_attention import plan_chunk_attention
q, k = (torch.empty(1, heads, 4096, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
lse = torch.empty(1, 32, 4096, device="meta")
config = Config(128, 64, num_warps=4, num_stages=3)
launch = plan_chunk_attention(
    q, k, k, q, lse, scale=0.1, softcap=None, window=None, target=target(8, 0), config=config
)
measured = resources.measure("chunk_attention", "spilling", launch, 80)
assert measured.spilled_bytes > 0 and not measured.sound, measured
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=280
    )


def test_production_configurations_neither_spill_nor_overflow(tmp_path: Path) -> None:
    path = tmp_path / "resources.json"
    done = run(str(SCRIPT), "--quick", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    compiled = {(row["kernel"], row["capability"]) for row in rows}
    kernels = {"chunk_attention", "fused_step", "key_mass", "select", "pool", "compact", "rotate"}
    assert compiled == {(kernel, capability) for kernel in kernels for capability in (80, 90, 100)}
    for row in rows:
        assert row["spilled_bytes"] == row["stack_bytes"] == 0, row
        assert row["shared_bytes"] <= {80: 163, 90: 227, 100: 227}[row["capability"]] * 1024, row
        assert 0 < row["registers"] <= MOST_REGISTERS, row
        assert row["registers"] * row["num_warps"] * 32 <= REGISTER_FILE, row
    attention = {(row["case"], row["capability"]) for row in rows if row["kernel"] == "chunk_attention"}
    assert {("D=64 bf16 G=4", 80), ("D=128 bf16 G=4", 80), ("D=64 bf16 G=4", 90), ("D=128 bf16 G=4", 90)} <= attention


def test_a_configuration_that_spills_is_found_out() -> None:
    done = run("-I", "-c", SPILLING, str(SCRIPT.parent))
    assert done.returncode == 0, done.stderr


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set; unset it" in done.stderr
