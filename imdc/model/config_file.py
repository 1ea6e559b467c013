"""A model's config without its weights, from a folder, a config.json, a GGUF file or the hub; needs no torch.

Of a GGUF file only the header is read; the layout is that of the GGUF specification,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from imdc.errors import ConfigError, UnsupportedModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_STRING = 2**24
# Where llama.cpp and transformers call an architecture differently.
_FAMILIES = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe", "qwen2moe": "qwen2_moe"}


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
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ConfigError(f"model {text!r} was not found: give a folder, a config.json, a .gguf file or a hub id")
    return _json_config(_from_hub(text))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ConfigError(f"{name!r} is no local path, and huggingface_hub is not installed to look for it") from error
    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model {name!r} is neither a local path nor found on the hub: {reason}") from error


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
    }
    found = {ours: entries.get(f"{family}.{theirs}") for ours, theirs in names.items()}
    if family is None or found["num_hidden_layers"] is None:
        raise UnsupportedModelError(f"{str(path)!r} holds no language model (architecture {family!r})")
    vocab = entries.get("tokenizer.ggml.tokens") or entries.get(f"{family}.vocab_size")
    # transformers dequantises GGUF weights to float32 unless asked for another type.
    return SimpleNamespace(
        model_type=_FAMILIES.get(family, family),
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
