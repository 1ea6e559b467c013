"""Calls of generate() that the tests of its modes compare, and the models that they are made on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, MIXED, build
from torch import Tensor
from transformers import PreTrainedModel

from imdc.model import hf

ROOMY = {"memory_tokens": 512, "chunk_tokens": 32}
TIGHT = {"memory_tokens": 48, "chunk_tokens": 24, "sink_tokens": 2, "recent_tokens": 8, "initial_memory": 0.25}
LENGTH = 110
WINDOWED = ("mistral_sliding", *MIXED)
NEW = 8


@functools.lru_cache(maxsize=2)
def model_of(family: str) -> PreTrainedModel:
    return FAMILIES[family]()


@functools.lru_cache(maxsize=2)
def assistant_of(family: str, noise: float) -> PreTrainedModel:
    """A model that agrees with `family` on some tokens, and not on others."""
    if family in WINDOWED and hf.RUNNING < (5, 23):
        pytest.skip("transformers' own assistant with sliding windows fails before 5.23")
    model = build(family)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += noise * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def prompt(rows: int = 1) -> Tensor:
    """Rows that repeat themselves, so that prompt lookup finds candidates."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 128, (rows, LENGTH // 5), generator=generator).repeat(1, 5)


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    """New tokens of the call `options`, which starts from one seed."""
    torch.manual_seed(3)
    settings = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": 2, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


@torch.no_grad()
def by_hand(model: PreTrainedModel, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
    """A greedy decoding loop of the caller's own, for `custom_generate`."""
    cache = {hf.CACHE_NAME: kwargs[hf.CACHE_NAME]}
    output = model(input_ids, **cache, attention_mask=kwargs["attention_mask"], logits_to_keep=1)
    for _ in range(generation_config.max_new_tokens):
        new = output.logits[:, -1:].argmax(dim=-1)
        input_ids = torch.cat((input_ids, new), dim=1)
        output = model(new, logits_to_keep=1, **cache)
    return input_ids


class Calls:
    """Counts the tokens of every forward call of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokens: list[int] = []

    def __enter__(self) -> Calls:
        self.handle = self.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: self.tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()
