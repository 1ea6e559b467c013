"""The model under test, inside lm-evaluation-harness's own class for models of Hugging Face."""

from __future__ import annotations

import logging
from typing import Any

import torch
from longbench_tasks import INSTALL, TaskError

from imdc.model.loading import load_model
from imdc.profiler.allocations import make_resident


def load_harness(name: str, gguf_file: str | None, dtype: str, device: torch.device) -> Any:
    """The model and its tokenizer inside lm-eval's `HFLM`, which tokenizes, fills chat templates and generates.

    Raises:
        TaskError: lm-eval is not installed.
        LoadError: the model cannot be loaded.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise TaskError(f"LongBench runs on lm-evaluation-harness: {INSTALL}") from error
    # It warns of what is done here on purpose: a model that is loaded already.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = load_model(name, gguf_file=gguf_file, dtype=dtype, device=device)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, backend="causal")
    _warm_up(lm)
    return lm


@torch.no_grad()
def _warm_up(lm: Any) -> None:
    """Touch every weight once, and what a first call sets up: the first answer's peak memory would hold all of it."""
    make_resident(lm.model)
    lm.model(torch.tensor([[lm.prefix_token_id]], device=lm.device))
