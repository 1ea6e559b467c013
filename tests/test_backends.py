"""Backends: the same numbers from each, the right one chosen, and the reason given."""

from __future__ import annotations

import importlib.machinery
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from tiny_models import FAMILIES, greedy

import imdc
from imdc.config import PrefillConfig
from imdc.errors import ConfigError
from imdc.model.backend_rule import (
    ALL_PACKAGES,
    AttentionTraits,
    choose_backend,
    find_flash,
    installed_packages,
)
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch
from imdc.planner.plan import plan_shape
from imdc.prefill.backends import REFERENCE, SDPA, choose
from imdc.prefill.flash import flash_attention

CPU = AttentionTraits(device_type="cpu", dtype="bfloat16", head_dim=64, softcap=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("memory", "chunk"), [(0, 33), (40, 1), (57, 31)])
@pytest.mark.parametrize("window", [None, 8, 500])
def test_sdpa_equals_the_reference(dtype: torch.dtype, memory: int, chunk: int, window: int | None) -> None:
    q = torch.randn(1, 6, chunk, 16)
    k, v = torch.randn(1, 2, memory + chunk, 16), torch.randn(1, 2, memory + chunk, 16)
    exact, exact_lse = REFERENCE.chunk_attention(q, k, v, scale=0.25, window=window)
    rounded = [x.to(dtype) for x in (q, k, v)]
    out, lse = SDPA.chunk_attention(*rounded, scale=0.25, window=window)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x if i == 0 else x.repeat_interleave(3, 1) for i, x in enumerate(rounded)),
        attn_mask=_mask(memory, chunk, window), scale=0.25,
    )  # fmt: skip
    allowed = 2 * (plain.float() - exact).abs().max().item() + 1e-6
    assert (out.float() - exact).abs().max().item() <= allowed
    if window != 8 or memory + chunk <= 8:
        torch.testing.assert_close(lse, exact_lse, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def _mask(memory: int, chunk: int, window: int | None) -> torch.Tensor:
    row, column = torch.arange(chunk)[:, None] + memory, torch.arange(memory + chunk)[None]
    return (column <= row) & (column > row - (window or memory + chunk))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_the_triton_engine_gives_the_tokens_of_the_reference(family: str, positions: str) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    model = FAMILIES[family](num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]) if (
        family == "gemma3") else FAMILIES[family](num_hidden_layers=2)  # fmt: skip
    model.to(DEVICE)
    ids = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    outputs = {}
    for backend in ("reference", "triton"):
        with imdc.patch(
            model, backend=backend, memory_tokens=40, chunk_tokens=32, recent_tokens=8, positions=positions
        ) as handle:
            outputs[backend] = greedy(model, ids)
            assert handle.report is not None and handle.report.backend == backend
    assert torch.equal(outputs["triton"].sequences, outputs["reference"].sequences)
    torch.testing.assert_close(outputs["triton"].logits[0], outputs["reference"].logits[0], atol=1e-4, rtol=1e-4)


def test_auto_takes_sdpa_on_a_cpu_and_the_reference_where_logits_are_capped() -> None:
    assert choose("auto", CPU)[0].name == "sdpa"
    capped = AttentionTraits("cpu", "bfloat16", 64, softcap=True)
    backend, why = choose("auto", capped)
    assert backend.name == "reference"
    assert "not sdpa: it cannot cap logits" in why


def test_auto_takes_triton_on_a_gpu_and_says_why_not() -> None:
    for head_dim in (64, 80, 128, 256):
        traits = AttentionTraits("cuda", "bfloat16", head_dim, False)
        assert choose_backend("auto", traits, ALL_PACKAGES)[0] == "triton"
    backend, why = choose_backend("auto", AttentionTraits("cuda", "bfloat16", 320, False), ALL_PACKAGES)
    assert backend == "sdpa"
    assert "head size 320" in why
    backend, why = choose_backend("auto", AttentionTraits("cuda", "bfloat16", 80, False), frozenset())
    assert backend == "sdpa"
    assert "triton is not installed, or older than 3.4" in why


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"capability": (7, 5)}, "compute capability 8.0 or newer, the device has 7.5"),
        ({"rocm": True}, "this PyTorch is built for ROCm"),
    ],
    ids=["T4", "ROCm"],
)
def test_devices_that_the_kernels_do_not_know_take_sdpa(known: dict[str, Any], reason: str) -> None:
    backend, why = choose_backend("auto", AttentionTraits("cuda", "float16", 64, False, **known), ALL_PACKAGES)
    assert backend == "sdpa" and reason in why
    assert choose_backend("auto", AttentionTraits("cuda", "float16", 64, False, (8, 0)), ALL_PACKAGES)[0] == "triton"


@pytest.mark.parametrize(("version", "usable"), [("3.3.1", False), ("3.4.0", True), ("3.10.0", True)])
def test_an_old_triton_counts_as_missing(version: str, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert ("triton" in installed_packages()) == usable


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_devices_without_fused_operators_take_the_reference(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    traits = AttentionTraits(device, "float16", 64, False)
    backend, why = choose_backend("auto", traits, ALL_PACKAGES)
    assert backend == "reference"
    assert f"not sdpa: PyTorch's operators that return the log-sum-exp are for cpu and cuda, not {device}" in why
    with pytest.raises(ConfigError, match=r"backend='sdpa' cannot be used: .* one of \['reference'\]"):
        choose_backend("sdpa", traits, ALL_PACKAGES)


@pytest.mark.parametrize("head_dim", [80, 320])
@pytest.mark.parametrize("packages", [ALL_PACKAGES, frozenset()])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_plan_has_the_backend_of_the_engine(device: str, packages: frozenset[str], head_dim: int) -> None:
    shape = replace(ModelShape.from_config(FAMILIES["llama"]().config), head_dim=head_dim, dtype="bfloat16")
    traits = AttentionTraits(device, "bfloat16", head_dim, False)
    made = plan_shape(shape, Batch(1000), PrefillConfig(), device=device, packages=packages)
    assert made.backend == choose_backend("auto", traits, packages)[0]


def test_a_plan_refuses_the_backend_that_the_engine_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="backend='triton' cannot be used: its kernels need a CUDA device"):
        imdc.plan(FAMILIES["llama"](), 100, backend="triton")


def test_a_backend_that_cannot_serve_says_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=r"backend='triton'.*CUDA.*sdpa"):
        choose("triton", CPU)
    with pytest.raises(ConfigError, match="backend='flash'"):
        choose("flash", CPU)


def test_explain_names_backend_layers_and_positions() -> None:
    text = imdc.explain(FAMILIES["gemma3"]())
    assert "backend: sdpa" in text
    assert "1 compressed, 2 with a sliding window" in text
    assert "compact beyond" in text


def fake_flash(name: str, generation: int) -> ModuleType:
    """The documented call of each generation, computed by the reference; unknown arguments raise."""
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def run(q, k, v, scale, window, cap):  # type: ignore[no-untyped-def]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        width = None if window[0] in (None, -1) else window[0] + 1
        out, lse = REFERENCE.chunk_attention(q, k, v, scale=scale, window=width, softcap=cap or None)
        return out.transpose(1, 2), lse

    def generation_2(  # type: ignore[no-untyped-def]
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        return_attn_probs=False,
    ):  # fmt: skip
        assert causal and return_attn_probs
        return *run(q, k, v, softmax_scale, window_size, softcap), None

    def generation_3(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):  # type: ignore[no-untyped-def]
        assert causal
        return run(q, k, v, softmax_scale, window_size, softcap)

    def generation_4(  # type: ignore[no-untyped-def]
        q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, return_lse=False
    ):
        assert causal and return_lse and window_size[0] != -1
        return run(q, k, v, softmax_scale, window_size, softcap)

    module.flash_attn_func = {2: generation_2, 3: generation_3, 4: generation_4}[generation]  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("name", "generation"), [("flash_attn", 2), ("flash_attn_interface", 3), ("flash_attn.cute", 4)]
)
def test_every_generation_of_flash_attn_is_called_its_own_way(
    monkeypatch: pytest.MonkeyPatch, name: str, generation: int
) -> None:
    """Only the call is proven here: the package itself needs a GPU."""
    if generation == 4:
        monkeypatch.setitem(sys.modules, "flash_attn", fake_flash("flash_attn", 2))
    monkeypatch.setitem(sys.modules, name, fake_flash(name, generation))
    assert find_flash() == (name, generation)
    q, k, v = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    for options in ({}, {"window": 3}, {"softcap": 5.0}):
        out, lse = flash_attention(name)(q, k, v, scale=0.25, **options)
        wanted, wanted_lse = REFERENCE.chunk_attention(q, k, v, scale=0.25, **options)  # type: ignore[arg-type]
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
