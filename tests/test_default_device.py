"""torch.set_default_device is the caller's: what imdc makes is where it says, on the host or beside the weights.

"meta" stands for a GPU: a tensor made without saying where would have no numbers. The sliding windows and the beam
search of transformers make such tensors themselves, so they have no part in this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, greedy

import imdc

SMALL: dict[str, Any] = {"memory_tokens": 40, "chunk_tokens": 32, "recent_tokens": 4, "sink_tokens": 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"observer": "random"},
        {"observer": "all_queries", "positions": "compact"},
        {"layer_budget": "adaptive"},
        {"decode_tokens": 4},
        {"recall": "host"},
        {"recall": "disk", "recall_dtype": "int8"},
    ],
    ids=str,
)
def test_answers_are_those_without_a_default_device(options: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama")
    ids = torch.randint(3, 100, (2, 150))
    mask = torch.ones_like(ids)
    recalls = options.get("recall", "none") != "none"

    def answers(name: str) -> list[torch.Tensor]:
        with imdc.patch(model, observation_tokens=8, **SMALL, **options) as handle:
            found = [greedy(model, ids[:1]).sequences]
            if not recalls:
                found.append(greedy(model, ids, attention_mask=mask).sequences)
                with imdc.probe(handle) as probed:
                    found.append(greedy(model, ids[:1]).sequences)
                found += [torch.nan_to_num(probed.results[-1].survival), probed.results[-1].pairs]
            cache = handle.read(ids[:1])
            imdc.save_cache(cache, tmp_path / name)
            for one in (cache, imdc.load_cache(tmp_path / name, model)):
                found.append(handle.ask(one, ids[:1, :9], max_new_tokens=5, do_sample=False))
                found.append(handle.ask(one, ids[:, :9], attention_mask=mask[:, :9], max_new_tokens=5, do_sample=False))
        return found

    expected = answers("host")
    with torch.device("meta"):
        found = answers("meta")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
