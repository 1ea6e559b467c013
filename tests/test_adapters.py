"""A saved cache is refused by the same model with other adapters, other settings of them, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, greedy, token_ids
from torch import Tensor, nn
from transformers import PreTrainedModel

import imdc
from imdc.errors import CacheMismatchError


class LowRank(nn.Module):
    """A LoRA layer as many write it by hand."""

    def __init__(self, base: nn.Linear, scaling: float) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.enabled = base, scaling, True
        torch.manual_seed(1)
        self.lora_a = nn.Parameter(torch.randn(4, base.in_features) / 8)
        self.lora_b = nn.Parameter(torch.randn(base.out_features, 4) / 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        return out + self.scaling * (x @ self.lora_a.T @ self.lora_b.T) if self.enabled else out


def adapted(scaling: float = 1.0) -> PreTrainedModel:
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj, scaling)
    return model


def switched_off() -> PreTrainedModel:
    model = adapted()
    model.model.layers[1].self_attn.q_proj.enabled = False
    return model


def save(model: PreTrainedModel, path: Path) -> None:
    with imdc.patch(model, memory_tokens=64, chunk_tokens=32):
        imdc.save_cache(greedy(model, token_ids(150)).past_key_values, path)


@pytest.mark.parametrize(
    ("filled", "other", "named"),
    [
        (
            FAMILIES["llama"],
            adapted,
            r"3 weights are in the file only, the first is model\.layers\.0\.self_attn\.q_proj",
        ),
        (adapted, FAMILIES["llama"], r"9 weights are in the file only, .*lora_a"),
        (adapted, lambda: adapted(0.5), r"settings of 3 modules differ, .*q_proj \(scaling is 1\.0 in the file, 0\.5"),
        (
            adapted,
            switched_off,
            r"settings of 1 modules differ, .*layers\.1.* \(enabled is True in the file, False here",
        ),
    ],
    ids=["adapter added", "adapter gone", "other scaling", "switched off"],
)
def test_other_adapters_are_refused(
    filled: Callable[[], PreTrainedModel], other: Callable[[], PreTrainedModel], named: str, tmp_path: Path
) -> None:
    save(filled(), tmp_path / "cache")
    with pytest.raises(CacheMismatchError, match=named):
        imdc.load_cache(tmp_path / "cache", other())


def test_the_same_adapters_are_accepted_also_where_a_layer_is_compiled(tmp_path: Path) -> None:
    save(adapted(), tmp_path / "cache")
    same: Any = adapted()
    same.model.layers[0].self_attn.q_proj = torch.compile(same.model.layers[0].self_attn.q_proj, backend="eager")
    assert imdc.load_cache(tmp_path / "cache", same).stored_tokens() > 0


def test_adapters_of_peft_are_told_apart(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    try:
        FAMILIES["llama"]().add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    except ValueError as error:
        # transformers 5.24 asks for a release of PEFT that is not out yet.
        pytest.skip(f"transformers refuses PEFT {peft.__version__}: {error}")

    def lora(alpha: int = 8) -> PreTrainedModel:
        model = FAMILIES["llama"]()
        torch.manual_seed(1)
        targets = ["q_proj", "v_proj"]
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
        return model

    save(lora(), tmp_path / "cache")
    assert imdc.load_cache(tmp_path / "cache", lora()).stored_tokens() > 0
    with pytest.raises(CacheMismatchError, match=r"settings of 6 modules differ.*scaling"):
        imdc.load_cache(tmp_path / "cache", lora(alpha=16))
    off = lora()
    off.disable_adapters()
    with pytest.raises(CacheMismatchError, match=r"settings of 6 modules differ"):
        imdc.load_cache(tmp_path / "cache", off)
    with pytest.raises(CacheMismatchError, match=r"are in the file only"):
        imdc.load_cache(tmp_path / "cache", FAMILIES["llama"]())
