"""LongBench: what imdc costs in score beside what it saves in time and memory, against the unpatched model.

    python bench/longbench.py --model Qwen/Qwen2.5-0.5B-Instruct --schedules full,fm,im,imdc --output DIR
    accelerate launch bench/longbench.py ...    # the same, the questions shared out over GPUs or hosts

The same command goes on with a run that was cut off. Prompts, answer lengths and metrics are those of
lm-evaluation-harness, put right where the official code does otherwise (`longbench_tasks.py`, `longbench_metrics.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import begin
import torch
from inputs import positive
from longbench_data import Record, in_order, load
from longbench_model import load_harness
from longbench_progress import Progress
from longbench_prompt import PROTOCOLS, encode, official_length
from longbench_read import read
from longbench_report import Results, draw, markdown, summarize
from longbench_store import Store, StoreError, unite
from longbench_tasks import choose_tasks
from longbench_ways import Amount, Way, parse_ways
from record import circumstances

from imdc.cli.answer import choose_device, quiet_transformers
from imdc.cli.options import add_config_options, given_options
from imdc.config import PrefillConfig
from imdc.errors import ImdcError
from imdc.observers import OBSERVERS

_UNFINISHED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every answer is there, 1 when time was up."""
    args = _parser().parse_args(argv)
    try:
        return run(args)
    except ImdcError as error:
        print(f"longbench.py: error: {error}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print(f"longbench.py: interrupted; the same command goes on from {args.output}", file=sys.stderr)
        return _INTERRUPTED


def run(args: argparse.Namespace) -> int:
    """Check, load, read, report.

    Raises:
        ImdcError: bad input, a data file that cannot be read, or a folder of another run.
    """
    quiet_transformers()
    tasks, extended = choose_tasks(args.tasks)
    ways = parse_ways(
        args.schedules,
        observer=args.observer,
        memory=Amount.parse(args.memory_tokens),
        chunk=Amount.parse(args.chunk_tokens),
        options=given_options(args),
    )
    found, source = load(tasks, args.data_dir, extended=extended)
    if args.threads:
        torch.set_num_threads(args.threads)
    rank, world, device = _place(args.device)
    # Before the run, whose code is what is loaded now: a commit made meanwhile is not what was measured.
    started = {**circumstances(commit=args.commit), "rank": rank, "processes": world, "device": str(device)}
    started["versions"] |= {name: version(name) for name in ("lm-eval", "rouge", "jieba")}
    lm = load_harness(args.model, args.gguf_file, args.dtype, device)
    window = getattr(lm.config, "max_position_embeddings", None)
    max_length = official_length(window, args.max_length) if args.protocol == "official" else None
    settings = {
        "model": _name(args),
        "parameters": lm.model.num_parameters(),
        "dtype": str(lm.model.dtype),
        "window": window,
        "protocol": args.protocol,
        "max_length": max_length,
        "data": source,
        "extended": extended,
        "seed": args.seed,
    }
    records, skipped = select(lm, found, args, max_length)
    with Store(args.output, rank) as store:
        store.check_settings(settings)
        store.note_session(started)
        finished = answer_all(lm, store, records[rank::world], ways, max_length, args.max_minutes)
        samples = _gather(store, world)
    if rank == 0:
        wanted = {(way.key, record.task.name, record.id) for way in ways for record in records}
        chosen = [sample for key, sample in samples.items() if key in wanted]
        results = summarize(chosen, tasks, ways, records, args.seed)
        finished = len(chosen) == len(wanted)
        results |= {
            "skipped": skipped,
            "min_prompt_tokens": args.min_prompt_tokens,
            "max_prompt_tokens": args.max_prompt_tokens,
            "beyond_window": len({s["prompt_sha"] for s in chosen if window and s["prompt_tokens"] > window}),
        }
        report(results, settings, chosen, store, started)
    return 0 if finished else _UNFINISHED


def select(
    lm: Any, found: dict[str, list[Record]], args: argparse.Namespace, max_length: int | None
) -> tuple[list[Record], list[dict[str, Any]]]:
    """The records to read, `--limit` of each task by `--seed`, and those left out for their length."""
    chosen: list[Record] = []
    skipped: list[dict[str, Any]] = []
    taken = dict.fromkeys(found, 0)
    for record in in_order(found, args.seed):
        name = record.task.name
        if args.limit is not None and taken[name] >= args.limit:
            continue
        if args.max_prompt_tokens is not None or args.min_prompt_tokens > 1:
            tokens = len(encode(lm, record, max_length))
            if not args.min_prompt_tokens <= tokens <= (args.max_prompt_tokens or tokens):
                skipped.append({"task": name, "id": record.id, "prompt_tokens": tokens})
                continue
        taken[name] += 1
        chosen.append(record)
    return chosen, skipped


def answer_all(
    lm: Any,
    store: Store,
    records: Sequence[Record],
    ways: Sequence[Way],
    max_length: int | None,
    max_minutes: float | None,
) -> bool:
    """Read each record in every way that the folder has no answer of; False where time was up before the end."""
    done = store.samples()
    for record in records:
        for way in ways:
            before = done.get((way.key, record.task.name, record.id))
            if before is not None and before["prompt_sha"] != record.sha:
                raise StoreError(
                    f"{store.folder} holds an answer to another prompt of {record.task.name} {record.id}: the data "
                    f"have changed; give another --output"
                )
    pending = [
        (record, way) for record in records for way in ways if (way.key, record.task.name, record.id) not in done
    ]
    progress = Progress(pending, len(records) * len(ways))
    for record, way in pending:
        if max_minutes is not None and progress.seconds > 60 * max_minutes:
            print(f"--max-minutes {max_minutes:g} is up; the same command goes on", file=sys.stderr)
            return False
        sample = read(lm, record, way, encode(lm, record, max_length))
        store.add(sample)
        progress.show(record, way, sample)
    return True


def report(
    results: Results, settings: dict[str, Any], samples: Iterable[dict[str, Any]], store: Store, started: dict[str, Any]
) -> None:
    """Write and print the tables; what was derived from fewer answers before is replaced."""
    from longbench_page import page

    text = markdown(results, settings)
    _replace(
        store.folder / "results.json",
        json.dumps({"settings": settings, "sessions": store.sessions(), **results}, indent=1, ensure_ascii=False)
        + "\n",
    )
    _replace(store.folder / "table.md", text)
    _replace(store.folder / "report.html", page(results, settings, started))
    print(text)
    begin.drawn(partial(draw, results, settings, list(samples)), store.folder / "plot.png")
    print(f"Written to {store.folder}: results.json, table.md, report.html, plot.png")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _place(device: str | None) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of this process, as `accelerate launch` or torchrun have set them.

    A `device` that is named is that of all processes: a small model leaves most of a GPU to others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, choose_device(device)
    from accelerate import PartialState

    # All on one device talk to each other as processes of a CPU do, of which accelerate must be told. The first to
    # finish waits for the last, however long that takes.
    shared = None if device is None else choose_device(device)
    cpu = shared is not None or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(weeks=52))
    return state.process_index, state.num_processes, shared or state.device


def _gather(store: Store, world: int) -> dict[Any, dict[str, Any]]:
    own = store.samples()
    if world == 1:
        return own
    from accelerate.utils import gather_object

    # Hosts need not share a disk.
    return unite(gather_object(list(own.values())))


def _name(args: argparse.Namespace) -> str:
    """The model's name without the path it lies at."""
    model = str(args.model).rstrip("/")
    name = Path(model).name if Path(model).exists() else model
    return name if args.gguf_file is None else f"{name}/{args.gguf_file}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longbench.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a folder, a .gguf file or a hub id")
    parser.add_argument("--gguf-file", metavar="NAME", help="a GGUF file inside the model folder or hub repository")
    parser.add_argument("--dtype", default="bfloat16", help="auto, float32, bfloat16 or float16 (default: bfloat16)")
    parser.add_argument(
        "--device", help="such as cpu or cuda:1, of all processes (default: cuda where there is one, each its own)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: its own choice)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the run, new or to go on with"
    )
    parser.add_argument("--commit", help="the commit that is run, where there is no git to ask")
    data = parser.add_argument_group("questions")
    data.add_argument("--tasks", default="longbench", help="longbench, longbench_e or tasks with commas between them")
    data.add_argument(
        "--data-dir",
        metavar="PATH",
        help="folder with TASK.jsonl files, official or of MiniLongBench, LongBench's data.zip, or hub (default: "
        "$LONGBENCH_DATA, ../shared/data/minilongbench, the hub)",
    )
    data.add_argument(
        "--limit", type=positive, metavar="N", help="questions of each task, drawn by --seed (default: all)"
    )
    data.add_argument(
        "--min-prompt-tokens", type=positive, default=1, metavar="N", help="leave out shorter prompts, and name them"
    )
    data.add_argument("--max-prompt-tokens", type=positive, metavar="N", help="leave out longer prompts, and name them")
    data.add_argument("--seed", type=int, default=0, help="of the draw and of the intervals (default: 0)")
    data.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help=f"default: {PROTOCOLS[0]}")
    data.add_argument("--max-length", type=positive, metavar="N", help="tokens the official protocol cuts prompts to")
    data.add_argument("--max-minutes", type=float, metavar="M", help="begin no further answer after M minutes")
    ways = parser.add_argument_group("ways of reading")
    ways.add_argument(
        "--schedules",
        default="full,fm,im,imdc",
        metavar="LIST",
        help="SCHEDULE[:OBSERVER][@MEMORY][+recall[EVERY]] with commas between them; full is the unpatched model "
        "(default: full,fm,im,imdc)",
    )
    ways.add_argument(
        "--memory-tokens", default="2048", metavar="N", help="tokens, or a share of the prompt such as 1/8"
    )
    ways.add_argument("--chunk-tokens", default=str(PrefillConfig().chunk_tokens), metavar="N", help="likewise")
    ways.add_argument("--observer", choices=list(OBSERVERS), default=PrefillConfig().observer)
    add_config_options(parser, leave_out=("schedule", "observer", "memory_tokens", "chunk_tokens", "memory_limit"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
