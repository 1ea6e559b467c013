"""What `questions.py` reads and asks: facts planted in pages of novels, and L-Eval's documents with their questions."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from begin import book_texts
from longbench_metrics import score
from longbench_tasks import Task

from imdc.errors import ImdcError

HAYSTACKS = "haystacks"
LEVAL = ("quality", "coursera", "multidoc_qa")
LEAD_IN = "Using the text above, answer this question: "
_CHOICE = "\nAnswer with the letter of the right choice alone."
_CHOICES = "\nAnswer with the letters of all right choices alone."
_MARGIN = 20_000
_NAMES = ("Alice", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "James", "Karen", "Louis")
# What a fact is about, and what it may be; a number is drawn. A small model finds facts and questions of this form.
_KINDS: dict[str, tuple[str, ...]] = {
    "secret number": (),
    "password": ("marzipan", "thunderbolt", "kingfisher", "lighthouse", "cinnamon", "gargoyle"),
    "home city": ("Lisbon", "Helsinki", "Nairobi", "Montevideo", "Cracow", "Osaka"),
    "favourite colour": ("turquoise", "crimson", "yellow", "purple", "orange", "silver"),
    "favourite animal": ("hedgehog", "otter", "peacock", "tortoise", "badger", "falcon"),
    "wedding month": ("January", "February", "April", "July", "October", "November"),
}
F1 = Task(
    name="leval",
    category="leval",
    language="en",
    metric="qa_f1",
    template="",
    max_new_tokens=64,
    chat=True,
    first_line_only=False,
)


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and what is asked of it.

    Attributes:
        number: of the document among those of its kind; haystacks are drawn from it.
        text: without questions.
        questions: as they are put to a model.
        answers: the right one of each.
        metric: "found" (the answer is in the reply), "letters" (the exam of L-Eval) or "f1".
        new_tokens: of a reply at most.
    """

    number: int
    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    metric: str
    new_tokens: int

    def score(self, question: int, reply: str) -> float:
        """0 to 1."""
        answer = self.answers[question]
        if self.metric == "found":
            return float(answer.lower() in reply.lower())
        if self.metric == "letters":
            return float(letters(reply) == letters(answer))
        return score(F1, reply, [answer], None)


def letters(text: str) -> str:
    """The choices that a reply names: its first run of capital letters A to D, sorted; "" where there is none.

    "(B) Their subconscious", "B, D" and "The answer is BD." name some, "Data" and "A bird" do not.
    """
    found = re.search(r"\(?\b([A-D](?:\)?[,\s]*(?:and\s+)?\(?[A-D])*)\)?(?=[.):,]|\s*$)", text)
    return "".join(sorted(set(re.findall("[A-D]", found[1])))) if found else ""


def documents(args: Any, tokenizer: Any) -> Iterator[Document]:
    """The first `args.documents` of `args.data` for a model with that tokenizer, L-Eval's within its longest prompt.

    Raises:
        ImdcError: the files are not there.
    """
    if args.data == HAYSTACKS:
        texts = book_texts(args.books)
        for seed in range(args.documents):
            yield _haystack(tokenizer, texts[seed % len(texts)][1], seed, args.prompt_tokens)
        return
    path = args.leval / f"{args.data}.jsonl"
    if not path.is_file():
        raise ImdcError(f"no file {path.name} in {args.leval.name}; name L-Eval's folder with --leval")
    short = (one for one in leval_documents(path) if len(tokenizer(one.text).input_ids) <= args.prompt_tokens)
    yield from itertools.islice(short, args.documents)


def leval_documents(path: Path) -> Iterator[Document]:
    """The documents of a file of L-Eval, whose name says what they are."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        yield _leval(number, json.loads(line), path.stem)


def facts(rng: random.Random) -> list[tuple[str, str, str]]:
    """(sentence, question, answer) of every kind, in random order, each about another person."""
    found = []
    for name, (kind, choices) in zip(rng.sample(_NAMES, len(_KINDS)), _KINDS.items(), strict=True):
        fact = rng.choice(choices) if choices else str(rng.randrange(10_000, 100_000))
        found.append((f"The {kind} of {name} is {fact}.", f"What is the {kind} of {name}?", fact))
    rng.shuffle(found)
    return found


def drawn_start(rng: random.Random, text: str, first: int, room: int) -> int:
    """A character of `text` from `first` on, with `room` characters after it.

    Raises:
        ImdcError: the text is too short.
    """
    if len(text) - room <= first:
        raise ImdcError(
            f"a book of {len(text):,} characters is too short for what is taken from it, {first + room:,} with "
            f"the ends that are left out; name longer books, or ask for fewer tokens"
        )
    return rng.randrange(first, len(text) - room)


def page(tokenizer: Any, text: str, rng: random.Random, tokens: int, planted: Sequence[tuple[str, str, str]]) -> str:
    """About `tokens` tokens of `text`, with the facts in paragraphs of their own at even distances.

    Raises:
        ImdcError: the text is too short.
    """
    start = drawn_start(rng, text, _MARGIN, _MARGIN + 8 * tokens)
    source = text[start : start + 8 * tokens]
    room = tokens - sum(len(tokenizer(f"\n\n{sentence}\n\n").input_ids) for sentence, _, _ in planted)
    offsets = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    source = source[: offsets[room - 1][1]]
    parts, begin = [], 0
    for number, (sentence, _, _) in enumerate(planted):
        aimed = int((number + 0.5) / len(planted) * len(source))
        cut = source.find(". ", aimed) + 1 or aimed
        parts += [source[begin:cut].strip(), sentence]
        begin = cut
    return "\n\n".join([*parts, source[begin:].strip()])


def _haystack(tokenizer: Any, text: str, seed: int, tokens: int) -> Document:
    rng = random.Random(seed)
    planted = facts(rng)
    questions = tuple(LEAD_IN + question for _, question, _ in planted)
    written = page(tokenizer, text, rng, tokens, planted)
    return Document(seed, written, questions, tuple(fact for _, _, fact in planted), "found", 16)


def _leval(number: int, record: dict[str, Any], task: str) -> Document:
    exam = task != "multidoc_qa"
    hint = {"quality": _CHOICE, "coursera": _CHOICES}.get(task, "")
    questions = tuple(LEAD_IN + question.strip() + hint for question in record["instructions"])
    answers, metric = tuple(record["outputs"]), "letters" if exam else "f1"
    return Document(number, record["input"], questions, answers, metric, 8 if exam else F1.max_new_tokens)
