"""Forward passes of other libraries: which "auto" takes, how each is called, and that none is believed unchecked."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from imdc.kernels import libraries, reference
from imdc.kernels.libraries import disagreement, find_flash, flash_attention, varlen_attention, why_not_varlen

from imdc.errors import ConfigError
from imdc.model import forward_speed
from imdc.model.backend_rule import AttentionTraits, Machine, choose_backend
from imdc.model.machine import machine_of
from imdc.prefill.backends import make_backend

H100 = Machine(capability=(9, 0), device_name="NVIDIA H100 80GB HBM3", multiprocessors=132)
NO_FLASH, NO_VARLEN = {"flash": "no FlashAttention imports"}, {"varlen": "torch is too old"}
PUBLISHED = "by published figures, not timed on this device"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """What was found and compared is remembered for the process; not from one test to the next."""
    for remembered in (find_flash, disagreement):
        remembered.cache_clear()
    yield
    for remembered in (find_flash, disagreement):
        remembered.cache_clear()


@pytest.mark.parametrize(
    ("changes", "model", "taken", "said"),
    [
        ({"missing": NO_FLASH | NO_VARLEN}, {}, "triton", "not flash: no FlashAttention imports"),
        ({"missing": NO_FLASH}, {}, "varlen", PUBLISHED),
        ({"flash": 3}, {}, "flash", PUBLISHED),
        ({"flash": 4}, {}, "varlen", PUBLISHED),
        ({"flash": 4, "missing": NO_VARLEN}, {}, "flash", "not varlen: torch is too old"),
        # FlashAttention 2 is slower than Triton's kernels, and nothing is published for other heads and chips.
        ({"flash": 2, "missing": NO_VARLEN}, {}, "triton", PUBLISHED),
        ({"flash": 3}, {"head_dim": 256}, "triton", "no figures for this device and head size"),
        ({"flash": 2, "capability": (8, 0)}, {}, "triton", "no figures for this device and head size"),
        ({"flash": 3, "capability": None, "device_name": None}, {}, "triton", "no figures for this device"),
        ({"missing": NO_FLASH}, {"softcap": True}, "triton", "not varlen: it cannot cap logits"),
        ({"flash": 3}, {"dtype": "float32"}, "triton", "not flash, varlen: it takes float16 and bfloat16"),
        ({"flash": 3, "device_name": "timed"}, {}, "varlen", "fastest of varlen, triton, flash as timed on timed"),
        # One that was not timed may be the fastest.
        ({"flash": 4, "device_name": "timed"}, {}, "varlen", PUBLISHED),
        ({"flash": 3, "device_name": "timed"}, {"head_dim": 64}, "flash", PUBLISHED),
    ],
)
def test_auto_takes_the_fastest_forward_and_says_how_it_knows(
    changes: dict[str, Any], model: dict[str, Any], taken: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {("timed", "bfloat16", 128): {"varlen": 1.0, "triton": 1.5, "flash 3": 2.0}}
    monkeypatch.setattr(forward_speed, "MILLISECONDS", record)
    traits = AttentionTraits(**{"device_type": "cuda", "dtype": "bfloat16", "head_dim": 128, "softcap": False, **model})
    backend, why = choose_backend("auto", traits, replace(H100, **changes))
    assert backend == taken
    assert said in why


def test_a_library_that_is_asked_for_and_cannot_serve_is_refused_with_the_reason() -> None:
    traits = AttentionTraits("cuda", "bfloat16", 128, softcap=False)
    assert choose_backend("flash", traits, H100) == ("flash", "flash: asked for")
    usable = r"\['triton', 'varlen', 'sdpa', 'reference'\]"
    message = rf"backend='flash' cannot be used: no FlashAttention imports; .* {usable}"
    with pytest.raises(ConfigError, match=message):
        choose_backend("flash", traits, replace(H100, missing=NO_FLASH))


def fake_flash(name: str, generation: int) -> ModuleType:
    """The documented call of each generation, computed by the reference; unknown arguments raise."""
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def run(q, k, v, scale, window, cap):  # type: ignore[no-untyped-def]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        width = None if window[0] in (None, -1) else window[0] + 1
        out, lse = reference.chunk_attention(q, k, v, scale=scale, window=width, softcap=cap or None)
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
        wanted, wanted_lse = reference.chunk_attention(q, k, v, scale=0.25, **options)  # type: ignore[arg-type]
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


def test_a_flash_attn_that_does_not_import_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a wheel for another torch: it is found, and its import fails."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake_flash("flash_attn_interface", 3))
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash("flash_attn", 2))
    imported = importlib.import_module

    def breaking(name: str) -> ModuleType:
        if name == "flash_attn_interface":
            raise ImportError("undefined symbol: _ZN3c10")
        return imported(name)

    monkeypatch.setattr(libraries.importlib, "import_module", breaking)
    assert find_flash(9) == ("flash_attn", 2)


def test_a_generation_is_only_taken_for_its_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake_flash("flash_attn_interface", 3))
    assert find_flash(9) == ("flash_attn_interface", 3)
    assert find_flash(8) is None and find_flash(12) is None


def fake_varlen() -> ModuleType:
    """The call of torch 2.15, of which only cuDNN's form is accepted."""
    module = ModuleType("varlen")

    def varlen_attn(  # type: ignore[no-untyped-def]
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert return_aux == {"lse": True} and enable_gqa and seqused_k.tolist() == [max_k] * (len(cu_seq_q) - 1)
        assert cu_seq_q.diff().tolist() == [max_q] * len(seqused_k) and window_size == (-1, 0)
        outs, sums = [], []
        for row in range(len(seqused_k)):
            q, k, v = (
                x[ends[row] : ends[row + 1]].transpose(0, 1)[None]
                for x, ends in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
            )
            out, lse = reference.chunk_attention(q, k, v, scale=scale)
            outs.append(out[0].transpose(0, 1))
            sums.append(lse[0])
        return torch.cat(outs), torch.cat(sums, dim=1)

    module.varlen_attn, module.AuxRequest = varlen_attn, dict  # type: ignore[attr-defined]
    return module


def test_varlen_is_called_as_cudnn_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the call is proven here: the operator needs a GPU."""
    monkeypatch.setattr(libraries.importlib, "import_module", lambda _: fake_varlen())
    forward = varlen_attention(reference.chunk_attention)
    for batch in (1, 2):
        q, k, v = torch.randn(batch, 4, 5, 16), torch.randn(batch, 2, 12, 16), torch.randn(batch, 2, 12, 16)
        for options in ({}, {"window": 3}):
            found = forward(q, k, v, scale=0.25, **options)
            wanted = reference.chunk_attention(q, k, v, scale=0.25, **options)  # type: ignore[arg-type]
            for x, y in zip(found, wanted, strict=True):
                torch.testing.assert_close(x, y, atol=1e-6, rtol=0.0)
    with pytest.raises(ValueError, match=r"softcap = 5\.0: varlen_attn cannot cap logits"):
        forward(q, k, v, scale=0.25, softcap=5.0)


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "head_dim", "major", "reason"),
    [
        ("2.15.0+cu132", 92600, 128, 9, None),
        ("2.15.0+cu132", 92600, 64, None, None),
        ("3.0.0", 92600, 128, 10, None),
        ("2.14.1", 92600, 128, 9, "from torch 2.15 on, this is 2.14.1"),
        ("2.15.0", 92300, 128, 9, "needs cuDNN 9.24 or newer, torch has 92300"),
        ("2.15.0+cpu", None, 128, 9, "torch has none"),
        ("2.15.0", 92600, 256, 9, "not 256"),
        ("2.15.0", 92600, 60, 9, "not 60"),
        ("2.15.0", 92600, 128, 8, "the device has 8"),
    ],
)
def test_varlen_is_for_cudnn_alone(
    torch_version: str, cudnn: int | None, head_dim: int, major: int | None, reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    found = why_not_varlen(head_dim, major)
    assert (found is None) == (reason is None)
    assert reason is None or (found is not None and reason in found)


def swapped(q: torch.Tensor, *rest: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = reference.chunk_attention(q, *rest, **options)
    return out, lse.transpose(1, 2) if q.shape[1] == q.shape[2] else lse


def unwindowed(*states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.chunk_attention(*states, **options | {"window": None})


def broken(*_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (reference.chunk_attention, None),
        (swapped, "its log-sum-exp is not the reference's here"),
        (unwindowed, "its output is not the reference's here"),
        (broken, "it does not run here: RuntimeError: no kernel image"),
    ],
    ids=["right", "swapped", "unwindowed", "broken"],
)
def test_a_library_that_computes_something_else_is_not_taken(
    forward: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "library_forward", lambda *_: forward)
    for softcap in (False, True):
        assert disagreement("flash", CPU, torch.bfloat16, 64, softcap, windowed=True) == reason
    if forward is unwindowed:
        # Models without windows need none.
        assert disagreement("flash", CPU, torch.bfloat16, 64) is None


def test_a_simulated_h100_tells_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr("imdc.model.machine.find_flash", lambda major: ("flash_attn", 2))
    monkeypatch.setattr("imdc.model.machine.why_not_varlen", lambda *_: None)
    compared = []

    def compare(name: str, *rest: Any) -> str | None:
        compared.append(name)
        return "its output is not the reference's here" if name == "varlen" else None

    monkeypatch.setattr("imdc.model.machine.disagreement", compare)
    found = machine_of(torch.device("cuda"), AttentionTraits("cuda", "bfloat16", 128, softcap=False))
    assert (found.capability, found.device_name, found.multiprocessors) == ((9, 0), "NVIDIA H100", 132)
    assert found.flash == 2 and compared == ["flash", "varlen"]
    assert found.missing == {"varlen": "its output is not the reference's here"}
    # A library that could not serve the model anyway is not run.
    compared.clear()
    machine_of(torch.device("cuda"), AttentionTraits("cuda", "bfloat16", 128, softcap=True))
    machine_of(torch.device("cuda"), AttentionTraits("cuda", "float32", 128, softcap=False))
    assert compared == ["flash"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    found = machine_of(torch.device("cuda"), AttentionTraits("cuda", "float16", 64, softcap=False))
    assert "no FlashAttention" in found.missing["flash"]


def test_a_library_s_backend_attends_with_it_and_compresses_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    called = []

    def forward(*tensors: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        called.append(options)
        return reference.chunk_attention(*tensors, **options)

    monkeypatch.setattr("imdc.prefill.backends.library_forward", lambda *_: forward)
    backend = make_backend("varlen", CPU)
    assert backend.name == "varlen" and backend.compress_step is not None
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 12, 16)
    out, new_k, _, indices = backend.compress_step(q, k, k, scale=0.25, keep=6, rows=2)
    assert called == [{"scale": 0.25, "softcap": None}]
    assert torch.equal(out, reference.chunk_attention(q, k, k, scale=0.25)[0])
    assert torch.equal(new_k, reference.compact(k, k, indices)[0])
