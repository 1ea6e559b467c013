"""Turns timings into the table by which `backend="auto"` chooses the forward pass.

    python bench/record_forwards.py     # reads bench/results/kernel_timings-*.json, writes imdc/model/timed.py

Each device, dtype and head size gets the milliseconds of a layer's whole step by forward pass, summed over the memories
that were timed. Of several timings of one the latest counts. A forward pass that was not timed at every memory is left
out. Exit status: 0, or 2 if there are no timings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT

TABLE = ROOT / "imdc" / "model" / "timed.py"
# Those that `imdc.model.forward_speed` ranks.
FORWARDS = ("triton", "flash", "varlen")

Records = dict[tuple[str, str, int], dict[str, float]]


def forward_times(record: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by forward pass of one result of `bench/kernel_timings.py`, FlashAttention with its generation."""
    columns = [verdict["step_milliseconds"] for verdict in record["verdicts"]]
    complete = [name for name in FORWARDS if columns and all(name in column for column in columns)]
    names = {name: f"flash {record['flash_generation']}" if name == "flash" else name for name in complete}
    return {names[name]: round(sum(column[name] for column in columns), 4) for name in complete}


def collect(paths: Iterable[Path]) -> Records:
    """The table, from result files in the order of their time."""
    found: Records = {}
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        key = (record["device"]["name"], "bfloat16", record["shape"]["dim"])
        found.setdefault(key, {}).update(forward_times(record))
    return found


def written(records: Records) -> str:
    """The module's text."""
    lines = [
        '"""What was timed, for `imdc.model.forward_speed`; written by `bench/record_forwards.py`, not by hand."""',
        "",
        "from __future__ import annotations",
        "",
        "# (device, dtype, head size) to milliseconds of a layer's step by forward pass, summed over memories.",
    ]
    if not records:
        return "\n".join([*lines, "MILLISECONDS: dict[tuple[str, str, int], dict[str, float]] = {}", ""])
    lines.append("MILLISECONDS: dict[tuple[str, str, int], dict[str, float]] = {")
    for (device, dtype, dim), times in sorted(records.items()):
        inner = ", ".join(f"{json.dumps(name)}: {taken!r}" for name, taken in sorted(times.items()))
        lines.append(f"    ({json.dumps(device)}, {json.dumps(dtype)}, {dim}): {{{inner}}},")
    return "\n".join([*lines, "}", ""])


def main(arguments: list[str] | None = None) -> int:
    """Read, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON (default: bench/results)")
    parser.add_argument("--table", type=Path, default=TABLE, help="module to write (default: imdc/model/timed.py)")
    options = parser.parse_args(arguments)
    paths = sorted(options.results.glob("kernel_timings-*.json"))
    if not paths:
        print(f"record_forwards: no kernel_timings-*.json in {options.results}", file=sys.stderr)
        return 2
    records = collect(paths)
    options.table.write_text(written(records), encoding="utf-8")
    print(f"{len(records)} devices and shapes written to {options.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
