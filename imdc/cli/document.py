"""A document and its questions in a chat template: what `imdc read` reads and what `imdc ask` adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imdc.cli.prompts import chat_prompt

# No document and no template holds it.
_MARK = "\x00"


@dataclass(frozen=True, slots=True)
class Frame:
    """What a tokenizer's chat template puts around a document and a question: the document's part, the question's.

    Attributes:
        tokenizer: whose template it is.
        before: text before the document.
        after: text after the question.
        templated: whether there is a chat template, which writes the special tokens itself.
    """

    tokenizer: Any
    before: str
    after: str
    templated: bool

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """The frame of that tokenizer."""
        before, _, after = chat_prompt(tokenizer, _MARK, None).partition(_MARK)
        return cls(tokenizer, before, after, bool(getattr(tokenizer, "chat_template", None)))

    def document(self, text: str) -> Tensor:
        """Token ids int64 [1, N] of the document."""
        return self._ids(self.before + text, add_special_tokens=not self.templated)

    def question(self, text: str) -> Tensor:
        """Token ids int64 [1, n] of a question behind the document."""
        return self._ids(f"\n\n{text}{self.after}", add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> Tensor:
        return torch.tensor([self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids])
