"""Questions of `fidelity.py` whose answers were planted: needles in novels, LongEval's lines, pairs of a JSON object.

LongEval's lines come from LongChat's LongEval, the pairs from "Lost in the Middle" (arXiv 2307.03172), worded as there.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import needle
from begin import book_texts
from fidelity_questions import FOUND, Question
from longbench_data import DataError, Record
from longbench_tasks import Task
from questions_data import LEAD_IN, drawn_start, facts, page

from imdc.cli.prompts import chat_prompt, encode_prompt

NEEDLE, WORDS, TWO_FACTS, LINES, PAIRS, TAIL = "needle", "words", "two facts", "lines", "pairs", "tail"
# Tokens of a novel's tail that are scored.
_TAIL_TOKENS = 128


def questions(tokenizer: Any, args: argparse.Namespace) -> Iterator[Question]:
    """As many of each kind as the options say, each kind the same for any number of the others.

    Raises:
        ImdcError: books or files are missing, or a book is too short.
    """
    yield from _needles(tokenizer, args)
    texts = book_texts(args.books) if args.words or args.two_facts or args.tails else []
    for kind, count in ((WORDS, args.words), (TWO_FACTS, args.two_facts)):
        for number in range(count):
            yield _facts(tokenizer, texts[number % len(texts)][1], kind, args.needle_tokens, args.seed + number)
    for number in range(args.tails):
        yield _tail(tokenizer, texts[number % len(texts)][1], args.tail_tokens, args.seed + number)
    yield from _lines(tokenizer, args.longeval, args.lines)
    yield from _pairs(tokenizer, args.pairs_file, args.pairs)


def _needles(tokenizer: Any, args: argparse.Namespace) -> Iterator[Question]:
    """Needles of `bench/needle.py`: its samples at this length and seed, not in the order of their depths."""
    if not args.needles:
        return
    wanted = argparse.Namespace(data=args.books, samples=args.needles, prompt_tokens=args.needle_tokens, seed=args.seed)
    samples = needle.make_samples(tokenizer, wanted)
    for number in spread(len(samples)):
        haystack = samples[number].haystack
        yield _question(tokenizer, NEEDLE, f"{args.needle_tokens}-{number}", haystack.prompt, haystack.needle.answer)


def spread(count: int) -> list[int]:
    """0..count-1 by their bits read backwards: as many as one likes from the front are spread over all of them.

    Needles lie the deeper, the higher their number. A run that is cut off has some of all depths this way.
    """
    return sorted(range(count), key=lambda number: f"{number:032b}"[::-1])


def _facts(tokenizer: Any, text: str, kind: str, tokens: int, seed: int) -> Question:
    """Six facts about six people in a page of a novel: one that is a word is asked for, or two at once."""
    rng = random.Random(seed)
    planted = facts(rng)
    written = page(tokenizer, text, rng, tokens, planted)
    asked = [fact for fact in planted if not fact[2].isdigit()]
    chosen = rng.sample(asked, 2 if kind == TWO_FACTS else 1)
    # "What is A?" and "What is B?" become "What is A, and what is B?".
    words = [question.rstrip("?") for _, question, _ in chosen]
    joined = ", and ".join([words[0], *(one[0].lower() + one[1:] for one in words[1:])])
    prompt = chat_prompt(tokenizer, written, f"{LEAD_IN}{joined}?")
    question = _question(tokenizer, kind, f"{tokens}-{seed}", prompt, *(answer for _, _, answer in chosen))
    gold = tokenizer("\n".join(sentence for sentence, _, _ in chosen), add_special_tokens=False).input_ids
    return replace(question, gold=gold)


def _tail(tokenizer: Any, text: str, tokens: int, seed: int) -> Question:
    """`tokens` of a novel, and what follows them as the right answer: perplexity where nothing was asked."""
    rng = random.Random(seed)
    room = 8 * (tokens + _TAIL_TOKENS)
    start = drawn_start(rng, text, len(text) // 8, room)
    ids = tokenizer(text[start : start + room]).input_ids
    known, after = ids[:tokens], ids[tokens : tokens + _TAIL_TOKENS]
    # The tokens of the text itself, whose parts might be cut otherwise.
    return replace(_question(tokenizer, TAIL, f"{tokens}-{seed}", tokenizer.decode(known)), ids=known, gold=after)


def _lines(tokenizer: Any, path: Path, count: int) -> Iterator[Question]:
    for number, line in enumerate(_read(path, count, "--longeval")):
        prompt = chat_prompt(tokenizer, line["prompt"], None)
        yield _question(tokenizer, LINES, f"{path.stem}-{number}", prompt, str(line["expected_number"]))


def _pairs(tokenizer: Any, path: Path, count: int) -> Iterator[Question]:
    for number, line in enumerate(_read(path, count, "--pairs-file")):
        body = ",\n ".join(f'"{key}": "{value}"' for key, value in line["ordered_kv_records"])
        text = (
            "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
            f'{{{body}}}\n\nKey: "{line["key"]}"\nCorresponding value:'
        )
        yield _question(tokenizer, PAIRS, f"{path.stem}-{number}", chat_prompt(tokenizer, text, None), line["value"])


def _read(path: Path, count: int, option: str) -> list[dict[str, Any]]:
    """The first `count` records of a file.

    Raises:
        DataError: the file is missing or has fewer.
    """
    if not count:
        return []
    if not path.is_file():
        raise DataError(
            f"{option}: no file {path.name} in {path.parent.name}; name another, or leave its questions out"
        )
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    if len(lines) < count:
        raise DataError(f"{path.name} has {len(lines)} records, {count} are asked for; ask for fewer")
    return [json.loads(line) for line in lines]


def _question(tokenizer: Any, kind: str, name: str, prompt: str, *answers: str) -> Question:
    """A question whose reply is right if it has all `answers` in it."""
    record = Record(
        task=_task(kind), id=name, prompt=prompt, answers=answers, all_classes=None, length=None, official=False
    )
    return Question(record, encode_prompt(tokenizer, prompt))


def _task(kind: str) -> Task:
    tokens = {TAIL: 0, PAIRS: 48}.get(kind, 32)
    return Task(
        name=kind,
        category=kind,
        language="en",
        metric=FOUND,
        template="",
        max_new_tokens=tokens,
        chat=False,
        first_line_only=False,
    )
