"""Backends: the same numbers from each, the right one chosen, and the reason given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from tiny_models import FAMILIES, build, greedy, token_ids, two_layers

import imdc
from imdc.config import PrefillConfig
from imdc.errors import ConfigError
from imdc.model.backend_rule import ANY_MACHINE, AttentionTraits, Machine, choose_backend
from imdc.model.machine import machine_of, triton_missing
from imdc.model.parts import Parts
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch
from imdc.planner.plan import plan_shape
from imdc.prefill.backends import REFERENCE, SDPA, choose

HERE = (torch.device("cpu"), AttentionTraits("cpu", "bfloat16", 64, softcap=False))
NO_TRITON = Machine(missing={"triton": "the package triton is not installed, or older than 3.4"})
H100 = Machine(capability=(9, 0), device_name="NVIDIA H100 80GB HBM3", multiprocessors=132)


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


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"positions": "original"}),
        ("gemma3", {"positions": "original"}),
        ("llama", {"positions": "compact"}),
        ("gemma3", {"positions": "compact"}),
        ("llama", {"observer": "all_queries", "observation_stride": 4}),
        ("gpt_oss", {"positions": "original"}),
        ("gpt_oss", {"positions": "compact"}),
    ],
)
def test_the_triton_engine_gives_the_tokens_of_the_reference(family: str, options: dict[str, Any]) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    model = build(family, **two_layers(family)).to(DEVICE)
    ids = token_ids(90).to(DEVICE)
    outputs = {}
    for backend in ("reference", "triton"):
        with imdc.patch(
            model, backend=backend, memory_tokens=40, chunk_tokens=32, recent_tokens=8, **options
        ) as handle:
            outputs[backend] = greedy(model, ids)
            assert handle.report is not None and handle.report.backend == backend
    assert torch.equal(outputs["triton"].sequences, outputs["reference"].sequences)
    torch.testing.assert_close(outputs["triton"].logits[0], outputs["reference"].logits[0], atol=1e-4, rtol=1e-4)


def test_auto_takes_sdpa_on_a_cpu_and_the_reference_where_logits_are_capped() -> None:
    assert choose("auto", *HERE)[0].name == "sdpa"
    backend, why = choose("auto", HERE[0], replace(HERE[1], softcap=True))
    assert backend.name == "reference"
    assert "not sdpa: it cannot cap logits" in why


def test_auto_takes_triton_on_a_gpu_and_says_why_not() -> None:
    for head_dim in (64, 80, 128, 256):
        traits = AttentionTraits("cuda", "bfloat16", head_dim, False)
        assert choose_backend("auto", traits, ANY_MACHINE)[0] == "triton"
    backend, why = choose_backend("auto", AttentionTraits("cuda", "bfloat16", 320, False), ANY_MACHINE)
    assert backend == "sdpa"
    assert "head size 320" in why
    backend, why = choose_backend("auto", AttentionTraits("cuda", "bfloat16", 80, False), NO_TRITON)
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
    traits = AttentionTraits("cuda", "float16", 64, False)
    backend, why = choose_backend("auto", traits, Machine(**known))
    assert backend == "sdpa" and "not triton, flash, varlen: its kernels" in why and reason in why
    assert choose_backend("auto", traits, Machine(capability=(8, 0)))[0] == "triton"
    with pytest.raises(ConfigError, match=r"backend='triton' cannot be used: its kernels .* one of \['sdpa', 'ref"):
        choose_backend("triton", traits, Machine(**known))


@pytest.mark.parametrize(("version", "usable"), [("3.3.1", False), ("3.4.0", True), ("3.10.0", True)])
def test_an_old_triton_counts_as_missing(version: str, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert (triton_missing() is None) == usable
    assert ("triton" not in machine_of(*HERE).missing) == usable


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_devices_without_fused_operators_take_the_reference(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    traits = AttentionTraits(device, "float16", 64, False)
    backend, why = choose_backend("auto", traits, ANY_MACHINE)
    assert backend == "reference"
    assert f"not sdpa: PyTorch's operators that return the log-sum-exp are for cpu and cuda, not {device}" in why
    with pytest.raises(ConfigError, match=r"backend='sdpa' cannot be used: .* one of \['reference'\]"):
        choose_backend("sdpa", traits, ANY_MACHINE)


MACHINES = {
    "any": ANY_MACHINE,
    "no triton": NO_TRITON,
    "H100": H100,
    "H100 with flash 3": replace(H100, flash=3, missing={"varlen": "too old"}),
    "T4": Machine(capability=(7, 5)),
}


@pytest.mark.parametrize("head_dim", [80, 320])
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_plan_has_the_backend_of_the_engine(device: str, machine: Machine, head_dim: int) -> None:
    shape = replace(ModelShape.from_config(FAMILIES["llama"]().config), head_dim=head_dim, dtype="bfloat16")
    traits = AttentionTraits(device, "bfloat16", head_dim, False)
    made = plan_shape(shape, Batch(1000), PrefillConfig(), device=device, machine=machine)
    assert made.backend == choose_backend("auto", traits, machine)[0]


def test_a_plan_of_a_model_asks_the_machine_that_the_engine_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated H100 with FlashAttention 3: the rule and the facts are the same for both."""
    model = FAMILIES["llama"]().to(torch.bfloat16)
    asked = []

    def simulated(*arguments: Any) -> Machine:
        asked.append(arguments)
        return replace(H100, flash=3)

    monkeypatch.setattr("imdc.model.machine.machine_of", simulated)
    monkeypatch.setattr("imdc.prefill.backends.machine_of", simulated)
    monkeypatch.setattr("imdc.kernels.libraries.find_flash", lambda _: ("reference", 3))
    monkeypatch.setattr("imdc.kernels.libraries.flash_attention", lambda _: REFERENCE.chunk_attention)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert imdc.plan(model, 100, backend="flash").backend == "flash"
    backend, _ = choose("flash", model.device, Parts.of(model).traits)
    assert backend.name == "flash" and backend.chunk_attention is REFERENCE.chunk_attention
    assert asked[0] == asked[1]
    # Planned for another kind of device, nothing is known of it.
    assert imdc.plan(model, 100, device="cuda").backend == "triton"


def test_a_plan_refuses_the_backend_that_the_engine_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="backend='triton' cannot be used: its kernels need a CUDA device"):
        imdc.plan(FAMILIES["llama"](), 100, backend="triton")


def test_a_backend_that_cannot_serve_says_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name in ("triton", "flash", "varlen"):
        with pytest.raises(ConfigError, match=rf"backend='{name}'.*CUDA.*sdpa"):
            choose(name, *HERE)


def test_explain_names_backend_layers_and_positions() -> None:
    text = imdc.explain(FAMILIES["gemma3"]())
    assert "backend: sdpa" in text
    assert "1 compressed, 2 with a sliding window" in text
    assert "compact beyond" in text
