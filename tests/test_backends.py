"""Backends: the same numbers from each, the right one chosen, and the reason given."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from kernel_cases import DEVICE
from tiny_models import FAMILIES, greedy

import imdc
from imdc.errors import ConfigError
from imdc.prefill import backends, rank, varlen
from imdc.prefill.backends import REFERENCE, SDPA, AttentionTraits, choose
from imdc.prefill.flash import find_flash, flash_attention

CPU = AttentionTraits(device_type="cpu", dtype=torch.bfloat16, head_dim=64, softcap=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("memory", "chunk"), [(0, 33), (40, 1), (57, 31)])
@pytest.mark.parametrize("window", [None, 8, 500])
def test_sdpa_equals_the_reference(dtype: torch.dtype, memory: int, chunk: int, window: int | None) -> None:
    q = torch.randn(1, 6, chunk, 16)
    k, v = torch.randn(1, 2, memory + chunk, 16), torch.randn(1, 2, memory + chunk, 16)
    exact, _ = REFERENCE.chunk_attention(q, k, v, scale=0.25, window=window)
    rounded = [x.to(dtype) for x in (q, k, v)]
    out, lse = SDPA.chunk_attention(*rounded, scale=0.25, window=window)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x if i == 0 else x.repeat_interleave(3, 1) for i, x in enumerate(rounded)),
        attn_mask=_mask(memory, chunk, window), scale=0.25,
    )  # fmt: skip
    allowed = 2 * (plain.float() - exact).abs().max().item() + 1e-6
    assert (out.float() - exact).abs().max().item() <= allowed
    if window != 8 or memory + chunk <= 8:
        # Against the same rounded inputs, whose products float32 holds exactly.
        _, rounded_lse = REFERENCE.chunk_attention(*rounded, scale=0.25, window=window)
        torch.testing.assert_close(lse, rounded_lse, atol=2e-4 if dtype == torch.bfloat16 else 1e-5, rtol=0)


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
    capped = AttentionTraits("cpu", torch.bfloat16, 64, softcap=True)
    backend, why = choose("auto", capped)
    assert backend.name == "reference"
    assert "not sdpa: it cannot cap logits" in why


@pytest.mark.parametrize("head_dim", [64, 80, 112, 128, 192, 256])
def test_auto_takes_triton_on_a_gpu(head_dim: int) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    assert choose("auto", AttentionTraits("cuda", torch.bfloat16, head_dim, False))[0].name == "triton"


def test_auto_says_why_not_for_head_sizes_beyond_the_kernels() -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    backend, why = choose("auto", AttentionTraits("cuda", torch.bfloat16, 264, False))
    assert backend.name == "sdpa"
    assert "head size 264 is beyond 256" in why


def test_a_backend_that_cannot_serve_says_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=r"backend='triton'.*CUDA.*sdpa"):
        choose("triton", CPU)
    with pytest.raises(ConfigError, match="backend='flash'"):
        choose("flash", CPU)


def on_a_gpu(**changes: object) -> AttentionTraits:
    known = {"device_type": "cuda", "dtype": torch.bfloat16, "head_dim": 128, "softcap": False}
    return AttentionTraits(**(known | {"capability": (9, 0), "device_name": "NVIDIA H100"} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": (7, 5)}, "compute capability 8.0 or newer, the device has 7.5"),
        ({"capability": None, "device_name": None, "rocm": True}, "built for ROCm"),
        ({"device_type": "xpu", "capability": None}, None),
        ({"device_type": "mps", "capability": None}, None),
    ],
    ids=["T4", "ROCm", "XPU", "MPS"],
)
def test_auto_falls_back_on_devices_that_triton_s_kernels_do_not_know(
    changes: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend, why = choose("auto", on_a_gpu(**changes))
    assert backend.name == "sdpa"
    assert reason is None or reason in why
    with pytest.raises(ConfigError, match=r"backend='triton' cannot be used: its kernels .*use backend='auto'"):
        choose("triton", on_a_gpu(**changes))


@pytest.mark.parametrize("version", ["2.3.1", "3.3.1"])
def test_auto_falls_back_where_triton_is_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setattr(backends.importlib.metadata, "version", lambda _: version)
    backend, why = choose("auto", on_a_gpu())
    assert backend.name == "sdpa"
    assert f"triton {version} is too old" in why and "triton>=3.4" in why


@pytest.mark.parametrize(
    ("flash", "torch_version", "changes", "taken", "source"),
    [
        (None, (2, 13), {}, "triton", "published figures, not timed on this device"),
        (None, (2, 15), {}, "varlen", "published figures"),
        (3, (2, 15), {}, "flash", "published figures"),
        (4, (2, 13), {}, "flash", "published figures"),
        (4, (2, 15), {}, "varlen", "published figures"),
        # FlashAttention 2 is slower than either, and nothing is published for other heads and chips.
        (2, (2, 13), {}, "triton", "published figures"),
        (3, (2, 15), {"head_dim": 256}, "triton", "no figures to choose by"),
        (3, (2, 15), {"capability": (8, 0)}, "triton", "no figures to choose by"),
        (None, (2, 15), {"softcap": True}, "triton", "not varlen: it cannot cap logits"),
        (3, (2, 15), {"dtype": torch.float32}, "triton", "not flash: it takes float16 and bfloat16"),
        (3, (2, 15), {"device_name": "timed"}, "varlen", "timed on timed"),
    ],
)
def test_auto_takes_the_fastest_forward_and_says_how_it_knows(
    flash: int | None,
    torch_version: tuple[int, int],
    changes: dict[str, object],
    taken: str,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setattr(backends, "find_flash", lambda _: flash and ("flash", flash))
    monkeypatch.setattr(backends, "find_varlen", lambda: None)
    monkeypatch.setattr(backends, "TORCH", torch_version)
    monkeypatch.setattr(backends, "_disagreement", lambda *_: None)
    monkeypatch.setattr(backends, "_library", lambda *_: REFERENCE.chunk_attention)
    monkeypatch.setitem(rank.RECORDED, "timed", ("varlen", "flash", "triton"))
    backend, why = choose("auto", on_a_gpu(**changes))
    assert backend.name == taken
    assert source in why


def test_a_library_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")

    def swapped(q: torch.Tensor, *rest: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = REFERENCE.chunk_attention(q, *rest, **options)  # type: ignore[arg-type]
        return out, lse.transpose(1, 2) if q.shape[1] == q.shape[2] else lse

    def broken(*_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(backends, "find_flash", lambda _: ("flash", 3))
    traits = AttentionTraits("cpu", torch.bfloat16, 64, softcap=False)
    for forward, reason in (
        (REFERENCE.chunk_attention, None),
        (swapped, "its log-sum-exp is not the reference's here"),
        (broken, "it does not run here: RuntimeError: no kernel image"),
    ):
        backends._disagreement.cache_clear()
        monkeypatch.setattr(backends, "_library", lambda *_, forward=forward: forward)
        assert backends._unmet_by_library("flash", traits) == reason
    backends._disagreement.cache_clear()


@pytest.mark.parametrize("order", ["heads first", "tokens first"])
def test_varlen_is_called_its_own_way(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the call is proven here: the operator needs a GPU."""
    module = ModuleType("varlen")

    def varlen_attn(  # type: ignore[no-untyped-def]
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa, seqused_k
    ):
        assert return_aux == {"lse": True} and enable_gqa and seqused_k.tolist() == [max_k] * (len(cu_seq_q) - 1)
        assert cu_seq_q.diff().tolist() == [max_q] * len(seqused_k) and window_size[1] == 0
        outs, sums = [], []
        for row in range(len(seqused_k)):
            q, k, v = (
                x[ends[row] : ends[row + 1]].transpose(0, 1)[None]
                for x, ends in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
            )
            width = None if window_size[0] == -1 else window_size[0] + 1
            out, lse = REFERENCE.chunk_attention(q, k, v, scale=scale, window=width)
            outs.append(out[0].transpose(0, 1))
            sums.append(lse[0])
        lse = torch.cat(sums, dim=1)
        return torch.cat(outs), lse if order == "heads first" else lse.transpose(0, 1)

    module.varlen_attn, module.AuxRequest = varlen_attn, dict  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen.importlib, "import_module", lambda _: module)
    assert varlen.find_varlen() is None
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)
    for options in ({}, {"window": 3}):
        found = varlen.varlen_attention()(q, k, v, scale=0.25, **options)
        wanted = REFERENCE.chunk_attention(q, k, v, scale=0.25, **options)  # type: ignore[arg-type]
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(found, wanted, strict=True))


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
