"""Saving a read prompt, loading it in this or another process, and refusing what does not fit."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, KINDS, build, greedy, token_ids
from transformers import PreTrainedModel

import imdc
from imdc.cache.cache import ImdcCache
from imdc.errors import CacheMismatchError, UnsupportedCallError

TIGHT = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8, "initial_memory": 0.25}


def read(model: PreTrainedModel, document: torch.Tensor, **options: object) -> tuple[torch.Tensor, ImdcCache]:
    with imdc.patch(model, **TIGHT, **options):
        output = greedy(model, document)
    cache = output.past_key_values
    assert isinstance(cache, ImdcCache)
    return output.sequences, cache


def ask(model: PreTrainedModel, history: torch.Tensor, cache: ImdcCache, seed: int, **options: object) -> torch.Tensor:
    question = token_ids(9, seed=100 + seed).expand(history.shape[0], -1)
    with imdc.patch(model, **TIGHT, **options):
        return greedy(model, torch.cat((history, question), dim=1), past_key_values=cache).sequences


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A cache file of the llama with seed 0."""
    path = tmp_path / "document.safetensors"
    model = FAMILIES["llama"]()
    imdc.save_cache(read(model, token_ids(150))[1], path)
    return path


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_loaded_cache_answers_as_the_one_it_was_saved_from(family: str, positions: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    history, cache = read(model, token_ids(150), positions=positions)
    imdc.save_cache(cache, tmp_path / "cache")
    loaded = [imdc.load_cache(tmp_path / "cache", model) for _ in range(2)]
    assert loaded[0].kv_bytes() == cache.kv_bytes()
    for number, one in enumerate(loaded):
        wanted = ask(model, history, cache.copy(), number, positions=positions)
        assert torch.equal(ask(model, history, one, number, positions=positions), wanted)


def test_padded_rows_are_saved_and_loaded(tmp_path: Path) -> None:
    model = FAMILIES["gemma3"]()
    ids = torch.cat((torch.nn.functional.pad(token_ids(20), (70, 0)), token_ids(90, seed=1)))
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    with imdc.patch(model, **TIGHT):
        first = greedy(model, ids, attention_mask=mask)
        imdc.save_cache(first.past_key_values, tmp_path / "cache")
        history = torch.cat((first.sequences, token_ids(9, seed=7).expand(2, -1)), dim=1)
        mask = torch.nn.functional.pad(mask, (0, history.shape[1] - mask.shape[1]), value=1)
        loaded = imdc.load_cache(tmp_path / "cache", model)
        got = greedy(model, history, past_key_values=loaded, attention_mask=mask)
        wanted = greedy(model, history, past_key_values=first.past_key_values, attention_mask=mask)
    assert torch.equal(got.sequences, wanted.sequences)


def test_a_prompt_read_by_a_plain_call_is_saved_without_a_tail(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, **TIGHT) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(token_ids(150), past_key_values=cache, logits_to_keep=1)
    imdc.save_cache(cache, tmp_path / "cache")
    loaded = imdc.load_cache(tmp_path / "cache", model)
    assert loaded.phase == "decode" and loaded.tail == 0 and loaded.stored_tokens() == 64
    assert torch.equal(ask(model, token_ids(150), loaded, 0), ask(model, token_ids(150), cache, 0))


ASK_ELSEWHERE = """
import json, sys, torch, transformers
import imdc
folder, path, ids = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
ids = torch.tensor(json.loads(ids))
answers = []
for question in ids:
    with imdc.patch(model, memory_tokens=64, chunk_tokens=32, sink_tokens=2, recent_tokens=8):
        cache = imdc.load_cache(path, model)
        out = model.generate(question[None], past_key_values=cache, attention_mask=torch.ones_like(question[None]),
                             max_new_tokens=12, do_sample=False, pad_token_id=0)
    answers.append(out[0].tolist())
print(json.dumps(answers))
"""


def test_another_process_asks_the_document_two_questions(tmp_path: Path) -> None:
    model = FAMILIES["gemma3"]()
    model.save_pretrained(tmp_path / "model")
    history, cache = read(model, token_ids(150))
    imdc.save_cache(cache, tmp_path / "cache")
    questions = torch.cat([torch.cat((history, token_ids(9, seed=seed)), dim=1) for seed in (100, 101)])
    run = subprocess.run(
        [sys.executable, "-c", ASK_ELSEWHERE, tmp_path / "model", tmp_path / "cache", json.dumps(questions.tolist())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    wanted = [ask(model, history, cache.copy(), seed)[0].tolist() for seed in (0, 1)]
    assert json.loads(run.stdout) == wanted


def test_a_copy_shares_nothing_with_its_original() -> None:
    model = FAMILIES["mistral_sliding"]()
    history, cache = read(model, token_ids(150))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    wanted = ask(model, history, cache.copy(), 0)
    assert cache.get_seq_length() == history.shape[1] - 1
    assert all(
        torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        for layer, (keys, values) in zip(cache.layers, before, strict=True)
    )
    assert torch.equal(ask(model, history, cache, 0), wanted)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: build("llama", seed=1), "23 of 30 weights differ, the first is model.embed_tokens.weight"),
        (lambda: build("llama").to(torch.bfloat16), "dtype is 'torch.float32' in the file, 'torch.bfloat16' here"),
        (lambda: build("llama", num_hidden_layers=2), "layers is 3 in the file, 2 here"),
        (lambda: build("llama", num_key_value_heads=4), "kv_heads is 2 in the file, 4 here"),
        (lambda: build("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_parameters is"),
        (lambda: build("qwen3"), "model_type is 'llama' in the file, 'qwen3' here"),
        (lambda: build("llama", vocab_size=140), "vocab_size is 128 in the file, 140 here"),
    ],
    ids=["weights", "dtype", "layers", "heads", "rope", "family", "vocabulary"],
)
def test_a_cache_of_another_model_is_refused_with_the_difference(saved: Path, other: object, named: str) -> None:
    with pytest.raises(CacheMismatchError, match="filled by another model") as refusal:
        imdc.load_cache(saved, other())  # type: ignore[operator]
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llama", "rms_norm_eps", 0.1),
        ("smollm3", "no_rope_layers", [0, 1, 0]),
        ("granite", "attention_multiplier", 0.9),
        ("gemma2", "attn_logit_softcapping", 1.0),
        ("mixtral", "num_experts_per_tok", 1),
        ("glm4_moe", "routed_scaling_factor", 2.5),
        ("cohere2", "layer_norm_eps", 0.1),
    ],
)
def test_the_same_weights_under_another_config_are_refused(
    family: str, name: str, value: object, tmp_path: Path
) -> None:
    model = build(family)
    imdc.save_cache(read(model, token_ids(90))[1], tmp_path / "cache")
    with pytest.raises(CacheMismatchError, match=f"{name} is .* in the file, {re.escape(repr(value))} here"):
        imdc.load_cache(tmp_path / "cache", build(family, **{name: value}))


def test_a_fine_tune_that_changed_one_matrix_is_refused(saved: Path) -> None:
    model = FAMILIES["llama"]()
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.data += 0.001 * torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
    with pytest.raises(CacheMismatchError, match=r"1 of \d+ weights differ.*layers.1.self_attn.v_proj"):
        imdc.load_cache(saved, model)


@pytest.mark.parametrize("length", [0, 4, 200, -1, -1000])
def test_a_truncated_file_is_refused(saved: Path, length: int) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:length])
    with pytest.raises(CacheMismatchError, match="truncated"):
        imdc.load_cache(saved, FAMILIES["llama"]())


def test_every_altered_byte_of_the_file_is_noticed(saved: Path) -> None:
    data = saved.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    model = FAMILIES["llama"]()
    generator = torch.Generator().manual_seed(0)
    inside_header = torch.randint(8, header, (20,), generator=generator).tolist()
    inside_tensors = torch.randint(header, len(data), (20,), generator=generator).tolist()
    for place in [*inside_header, *inside_tensors, header, len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1
        saved.write_bytes(damaged)
        with pytest.raises(CacheMismatchError):
            imdc.load_cache(saved, model)
    saved.write_bytes(data)
    imdc.load_cache(saved, model)


def test_a_state_altered_by_hand_is_refused(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    state = json.loads(header["imdc"])
    state["rows"]["position"] = [7]
    save_file(load_file(saved), saved, metadata={**header, "imdc": json.dumps(state)})
    with pytest.raises(CacheMismatchError, match="altered"):
        imdc.load_cache(saved, FAMILIES["llama"]())


def test_files_that_are_no_cache_are_refused(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    save_file({"x": torch.zeros(3)}, tmp_path / "plain")
    with pytest.raises(CacheMismatchError, match="no imdc cache"):
        imdc.load_cache(tmp_path / "plain", model)
    (tmp_path / "pickle").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(CacheMismatchError, match="no safetensors file"):
        imdc.load_cache(tmp_path / "pickle", model)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        imdc.load_cache(tmp_path / "nowhere", model)


def test_a_newer_format_is_refused_with_both_versions(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imdc.cache.file._FORMAT", 7)
    with pytest.raises(CacheMismatchError, match=f"has format 3, written by imdc {imdc.__version__}.*reads formats 7"):
        imdc.load_cache(saved, FAMILIES["llama"]())


def test_an_interrupted_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    data = saved.read_bytes()
    cache = read(model, token_ids(80, seed=1))[1]

    def broken(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("imdc.cache.file.save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        imdc.save_cache(cache, saved)
    assert saved.read_bytes() == data
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_what_cannot_be_saved_says_why(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, **TIGHT) as handle, pytest.raises(UnsupportedCallError, match="empty"):
        imdc.save_cache(handle.new_cache(), tmp_path / "cache")
    cache = read(model, token_ids(80))[1]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        imdc.save_cache(cache, tmp_path / "no" / "cache")
    del model, handle
    with pytest.raises(UnsupportedCallError, match="gone"):
        imdc.save_cache(cache, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_the_file_may_go_once_it_is_loaded(saved: Path) -> None:
    model = FAMILIES["llama"]()
    document = token_ids(150)
    history, cache = read(model, document)
    loaded = imdc.load_cache(saved, model)
    with saved.open("r+b") as file:
        file.write(b"\0" * saved.stat().st_size)
    saved.unlink()
    assert torch.equal(ask(model, history, loaded, 0), ask(model, history, cache, 0))
