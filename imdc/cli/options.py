"""Command line options that commands share; those that mirror PrefillConfig take name, choices and help from it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from os.path import expanduser
from typing import Any

from imdc.config import CHOICES, STARTS, PrefillConfig, resolve_config
from imdc.errors import ConfigError
from imdc.presets import preset_options
from imdc.units import parse_bytes, parse_tokens

_PREFIX = "config_"


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how a model is loaded, besides its name: --gguf-file, --dtype and --device."""
    parser.add_argument("--gguf-file", metavar="NAME", help="a GGUF file inside the model folder or hub repository")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one, else cpu)")


def add_config_options(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any] | None = None, *, leave_out: Collection[str] = ()
) -> None:
    """Add one option per field of PrefillConfig but `leave_out`; `defaults` are shown in place of the field's own."""
    shown = defaults or {}
    texts = _help_texts()
    group = parser.add_argument_group("how the prompt is read")
    for field in fields(PrefillConfig):
        if field.name in leave_out:
            continue
        default = shown.get(field.name, field.default)
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=_PREFIX + field.name,
            type=_parser_of(field),
            choices=CHOICES.get(field.name),
            metavar=None if field.name in CHOICES else "DIR" if field.name == "recall_dir" else "N",
            help=f"{texts.get(field.name, '')} (default: {default})".replace("%", "%%"),
        )


def config_from(args: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> PrefillConfig:
    """The config that the options of `add_config_options` ask for.

    Raises:
        ConfigError: the values do not work together.
    """
    given = given_options(args)
    return resolve_config(None, **{**(defaults or {}), **preset_options(given), **given})


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of PrefillConfig that were given on the command line."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(_PREFIX) and value is not None
    }


def _help_texts() -> dict[str, str]:
    """Field name to text, out of the "Attributes" section of PrefillConfig's docstring."""
    section = (PrefillConfig.__doc__ or "").partition("Attributes:")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _parser_of(field: Field[Any]) -> Callable[[str], Any]:
    annotation = str(field.type)
    if field.name == "memory_limit":
        return _guarded(_bytes_or_share)
    if field.name == "recall_limit":
        return _guarded(parse_bytes)
    if field.name == "recall_dir":
        return expanduser
    if field.name in CHOICES:
        return str
    if "float" in annotation:
        return _guarded(lambda text: text if text in STARTS else _share_or_tokens(text))
    if "str" in annotation:
        return _guarded(lambda text: text if text == "auto" else parse_tokens(text))
    if field.name.endswith("_tokens"):
        return _guarded(_tokens_or_zero)
    return int


def _tokens_or_zero(text: str) -> int:
    return 0 if text == "0" else parse_tokens(text)


def _share_or_tokens(text: str) -> int | float:
    # "0.25" is a share, "0.5k" a number of tokens.
    return float(text) if "." in text and not text[-1].isalpha() else parse_tokens(text)


def _bytes_or_share(text: str) -> int | float:
    # "0.5" is a share, "0.5GiB" a size, and a bare "24" could mean anything.
    if "." in text and text[-1:].isdigit():
        return float(text)
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"{error}, or a share such as 0.5") from error


def _guarded(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` with errors that argparse shows as they are."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error

    return parsed
