"""Compiles every kernel ahead of time and reports registers, spilled bytes and shared memory. Needs no GPU.

    python bench/kernel_resources.py                      # table of all configurations, sm_80, sm_90 and sm_100
    python bench/kernel_resources.py --quick              # what the test suite compiles
    python bench/kernel_resources.py --json result.json   # the table as JSON, with versions and commit

The launches come from the `plan_*` functions that production uses, on tensors without storage, so block sizes, warps
and stages are those of the device in question. Exit status: 0 if nothing spills, all shared memory fits and the
attention kernels show none of the faults that `bench/kernel_pipeline.py` looks for, 1 if not, 2 if it cannot compile
here.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_configurations import (
    KEEP,
    KEYS,
    KV_HEADS,
    QUERIES,
    TYPE_NAMES,
    chip,
    fed_in_blocks,
    launches,
)
from torch import Tensor

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes, per thread (registers, spilled and stack bytes) and per program (shared)."""

    kernel: str
    case: str
    capability: int
    num_warps: int
    num_stages: int
    block: dict[str, int]
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    faults: list[str]

    @property
    def sound(self) -> bool:
        """Nothing spills, the shared memory fits the chip, and nothing is seen that would make it slow."""
        fits = self.spilled_bytes == 0 and self.stack_bytes == 0 and self.shared_bytes <= self.shared_limit
        return fits and not self.faults


def source_of(launch: Any) -> Any:
    """The kernel with its arguments' types, as Triton itself would specialise this launch."""
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        place = (parameter.num,)
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[place] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
            attributes[place] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            element, block = TYPE_NAMES[value.base.dtype], ", ".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{element}[{block}]>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif type(value) is int:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[place] = [["tt.divisibility", 16]]
        else:
            raise TypeError(f"{parameter.name} = {value!r}: no rule for its type in a kernel's signature")
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: this build of Triton ships no {name}")
    return str(path)


def measure(kernel: str, case: str, launch: Any, capability: int) -> Resources:
    """Compile one launch and read what it takes."""
    import triton
    from kernel_pipeline import assembler_log, faults, spilled_bytes
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source_of(launch), target=target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    fed = fed_in_blocks(kernel, case)
    log = assembler_log(compiled.asm["ptx"], capability) if numbers["STACK"] or (fed and capability == 90) else ""
    blocks = {n: v for n, v in launch.arguments.items() if n.startswith(("BLOCK_", "TILE")) and isinstance(v, int)}
    return Resources(
        kernel=kernel,
        case=case,
        capability=capability,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        block=blocks,
        registers=numbers["REG"],
        # Spills live on the stack: where there is none, ptxas need not run again to say so.
        spilled_bytes=spilled_bytes(log) if numbers["STACK"] else 0,
        stack_bytes=numbers["STACK"],
        shared_bytes=compiled.metadata.shared,
        shared_limit=chip(capability).shared_bytes,
        faults=faults(compiled.asm, log, capability, blocks["BLOCK_D"]) if fed else [],
    )


def _commit() -> str:
    """The commit checked out; marked if the kernels or these scripts differ from it."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    changed = git("status", "--porcelain", "--", "kernels", "bench/kernel_*.py")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, write JSON if asked; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the configurations the test suite compiles")
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES, help="default: all")
    parser.add_argument("--kernel", action="append", help="only these kernels")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    try:
        import triton
        from imdc.kernels._launch import INTERPRETED
    except ImportError as error:
        print(f"kernel_resources: {error}", file=sys.stderr)
        return 2
    if INTERPRETED:
        print("kernel_resources: TRITON_INTERPRET is set; unset it, the interpreter compiles nothing", file=sys.stderr)
        return 2

    rows: list[Resources] = []
    print(
        f"{'kernel':<16}{'case':<30}{'sm':>4}{'warps':>6}{'stages':>7}{'regs':>5}{'spill B':>8}{'shared B':>9}  blocks"
    )
    for capability in options.capability or CAPABILITIES:
        for kernel, case, launch in launches(capability, options.quick):
            if options.kernel and kernel not in options.kernel:
                continue
            row = measure(kernel, case, launch, capability)
            rows.append(row)
            blocks = " ".join(f"{name.removeprefix('BLOCK_')}={size}" for name, size in row.block.items())
            verdict = "" if row.sound else "  UNSOUND " + "; ".join(row.faults)
            print(
                f"{kernel:<16}{case:<30}{capability:>4}{row.num_warps:>6}{row.num_stages:>7}{row.registers:>5}"
                f"{row.spilled_bytes:>8}{row.shared_bytes:>9}  {blocks}{verdict}",
                flush=True,
            )
    unsound = [row for row in rows if not row.sound]
    print(f"{len(rows)} configurations, {len(unsound)} that spill, exceed shared memory or show a fault")
    if options.json is not None:
        record = {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": _commit(),
            "quick": options.quick,
            "shapes": {"queries": QUERIES, "keys": KEYS, "keep": KEEP, "kv_heads": KV_HEADS},
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if unsound else 0


if __name__ == "__main__":
    sys.exit(main())
