"""patch() and remove(): refusals that name the remedy and leave the model as it was, and no trace afterwards."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, greedy, token_ids
from torch import nn
from transformers import DynamicCache, PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import imdc
from imdc.errors import CacheMismatchError, ConfigError, UnsupportedCallError, UnsupportedModelError

SMALL = {"memory_tokens": 64, "chunk_tokens": 32}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module and config, by value where it is a container, and transformers' registries."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            state[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else value
    state["config"] = dict(vars(model.config))
    state["attention"] = dict(ALL_ATTENTION_FUNCTIONS)
    state["masks"] = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    return state


@pytest.fixture
def model() -> PreTrainedModel:
    return FAMILIES["llama"]()


def test_removal_leaves_no_trace(model: PreTrainedModel) -> None:
    before = state_of(model)
    handle = imdc.patch(model, **SMALL)
    assert state_of(model) != before
    greedy(model, token_ids(100))
    handle.remove()
    assert state_of(model) == before
    handle.remove()
    assert state_of(model) == before


def test_removal_leaves_no_trace_after_an_exception_inside(model: PreTrainedModel) -> None:
    before = state_of(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("inside a layer")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside a layer"), imdc.patch(model, **SMALL):
        greedy(model, token_ids(100))
    hook.remove()
    assert state_of(model) == before


def test_an_instance_forward_of_someone_else_comes_back(model: PreTrainedModel) -> None:
    own = model.forward
    model.forward = own
    with imdc.patch(model, **SMALL):
        assert model.forward is not own
    assert model.__dict__["forward"] == own


def test_a_wrapper_put_on_later_survives_the_removal(model: PreTrainedModel) -> None:
    ids, calls = token_ids(100), []
    wanted = greedy(model, ids).sequences
    handle = imdc.patch(model, memory_tokens=16, chunk_tokens=16, sink_tokens=1, recent_tokens=4)
    ours = model.forward

    @functools.wraps(ours)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    model.forward = theirs
    assert not torch.equal(greedy(model, ids).sequences, wanted)
    handle.remove()
    calls.clear()
    assert torch.equal(greedy(model, ids).sequences, wanted) and len(calls) == 12
    with imdc.patch(model, **SMALL):
        greedy(model, ids)
    assert model.forward is theirs


def test_double_patch_raises_and_keeps_the_first(model: PreTrainedModel) -> None:
    with imdc.patch(model, **SMALL) as handle:
        with pytest.raises(UnsupportedModelError, match="patched already"):
            imdc.patch(model, **SMALL)
        greedy(model, token_ids(100))
        assert handle.report is not None


def test_short_calls_without_our_cache_are_the_models_own(model: PreTrainedModel) -> None:
    ids = token_ids(SMALL["memory_tokens"] + SMALL["chunk_tokens"])
    wanted = model(ids).logits
    with imdc.patch(model, **SMALL) as handle:
        assert torch.equal(model(ids).logits, wanted)
        assert handle.report is None


def test_training_steps_are_the_models_own(model: PreTrainedModel) -> None:
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()
        model(token_ids(100), labels=token_ids(100)).loss.backward()
        model.eval()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    wanted = gradients()
    with imdc.patch(model, **SMALL):
        greedy(model, token_ids(100))
        got = gradients()
    assert len(got) == len(wanted) == len(list(model.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))


@pytest.mark.parametrize("call", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_copy_of_a_patched_model_is_refused(model: PreTrainedModel, call: Callable[[Any], Any]) -> None:
    with imdc.patch(model, **SMALL), pytest.raises(UnsupportedCallError, match=r"cannot be copied.*remove\(\)"):
        call(model)
    call(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_token": 64}, "Did you mean 'memory_tokens'"),
        ({"schedule": "imcd"}, "Did you mean 'imdc'"),
        ({"memory_tokens": 0}, "memory_tokens"),
        ({"memory_tokens": -5}, "memory_tokens"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"chunk_tokens": -1}, "chunk_tokens"),
        ({"memory_tokens": 16, "sink_tokens": 17, "recent_tokens": 0}, "sink_tokens"),
        ({"backend": "triton"}, "triton"),
        ({"observer": "everyone"}, "observer"),
    ],
)
def test_bad_options_raise_and_leave_the_model(
    model: PreTrainedModel, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = state_of(model)
    with pytest.raises(ConfigError, match=message):
        imdc.patch(model, **options)
    assert state_of(model) == before


def test_unsupported_models_name_the_supported_ones() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedModelError, match=r"encoder-decoder.*Llama"):
        imdc.patch(t5)
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
        imdc.patch(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        imdc.patch(FAMILIES["llama"]().model)


def test_training_mode_raises(model: PreTrainedModel) -> None:
    with imdc.patch(model, **SMALL):
        model.train()
        with pytest.raises(UnsupportedCallError, match=r"model\.eval\(\)"):
            greedy(model, token_ids(100))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: greedy(m, token_ids(100), use_cache=False), "use_cache"),
        (lambda m: greedy(m, token_ids(100), output_attentions=True), "output_attentions"),
        (lambda m: greedy(m, token_ids(100), output_hidden_states=True), "output_hidden_states"),
        (lambda m: greedy(m, token_ids(100), prefill_chunk_size=16), "chunk_tokens"),
        (lambda m: greedy(m, token_ids(100), cache_implementation="static"), "cache_implementation"),
        (lambda m: greedy(m, token_ids(100), past_key_values=DynamicCache()), "DynamicCache"),
        (lambda m: greedy(m, token_ids(100), position_ids=torch.arange(100)[None] * 2), "position_ids go from 0 to 2"),
        (lambda m: m.generate(inputs_embeds=torch.zeros(1, 5, 64), max_new_tokens=2), "inputs_embeds"),
        (lambda m: greedy(m, token_ids(100), attention_mask=torch.zeros(1, 100, dtype=torch.long)), "all padding"),
    ],
)
def test_bad_calls_raise_and_leave_the_model(
    model: PreTrainedModel, call: Callable[[PreTrainedModel], Any], message: str
) -> None:
    model.set_attn_implementation("eager")  # transformers itself refuses output_attentions under sdpa
    wanted = greedy(model, token_ids(100)).sequences
    with imdc.patch(model, memory_tokens=512, chunk_tokens=32):
        patched = state_of(model)
        with pytest.raises(UnsupportedCallError, match=message):
            call(model)
        assert state_of(model) == patched
        assert torch.equal(greedy(model, token_ids(100)).sequences, wanted)


def test_empty_prompts_raise(model: PreTrainedModel) -> None:
    with imdc.patch(model, **SMALL) as handle:
        with pytest.raises(UnsupportedCallError, match="empty prompt"):
            model(torch.empty(1, 0, dtype=torch.long), past_key_values=handle.new_cache(), logits_to_keep=1)
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=2)


def test_a_manual_loop_equals_generate(model: PreTrainedModel) -> None:
    ids = token_ids(100)
    with imdc.patch(model, **SMALL) as handle:
        wanted = greedy(model, ids).sequences[0, 100:]
        cache = handle.new_cache()
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        got = []
        for _ in range(12):
            token = logits[:, -1:].argmax(-1)
            got.append(int(token))
            logits = model(token, past_key_values=cache).logits
    assert got == wanted.tolist()


def test_a_cache_read_in_inference_mode_goes_on_outside_of_it(model: PreTrainedModel) -> None:
    ids, new = token_ids(100), torch.tensor([[7]])
    with imdc.patch(model, **SMALL) as handle:

        def last(mode: Callable[[], Any]) -> torch.Tensor:
            cache = handle.new_cache()
            with mode():
                model(ids, past_key_values=cache, logits_to_keep=1)
                model(new, past_key_values=cache)
            logits: torch.Tensor = model(new, past_key_values=cache).logits
            return logits

        assert torch.equal(last(torch.inference_mode), last(torch.no_grad))


def test_a_prompt_shorter_than_one_chunk(model: PreTrainedModel) -> None:
    wanted = greedy(model, token_ids(5)).sequences
    with imdc.patch(model, **SMALL) as handle:
        assert torch.equal(greedy(model, token_ids(5)).sequences, wanted)
        assert handle.report is not None and len(handle.report.steps) == 1


def test_the_cache_of_another_model_is_refused(model: PreTrainedModel) -> None:
    other = FAMILIES["llama"](seed=1)
    with imdc.patch(model, **SMALL), imdc.patch(other, **SMALL):
        cache = greedy(other, token_ids(100)).past_key_values
        with pytest.raises(CacheMismatchError, match="another model"):
            greedy(model, token_ids(140), past_key_values=cache, attention_mask=None)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
@pytest.mark.parametrize("seed", [0, 1], ids=["same model", "another model"])
def test_only_a_patched_model_goes_on_from_a_cache(family: str, seed: int) -> None:
    model = FAMILIES[family]()
    with imdc.patch(model, **SMALL) as handle:
        cache, fresh = greedy(model, token_ids(100)).past_key_values, handle.new_cache()
    other = model if seed == 0 else FAMILIES[family](seed=seed)
    keys = cache.layers[1].keys.clone()
    for one in (cache, fresh):
        with pytest.raises(UnsupportedCallError, match=r" is an ImdcCache.*imdc\.patch\(model\)"):
            greedy(other, token_ids(140), past_key_values=one)
    assert torch.equal(cache.layers[1].keys, keys) and fresh.is_empty


@pytest.mark.parametrize("length", [5, 111])
def test_a_turn_that_ends_before_the_cache_does_is_refused(model: PreTrainedModel, length: int) -> None:
    with imdc.patch(model, **SMALL):
        first = greedy(model, token_ids(100))
        cache = first.past_key_values
        with pytest.raises(UnsupportedCallError, match=f"{length} tokens, .* already holds 111.*whole"):
            greedy(model, token_ids(length), past_key_values=cache)
        # The same tokens are new ones where the mask says so.
        new = torch.cat((first.sequences[:, -1:], token_ids(length)), dim=1)
        mask = torch.ones(1, first.sequences.shape[1] + length, dtype=torch.long)
        history = torch.cat((first.sequences, token_ids(length)), dim=1)
        wanted = greedy(model, history, past_key_values=cache.copy()).sequences[:, -12:]
        assert torch.equal(greedy(model, new, past_key_values=cache, attention_mask=mask).sequences[:, -12:], wanted)


def test_importing_imdc_changes_nothing_and_needs_no_torch() -> None:
    code = "import sys, imdc; imdc.PrefillConfig(); assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
                   check=True, cwd="/")  # fmt: skip
