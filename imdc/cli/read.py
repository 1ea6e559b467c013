"""`imdc read`: read a document once in bounded memory, and save what `imdc ask` answers from."""

from __future__ import annotations

import argparse
import json
import os
import time
from os.path import expanduser
from typing import Any

from imdc.cli.answer import check_writable, choose_device, quiet_transformers, read_document
from imdc.cli.options import add_config_options, add_loading_options, config_from
from imdc.observers import GENERAL_QUESTIONS, find_observer
from imdc.units import format_bytes, format_tokens

# Nobody knows the questions yet, so general ones vote unless some are given.
DEFAULTS = {"observer": "questions"}


def add_parser(subparsers: Any) -> None:
    """Add `read` to the parser of `imdc`."""
    parser = subparsers.add_parser(
        "read",
        help="read a text file once and save it for questions",
        description=(
            "Read a text file in bounded memory and save the KV cache, from which `imdc ask` answers any number of "
            "questions. With --recall host or disk the file holds all KV pairs, and questions that nobody knew find "
            "theirs."
        ),
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a folder, a .gguf file or a hub id")
    add_loading_options(parser)
    parser.add_argument(
        "--file", required=True, type=expanduser, metavar="FILE", help="the document, UTF-8 text; - is standard input"
    )
    parser.add_argument("--save", required=True, type=expanduser, metavar="FILE", help="where the cache goes")
    parser.add_argument(
        "--question",
        action="append",
        metavar="TEXT",
        help="what will be asked, or the like of it; may be given several times (default: general questions)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    # That is about answers: `imdc ask` has it.
    add_config_options(parser, DEFAULTS, leave_out=("recall_every",))


def run(args: argparse.Namespace) -> int:
    """Run `imdc read`; 0 when the cache is saved.

    Raises:
        ImdcError: bad input, see its message; everything is checked before the model is loaded.
    """
    config = config_from(args, DEFAULTS)
    document = read_document(args.file)
    check_writable(args.save)
    device = choose_device(args.device)
    quiet_transformers()

    import imdc
    from imdc.cli.document import Frame
    from imdc.cli.tables import reading_progress
    from imdc.model.loading import load_model

    model, tokenizer = load_model(args.model, gguf_file=args.gguf_file, dtype=args.dtype, device=device)
    frame = Frame.of(tokenizer)
    ids = frame.document(document)
    texts = args.question
    if texts is None and find_observer(config.observer).name == "questions":
        texts = list(GENERAL_QUESTIONS)
    questions = None if texts is None else [frame.question(text) for text in texts]
    began = time.perf_counter()
    with reading_progress(ids.shape[1]) as on_step, imdc.patch(model, config, on_step=on_step) as handle:
        cache = handle.read(ids, questions)
        report = handle.report
    seconds = time.perf_counter() - began
    assert report is not None
    imdc.save_cache(cache, args.save)
    size = os.stat(args.save).st_size
    if args.json:
        values = {"prompt_tokens": report.prompt_tokens, "seconds": seconds, "memory_tokens": report.memory_tokens}
        sizes = {"kv_bytes": report.kv_bytes, "host_bytes": report.host_bytes, "file_bytes": size}
        print(json.dumps({"model": args.model, "config": report.config.as_dict(), **values, **sizes}, indent=2))
        return 0
    place = "on disk" if config.recall == "disk" else "in host memory"
    kind = "" if config.recall_dtype == "model" else f" as {config.recall_dtype}"
    stored = f", all pairs {place}{kind} {format_bytes(report.host_bytes)}" if report.host_bytes else ""
    print(
        f"{format_tokens(report.prompt_tokens)} tokens read in {seconds:.1f} s. KV cache "
        f"{format_bytes(report.kv_bytes)} ({format_tokens(report.memory_tokens)} pairs per layer and head){stored}.\n"
        f"{format_bytes(size)} saved to {args.save}"
    )
    return 0
