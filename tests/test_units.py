"""Sizes and GPU names as people write them."""

from __future__ import annotations

import pytest

from imdc.errors import ConfigError
from imdc.planner.gpus import find_gpu
from imdc.units import ends_of, format_bytes, format_percent, parse_bytes, parse_tokens


@pytest.mark.parametrize(
    ("text", "amount"),
    [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5MiB", 3 * 2**19), ("512b", 512), ("1_000kb", 10**6)],
)
def test_byte_sizes(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(
    ("text", "count"), [("32768", 32768), ("128k", 128_000), ("128Ki", 131_072), ("1M", 10**6), ("1,024", 1024)]
)
def test_token_counts(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1GiB", "1e9", "5 GiB extra", "0GiB", "1,5GiB", "1__0GiB", "0.5b", "9" * 20 + "TiB", "9" * 400 + "b"],
)
def test_sizes_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["1.5", "1,5k", "1,2,3", "\u0661\u0662", "9" * 5000])
def test_token_counts_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="token count"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("share", "text"), [(0.0204, "+2.0%"), (-0.1, "-10.0%"), (-0.0001, "+0.0%"), (0.0, "+0.0%"), (-0.006, "-0.6%")]
)
def test_differences_print_without_a_negative_zero(share: float, text: str) -> None:
    assert format_percent(share) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (15 * 2**30, "15.0 GiB"), (200 * 2**20, "200 MiB")],
)
def test_sizes_print_with_three_digits(amount: int, text: str) -> None:
    assert format_bytes(amount) == text


@pytest.mark.parametrize("name", ["H100", "h100", "RTX 4090", "nvidia-a100"])
def test_gpus_go_by_the_names_people_use(name: str) -> None:
    gpu = find_gpu(name)
    assert gpu is not None and gpu.name in name.lower()
    assert gpu.least_seconds(gpu.flops, 0) == pytest.approx(1.0)
    assert gpu.least_seconds(0, 2 * gpu.bandwidth) == pytest.approx(2.0)


def test_long_lists_show_their_ends_around_a_gap() -> None:
    assert ends_of("abc", 4) == [(0, "a"), (1, "b"), (2, "c")]
    assert ends_of("abcd", 4) == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert ends_of("abcde", 4) == [(0, "a"), (1, "b"), None, (3, "d"), (4, "e")]
    assert ends_of([], 4) == []
