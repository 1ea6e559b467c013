"""`imdc generate`: read a document in bounded memory and answer a question about it."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from os.path import expanduser
from typing import Any

from imdc.cli.answer import Reading, answer, choose_device, quiet_transformers, read_document
from imdc.cli.options import add_config_options, add_loading_options, config_from
from imdc.config import PrefillConfig
from imdc.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `imdc generate` found: the patched model's reading, and the unpatched one's where it was asked for."""

    model: str
    config: PrefillConfig
    patched: Reading
    full: Reading | None
    trained_window: int | None

    def as_json(self) -> dict[str, Any]:
        """Values for `--json`."""
        values: dict[str, Any] = {"model": self.model, "config": self.config.as_dict(), **self.patched.as_json()}
        if self.full is not None:
            values["full"] = self.full.as_json()
        return values


def add_parser(subparsers: Any) -> None:
    """Add `generate` to the parser of `imdc`."""
    parser = subparsers.add_parser(
        "generate",
        help="read a text file in bounded memory and answer a question about it",
        description="Read a text file in bounded memory and answer a question about it (greedy decoding).",
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a folder, a .gguf file or a hub id")
    add_loading_options(parser)
    parser.add_argument(
        "--file", required=True, type=expanduser, metavar="FILE", help="the document, UTF-8 text; - is standard input"
    )
    parser.add_argument("--question", metavar="TEXT", help="asked after the document; without it the document is all")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    parser.add_argument("--compare", choices=["full"], help="also run the unpatched model and show both")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_config_options(parser)


def compute(args: argparse.Namespace, *, show_progress: bool) -> Outcome:
    """Load, read, answer; everything is checked before the model is loaded.

    Raises:
        ImdcError: bad input, see its message.
    """
    config = config_from(args)
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    document = read_document(args.file)
    device = choose_device(args.device)
    quiet_transformers()

    from imdc.cli.prompts import chat_prompt, encode_prompt
    from imdc.cli.tables import reading_progress
    from imdc.model.loading import load_model

    model, tokenizer = load_model(args.model, gguf_file=args.gguf_file, dtype=args.dtype, device=device)
    ids = encode_prompt(tokenizer, chat_prompt(tokenizer, document, args.question))
    if show_progress:
        with reading_progress(len(ids)) as on_step:
            patched = answer(model, tokenizer, ids, max_new_tokens=args.max_new_tokens, config=config, on_step=on_step)
    else:
        patched = answer(model, tokenizer, ids, max_new_tokens=args.max_new_tokens, config=config)
    full = None
    if args.compare == "full":
        full = answer(model, tokenizer, ids, max_new_tokens=args.max_new_tokens, config=None)
    window = getattr(model.config, "max_position_embeddings", None)
    return Outcome(args.model, config, patched, full, window)


def run(args: argparse.Namespace) -> int:
    """Run `imdc generate`; 0 when an answer was generated."""
    outcome = compute(args, show_progress=not args.json)
    if args.json:
        print(json.dumps(outcome.as_json(), indent=2))
        return 0

    from rich.console import Console

    from imdc.cli.tables import costs_table

    console = Console()
    if outcome.full is None:
        console.print(costs_table({"imdc": outcome.patched}))
        print(outcome.patched.answer)
        return 0
    console.print(costs_table({f"imdc ({outcome.config.schedule})": outcome.patched, "unpatched": outcome.full}))
    window = outcome.trained_window
    if window is not None and outcome.patched.prompt_tokens > window:
        print(f"The unpatched answer is beyond the model's context length of {window:,} tokens.")
    print(f"imdc:      {outcome.patched.answer}")
    print(f"unpatched: {outcome.full.answer}")
    return 0
