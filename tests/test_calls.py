"""What callers say beside the prompt: masks, positions, the config's own switches, autocast; honoured or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, greedy, token_ids
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import imdc
from imdc.cache.cache import ImdcCache
from imdc.errors import UnsupportedCallError
from imdc.model.hf import CACHE_NAME

ROOMY = {"memory_tokens": 512, "chunk_tokens": 32}
TIGHT = {"memory_tokens": 48, "chunk_tokens": 24, "sink_tokens": 2, "recent_tokens": 8, "initial_memory": 0.25}
READ = 60


@pytest.fixture
def model() -> PreTrainedModel:
    return build("llama")


def ones(columns: int, *zeros: int) -> Tensor:
    """A mask of two rows, with zeros in these columns of the second one."""
    mask = torch.ones(2, columns, dtype=torch.long)
    mask[1, list(zeros)] = 0
    return mask


@pytest.mark.parametrize(
    ("new", "said", "message"),
    [
        (1, {"attention_mask": ones(READ + 1, READ)}, "attention_mask hides a new token of row 1"),
        (1, {"attention_mask": ones(READ + 1, 5, 6)}, "counts 58 tokens before the new ones in row 1.* has read 60"),
        (1, {"attention_mask": ones(7)}, r"attention_mask has shape \(2, 7\) for input_ids \(2, 1\) after 60 tokens"),
        (1, {"attention_mask": torch.ones(2, 1, 1, READ + 1)}, r"attention_mask has shape \(2, 1, 1, 61\)"),
        (1, {"position_ids": torch.full((2, 1), READ + 9)}, "position_ids give 69 to token 60 of row 0"),
        (1, {"position_ids": torch.tensor([READ])}, r"position_ids has shape \(1,\)"),
        (9, {"attention_mask": ones(READ + 9, 5)}, "counts 59 tokens before the new ones in row 1"),
        (9, {"position_ids": torch.arange(9)[None]}, "position_ids give 8 to token 68 of row 0"),
    ],
)
def test_a_mask_or_positions_of_another_text_are_refused(
    model: PreTrainedModel, new: int, said: dict[str, Tensor], message: str
) -> None:
    with imdc.patch(model, **ROOMY) as handle:
        cache = handle.new_cache()
        model(token_ids(READ, 2), **{CACHE_NAME: cache})
        with pytest.raises(UnsupportedCallError, match=message):
            model(token_ids(new, 2, seed=1), **said, **{CACHE_NAME: cache})
        assert cache.get_seq_length() == READ
        mask, positions = ones(READ + new), torch.arange(READ, READ + new)[None]
        model(token_ids(new, 2, seed=1), attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})
        assert cache.get_seq_length() == READ + new


def test_positions_that_begin_elsewhere_are_refused_before_anything_is_read(model: PreTrainedModel) -> None:
    with imdc.patch(model, **ROOMY) as handle:
        with pytest.raises(UnsupportedCallError, match="position_ids give 106 to token 99 of row 0"):
            greedy(model, token_ids(100), position_ids=torch.arange(7, 107)[None])
        assert handle.report is None


def test_padding_may_be_said_by_columns_or_by_tokens(model: PreTrainedModel) -> None:
    mask, columns = ones(READ, *range(20)), torch.arange(READ).expand(2, -1)
    logits = []
    with imdc.patch(model, **ROOMY) as handle:
        for positions in (columns, (mask.cumsum(dim=1) - 1).clamp(min=0)):
            cache = handle.new_cache()
            model(token_ids(READ, 2), attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})
            said = {"attention_mask": ones(READ + 1, *range(20)), "position_ids": positions[:, -1:] + 1}
            logits.append(model(token_ids(1, 2, seed=1), **said, **{CACHE_NAME: cache}).logits)
    assert torch.equal(*logits)


def test_a_padded_prompt_of_generate_is_asked_after_loading(model: PreTrainedModel, tmp_path: Path) -> None:
    ids, question, answers = token_ids(READ), token_ids(9, seed=1), []
    with imdc.patch(model, **ROOMY) as handle:
        for padding in (0, 20):
            padded = torch.nn.functional.pad(ids, (padding, 0))
            mask = (torch.arange(READ + padding) >= padding).long()[None]
            cache = greedy(model, padded, attention_mask=mask)[CACHE_NAME]
            imdc.save_cache(cache, tmp_path / "x")
            answers.append(handle.ask(imdc.load_cache(tmp_path / "x", model), question, max_new_tokens=5))
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_a_config_asks_for_is_refused_by_hand_and_not_collected(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation("eager")
    setattr(model.config, name, True)
    wanted, collected = greedy(model, token_ids(100)).sequences, []
    with imdc.patch(model, **ROOMY) as handle:
        with pytest.raises(UnsupportedCallError, match=f"config.{name}=True"):
            model(token_ids(100), **{CACHE_NAME: handle.new_cache()})
        hook = model.model.register_forward_hook(
            lambda module, args, output: collected.append(output.get(name.removeprefix("output_")))
        )
        assert torch.equal(greedy(model, token_ids(100)).sequences, wanted)
        handle.read(token_ids(100))
        hook.remove()
    assert len(collected) > 12 and not any(collected)


@pytest.mark.parametrize("value", [None, 0])
def test_an_argument_that_switches_the_cache_off_is_refused(model: PreTrainedModel, value: Any) -> None:
    with imdc.patch(model, **ROOMY), pytest.raises(UnsupportedCallError, match=f"use_cache={value}"):
        greedy(model, token_ids(100), use_cache=value)


@pytest.mark.parametrize("options", [{}, {"recall": "host"}, {"layer_budget": "entropy", "positions": "compact"}])
def test_autocast_is_for_the_models_modules(model: PreTrainedModel, options: dict[str, Any]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = greedy(model, token_ids(100)).sequences
        with imdc.patch(model, **{**TIGHT, **options}) as handle:
            greedy(model, token_ids(100))
            assert handle.report is not None and handle.report.memory_tokens <= 48 + 16
        with imdc.patch(model, **ROOMY):
            assert torch.equal(greedy(model, token_ids(100)).sequences, wanted)


@pytest.mark.parametrize("cache", [(), ((torch.zeros(1, 2, 3, 16),) * 2,) * 3, False], ids=["empty", "tuples", "bool"])
def test_a_cache_that_is_none_is_named(model: PreTrainedModel, cache: Any) -> None:
    with imdc.patch(model, **ROOMY), pytest.raises(UnsupportedCallError, match=f"{CACHE_NAME} is a (tuple|bool), no"):
        model(token_ids(5), **{CACHE_NAME: cache})


def test_a_model_that_returns_records_by_default_is_asked(model: PreTrainedModel) -> None:
    with imdc.patch(model, **ROOMY) as handle:
        cache = handle.read(token_ids(100))
        wanted = handle.ask(cache, token_ids(9, seed=1), max_new_tokens=5)
        model.generation_config.return_dict_in_generate = True
        assert torch.equal(handle.ask(cache, token_ids(9, seed=1), max_new_tokens=5), wanted)


@pytest.mark.parametrize("cache", [None, DynamicCache()], ids=["None", "DynamicCache"])
def test_only_a_cache_of_imdc_is_saved(cache: ImdcCache, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCallError, match=f"cache is a {type(cache).__name__}"):
        imdc.save_cache(cache, tmp_path / "x")
