"""Where recall keeps a text: the store is made before the text is read, or its reading is refused."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from imdc.cache.cache import ImdcCache
from imdc.cache.store import HostStore
from imdc.config import PrefillConfig
from imdc.errors import ConfigError, UnsupportedCallError
from imdc.model.parts import Parts
from imdc.model.shape import ModelShape
from imdc.planner import recalling
from imdc.planner.batch import Batch
from imdc.units import format_bytes


def check_recall(config: PrefillConfig, cache: ImdcCache, tokens: int) -> None:
    """Refuse turns of so many `tokens` that would leave a text and its store apart.

    Raises:
        UnsupportedCallError: a prompt of forward() with recall, another turn over a text that has a store, or with
            recall over one that has none.
    """
    if config.recall != "none" and cache.store is None and not cache.is_branch and tokens > 1:
        if cache.is_empty:
            raise UnsupportedCallError(
                f"recall={config.recall!r} is for generate(), handle.read() and handle.ask(); leave it out for "
                f"forward()"
            )
        raise UnsupportedCallError(
            f"recall={config.recall!r} with a cache whose text has no store, so nothing could be taken back; pass the "
            f"whole conversation as input_ids and no cache, or leave recall out"
        )
    if cache.store is not None and not cache.is_empty and not cache.is_branch:
        raise UnsupportedCallError(
            "the cache belongs to a document with a store, to which nothing can be added; ask it with handle.ask()"
        )
    if cache.is_branch and cache.asked:
        raise UnsupportedCallError(
            f"the cache is that of a call with recall={config.recall!r}, which cannot go on: what it took back is "
            f"about its own question; pass the whole conversation as input_ids and no cache"
        )


def text_store(parts: Parts, config: PrefillConfig, tokens: int, available: int | None) -> HostStore | None:
    """An empty store for a text of `tokens`, where the config asks for one and a model has layers to compress.

    Args:
        parts: of the model.
        config: the options.
        tokens: of the text.
        available: bytes of host memory that are free, None where that is not known.

    Raises:
        ConfigError: it would take more than `recall_limit`, or than there is, or its folder cannot be used.
    """
    if config.recall == "none" or not parts.full_layers:
        return None
    shape = ModelShape.from_model(parts.model)
    needed, folder = recalling.host_bytes(shape, Batch(tokens), config), None
    if config.recall_limit is not None and needed > config.recall_limit:
        raise ConfigError(
            f"recall={config.recall!r} stores {format_bytes(needed)} for {tokens} tokens, more than "
            f"recall_limit={config.recall_limit} bytes; raise it, read a shorter document, or leave recall out"
        )
    if config.recall == "disk":
        folder = Path(tempfile.gettempdir() if config.recall_dir is None else config.recall_dir)
        if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
            raise ConfigError(
                f"recall_dir={os.fspath(folder)!r} is no folder that can be written to; name one with recall_dir"
            )
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ConfigError(
                f"recall='disk' stores {format_bytes(needed)} for {tokens} tokens, and {os.fspath(folder)!r} has "
                f"{format_bytes(free)} free; name a folder on another disk with recall_dir, or read a shorter document"
            )
    elif config.recall_limit is None and available is not None and needed > available:
        raise ConfigError(
            f"recall={config.recall!r} stores {format_bytes(needed)} for {tokens} tokens, and only "
            f"{format_bytes(available)} of host memory are available; take recall='disk', or read a shorter document"
        )
    int8, summarised = config.recall_dtype == "int8", config.recall_every > 0
    return HostStore(parts.full_layers, tokens, folder, int8=int8, summarised=summarised)
