"""The real model on real documents: a memory that holds the prompt changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import imdc

TOKENS = 3_072
BOOKS = ("dracula.txt", "moby_dick.txt", "pride_and_prejudice.txt")


def read(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("book", BOOKS)
def test_memory_that_holds_the_prompt_equals_the_unpatched_model(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], data_dir: Path, book: str
) -> None:
    """The bound is measured in the same run: how far transformers' own eager and sdpa attention lie apart."""
    model, tokenizer = smollm2
    text = (data_dir / "books" / book).read_text(encoding="utf-8")[40_000:70_000]
    ids = torch.tensor([tokenizer(text).input_ids[:TOKENS]])
    assert ids.shape[1] == TOKENS
    own = model.config._attn_implementation
    dtype = model.dtype
    model.float()
    try:
        stock = read(model, ids)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            eager = model(ids, logits_to_keep=1).logits[:, -1]
        model.set_attn_implementation(own)
        with imdc.patch(model, memory_tokens=TOKENS + 64, chunk_tokens=1024) as handle:
            ours = read(model, ids)
            assert handle.report is not None and len(handle.report.steps) == 3
    finally:
        model.set_attn_implementation(own)
        model.to(dtype)
    assert torch.equal(ours.sequences, stock.sequences)
    apart = (eager - stock.logits[0]).abs().max().item()
    assert apart > 0
    assert (ours.logits[0] - stock.logits[0]).abs().max().item() <= apart
    print(f"{book}: eager-sdpa {apart:.2e}, imdc-sdpa {(ours.logits[0] - stock.logits[0]).abs().max().item():.2e}")
