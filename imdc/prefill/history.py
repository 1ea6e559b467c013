"""What a call says of the text so far, by its mask and positions, held against what the cache has read of it.

imdc numbers tokens itself and leaves padding out, so a mask or positions that say anything else would be ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imdc.cache.cache import ImdcCache
from imdc.errors import UnsupportedCallError
from imdc.model import hf


def check_history(held: int, given: int, passed: int) -> None:
    """Refuse a turn whose text is not what the cache holds with new tokens behind it; transformers would lose a part.

    Args:
        held: tokens of earlier turns that the cache has seen.
        given: columns of the call's attention mask, or of its input_ids.
        passed: columns of its input_ids: all of them, or the new ones alone.

    Raises:
        UnsupportedCallError: the call has nothing new, or new tokens that do not follow what was read.
    """
    whole = "pass the whole conversation as input_ids"
    if given <= held:
        raise UnsupportedCallError(
            f"the call speaks of {given} tokens, {hf.CACHE_NAME} already holds {held}; {whole}, or the new tokens with "
            f"an attention_mask for the whole conversation"
        )
    if passed not in (given, given - held):
        raise UnsupportedCallError(
            f"attention_mask speaks of {given} tokens, {hf.CACHE_NAME} has read {held} and input_ids has {passed}; "
            f"{whole}, or its last {given - held} tokens: the last one of an answer was never read"
        )


def check_mask_shape(mask: Any, shape: tuple[int, int], held: int) -> None:
    """Refuse a mask of neither the new tokens, `shape` [B, T], nor all columns, of which the cache holds `held`.

    Raises:
        UnsupportedCallError: the message names both shapes.
    """
    rows, columns = shape
    seen = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if seen not in ((rows, columns), (rows, held + columns)):
        raise UnsupportedCallError(
            f"attention_mask has shape {seen} for input_ids {shape} after {held} tokens; pass one column per token, 1 "
            f"for tokens and 0 for padding"
        )


# Reads tensors on the host.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_text(cache: ImdcCache, named: dict[str, Any], *, decodes: bool) -> None:
    """Refuse a mask or positions of another text than that of `cache` with the new tokens behind it.

    Args:
        cache: what the call goes on from.
        named: the arguments of a forward call, with `input_ids` int64 [B, T].
        decodes: whether the tokens are appended, padding and all; else padding among them is left out.

    Raises:
        UnsupportedCallError: the message names row and remedy.
    """
    ids, turn = named["input_ids"], cache.turn
    rows, columns = ids.shape
    # Assisted decoding may pass once more what the cache holds.
    again = turn is not None and turn.columns is not None and columns >= turn.columns
    held = 0 if again else cache.get_seq_length()
    seen = None if again else cache.rows
    if seen is not None and seen.tokens.numel() != rows:
        raise UnsupportedCallError(
            f"{hf.CACHE_NAME} holds {seen.tokens.numel()} rows, input_ids has {rows}; pass as many rows"
        )
    if decodes and turn is not None:
        # generate() goes on from the mask that came with the prompt, token by token: no reason to wait for the device.
        return
    read = [0] * rows if seen is None else (seen.tokens + cache.tail).tolist()
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    real = torch.ones(1, columns, dtype=torch.bool, device="cpu")
    if mask is not None:
        real = _checked_mask(mask, (rows, columns), held, read)[:, -columns:]
        if decodes and not bool(real.all()):
            raise UnsupportedCallError(
                f"attention_mask hides a new token of row {_first(~real.all(dim=1))}, and what is decoded always "
                f"counts; pass 1 for it"
            )
    if positions is not None:
        _check_positions(positions, real.expand(rows, -1), held, read)


def _checked_mask(mask: Any, shape: tuple[int, int], held: int, read: list[int]) -> Tensor:
    """`mask` as bool on the CPU, if it speaks of the text that was read."""
    columns = shape[1]
    check_mask_shape(mask, shape, held)
    real: Tensor = mask.to("cpu", torch.bool)
    before = real[:, :-columns].sum(dim=1)
    if before.tolist() != read and mask.shape[1] > columns:
        row = _first(before != torch.tensor(read, device="cpu"))
        raise UnsupportedCallError(
            f"attention_mask counts {int(before[row])} tokens before the new ones in row {row}, and the cache has read "
            f"{read[row]}; pass the mask it was read with, and 1 for what was decoded, or read the text anew"
        )
    return real


def _check_positions(positions: Any, real: Tensor, held: int, read: list[int]) -> None:
    """Refuse positions that imdc would replace by others: it counts the tokens, or the columns, one by one.

    Args:
        positions: of the caller.
        real: bool [B, T] on the CPU, which of the new columns are tokens.
        held: columns before.
        read: tokens before, per row.
    """
    rows, columns = real.shape
    seen = tuple(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
    remedy = "imdc numbers prompt and memory itself, one by one; leave position_ids out"
    if seen not in ((rows, columns), (1, columns)):
        raise UnsupportedCallError(f"position_ids has shape {seen} for input_ids {(rows, columns)}: {remedy}")
    given = positions.cpu().expand(rows, -1)
    wrong = (given.diff() != 1) & real[:, 1:] & real[:, :-1]
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        pair = given[row, column : column + 2].tolist()
        raise UnsupportedCallError(f"position_ids go from {pair[0]} to {pair[1]} in row {row}: {remedy}")
    for row, tokens in enumerate(read):
        places = real[row].nonzero()[:, 0]
        if not places.numel():
            continue
        last, number = int(places[-1]), tokens + places.numel() - 1
        if int(given[row, last]) not in (number, held + last):
            raise UnsupportedCallError(
                f"position_ids give {int(given[row, last])} to token {number} of row {row}: {remedy}"
            )


def _first(rows: Tensor) -> int:
    return int(rows.nonzero()[0])
