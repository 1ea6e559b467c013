"""Branches of a cache: what a question works on, while the document's own cache stays as it is."""

from __future__ import annotations

import copy

import torch

from imdc.cache.cache import ImdcCache


def branch(cache: ImdcCache, rows: int = 1) -> ImdcCache:
    """A cache of `rows` rows that all begin with the only row of `cache`; nothing done to it reaches `cache`.

    The stored keys and values are shared, not copied: whoever appends to a cache or reads into it makes new tensors
    first. A turn over a branch drops nothing.

    Args:
        cache: filled, with one row.
        rows: of the branch.
    """
    assert cache.rows is not None, "only a filled cache branches"
    twin = copy.copy(cache)
    twin.layers = [layer.twin(rows) for layer in cache.layers]
    twin.rows = cache.rows.select(torch.zeros(rows, dtype=torch.long, device="cpu"))
    twin.anew, twin.turn, twin.is_branch, twin.asked = {}, None, True, False
    return twin
