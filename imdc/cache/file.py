"""Keep a prefilled cache on disk: read a document once, ask about it later, in any process.

One safetensors file, never pickle. Tensors are `layers.<n>.keys` and `layers.<n>.values` [B, Hkv, stored, D], and with
recall `store.<n>.keys` and `store.<n>.values` [1, tokens, Hkv, D]. The header holds `imdc`, a JSON text with everything
else (the model's facts, samples of its weights, settings of its adapters, the state of rows and layers), and `sha256`,
the checksum of that text and of all tensors. The checksum finds damage, not forgery: it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
import warnings
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
from imdc.cache.layers import MemoryLayer
from imdc.cache.rows import RowState
from imdc.cache.store import HostStore
from imdc.errors import CacheMismatchError, UnsupportedCallError
from imdc.model.parts import Parts

# Raise it when a file written by one version cannot be read by the other.
_FORMAT = 2
# That of files which also hold a document's store: earlier versions would not see it.
_FORMAT_WITH_STORE = 3
# Elements of each weight, evenly spread, that go into its sample: a merged adapter changes almost every element.
_SAMPLE = 64
# What torch.compile and FSDP put into the names of what they wrap.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.|$)")
_ROW_FIELDS = ("tokens", "position", "padding", "compact", "question")


def save_cache(cache: ImdcCache, path: str | os.PathLike[str]) -> None:
    """Write `cache` to the file `path`, which appears only when it is complete.

    The memory, the decoded tail and, in sliding-window layers, the last window are kept. Token ids are not: the next
    `generate()` needs the whole history again, as with a cache in memory.

    Raises:
        UnsupportedCallError: the cache is empty, or the model that made it is gone.
        FileNotFoundError: the folder of `path` does not exist.
    """
    path = Path(path)
    if cache.rows is None:
        raise UnsupportedCallError("the cache is empty; read a prompt with generate() or model(...) before saving it")
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
            "format": _FORMAT if cache.store is None else _FORMAT_WITH_STORE,
            "imdc": __version__,
            "model": _facts(Parts.of(model)),
            "weights": _weight_samples(model),
            "adapters": _adapter_settings(model),
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


def load_cache(path: str | os.PathLike[str], model: PreTrainedModel) -> ImdcCache:
    """The cache that `save_cache(cache, path)` wrote, on the devices of `model`.

    `generate(history + question, past_key_values=cache)` of the patched model goes on from it. A call appends to the
    cache it is given, so load it again, or give each question its own `cache.copy()`.

    Args:
        path: a file of `save_cache`.
        model: the model that filled the cache, patched or not; its weights, adapters, dtype and config must be the
            same.

    Raises:
        CacheMismatchError: the file is truncated, altered or no imdc cache, or another model filled it; the message
            names every difference.
        FileNotFoundError: there is no such file.
        UnsupportedModelError: `model` is of no supported family.
    """
    path = Path(path)
    parts = Parts.of(model)
    state, tensors = _read(path)
    _compare(path, state, parts)
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
    cache.rows = RowState(**{name: torch.tensor(state["rows"][name]) for name in _ROW_FIELDS})
    cache.store = HostStore.of(tensors)
    # An empty list has no type of its own.
    cache.rows.question = cache.rows.question.long()
    return cache


def _layer_state(layer: Any) -> dict[str, Any]:
    shape = list(layer.keys.shape)
    if isinstance(layer, MemoryLayer):
        return {"shape": shape, "seen": layer.seen, "tail": layer.tail}
    return {"shape": shape, "seen": layer.cumulative_length}


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _checksum(state: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON state and the tensors of a file whose checksum is right."""
    name, again = os.fspath(path), "read the prompt again and save the cache anew"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            # A copy: the file itself may change or go while the cache lives.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CacheMismatchError(f"{name!r} is truncated or no safetensors file ({error}); {again}") from error
    if "imdc" not in header or "sha256" not in header:
        raise CacheMismatchError(f"{name!r} is no imdc cache: its header holds {sorted(header)}; {again}")
    if _checksum(header["imdc"], tensors) != header["sha256"]:
        raise CacheMismatchError(f"{name!r} was altered after it was saved: its checksum differs; {again}")
    state: dict[str, Any] = json.loads(header["imdc"])
    if state["format"] not in (_FORMAT, _FORMAT_WITH_STORE):
        raise CacheMismatchError(
            f"{name!r} has format {state['format']}, written by imdc {state['imdc']}; imdc {__version__} "
            f"reads formats {_FORMAT} and {_FORMAT_WITH_STORE}: use that version, or {again}"
        )
    return state, tensors


def _facts(parts: Parts) -> dict[str, Any]:
    """What two models must share so that one can use the other's cache, in the types that JSON gives back."""
    config = parts.config
    attention: Any = parts.decoder.layers[0].self_attn
    quantization = getattr(parts.model.config, "quantization_config", None)
    facts = {
        "model_type": config.model_type,
        "dtype": str(parts.model.dtype),
        "quantization": getattr(quantization, "quant_method", None),
        "layers": len(parts.windows),
        "hidden_size": config.hidden_size,
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": int(attention.head_dim),
        "vocab_size": config.vocab_size,
        "sliding_windows": parts.windows,
        "rope_parameters": getattr(config, "rope_parameters", None),
    }
    result: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return result


def _weight_samples(model: PreTrainedModel) -> dict[str, str | None]:
    """Parameter name to a digest of some elements; None for weights that are offloaded or packed by a library."""
    samples: dict[str, str | None] = {}
    for name, parameter in model.named_parameters():
        name = _plain_name(name)
        weight: Any = parameter.detach()
        if hasattr(weight, "to_local"):
            weight = weight.to_local()
        if weight.is_meta or type(weight) not in (torch.Tensor, torch.nn.Parameter):
            samples[name] = None
            continue
        flat = weight.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous()
        samples[name] = hashlib.sha256(_bytes(sample)).hexdigest()[:12]
    return samples


def _adapter_settings(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Module name to class and plain attributes, of modules that neither torch nor transformers defines.

    Adapters are such modules. Their weights say nothing of a scaling, or of an adapter that is switched off; numbers,
    texts and lists or dicts of these are compared for that.
    """
    settings: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] in ("torch", "transformers"):
            continue
        own = {key: value for key, value in vars(module).items() if key != "training" and not key.startswith("_")}
        # Properties of a PEFT layer, whose attributes behind them are private.
        own |= {key: getattr(module, key) for key in ("active_adapters", "disable_adapters") if hasattr(module, key)}
        own = {key: value for key, value in own.items() if _is_plain(value)}
        settings[_plain_name(name)] = {"class": type(module).__qualname__, **own}
    result: dict[str, dict[str, Any]] = json.loads(json.dumps(settings))
    return result


def _plain_name(name: str) -> str:
    return _WRAPPERS.sub("", name).lstrip(".")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _compare(path: Path, state: dict[str, Any], parts: Parts) -> None:
    differences = _entries_that_differ(state["model"], _facts(parts))
    if not differences:
        differences = _weights_that_differ(path, state["weights"], _weight_samples(parts.model))
        differences += _adapters_that_differ(state["adapters"], _adapter_settings(parts.model))
    if differences:
        raise CacheMismatchError(
            f"{os.fspath(path)!r} was filled by another model: {'; '.join(differences)}. "
            f"Load the model that filled it, with its adapters as they were, or read the prompt again"
        )


def _entries_that_differ(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {saved.get(name)!r} in the file, {here.get(name)!r} here"
        for name in dict.fromkeys((*saved, *here))
        if saved.get(name) != here.get(name)
    ]


def _weights_that_differ(path: Path, saved: dict[str, str | None], here: dict[str, str | None]) -> list[str]:
    differences = []
    for names, place in (
        ([name for name in saved if name not in here], "the file only"),
        ([name for name in here if name not in saved], "this model only"),
    ):
        if names:
            differences.append(f"{len(names)} weights are in {place}, the first is {names[0]}")
    readable = [name for name in saved if saved[name] is not None and here.get(name) is not None]
    other = [name for name in readable if saved[name] != here[name]]
    if other:
        differences.append(f"{len(other)} of {len(readable)} weights differ, the first is {other[0]}")
    elif not readable and not differences:
        warnings.warn(
            f"imdc: no weight of the model can be read here (all are offloaded or packed), so "
            f"{os.fspath(path)!r} was compared with its config only",
            RuntimeWarning,
            stacklevel=4,
        )
    return differences


def _adapters_that_differ(saved: dict[str, dict[str, Any]], here: dict[str, dict[str, Any]]) -> list[str]:
    other = [name for name in dict.fromkeys((*saved, *here)) if saved.get(name) != here.get(name)]
    if not other:
        return []
    first = other[0]
    entries = ", ".join(_entries_that_differ(saved.get(first, {}), here.get(first, {})))
    return [f"settings of {len(other)} modules differ, the first is {first} ({entries})"]
