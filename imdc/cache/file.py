"""Keep a prefilled cache on disk: read a document once, ask about it later, in any process.

One safetensors file, never pickle. Tensors are `layers.<n>.keys` and `layers.<n>.values` [B, Hkv, stored, D], and with
recall `store.<n>.keys` and `store.<n>.values` [1, tokens, Hkv, D], in eight bits with `store.<n>.key_scales` and
`store.<n>.value_scales`, see `imdc.cache.int8`. The header holds `imdc`, a JSON text with everything
else (the model's facts, samples of its weights, settings of its adapters, the state of rows and layers), and `sha256`,
the checksum of that text and of all tensors. The checksum finds damage, not forgery: it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from imdc import __version__
from imdc.cache.cache import ImdcCache
from imdc.cache.identity import adapter_settings, compare, facts, tensor_bytes, weight_samples
from imdc.cache.layers import MemoryLayer
from imdc.cache.rows import RowState
from imdc.cache.store import HostStore
from imdc.errors import CacheMismatchError, UnsupportedCallError, check_choice
from imdc.model.parts import Parts

# Raise it when a file written by one version cannot be read by the other.
_FORMAT = 3
# That of files which also hold a document's store, and of those where it is in eight bits: versions that do not know of
# it would not see it, or take its codes for keys and values.
_FORMAT_WITH_STORE, _FORMAT_WITH_INT8 = 4, 5
_ROW_FIELDS = ("tokens", "position", "padding", "compact", "question")


def save_cache(cache: ImdcCache, path: str | os.PathLike[str]) -> None:
    """Write `cache` to the file `path`, which appears only when it is complete.

    The memory, the decoded tail and, in sliding-window layers, the last window are kept. Token ids are not: the next
    `generate()` needs the whole history again, as with a cache in memory.

    Raises:
        UnsupportedCallError: the cache is empty or that of one question, or the model that made it is gone.
        FileNotFoundError: the folder of `path` does not exist.
    """
    path = Path(path)
    if not isinstance(cache, ImdcCache):
        raise UnsupportedCallError(
            f"cache is a {type(cache).__name__}; pass that of handle.read(), or of a patched model's generate()"
        )
    if cache.rows is None:
        raise UnsupportedCallError("the cache is empty; read a prompt with generate() or model(...) before saving it")
    if cache.is_branch:
        raise UnsupportedCallError(
            "the cache is that of one question, and what it took back is about that alone; save the one that "
            "handle.read() returned"
        )
    model = cache.owner()  # type: ignore[operator]
    if model is None:
        raise UnsupportedCallError("the model that filled this cache is gone; save the cache while the model is alive")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {os.fspath(path.parent)!r} does not exist; create it before saving the cache")
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(cache.layers):
        for side in ("keys", "values"):
            tensors[f"layers.{number}.{side}"] = getattr(layer, side).detach().cpu().contiguous()
    if cache.store is not None:
        tensors |= cache.store.tensors()
    state = json.dumps(
        {
            "format": _format(cache),
            "imdc": __version__,
            "model": facts(Parts.of(model)),
            "weights": weight_samples(model),
            "adapters": adapter_settings(model),
            "cache": {"phase": cache.phase, "width": cache.width},
            "rows": {name: getattr(cache.rows, name).tolist() for name in _ROW_FIELDS},
            "layers": [_layer_state(layer) for layer in cache.layers],
        }
    )
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        save_file(tensors, partial, metadata={"imdc": state, "sha256": _checksum(state, tensors)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_cache(path: str | os.PathLike[str], model: PreTrainedModel, *, recall: str = "host") -> ImdcCache:
    """The cache that `save_cache(cache, path)` wrote, on the devices of `model`.

    `generate(history + question, past_key_values=cache)` of the patched model goes on from it. A call appends to the
    cache it is given, so load it again, or give each question its own `cache.copy()`. Where the file has a document's
    store, only `handle.ask()` goes on from it, which leaves the cache as it is.

    Args:
        path: a file of `save_cache`.
        model: the model that filled the cache, patched or not; its weights, adapters, dtype and config must be the
            same.
        recall: where the document's store is, if the file has one: "host" reads it into host memory, "disk" maps the
            file, which must then stay as it is while the cache lives (another file may take its name). Mean keys,
            1/32 of a store in 16 bits, are no part of the file: a question makes them in host memory.

    Raises:
        ConfigError: another `recall`.
        CacheMismatchError: the file is truncated, altered or no imdc cache, or another model filled it; the message
            names every difference.
        FileNotFoundError: there is no such file.
        UnsupportedModelError: `model` is of no supported family.
    """
    check_choice("recall", recall, ("host", "disk"))
    path = Path(path)
    parts = Parts.of(model)
    state, tensors = _read(path, map_store=recall == "disk")
    compare(path, state, parts)
    cache = ImdcCache(parts.windows, owner=weakref.ref(model))
    layers: list[Any] = cache.layers
    for number, (layer, saved) in enumerate(zip(layers, state["layers"], strict=True)):
        device = parts.device(number)
        keys, values = (tensors.pop(f"layers.{number}.{side}").to(device) for side in ("keys", "values"))
        if isinstance(layer, MemoryLayer):
            layer.load(keys, values, saved["seen"])
            layer.tail = saved["tail"]
        else:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            layer.cumulative_length = saved["seen"]
    cache.phase, cache.width = state["cache"]["phase"], state["cache"]["width"]
    fields: dict[str, Any] = {name: torch.tensor(state["rows"][name], device="cpu") for name in _ROW_FIELDS}
    cache.rows = RowState(**fields)
    cache.store = HostStore.of(tensors)
    # An empty list has no type of its own.
    cache.rows.question = cache.rows.question.long()
    return cache


def _format(cache: ImdcCache) -> int:
    if cache.store is None:
        return _FORMAT
    return _FORMAT_WITH_INT8 if cache.store.int8 else _FORMAT_WITH_STORE


def _layer_state(layer: Any) -> dict[str, Any]:
    shape = list(layer.keys.shape)
    if isinstance(layer, MemoryLayer):
        return {"shape": shape, "seen": layer.seen, "tail": layer.tail}
    return {"shape": shape, "seen": layer.cumulative_length}


def _checksum(state: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _read(path: Path, *, map_store: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON state and the tensors of a file whose checksum is right; those of a store mapped or read."""
    shown, again = os.fspath(path), "read the prompt again and save the cache anew"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            for name in tensors:
                if not (map_store and name.startswith("store.")):
                    # A copy: the file itself may change or go while the cache lives.
                    tensors[name] = tensors[name].clone()
    except SafetensorError as error:
        raise CacheMismatchError(f"{shown!r} is truncated or no safetensors file ({error}); {again}") from error
    if "imdc" not in header or "sha256" not in header:
        raise CacheMismatchError(f"{shown!r} is no imdc cache: its header holds {sorted(header)}; {again}")
    if _checksum(header["imdc"], tensors) != header["sha256"]:
        raise CacheMismatchError(f"{shown!r} was altered after it was saved: its checksum differs; {again}")
    state: dict[str, Any] = json.loads(header["imdc"])
    known = (_FORMAT, _FORMAT_WITH_STORE, _FORMAT_WITH_INT8)
    if state["format"] not in known:
        raise CacheMismatchError(
            f"{shown!r} has format {state['format']}, written by imdc {state['imdc']}; imdc {__version__} "
            f"reads formats {', '.join(map(str, known))}: use that version, or {again}"
        )
    return state, tensors
