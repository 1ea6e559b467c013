"""The store of a document in a mapped file: answers as from host memory, no room taken there, nothing left behind."""

from __future__ import annotations

import gc
import os
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, token_ids

import imdc
from imdc.cache.store import HostStore
from imdc.config import PrefillConfig
from imdc.errors import ConfigError

TIGHT: dict[str, Any] = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_answers_are_those_from_host_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    (folder := tmp_path / "folder").mkdir()
    model = FAMILIES["gemma3"]().to(dtype)
    questions = [token_ids(9, seed=seed) for seed in (1, 2)]
    answers, stores = [], []
    for options in ({"recall": "host"}, {"recall": "disk", "recall_dir": str(folder)}):
        with imdc.patch(model, **TIGHT, **options) as handle:
            cache = handle.read(token_ids(300))
            assert handle.report is not None and cache.store is not None
            assert handle.report.host_bytes == cache.store.nbytes()
            answers.append([handle.ask(cache, question, **GREEDY) for question in questions])
            stores.append(cache.store)
            imdc.save_cache(cache, tmp_path / options["recall"])
    host, disk = (store.tensors() for store in stores)
    assert host.keys() == disk.keys() and all(torch.equal(host[name], disk[name]) for name in host)
    # A mapped file has no name any more: it cannot be left behind.
    assert list(folder.iterdir()) == []
    with imdc.patch(model, **TIGHT) as handle:
        for saved in ("host", "disk"):
            for place in ("host", "disk"):
                cache = imdc.load_cache(tmp_path / saved, model, recall=place)
                answers.append([handle.ask(cache, question, **GREEDY) for question in questions])
    for one in answers[1:]:
        assert all(torch.equal(got, wanted) for got, wanted in zip(one, answers[0], strict=True))


@linux_only
def test_what_is_mapped_takes_no_memory_of_the_process(tmp_path: Path) -> None:
    def anonymous() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    tokens, chunk = 100_000, torch.ones(1, 2, 5000, 64)
    taken = []
    for folder in (tmp_path, None):
        before, store = anonymous(), HostStore([0], tokens, folder)
        for start in range(0, tokens, 5000):
            store.write(0, start, chunk, chunk)
        store.finish()
        taken.append(anonymous() - before)
        assert store.nbytes() == 2 * tokens * 2 * 64 * 4
    assert taken[0] < 0.1 * taken[1]


@linux_only
def test_a_saved_store_is_mapped_or_read(tmp_path: Path) -> None:
    model, path = FAMILIES["llama"](), tmp_path / "document"
    with imdc.patch(model, **TIGHT, recall="host") as handle:
        imdc.save_cache(handle.read(token_ids(300)), path)
    for recall, mapped in (("host", False), ("disk", True)):
        cache = imdc.load_cache(path, model, recall=recall)
        gc.collect()
        assert (str(path) in Path("/proc/self/maps").read_text()) == mapped
        del cache
    with pytest.raises(ConfigError, match="recall must be one of 'host', 'disk', got 'none'"):
        imdc.load_cache(path, model, recall="none")


def test_a_disk_without_room_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    model, needed = FAMILIES["llama"](), 3 * 2 * 16 * (2 * 4 * 300 + 2 * 19)
    monkeypatch.setattr("imdc.prefill.text_store.shutil.disk_usage", lambda folder: usage(0, 0, needed))
    options = {**TIGHT, "recall": "disk", "recall_dir": str(tmp_path)}
    with imdc.patch(model, **options) as handle:
        handle.read(token_ids(300))
        report = handle.report
        with pytest.raises(ConfigError, match="free; name a folder on another disk with recall_dir"):
            handle.read(token_ids(301))
        assert handle.report is report
    with imdc.patch(model, **options, recall_limit=needed - 1) as handle, pytest.raises(ConfigError, match="more than"):
        handle.read(token_ids(300))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="blocks are not reserved here")
def test_a_disk_that_fills_meanwhile_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        imdc.patch(FAMILIES["llama"](), **TIGHT, recall="disk", recall_dir=str(tmp_path)) as handle,
        pytest.raises(ConfigError, match=r"no room for 37\.5 KiB .*No space left.*recall_dir"),
    ):
        handle.read(token_ids(300))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with (
        imdc.patch(FAMILIES["llama"](), **TIGHT, recall="disk", recall_dir=missing) as handle,
        pytest.raises(ConfigError, match="is no folder that can be written to"),
    ):
        handle.read(token_ids(300))
    with pytest.raises(ConfigError, match="recall_dir='x' has no effect with recall='host'; set recall='disk'"):
        PrefillConfig(recall="host", recall_dir="x")
    assert "on disk" in str(imdc.plan(FAMILIES["llama"](), 300, **TIGHT, recall="disk"))
