"""The command `imdc`: one subcommand per module of `imdc.cli`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from imdc import __version__
from imdc.errors import ImdcError, did_you_mean

COMMANDS = ("demo", "generate", "read", "ask", "plan", "profile", "eval")

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest option where one was mistyped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, extra = super().parse_known_args(args, namespace)
        for word in extra:
            if word.startswith("--"):
                name = word.partition("=")[0]
                hint = did_you_mean(name, self._option_string_actions)
                self.error(f"unknown option {name}.{hint} See {self.prog} --help")
        return known, extra


def build_parser() -> argparse.ArgumentParser:
    """The parser of `imdc` with all its subcommands; nothing heavy is imported for it."""
    parser = _Parser(prog="imdc", description="Read very long prompts with Hugging Face models in bounded memory.")
    parser.add_argument("--version", action="version", version=f"imdc {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        _command(name).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `imdc` with `argv` (the process's own by default).

    Returns:
        0 done; 1 the demo's answer was wrong, or nobody read the output; 2 bad input; 130 interrupted.
    """
    try:
        args = build_parser().parse_args(argv)
        return int(_command(args.command).run(args))
    except ImdcError as error:
        print(f"imdc: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone (`imdc plan ... | head`); nothing may be written to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _command(name: str) -> Any:
    return importlib.import_module(f"imdc.cli.{name}")


if __name__ == "__main__":
    sys.exit(main())
