"""The language model inside a model that also reads images: the same weights and logits, prefilled by imdc."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mode_cases import ROOMY, TIGHT
from tiny_models import TEXT_SHAPES, build, greedy, token_ids
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import imdc
from imdc.errors import UnsupportedModelError
from imdc.model.families import IMAGE_READERS
from imdc.model.loading import load_model

_EYE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "head_dim": 16,
}  # fmt: skip
# The name of the classes, the text family and its model type, and the type of the vision tower.
_CLASSES = {
    "gemma3": ("Gemma3", "gemma3", "gemma3_text", "siglip_vision_model"),
    "mistral3": ("Mistral3", "mistral", "mistral", "pixtral"),
    # Ministral 3: the same classes around another language model.
    "ministral3": ("Mistral3", "ministral3", "ministral3", "pixtral"),
    "llava": ("Llava", "llama", "llama", "clip_vision_model"),
}
READERS = (*IMAGE_READERS, "ministral3")


def reader(kind: str, **text: Any) -> PreTrainedModel:
    """A tiny random model that reads images and text."""
    name, family, text_type, eye = _CLASSES[kind]
    shape = {**TEXT_SHAPES[family], "model_type": text_type, **text}
    config = getattr(transformers, f"{name}Config")(
        text_config=shape, vision_config={**_EYE, "model_type": eye}, image_token_index=127
    )
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    # Nothing stops a generation early.
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.mark.parametrize("kind", READERS)
def test_it_shares_weights_and_gives_the_same_logits(kind: str) -> None:
    whole = reader(kind)
    before = whole.config.to_dict()
    model = imdc.language_model(whole)
    assert whole.config.to_dict() == before and "ForCausalLM" in type(model).__name__ and not model.training
    assert {x.data_ptr() for x in model.parameters()} <= {x.data_ptr() for x in whole.parameters()}
    assert not any("vision" in name for name, _ in model.named_parameters())
    assert torch.equal(model(token_ids()).logits, whole(token_ids()).logits)
    assert imdc.language_model(model) is model


@pytest.mark.parametrize("kind", READERS)
def test_its_prompts_are_prefilled(kind: str) -> None:
    whole = reader(kind)
    wanted = greedy(whole, token_ids())
    model = imdc.language_model(whole)
    # One that was never part of another, with the same weights.
    alone = type(model)(model.config)
    alone.load_state_dict(model.state_dict())
    alone.eval()
    with imdc.patch(model, **ROOMY) as handle:
        assert torch.equal(greedy(model, token_ids()).sequences, wanted.sequences)
        assert handle.report is not None and len(handle.report.steps) > 1
    with imdc.patch(model, **TIGHT), imdc.patch(alone, **TIGHT):
        got, expected = greedy(model, token_ids()), greedy(alone, token_ids())
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(x, y) for x, y in zip(got.logits, expected.logits, strict=True))


@pytest.mark.parametrize("kind", IMAGE_READERS)
def test_the_whole_is_refused_with_the_remedy(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'{kind}' also reads images.*imdc\.language_model\(model\)"):
        imdc.patch(reader(kind))


@pytest.mark.parametrize("kind", READERS)
def test_loading_takes_it_out(kind: str, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    whole = reader(kind, vocab_size=len(byte_tokenizer))
    whole.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert "ForCausalLM" in type(model).__name__
    assert torch.equal(model(token_ids()).logits, whole(token_ids()).logits)
    assert str(tmp_path) == model.name_or_path


def test_what_the_whole_was_loaded_with_stays() -> None:
    whole = reader("gemma3").to(torch.bfloat16)
    whole.set_attn_implementation("eager")
    whole.generation_config.max_new_tokens = 7
    model = imdc.language_model(whole.train())
    assert model.dtype == torch.bfloat16 and model.training and model.generation_config.max_new_tokens == 7
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


def test_offloaded_weights_give_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole = reader("gemma3")
    whole.save_pretrained(tmp_path / "model")
    places: dict[str, Any] = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "disk"}
    places["model.language_model"] = "disk"
    placed = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    model = imdc.language_model(placed)
    assert all(x.is_meta for x in model.parameters())
    plain = imdc.language_model(whole)
    with imdc.patch(model, **TIGHT), imdc.patch(plain, **TIGHT):
        assert torch.equal(greedy(model, token_ids()).sequences, greedy(plain, token_ids()).sequences)


def test_others_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'llava' has no language model .* gemma3, mistral3"):
        imdc.language_model(reader("llava"))
    with pytest.raises(UnsupportedModelError, match=r"'llava' is not supported"):
        imdc.patch(reader("llava"))


def test_a_model_of_text_alone_is_returned_as_it_is() -> None:
    model = build("llama")
    assert imdc.language_model(model) is model


@pytest.mark.parametrize(("kind", "supported"), [("gemma3", True), ("mistral3", True), ("llava", False)])
def test_a_plan_says_whether_it_can_be_patched(kind: str, supported: bool) -> None:
    said = str(imdc.plan(reader(kind).config, 1000, memory_tokens=64))
    assert ("does not support 'llava'" in said) is not supported
    assert "the text part alone" in said
