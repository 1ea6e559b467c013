"""Which model filled a cache: what a saved one records of it, and in what another model differs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from imdc.errors import CacheMismatchError
from imdc.model.parts import Parts

# Elements of each weight, evenly spread, that go into its sample: a merged adapter changes almost every element.
_SAMPLE = 64
# Fields of configs that say how keys and values are computed, as far as a model has them.
_COMPUTING = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "hidden_act",
    "hidden_activation",
    "layer_norm_eps",
    "n_group",
    "no_rope_layers",
    "norm_topk_prob",
    "num_experts_per_tok",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "routed_scaling_factor",
    "swiglu_alpha",
    "swiglu_limit",
    "topk_group",
)
# What torch.compile and FSDP put into the names of what they wrap.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.|$)")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def facts(parts: Parts) -> dict[str, Any]:
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
        **{name: getattr(config, name) for name in _COMPUTING if hasattr(config, name)},
    }
    result: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return result


def weight_samples(model: PreTrainedModel) -> dict[str, str | None]:
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
        samples[name] = hashlib.sha256(tensor_bytes(sample)).hexdigest()[:12]
    return samples


def adapter_settings(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
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


def compare(path: Path, state: dict[str, Any], parts: Parts) -> None:
    """Refuse a model that is not the one of a file's `state`.

    Raises:
        CacheMismatchError: with every difference.
    """
    here = facts(parts)
    # Files that are older know nothing of these.
    known = {name: value for name, value in here.items() if name in state["model"] or name not in _COMPUTING}
    differences = _entries_that_differ(state["model"], known)
    if not differences:
        differences = _weights_that_differ(path, state["weights"], weight_samples(parts.model))
        differences += _adapters_that_differ(state["adapters"], adapter_settings(parts.model))
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
