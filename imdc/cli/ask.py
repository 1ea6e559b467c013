"""`imdc ask`: answer questions about a document that `imdc read` has read and saved."""

from __future__ import annotations

import argparse
import json
import os
import time
from os.path import expanduser
from typing import Any

from imdc.cli.answer import choose_device, quiet_transformers
from imdc.cli.options import add_loading_options
from imdc.config import RECALL_EVERY, PrefillConfig
from imdc.errors import ConfigError
from imdc.units import format_bytes


def add_parser(subparsers: Any) -> None:
    """Add `ask` to the parser of `imdc`."""
    parser = subparsers.add_parser(
        "ask",
        help="answer questions about a document that `imdc read` saved",
        description="Answer questions about a document that `imdc read` saved, with the model that read it (greedy).",
    )
    parser.add_argument("cache", type=expanduser, metavar="FILE", help="what `imdc read --save` wrote")
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="the model that read the document")
    add_loading_options(parser)
    parser.add_argument("--question", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    parser.add_argument(
        "--recall",
        choices=["host", "disk"],
        default="host",
        help="where to take back pairs from, if the file has them: host memory, or the file itself (default: host)",
    )
    parser.add_argument(
        "--recall-every",
        type=int,
        metavar="N",
        help=f"every Nth token of an answer takes back anew what it needs, 0: none does (default: {RECALL_EVERY})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Run `imdc ask`; 0 when every question was answered.

    Raises:
        ImdcError: bad input, such as the cache of another model.
    """
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if not os.path.isfile(args.cache):
        raise ConfigError(f"cannot read {args.cache!r}: no such file; save one with `imdc read --save`")
    config = PrefillConfig(
        recall=args.recall, recall_every=RECALL_EVERY if args.recall_every is None else args.recall_every
    )
    device = choose_device(args.device)
    quiet_transformers()

    import imdc
    from imdc.cli.document import Frame
    from imdc.model.loading import load_model

    model, tokenizer = load_model(args.model, gguf_file=args.gguf_file, dtype=args.dtype, device=device)
    frame = Frame.of(tokenizer)
    began = time.perf_counter()
    cache = imdc.load_cache(args.cache, model, recall=args.recall)
    loaded = time.perf_counter() - began
    if args.recall_every is not None and cache.store is None:
        raise ConfigError(
            f"--recall-every {args.recall_every} has no effect: {args.cache!r} has no pairs to take back; read the "
            f"document with `imdc read --recall host`, or leave it out"
        )
    answers: list[dict[str, Any]] = []
    with imdc.patch(model, config) as handle:
        for text in args.question:
            began = time.perf_counter()
            ids = frame.question(text).to(device)
            new = handle.ask(cache, ids, max_new_tokens=args.max_new_tokens, do_sample=False)
            report = handle.report
            assert report is not None
            answers.append(
                {
                    "question": text,
                    "answer": str(tokenizer.decode(new[0], skip_special_tokens=True)).strip(),
                    "seconds": time.perf_counter() - began,
                    "recall_seconds": report.recall_seconds,
                    "recalled_bytes": report.recalled_bytes,
                }
            )
            if not args.json:
                print(answers[-1]["answer"], flush=True)
    stored = 0 if cache.store is None else cache.store.nbytes()
    if args.json:
        sizes = {"kv_bytes": cache.kv_bytes(), "host_bytes": stored}
        print(json.dumps({"model": args.model, "load_seconds": loaded, **sizes, "answers": answers}, indent=2))
        return 0
    each = sum(one["seconds"] for one in answers) / len(answers)
    line = f"{cache.get_seq_length():,} tokens, KV cache {format_bytes(cache.kv_bytes())}, loaded in {loaded:.1f} s; "
    line += f"{each:.1f} s per question"
    if stored:
        place = "on disk" if args.recall == "disk" else "in host memory"
        moved = sum(one["recalled_bytes"] for one in answers) // len(answers)
        milliseconds = 1000 * sum(one["recall_seconds"] for one in answers) / len(answers)
        line += f", of which {milliseconds:.0f} ms to take back from {format_bytes(stored)} {place}, reading "
        line += format_bytes(moved)
    print(f"\n{line}")
    return 0
