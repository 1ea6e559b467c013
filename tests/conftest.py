"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

# Before anything imports them: no test may reach for the hub, and Triton without a GPU needs its interpreter.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Triton reads this once, when transformers first imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from tiny_models import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from imdc.model.loading import SMOLLM2_INSTALL, find_smollm2_gguf, load_model
from imdc.prefill import hook

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from interpreter import patch_language_once_per_launch

    patch_language_once_per_launch()

# Its assertions are those of tests, and shall show what they compared.
pytest.register_assert_rewrite("promises")

_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where a test says nothing else, its tensors and models are there."""
    parser.addoption("--device", help="default device of the tests, such as cuda")


def pytest_configure(config: pytest.Config) -> None:
    """Make it so, for generators of random numbers too, which have no default device."""
    device = config.getoption("--device")
    if device is not None:
        torch.set_default_device(device)
        torch.Generator = partial(torch.Generator, device)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _no_patch_left() -> Iterator[None]:
    """Every test takes its patches back, or drops the patched models: one that is left would meet the next tests."""
    yield
    if hook._patches:
        gc.collect()
    assert not hook._patches and not hook._overlays


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 with its tokenizer, shared: leave it unpatched."""
    path = find_smollm2_gguf()
    if path is None:
        pytest.skip(f"SmolLM2 is not installed: {SMOLLM2_INSTALL}")
    return load_model(path)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The project's real texts, which lie beside the repository and are not part of it."""
    if not _DATA.is_dir():
        pytest.skip(f"no test data at {_DATA}")
    return _DATA


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte, as in GPT-2's vocabulary before any merge, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with a tiny random Llama and the byte tokenizer, as `from_pretrained` wants it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build("llama", vocab_size=len(byte_tokenizer)).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A text of 420 tokens of `byte_tokenizer`."""
    path = tmp_path / "document.txt"
    path.write_text("It was a bright cold day in April. " * 12, encoding="utf-8")
    return path
