"""How far decoding may go on from a cache: when it is compressed again, and what is refused."""

from __future__ import annotations

from torch import Tensor

from imdc.cache.cache import ImdcCache
from imdc.config import PrefillConfig
from imdc.errors import UnsupportedCallError
from imdc.model.parts import Parts
from imdc.positions import answer_room, fitted


def compression_due(parts: Parts, config: PrefillConfig, cache: ImdcCache, count: int) -> bool:
    """Whether the cache has to be compressed before `count` tokens are appended to it.

    That is so after `decode_tokens`, and where positions are compact also before the answer leaves the window.
    """
    rows, tail = cache.rows, cache.tail
    if rows is None or not tail:
        return False
    limit, window = config.decode_tokens, parts.trained_window
    # That question and answer of a branch fit was checked before, and no turn comes after them.
    compact = cache.compact and not cache.drafting and not cache.is_branch
    if compact or (limit is not None and config.positions != "original" and parts.full_layers):
        room = answer_room(fitted(config, window), window)
        # With decode_tokens all rows of a batch are compressed at once, and none at another time than by itself.
        limit = min((size for size in (limit, room) if size is not None), default=None)
    if limit is not None and tail >= limit:
        return True
    return compact and limit is not None and _reach(rows.position[rows.compact], tail + count) > window


def check_decoding(parts: Parts, cache: ImdcCache, count: int) -> None:
    """Refuse to append `count` tokens at positions that the model was not trained for, or that change its factors.

    generate() says beforehand how much will be written, and is never refused here. An assistant's drafts may be bad.

    Raises:
        UnsupportedCallError: the message names the remedy.
    """
    rows, window = cache.rows, parts.trained_window
    if rows is None or cache.drafting:
        return
    added = cache.tail + count
    if _reach(rows.position[rows.compact], added) > window:
        raise UnsupportedCallError(
            f"decoding reaches position {_reach(rows.position[rows.compact], added)} of compact positions, the model "
            f"was trained for {window}, and compressing again makes no room; lower memory_tokens, or leave it out"
        )
    within = rows.position[~rows.compact & (rows.position <= window)]
    if parts.rope_type == "longrope" and _reach(within, added) > window:
        raise UnsupportedCallError(
            f"decoding reaches position {_reach(within, added)} of original positions, where rope_type='longrope' "
            f"takes other factors than for the {window} before; use positions='compact'"
        )


def _reach(positions: Tensor, added: int) -> int:
    return int(positions.max()) + added if positions.numel() else 0
