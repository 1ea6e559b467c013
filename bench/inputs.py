"""What several benchmarks read alike: a setting of the command line, and the tokens of a real text."""

from __future__ import annotations

import argparse
from typing import Any

from imdc.cli.demo import reference_text
from imdc.errors import ImdcError


def setting(text: str) -> tuple[int, int]:
    """(chunk, memory) in tokens of an option such as "512,4096"."""
    chunk, _, memory = text.partition(",")
    try:
        return int(chunk), int(memory)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not CHUNK,MEMORY, such as 512,4096") from error


def positive(text: str) -> int:
    """A number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def reference_ids(tokenizer: Any, prompt_tokens: int) -> list[int]:
    """The first `prompt_tokens` tokens of CPython's reference.

    Raises:
        ImdcError: the text is shorter.
    """
    ids: list[int] = tokenizer(reference_text()).input_ids
    if len(ids) < prompt_tokens:
        raise ImdcError(f"the text has {len(ids)} tokens, --prompt-tokens asks for {prompt_tokens}; ask for fewer")
    return ids[:prompt_tokens]
