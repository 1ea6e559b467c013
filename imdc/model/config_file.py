"""A model's config without its weights, from a folder, a config.json, a GGUF file or the hub; needs no torch.

Of a GGUF file only the header is read; the layout is that of the GGUF specification,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What a config leaves out, or says in one of several ways, is
filled in here too.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from imdc.errors import ConfigError, UnsupportedModelError
from imdc.model.families import GGUF_NAMES, describe

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_STRING = 2**24
# A config of several parts may say these once, for all of them.
_SHARED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")


def read_config(source: str | os.PathLike[str]) -> Any:
    """The config of a model, as an object with one attribute per entry.

    Args:
        source: a folder with a config.json, a .json file, a .gguf file, or a hub id.

    Raises:
        ConfigError: the file is missing, cannot be read, or the hub does not know the id.
        UnsupportedModelError: a GGUF file that holds no model.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf_config(path)
    if path.is_dir():
        inside = sorted(path.glob("*.gguf"))
        if not (path / "config.json").is_file() and inside:
            return _gguf_config(inside[0])
        return _json_config(path / "config.json")
    if path.suffix.lower() == ".json" or path.is_file():
        return _json_config(path)
    text = os.fspath(source)
    if looks_local(text):
        raise ConfigError(f"model {text!r} was not found: give a folder, a config.json, a .gguf file or a hub id")
    return _json_config(hub_file(text, "config.json"))


def looks_local(source: str) -> bool:
    """True for what can only be a path: hub ids have at most one slash and never start with `.`, `/` or `~`."""
    return source.startswith((".", "/", "~", os.sep)) or source.count("/") > 1


def hub_file(name: str, file: str) -> Path:
    """The file of a hub repository, downloaded where it is not cached.

    Raises:
        ConfigError: the hub does not know it or cannot be reached.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ConfigError(f"{name!r} is no local path, and huggingface_hub is not installed to look for it") from error
    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {name!r} is neither a local path nor found on the hub with {file!r}: {reason}"
        ) from error


def _json_config(path: Path) -> Any:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{str(path)!r} was not found: give a folder with a config.json, or that file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as a model config: {error}") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"{str(path)!r} holds {type(entries).__name__}, not the entries of a model config")
    return _namespace(entries)


def _namespace(entries: dict[str, Any]) -> SimpleNamespace:
    nested = entries.get("text_config")
    if isinstance(nested, dict):
        entries = {**entries, "text_config": _namespace(nested)}
    return SimpleNamespace(**entries)


def _gguf_config(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            entries, tensors = _gguf_header(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{str(path)!r} was not found") from error
    except (OSError, struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
        raise ConfigError(f"{str(path)!r} is not a readable GGUF file: {error}") from error
    family = entries.get("general.architecture")
    names = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "max_position_embeddings": "context_length",
        "sliding_window": "attention.sliding_window",
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    }
    found = {ours: entries.get(f"{family}.{theirs}") for ours, theirs in names.items()}
    if family is None or found["num_hidden_layers"] is None:
        raise UnsupportedModelError(f"{str(path)!r} holds no language model (architecture {family!r})")
    vocab = entries.get("tokenizer.ggml.tokens") or entries.get(f"{family}.vocab_size")
    # transformers dequantises GGUF weights to float32 unless asked for another type.
    return SimpleNamespace(
        model_type=GGUF_NAMES.get(str(family), family),
        vocab_size=vocab,
        dtype="float32",
        tie_word_embeddings="output.weight" not in tensors,
        **found,
    )


def _gguf_header(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """Metadata (of arrays only the length) and tensor names."""
    if file.read(4) != b"GGUF":
        raise OSError("it does not begin with the letters GGUF")
    version, tensors, entries = struct.unpack("<IQQ", file.read(20))
    if version < 2:
        raise OSError(f"version {version} of the format is too old; convert it anew")
    found: dict[str, Any] = {}
    for _ in range(entries):
        name = _gguf_string(file)
        found[name] = _gguf_value(file, _unpack(file, "I"))
    names = set()
    for _ in range(tensors):
        names.add(_gguf_string(file))
        dimensions = _unpack(file, "I")
        file.seek(8 * dimensions + 12, os.SEEK_CUR)
    return found, names


def _unpack(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]


def _gguf_string(file: BinaryIO) -> str:
    length = _unpack(file, "Q")
    # A broken file may claim any length; a tokenizer's chat template, the longest there is, has some KiB.
    data = file.read(min(length, _LONGEST_STRING))
    if len(data) < length:
        raise OSError("it ends in the middle of its header")
    return data.decode("utf-8", errors="replace")


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _gguf_string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])
    inner, length = struct.unpack("<IQ", file.read(12))
    if inner in _SCALARS:
        file.seek(length * struct.calcsize("<" + _SCALARS[inner]), os.SEEK_CUR)
    else:
        for _ in range(length):
            _gguf_value(file, inner)
    return length


def completed(config: Any) -> tuple[Any, str]:
    """The text part of a config with what it leaves out, and its `model_type`."""
    text = getattr(config, "text_config", None)
    text = config if text is None else text
    family = str(getattr(text, "model_type", "unknown"))
    missing = describe(family).missing
    shared = {name: value for name in _SHARED if (value := getattr(config, name, None)) is not None}
    return _Completed(text, {**missing, **shared}), family


class _Completed:
    """A config whose missing entries, or those that are None, come from a mapping."""

    def __init__(self, config: Any, missing: Mapping[str, Any]) -> None:
        self._config, self._missing = config, missing

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name, None)
        return self._missing.get(name) if value is None else value


def weight_bits(config: Any) -> int | None:
    """Bits per weight that the `quantization_config` of a config.json names, by the ways of the common formats."""
    quantised = getattr(config, "quantization_config", None)
    if not isinstance(quantised, Mapping):
        return None
    bits = 4 if quantised.get("load_in_4bit") else 8 if quantised.get("load_in_8bit") else quantised.get("bits")
    # compressed-tensors names them for groups of layers; the first one is that of the matrices.
    groups = quantised.get("config_groups")
    for group in groups.values() if bits is None and isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        bits = weights.get("num_bits") if bits is None and isinstance(weights, Mapping) else bits
    method = str(quantised.get("quant_method"))
    if bits is None:
        bits = 8 if "fp8" in method else 4 if method == "mxfp4" else None
    return bits if isinstance(bits, int) and 1 <= bits <= 8 else None


def attention_is_quantised(config: Any) -> bool:
    """Whether attention's matrices are quantised where others are: not where its `quantization_config` spares them."""
    quantised = getattr(config, "quantization_config", None)
    spared = quantised.get("modules_to_not_convert") if isinstance(quantised, Mapping) else None
    return not any("self_attn" in str(name) for name in spared or ())


def size_of(config: Any, family: str, *names: str, default: int | None = None) -> int:
    """The first of the entries that is there; `default`, where there is one, stands for what is left out or 0.

    Raises:
        UnsupportedModelError: it is no positive int.
    """
    value = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if default is not None and not value:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModelError(
            f"the config of model type {family!r} has {names[0]}={value!r}; a plan needs it as a positive int"
        )
    return value
