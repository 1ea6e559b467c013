"""Prompts in a model's chat template, and long ones with one planted fact: needle, prose and question."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imdc.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = (
    "Alice", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "James",
    "Karen", "Louis", "Maria", "Nathan", "Olivia", "Peter", "Rachel", "Simon", "Teresa", "Victor",
)  # fmt: skip
# Paragraphs longer than this are rare in prose; a needle is moved by at most so many characters to a sentence's end.
_BOUNDARY_SEARCH = 2000


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact no document contains, the question about it, and the text every right answer contains."""

    sentence: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Haystack:
    """A prompt with one needle.

    `prompt` is the whole text, chat template included; `prompt_tokens` its length; `needle_token` the index of the
    needle's first token; `depth` where it really lies, as a share of the prompt.
    """

    prompt: str
    needle: Needle
    prompt_tokens: int
    needle_token: int

    @property
    def depth(self) -> float:
        """Position of the needle's first token as a share of the prompt."""
        return self.needle_token / self.prompt_tokens


def number_needle(rng: random.Random, lead_in: str = "Using the text above, answer this question:") -> Needle:
    """A sentence that gives one person a secret five-digit number.

    The words before the question (`lead_in`) and a paragraph of its own for the sentence are for small models: without
    them SmolLM2 now and then goes on with the text, even where it sees all of it.
    """
    name = rng.choice(_NAMES)
    number = str(rng.randrange(10_000, 100_000))
    return Needle(
        sentence=f"The secret number of {name} is {number}.",
        question=f"{lead_in} What is the secret number of {name}?",
        answer=number,
    )


def chat_prompt(tokenizer: PreTrainedTokenizerBase, document: str, question: str | None) -> str:
    """Document, blank line, question (if any), in the tokenizer's chat template where it has one."""
    content = document if question is None else f"{document}\n\n{question}"
    if not getattr(tokenizer, "chat_template", None):
        return f"{content}\n"
    templated = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return str(templated)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt from `chat_prompt`; special tokens are added only where no template wrote them."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=not getattr(tokenizer, "chat_template", None)).input_ids
    return ids


def build_haystack(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    needle: Needle,
    *,
    prompt_tokens: int,
    depth: float,
    start: int = 0,
) -> Haystack:
    """Cut prose from `text` and plant `needle` in it, so that the whole prompt has about `prompt_tokens` tokens.

    Args:
        tokenizer: A fast tokenizer (its character offsets are needed).
        text: The prose; it must hold `prompt_tokens` tokens from `start` on.
        needle: What to plant.
        prompt_tokens: Length aimed at; the result is at most 16 tokens away from it.
        depth: Share of the prose before the needle, 0 to 1; the needle goes to the nearest following sentence end.
        start: First character of `text` to use.

    Raises:
        ConfigError: `depth` is outside 0..1, `text` is too short, or the prompt cannot hold needle and question.
    """
    if not 0.0 <= depth <= 1.0:
        raise ConfigError(f"depth={depth} is outside 0..1.")
    frame = len(encode_prompt(tokenizer, chat_prompt(tokenizer, f"\n\n{needle.sentence}\n\n", needle.question)))
    filler_tokens = prompt_tokens - frame
    if filler_tokens < 1:
        raise ConfigError(f"prompt_tokens={prompt_tokens} cannot hold needle and question, which take {frame} tokens.")
    # Eight characters a token is more than any prose needs; it keeps a whole book from being tokenized for one page.
    source = text[start : start + 8 * filler_tokens + _BOUNDARY_SEARCH]
    offsets = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) < filler_tokens:
        raise ConfigError(
            f"text has {len(offsets)} tokens from character {start} on; prompt_tokens={prompt_tokens} needs "
            f"{filler_tokens}. Give a longer text or a smaller prompt_tokens."
        )
    filler = source[: offsets[filler_tokens - 1][1]]
    cut = _sentence_end(filler, offsets[int(depth * (filler_tokens - 1))][0])
    document = f"{filler[:cut].rstrip()}\n\n{needle.sentence}\n\n{filler[cut:].lstrip()}"
    prompt = chat_prompt(tokenizer, document, needle.question)
    before = prompt[: prompt.index(needle.sentence)]
    return Haystack(
        prompt=prompt,
        needle=needle,
        prompt_tokens=len(encode_prompt(tokenizer, prompt)),
        needle_token=len(encode_prompt(tokenizer, before)),
    )


def _sentence_end(text: str, position: int) -> int:
    """First character after the first sentence end at or after `position`; `position` where none is near."""
    window = text[position : position + _BOUNDARY_SEARCH]
    ends = [found + 1 for mark in (". ", ".\n") if (found := window.find(mark)) >= 0]
    return position + min(ends) if ends else position
