"""Prompts with a planted fact: length, depth, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from imdc.cli.prompts import build_haystack, chat_prompt, encode_prompt, number_needle
from imdc.errors import ConfigError

PROSE = "The whale rose. Nobody spoke for a while, and the sea was calm. " * 400


@pytest.mark.parametrize("depth", [0.0, 0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("tokens", [500, 4096])
def test_length_and_depth_are_as_asked(byte_tokenizer: Any, tokens: int, depth: float) -> None:
    needle = number_needle(random.Random(3))
    haystack = build_haystack(byte_tokenizer, PROSE, needle, prompt_tokens=tokens, depth=depth)
    ids = encode_prompt(byte_tokenizer, haystack.prompt)
    assert haystack.prompt_tokens == len(ids)
    assert abs(len(ids) - tokens) <= 16
    assert haystack.prompt.count(needle.sentence) == 1
    assert haystack.prompt.count(needle.answer) == 1
    assert haystack.prompt.rstrip().endswith(needle.question)
    start = haystack.needle_token
    assert byte_tokenizer.decode(ids[start : start + len(needle.sentence)]) == needle.sentence
    # Frame and sentence ends move it: by the question after the prose, and by at most one sentence.
    prose = tokens - len(needle.sentence) - len(needle.question)
    assert -16 <= start - depth * prose <= 80


def test_needle_stands_between_sentences(byte_tokenizer: Any) -> None:
    needle = number_needle(random.Random(1))
    haystack = build_haystack(byte_tokenizer, PROSE, needle, prompt_tokens=2000, depth=0.37)
    before, _, after = haystack.prompt.partition(needle.sentence)
    assert before.endswith(".\n\n")
    assert after.startswith("\n\n")
    assert after.lstrip()[0].isupper()


def test_start_moves_through_the_text(byte_tokenizer: Any) -> None:
    needle = number_needle(random.Random(1))
    text = "First part. " * 100 + "Second part. " * 100
    haystack = build_haystack(byte_tokenizer, text, needle, prompt_tokens=600, depth=0.5, start=1200)
    assert "First" not in haystack.prompt


def test_needles_follow_the_generator_and_the_lead_in() -> None:
    assert number_needle(random.Random(5)) == number_needle(random.Random(5))
    assert len({number_needle(random.Random(seed)).answer for seed in range(50)}) > 45
    needle = number_needle(random.Random(5), lead_in="Question:")
    assert needle.question.startswith("Question: What is the secret number of ")
    assert needle.answer in needle.sentence
    assert needle.answer not in needle.question


def test_chat_template_is_used_where_there_is_one(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat_prompt(byte_tokenizer, "Text.", "Why?") == "Text.\n\nWhy?\n"
    assert chat_prompt(byte_tokenizer, "Text.", None) == "Text.\n"
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    assert chat_prompt(byte_tokenizer, "Text.", "Why?") == "<user>Text.\n\nWhy?<assistant>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1.5}, "depth=1.5"),
        ({"depth": -0.1}, "depth=-0.1"),
        ({"prompt_tokens": 20}, "cannot hold needle and question"),
        ({"prompt_tokens": 100_000}, "Give a longer text"),
        ({"start": len(PROSE) - 100}, "text has 100 tokens"),
    ],
)
def test_impossible_haystacks_are_refused(byte_tokenizer: Any, options: dict[str, Any], message: str) -> None:
    asked = {"prompt_tokens": 1000, "depth": 0.5, **options}
    with pytest.raises(ConfigError, match=message):
        build_haystack(byte_tokenizer, PROSE, number_needle(random.Random(0)), **asked)
