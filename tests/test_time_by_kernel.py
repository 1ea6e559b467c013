"""`bench/time_by_kernel.py`: kinds of kernels by their names, and their shares of a run, without a GPU."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("time_by_kernel")


def test_every_kernel_of_imdc_has_a_kind(bench: ModuleType) -> None:
    names = [
        name
        for path in sorted((ROOT / "kernels").glob("*.py"))
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    kinds = {name: bench.kind_of(name) for name in names}
    assert kinds.pop("_fused_step_kernel") == "fused step" and kinds.pop("_chunk_attention_kernel") == "attention"
    assert len(kinds) >= 5 and set(kinds.values()) == {"scoring and compaction"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t> >", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>::Params)", "attention"),
        ("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_TNN", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_nn_align1>", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>", "matrix products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float>", "matrix products"),
        ("Memcpy DtoH (Device -> Pageable)", "copies"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda()>", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>>", "copies"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps<float>>>", "sums and norms"),
        ("_rms_norm_forward_kernel", "sums and norms"),
        ("_swiglu_forward_kernel", "elementwise and other"),
        ("void at::native::vectorized_elementwise_kernel<4, pow_tensor_scalar>", "elementwise and other"),
        ("Memset (Device)", "elementwise and other"),
    ],
)
def test_kernels_of_libraries_have_a_kind(bench: ModuleType, name: str, kind: str) -> None:
    assert bench.kind_of(name) == kind


def test_kinds_and_gaps_fill_the_run(bench: ModuleType) -> None:
    kernels = {"gemm_a": [1.5e6, 3], "gemm_b": [0.5e6, 2], "_fused_step_kernel": [1e6, 4]}
    found = bench.shares(kernels, 4.0)
    assert [(one["kind"], one["seconds"], one["share"], one["calls"]) for one in found] == [
        ("matrix products", 2.0, 0.5, 5),
        ("fused step", 1.0, 0.25, 4),
        ("no kernel running", 1.0, 0.25, 0),
    ]
    assert found[0]["dearest"] == [
        {"name": "gemm_a", "seconds": 1.5, "calls": 3},
        {"name": "gemm_b", "seconds": 0.5, "calls": 2},
    ]


def test_kernels_at_once_leave_no_gap(bench: ModuleType) -> None:
    found = {one["kind"]: one["seconds"] for one in bench.shares({"gemm": [3e6, 1], "copy": [2e6, 1]}, 4.0)}
    assert found == {"matrix products": 3.0, "copies": 2.0, "no kernel running": 0.0}


def test_the_dearest_kernels_of_a_kind_are_named(bench: ModuleType) -> None:
    kernels = {f"gemm_{number}{'x' * 200}": [float(number), 1] for number in range(12)}
    (products,) = (one for one in bench.shares(kernels, 1.0) if one["kind"] == "matrix products")
    assert [one["name"] for one in products["dearest"]] == [
        f"gemm_{number}{'x' * 200}"[:160] for number in range(11, 3, -1)
    ]
    assert products["calls"] == 12 and products["seconds"] == pytest.approx(66e-6)


def test_events_of_the_device_are_added_up_by_name(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def event(device: str, name: str, microseconds: float) -> SimpleNamespace:
        return SimpleNamespace(device_type=SimpleNamespace(name=device), name=name, device_time_total=microseconds)

    events = [event("CUDA", "a", 2.0), event("CPU", "a", 50.0), event("CUDA", "b", 1.0), event("CUDA", "a", 3.0)]
    ended = []

    @contextmanager
    def profile(activities: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(events=lambda: events if ended else pytest.fail("asked before the end"))
        ended.append(activities)

    monkeypatch.setattr(bench, "profile", profile)
    with bench.time_by_kernel() as kernels:
        assert not kernels
    assert dict(kernels) == {"a": [5.0, 2], "b": [1.0, 1]}
