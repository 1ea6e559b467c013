"""`imdc eval`: lm-evaluation-harness with a model that imdc has patched."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from imdc.errors import ConfigError

_INSTALL = 'pip install -e ".[bench]" in the repository of imdc'
_HELP = """\
imdc eval runs the model "imdc" of lm-evaluation-harness, whose help follows. Leave --model out; options of imdc, such
as memory_tokens=2048, go into --model_args, beside pretrained=MODEL.
"""
_OTHERS = ("ls", "validate")


def add_parser(subparsers: Any) -> None:
    """Add `eval` to the parser of `imdc`."""
    parser = subparsers.add_parser(
        "eval",
        help="run any task of lm-evaluation-harness in bounded memory",
        description="Run any task of lm-evaluation-harness in bounded memory.",
        # No argument is an option here: all of them are the harness's, --help too.
        prefix_chars="\0",
        add_help=False,
    )
    parser.add_argument("arguments", nargs="*", help="of `lm-eval run`; options of imdc go into --model_args")


def harness_arguments(given: list[str]) -> list[str]:
    """What `lm-eval` is called with: `given`, and the model "imdc".

    Raises:
        ConfigError: another model is asked for.
    """
    if given and given[0] in _OTHERS:
        return given
    rest = given[1:] if given and given[0] == "run" else given
    for at, word in enumerate(rest):
        name, _, value = word.partition("=")
        if name in ("--model", "-M"):
            other = value or (rest[at + 1] if at + 1 < len(rest) else "")
            if other != "imdc":
                raise ConfigError(f"imdc eval runs the model imdc, not {other!r}; for others call lm-eval itself")
            return ["run", *rest]
    return ["run", "--model", "imdc", *rest]


def run(args: argparse.Namespace) -> int:
    """Run `imdc eval`; 0 when the harness has finished.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or another model is asked for.
    """
    arguments = harness_arguments(args.arguments)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"imdc eval needs lm-evaluation-harness: {_INSTALL}")
    from lm_eval.__main__ import cli_evaluate

    importlib.import_module("imdc.cli.harness")
    if {"-h", "--help"} & set(arguments):
        print(_HELP)
    before = sys.argv
    sys.argv = ["imdc eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
