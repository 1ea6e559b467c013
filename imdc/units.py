"""Sizes at the edge: bytes, token counts and lists as people write and read them. Inside imdc, sizes are plain ints.

"KiB", "MiB", "GiB", "TiB" are powers of 1024; "KB", "MB", "GB", "TB" are powers of 1000. Token counts take "k" and
"M" as 1,000 and 1,000,000, and "Ki" and "Mi" as 1,024 and 1,048,576.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from imdc.errors import ConfigError

Item = TypeVar("Item")

MIB = 2**20
GIB = 2**30

_BYTE_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_TOKEN_UNITS = {"": 1, "k": 10**3, "m": 10**6, "ki": 2**10, "mi": 2**20}
# A comma separates thousands and nothing else: "1,5M" means 1.5M to some people and 15M to nobody.
_NUMBER = re.compile(r"\s*([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*)(\.[0-9]+)?\s*([A-Za-z]*)\s*")
# Far above any memory or prompt, and far below what a float cannot hold.
_MOST = 10**18


class DefaultSize(int):
    """A number of tokens that nobody chose: where it does not fit the model's window, a smaller one is used.

    See `imdc.positions.fitted`. It is the number in every other respect.
    """

    __slots__ = ()


def _parse(text: str, units: Mapping[str, int], what: str, remedy: str) -> int:
    match = _NUMBER.fullmatch(text)
    factor = units.get(match[3].lower()) if match else None
    # There is no half of a byte or token.
    if match is None or factor is None or (factor == 1 and match[2]) or len(match[1]) > 24:
        raise ConfigError(f"{what} {text!r} is not understood: {remedy}")
    amount = round(float(match[1].replace(",", "").replace("_", "") + (match[2] or "")) * factor)
    if amount > _MOST:
        raise ConfigError(f"{what} {text!r} is larger than anything there is: {remedy}")
    if amount < 1:
        raise ConfigError(f"{what} {text!r} must be greater than zero: {remedy}")
    return amount


def parse_bytes(text: str, what: str = "size") -> int:
    """Bytes of a size such as "24GiB" or "80 GB".

    Args:
        text: number and unit; the unit is required, since a bare "24" could mean anything.
        what: name of the argument, for the error message.

    Raises:
        ConfigError: no unit, an unknown unit, or nothing above zero.
    """
    return _parse(text, _BYTE_UNITS, what, "give a number with a unit, such as 24GiB, 512MiB or 80GB")


def parse_tokens(text: str, what: str = "token count") -> int:
    """Tokens of a count such as "32768", "128k" (128,000), "128Ki" (131,072) or "1M".

    Raises:
        ConfigError: not a number, an unknown unit, or nothing above zero.
    """
    return _parse(text, _TOKEN_UNITS, what, "give a whole number of tokens, such as 32768, 128k or 1M")


def format_bytes(amount: float) -> str:
    """A size with three significant digits and a binary unit: "512 B", "1.50 MiB", "24.0 GiB"."""
    size, unit = float(amount), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    if unit == "B":
        return f"{size:.0f} B"
    digits = 2 if abs(size) < 10 else 1 if abs(size) < 100 else 0
    return f"{size:.{digits}f} {unit}"


def format_percent(share: float) -> str:
    """A difference in per cent with its sign: "+2.0%"; what rounds to nothing is "+0.0%", whatever its sign."""
    return f"{100 * share:+.1f}%".replace("-0.0%", "+0.0%")


def format_tokens(count: int) -> str:
    """A token count with thousands separators."""
    return f"{count:,}"


def ends_of(items: Sequence[Item], most: int) -> list[tuple[int, Item] | None]:
    """All items with their numbers from 0, or of more than `most` the first and the last ones around a None."""
    numbered = list(enumerate(items))
    if len(numbered) <= most:
        return list(numbered)
    half = most // 2
    return [*numbered[:half], None, *numbered[-half:]]
