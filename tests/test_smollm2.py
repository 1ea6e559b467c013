"""The real model on a real text: a memory that holds the prompt changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import imdc

TOKENS = 512


def read(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def last_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, logits_to_keep=1).logits[:, -1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_that_holds_the_prompt_equals_the_unpatched_model(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], data_dir: Path
) -> None:
    """The bound is measured in the same run: as if ours and sdpa erred as much as transformers' own eager and sdpa."""
    model, tokenizer = smollm2
    text = (data_dir / "books" / "moby_dick.txt").read_text(encoding="utf-8")[40_000:70_000]
    ids = torch.tensor([tokenizer(text).input_ids[:TOKENS]])
    assert ids.shape[1] == TOKENS
    own = model.config._attn_implementation
    dtype = model.dtype
    model.float()
    try:
        stock = read(model, ids)
        model.set_attn_implementation("eager")
        eager = last_logits(model, ids)
        model.set_attn_implementation(own)
        with imdc.patch(model, memory_tokens=TOKENS + 64, chunk_tokens=176) as handle:
            ours = read(model, ids)
            assert handle.report is not None and len(handle.report.steps) == 3
        exact = last_logits(model.double(), ids)
    finally:
        model.set_attn_implementation(own)
        model.to(dtype)
    assert torch.equal(ours.sequences, stock.sequences)
    errors = [(logits - exact).abs().max().item() for logits in (stock.logits[0], eager)]
    assert min(errors) > 0
    apart = (ours.logits[0] - stock.logits[0]).abs().max().item()
    assert apart <= sum(errors)
    print(f"errors of sdpa and eager {errors[0]:.2e} and {errors[1]:.2e}, imdc-sdpa {apart:.2e}")
