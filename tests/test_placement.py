"""Models whose weights lie elsewhere: offloaded, quantised, or split over processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, greedy, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import imdc
from imdc.cache.cache import ImdcCache

ROOMY = {"memory_tokens": 512, "chunk_tokens": 32}
TIGHT = {"memory_tokens": 48, "chunk_tokens": 24, "sink_tokens": 2, "recent_tokens": 8, "initial_memory": 0.25}


def answers(model: PreTrainedModel) -> list[Tensor]:
    """What a roomy and a tight memory make of a prompt, and of a second turn."""
    found = []
    for limits in (ROOMY, TIGHT):
        with imdc.patch(model, **limits):
            first = greedy(model, token_ids())
            history = torch.cat((first.sequences, token_ids(40, seed=1)), dim=1)
            found += [first.sequences, greedy(model, history, past_key_values=first.past_key_values).sequences]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(path)
    return path


def layers_on_disk(folder: Path, tmp_path: Path) -> PreTrainedModel:
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")


def embedding_and_head_on_disk(folder: Path, tmp_path: Path) -> PreTrainedModel:
    names = ("model.norm", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.layers.2")
    places = {**dict.fromkeys(names, "cpu"), "model.embed_tokens": "disk", "lm_head": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")


def everything_offloaded(folder: Path, tmp_path: Path) -> PreTrainedModel:
    from accelerate import cpu_offload

    model = AutoModelForCausalLM.from_pretrained(folder)
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


PLACES: list[Callable[[Path, Path], PreTrainedModel]] = [
    layers_on_disk,
    embedding_and_head_on_disk,
    everything_offloaded,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_offloaded_weights_give_the_same_tokens(
    place: Callable[[Path, Path], PreTrainedModel], folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    model = place(folder, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    for got, wanted in zip(answers(model), answers(build("llama")), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_cache_goes_between_placements_of_a_model(
    place: Callable[[Path, Path], PreTrainedModel], folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    placed, plain = place(folder, tmp_path), build("llama")

    def ask(model: PreTrainedModel, history: Tensor, cache: ImdcCache) -> Tensor:
        with imdc.patch(model, **TIGHT):
            return greedy(model, torch.cat((history, token_ids(9, seed=2)), dim=1), past_key_values=cache).sequences

    with imdc.patch(placed, **TIGHT):
        first = greedy(placed, token_ids())
    imdc.save_cache(first.past_key_values, tmp_path / "cache")
    if all(parameter.is_meta for parameter in placed.parameters()):
        with pytest.warns(RuntimeWarning, match="compared with its config only"):
            loaded = imdc.load_cache(tmp_path / "cache", plain)
    else:
        loaded = imdc.load_cache(tmp_path / "cache", plain)
    assert torch.equal(ask(plain, first.sequences, loaded), ask(placed, first.sequences, first.past_key_values))


def test_int8_weights_give_what_their_rounded_values_give(folder: Path) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    options: dict[str, Any] = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    rounded, changed = build("llama"), 0
    for name, parameter in rounded.named_parameters():
        weight: Any = model.get_parameter(name).detach()
        if hasattr(weight, "dequantize") and type(weight) is not Tensor:
            value = weight.dequantize()
            changed += int(not torch.equal(value, parameter))
            parameter.data = value
    # Seven matrices in each of three layers.
    assert changed >= 21
    assert torch.equal(answers(model)[0], greedy(model, token_ids()).sequences)
    for got, wanted in zip(answers(model), answers(rounded), strict=True):
        assert torch.equal(got, wanted)


PARALLEL = """
import json, os, sys, torch, transformers
import imdc
folder, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
assert model.tp_size == 2, model.tp_size

def prompt(length, seed):
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))

def ask(ids, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    out = model.generate(ids, return_dict_in_generate=True, **options)
    return out.sequences, out.past_key_values

found, heads = [], []
for limits in json.loads('''LIMITS'''):
    with imdc.patch(model, **limits):
        tokens, cache = ask(prompt(110, 0))
        heads.append(cache.layers[0].keys.shape[1])
        history = torch.cat((tokens, prompt(40, 1)), dim=1)
        found += [tokens.tolist(), ask(history, past_key_values=cache)[0].tolist()]
with open(f"{out}.{torch.distributed.get_rank()}", "w") as file:
    json.dump({"found": found, "heads": heads}, file)
torch.distributed.barrier()
# All is written; gloo's threads may abort a process that ends in the usual way.
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo backend")
def test_two_tensor_parallel_processes_give_the_tokens_of_one(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL.replace("LIMITS", json.dumps([ROOMY, TIGHT])), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder, "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    wanted = [tokens.tolist() for tokens in answers(build("llama"))]
    for rank in range(2):
        result = json.loads((tmp_path / f"out.{rank}").read_text(encoding="utf-8"))
        assert result["found"] == wanted
        # Each process holds one of the two KV heads.
        assert result["heads"] == [1, 1]
