"""Reads from generated code what bounds the speed of the attention kernels, where no GPU can time them.

Correct code may be slow for reasons that show in what the compiler made of it: loads that are issued in the iteration
that needs them, keys and values that arrive at one barrier, matrix instructions of another generation, products that
the assembler runs one after another, blocks so small that the L2 cache cannot feed the matrix units. `faults` names
them; `bench/kernel_resources.py` counts a kernel with faults as unsound.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

# Matrix instruction of each generation, in PTX.
INSTRUCTIONS = {8: r"\bmma\.sync", 9: r"\bwgmma\.mma_async", 10: r"\btcgen05\.mma"}
# Rows of queries that share one load of the keys: a 16-bit key element serves as many FLOPs per byte. Below 128 the L2
# cache bounds an H100 to less than its matrix units do (64 bytes per clock and multiprocessor at 4096 FLOPs).
LEAST_ROWS, LEAST_ROWS_LARGE_HEADS = 128, 64
# Columns of one wgmma: below 64 its operands are not fed at full rate.
LEAST_COLUMNS = 64
_COPY = re.compile(r"async(?:_tma)?_copy_global_to_local")
_PRODUCT = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")
_OPERAND = re.compile(r"(?:tensor|memdesc)<(\d+)x(\d+)x(?:bf16|f16)")


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop with matrix products: what it copies, and what is under way when it starts."""

    products: int
    copies: int
    copies_before: int
    waits: int
    rows: int

    @property
    def ahead(self) -> int:
        """Iterations between the copy of a block and its use."""
        return self.copies_before // self.copies if self.copies else 0


def loops(ttgir: str) -> Iterator[Loop]:
    """The loops of a kernel's intermediate code that multiply matrices."""
    lines = ttgir.splitlines()
    before = 0
    i = 0
    while i < len(lines):
        if "scf.for" not in lines[i]:
            before += bool(_COPY.search(lines[i]))
            i += 1
            continue
        indent = len(lines[i]) - len(lines[i].lstrip())
        end = i + 1
        while not lines[end].startswith(" " * indent + "}"):
            end += 1
        body = lines[i + 1 : end]
        products = [line for line in body if _PRODUCT.search(line)]
        if products and not any("scf.for" in line for line in body):
            shapes = [_OPERAND.findall(line) for line in products]
            yield Loop(
                products=len(products),
                copies=sum(bool(_COPY.search(line)) for line in body),
                copies_before=before,
                # A wait for the product itself names the operands that it frees.
                waits=sum("wait_barrier" in line and " deps " not in line for line in body),
                # The larger of both sides: scoring multiplies the keys by the queries.
                rows=min(max(int(shape[0][0]), int(shape[1][1])) for shape in shapes if len(shape) > 1),
            )
            before = 0
            i = end
        else:
            i += 1


def faults(asm: dict[str, str], assembler_log: str, capability: int, block_d: int) -> list[str]:
    """What keeps a 16-bit attention kernel with aligned inputs from its speed; empty if nothing is seen.

    Args:
        asm: "ttgir" and "ptx" of the compiled kernel.
        assembler_log: what ptxas printed with -v.
        capability: 80, 90 or 100.
        block_d: head size, rounded up to a power of two.
    """
    found = []
    major = capability // 10
    bulk = major >= 9
    least_ahead = 2 if bulk and block_d <= 128 else 1
    least_rows = LEAST_ROWS if block_d <= 128 else LEAST_ROWS_LARGE_HEADS
    seen = list(loops(asm["ttgir"]))
    if sum(loop.products >= 2 for loop in seen) < 2:
        found.append(f"{len(seen)} loops with products, where an unmasked and a masked one are expected")
    for loop in seen:
        if loop.ahead < least_ahead:
            found.append(f"blocks are copied {loop.ahead} iterations ahead, at least {least_ahead} are needed")
        if bulk and loop.waits < loop.copies:
            found.append(f"{loop.copies} copies wait at {loop.waits} barriers")
        if loop.rows < least_rows:
            found.append(f"{loop.rows} rows share a load of the keys, at least {least_rows} are needed")
    if not re.search(INSTRUCTIONS[major], asm["ptx"]):
        found.append(f"no matrix instruction of sm_{capability}")
    columns = [int(n) for n in re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k", asm["ptx"])]
    if columns and min(columns) < LEAST_COLUMNS:
        found.append(f"wgmma of {min(columns)} columns, at least {LEAST_COLUMNS} are needed")
    if "serialized" in assembler_log or "serialization" in assembler_log:
        found.append("wgmma is serialised")
    return sorted(set(found))


def assembler_log(ptx: str, capability: int) -> str:
    """What ptxas, the one Triton assembles with, reports of a kernel."""
    from triton.backends.nvidia.compiler import get_ptxas

    match = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    if match is None:
        raise ValueError("ptx: names no target")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={match[1]}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def spilled_bytes(log: str) -> int:
    """Bytes that a kernel stores and loads for spills, by the assembler's report."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not spills:
        raise ValueError(f"ptxas: reported no spills at all: {log!r}")
    return sum(map(int, spills))
