"""From a record to token ids: the two protocols.

- "official": cut in the middle to the model's window, as `pred.py` of THUDM/LongBench does it, then the chat template.
- "untruncated": the whole prompt, then the chat template.
"""

from __future__ import annotations

from typing import Any

from longbench_data import Record

from imdc.errors import ImdcError

PROTOCOLS = ("untruncated", "official")
# The official max_length by the model's window.
_OFFICIAL_LENGTHS = {4096: 3500, 8192: 7500, 16384: 15500, 32768: 31500, 131072: 127500}


class WindowError(ImdcError, ValueError):
    """No official length exists for the model's window."""


def official_length(window: int | None, asked: int | None) -> int:
    """Tokens a prompt is cut to before the chat template: `asked`, or the official figure for the model's window.

    Raises:
        WindowError: the window has no official figure.
    """
    if asked is not None:
        return asked
    if window not in _OFFICIAL_LENGTHS:
        known = ", ".join(f"{length} for {size}" for size, length in _OFFICIAL_LENGTHS.items())
        raise WindowError(
            f"the model's window is {window} tokens, for which LongBench has no max_length ({known}); set --max-length"
        )
    return _OFFICIAL_LENGTHS[window]


def cut_middle(tokenizer: Any, text: str, length: int) -> str:
    """`text` with its middle left out, where it has more than `length` tokens; special tokens are not kept."""
    ids = tokenizer(text, truncation=False).input_ids
    if len(ids) <= length:
        return text
    half = int(length / 2)
    head, tail = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return str(head) + str(tail)


def encode(lm: Any, record: Record, max_length: int | None) -> list[int]:
    """Token ids of a record's prompt.

    Args:
        lm: an `HFLM`, which knows the chat template and whether a beginning-of-text token is still to be added.
        record: the question.
        max_length: what the official protocol cuts to; None leaves the prompt whole.
    """
    prompt = record.prompt if max_length is None else cut_middle(lm.tokenizer, record.prompt, max_length)
    if record.task.chat and getattr(lm.tokenizer, "chat_template", None):
        prompt = lm.apply_chat_template([{"role": "user", "content": prompt}])
    ids: list[int] = lm.tok_encode(prompt)
    return ids
