"""`kernels/compress_step.py`: the step in one launch and in several, what it allocates, and which way it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import (
    DEVICE,
    FEW_DTYPES,
    ON_DEVICE,
    Case,
    assert_near,
    attention_oracle,
    eager_attention,
    mass_of,
    masses_in_several_orders,
    poisoned_memory,
    unaligned,
)
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from imdc.kernels import _launch, compress, reference
from imdc.kernels import compress_step as module
from imdc.kernels._launch import Config
from imdc.kernels.compress_step import compress_step
from imdc.kernels.limits import OUTPUT_CHANGE, StepSizes

# Groups of 1, 3, 4, 7 and 8; ragged lengths, empty memory, a one-token chunk, capped logits.
CASES = (
    Case(1, 2, 4, 50, 117, 64),
    Case(2, 1, 3, 33, 33, 96),
    Case(1, 2, 1, 1, 70, 32),
    Case(1, 1, 8, 40, 230, 16, softcap=2.0),
    Case(1, 2, 7, 37, 101, 80),
    Case(1, 1, 4, 1, 1, 16),
)
WAYS = ["one launch", "two", "several"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Takes one of the ways, whatever pays: all in one launch, one after the forward pass, or each part by itself.

    A device's blocks for float32, which production never takes in one launch, may be too small for all observers.
    """

    def fits(q: object, k: object, sizes: StepSizes, config: Config, target: object) -> bool:
        return request.param == "one launch" and sizes.observers * sizes.group <= config.rows

    monkeypatch.setattr(module, "one_launch_pays", fits)
    monkeypatch.setattr(compress, "one_launch_pays", lambda *_: request.param == "two")
    module.plan_step.forget()
    yield str(request.param)
    module.plan_step.forget()


def options(case: Case) -> dict[str, Any]:
    return {"scale": case.logits["scale"], "softcap": case.softcap}


def observers(case: Case) -> int:
    """As many as fit the smallest block of rows there is, that of the interpreter."""
    return min(case.queries, 32 // case.group)


@pytest.mark.parametrize(
    ("pool_kernel", "pooling", "scoring"),
    [(1, "max", "attention"), (15, "max", "attention"), (5, "avg", "attention"), (15, "max", "output_change")],
)
@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(
    case: Case, dtype: torch.dtype, pool_kernel: int, pooling: str, scoring: str, way: str
) -> None:
    q, k, v = case.tensors(dtype)
    scored, rows = case.keys - case.queries // 4, observers(case)
    sinks, recent = min(3, scored // 8), min(4, scored // 8)
    keep = (scored + 1) // 2
    chosen = {"keep": keep, "sink_tokens": sinks, "recent_tokens": recent}
    with poisoned_memory():
        pooled: dict[str, Any] = {"pool_kernel": pool_kernel, "pooling": pooling, "scoring": scoring}
        out, new_k, new_v, indices = compress_step(
            q, k, v, rows=rows, scored_keys=scored, **pooled, **chosen, **options(case)
        )
    truth, _ = attention_oracle(q, k, v, **case.logits)
    assert_near(out, truth, eager_attention(q, k, v, **case.logits), factor=2.0, softcap=case.softcap)

    changed = {"v": v, "out": out} if scoring == OUTPUT_CHANGE else {}
    exact = mass_of(q.double(), k.double(), rows=rows, **changed, **case.logits)[..., :scored]
    exact = reference.pool(exact, pool_kernel, pooling)
    exact[..., :sinks] = exact[..., scored - recent :] = float("inf")
    assert (indices.diff(dim=-1) > 0).all() and (indices >= 0).all() and (indices < scored).all()
    kept = torch.zeros_like(exact, dtype=torch.bool).scatter_(-1, indices, True)
    least_kept = exact.masked_fill(~kept, float("inf")).amin(dim=-1)
    best_dropped = exact.masked_fill(kept, 0.0).amax(dim=-1)
    # Scores closer than float32 tells apart may change places; a cap multiplies the error of its logits.
    tied = 1e-5 if case.softcap is None else 1e-4
    tied *= 4 if changed else 1  # the share is squared, and the distance is a difference
    assert (best_dropped <= least_kept * (1 + tied)).all()

    expected_k, expected_v = reference.compact(k, v, indices)
    assert torch.equal(new_k, expected_k) and torch.equal(new_v, expected_v)


@pytest.mark.parametrize("keep", [1, 77, 117])
@pytest.mark.parametrize("rows", [1, 8])
def test_the_mass_is_that_of_the_last_rows(rows: int, keep: int, way: str) -> None:
    """Also where nothing is dropped, and where one key is kept."""
    case = CASES[0]
    q, k, v = case.tensors(torch.float32)
    with poisoned_memory() as allocated:
        indices = compress_step(q, k, v, rows=rows, keep=keep, **options(case))[3]
    mass = next(x for x in allocated if x.shape == (1, 2, 117) and x.dtype == torch.float32)
    truth = mass_of(q.double(), k.double(), rows=rows, **case.logits)
    lse = reference.chunk_attention(q, k, v, **case.logits)[1]
    assert_near(mass, truth, masses_in_several_orders(case, q, k, lse, rows=rows), factor=4.0)
    assert torch.equal(indices, reference.select(mass, keep))


def test_ties_go_to_the_lowest_index(way: str) -> None:
    case = Case(1, 2, 4, 20, 217, 64)
    q, k, v = case.tensors(torch.float32)
    # Queries of zeros share their attention evenly, so all keys that every observer sees have one mass, to the bit.
    indices = compress_step(torch.zeros_like(q), k, v, rows=8, keep=150, **options(case))[3]
    assert torch.equal(indices, torch.arange(150, device=DEVICE).expand(1, 2, -1))
    forced = {"sink_tokens": 2, "recent_tokens": 5}
    indices = compress_step(torch.zeros_like(q), k, v, rows=8, keep=150, **forced, **options(case))[3]
    expected = torch.cat([torch.arange(145), torch.arange(212, 217)]).to(DEVICE)
    assert torch.equal(indices, expected.expand(1, 2, -1))


def test_the_cap_decides_what_is_kept(way: str) -> None:
    """Uncapped, one key outweighs all; capped, a key that every head attends to a little weighs more."""
    q = torch.zeros(1, 4, 4, 16, device=DEVICE)
    k = torch.zeros(1, 1, 40, 16, device=DEVICE)
    for head in range(4):
        q[:, head, :, head] = 1.0
    k[:, :, 7, 0] = 100.0
    k[:, :, 21, :4] = 3.0
    arguments: dict[str, Any] = {"scale": 1.0, "keep": 1, "rows": 4}
    chosen = [compress_step(q, k, k, softcap=cap, **arguments)[3].item() for cap in (None, 1.0)]
    masses = [mass_of(q.double(), k.double(), rows=4, scale=1.0, softcap=cap, window=None) for cap in (None, 1.0)]
    assert chosen == [int(mass.argmax()) for mass in masses] and chosen[0] != chosen[1]


def test_the_keys_that_are_kept_may_be_others_than_those_attended_to(way: str) -> None:
    q, k, v = CASES[0].tensors(torch.bfloat16)
    canonical = inside = torch.randn_like(k)
    _, new_k, new_v, indices = compress_step(q, k, v, keep=40, rows=8, kept_k=unaligned(inside), **options(CASES[0]))
    expected = reference.compact(canonical, v, indices)
    assert torch.equal(new_k, expected[0]) and torch.equal(new_v, expected[1])


@pytest.mark.parametrize("blocks", [(128, 128), (128, 64)], ids=str)
def test_blocks_of_production_agree_with_float64(
    blocks: tuple[int, int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(1, 2, 4, 70, 421, 64)
    config = Config(*blocks, num_warps=8, num_stages=1, descriptors=True)
    monkeypatch.setattr(module, "attention_config", lambda *_: config)
    q, k, v = case.tensors(torch.float32)
    with poisoned_memory() as allocated:
        out, _, _, indices = compress_step(q, k, v, rows=16, keep=200, scored_keys=405, pool_kernel=5, **options(case))
    truth, _ = attention_oracle(q, k, v, **case.logits)
    assert_near(out, truth, eager_attention(q, k, v, **case.logits), factor=2.0)
    mass = next(x for x in allocated if x.shape == (1, 2, 405) and x.dtype == torch.float32)
    assert torch.equal(indices, reference.select(reference.pool(mass, 5), 200))


class Recorder(TorchDispatchMode):
    """Lists every operator of PyTorch that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pool_kernel", [1, 15])
def test_allocates_and_launches_what_it_documents(monkeypatch: pytest.MonkeyPatch, pool_kernel: int, way: str) -> None:
    q, k, v = CASES[0].tensors(torch.bfloat16)
    launched: list[str] = []
    monkeypatch.setattr(_launch.Launch, "run", lambda self, *_: launched.append(self.kernel.__name__))
    arguments: dict[str, Any] = {"keep": 40, "rows": 8, "scored_keys": 100, "pool_kernel": pool_kernel}
    arguments |= options(CASES[0])
    compress_step(q, k, v, **arguments)  # which also plans
    launched.clear()
    with Recorder() as recorder, poisoned_memory() as allocated:
        compress_step(q, k, v, **arguments)
    fused, several = way == "one launch", way == "several"
    assert len(launched) == len(set(launched)) == (1 if fused else 2 if way == "two" else 4)

    # Filling is the poison's doing; anything else, such as reading a value back, would be a wait for the device.
    assert set(recorder.called) <= {"empty_strided", "fill_"}
    score_bytes = 2 * 100 * 4
    expected = {
        "output": q.numel() * 2,
        **({} if fused else {"log-sum-exp": 8 * 50 * 4}),
        "scores": score_bytes,
        **({"ranks": score_bytes} if not several or pool_kernel > 1 else {}),
        "indices": 2 * 40 * 8,
        "new keys": 2 * 40 * 64 * 2,
        "new values": 2 * 40 * 64 * 2,
    }
    assert sorted(x.numel() * x.element_size() for x in allocated) == sorted(expected.values())


def test_a_library_s_forward_is_taken_and_its_log_sum_exp_checked(way: str) -> None:
    case = CASES[0]
    q, k, v = case.tensors(torch.bfloat16)
    arguments: dict[str, Any] = {"keep": 40, "rows": 8, "pool_kernel": 5, **options(case)}
    called: list[dict[str, Any]] = []

    def library(*tensors: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        called.append(given)
        out, lse = reference.chunk_attention(*tensors, **given)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse

    out, new_k, _, indices = compress_step(q, k, v, forward=library, **arguments)
    assert called == [options(case)]
    assert torch.equal(out, reference.chunk_attention(q, k, v, **options(case))[0])
    assert torch.equal(new_k, reference.compact(k, v, indices)[0])
    lse = reference.chunk_attention(q, k, v, **options(case))[1]
    mass = reference.key_mass(q, k, lse, rows=8, pool_kernel=5, **options(case))
    best = mass.topk(40, dim=-1).values.sum()
    assert mass.gather(-1, indices).sum() >= best * (1 - 1e-5)
    with pytest.raises(ValueError, match=r"lse\.shape = \[1, 50, 8\]: must be \[1, 8, 50\]"):
        compress_step(q, k, v, forward=lambda *_, **__: (out, lse.transpose(1, 2)), **arguments)


@pytest.mark.parametrize("stride", [2, 3, 7, 50])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_every_nth_observer_votes(case: Case, stride: int, way: str) -> None:
    q, k, v = case.tensors(torch.float32)
    scored, rows = case.keys - case.queries // 4, observers(case)
    with poisoned_memory() as allocated:
        compress_step(q, k, v, rows=rows, stride=stride, keep=scored // 2, scored_keys=scored, **options(case))
    mass = next(x for x in allocated if x.shape == (case.batch, case.kv_heads, scored) and x.dtype == torch.float32)
    lse = reference.chunk_attention(q, k, v, **case.logits)[1]
    truth = mass_of(q.double(), k.double(), rows=rows, stride=stride, **case.logits)[..., :scored]
    rivals = [x[..., :scored] for x in masses_in_several_orders(case, q, k, lse, rows=rows, stride=stride)]
    assert_near(mass, truth, rivals, factor=4.0)


@pytest.mark.skipif(not ON_DEVICE, reason="needs a CUDA device: the interpreter has nothing to wait for")
def test_never_waits_for_the_device(way: str) -> None:
    q, k, v = CASES[0].tensors(torch.bfloat16)
    arguments: dict[str, Any] = {"keep": 40, "rows": 8, "pool_kernel": 5, **options(CASES[0])}
    compress_step(q, k, v, **arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compress_step(q, k, v, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_runs_give_the_same_bits(way: str) -> None:
    q, k, v = CASES[0].tensors(torch.bfloat16)
    first, second = (compress_step(q, k, v, keep=40, rows=8, **options(CASES[0])) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 118}, r"keep = 118: must be 0 .*\.\.117"),
        ({"keep": 40, "scored_keys": 30}, r"keep = 40: must be 0 .*\.\.30"),
        ({"keep": 5, "sink_tokens": 6}, r"keep = 5: must be 6"),
        ({"rows": 51}, r"rows = 51: must be 1\.\.50"),
        ({"stride": 0}, r"stride = 0: must be at least 1"),
        ({"pool_kernel": 2}, r"pool_kernel = 2: must be odd"),
        ({"pooling": "mean"}, r"pooling = 'mean': must be one of 'max', 'avg'"),
        ({"scoring": "mass"}, r"scoring = 'mass': must be one of 'attention', 'output_change'"),
        ({"scored_keys": 118}, r"scored_keys = 118"),
        ({"k": torch.zeros(3, 3)}, r"k\.shape = \[3, 3\]"),
        ({"v": torch.zeros(1, 2, 9, 64)}, r"v\.shape = \[1, 2, 9, 64\]"),
        ({"kept_k": torch.zeros(1, 2, 9, 64)}, r"kept_k\.shape = \[1, 2, 9, 64\]"),
        ({"softcap": 0.0}, r"softcap = 0\.0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    q, k, v = CASES[0].tensors(torch.float32)
    monkeypatch.setattr(_launch.Launch, "run", lambda *_: pytest.fail("a kernel was launched"))
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in changes.items()}
    arguments = {"q": q, "k": k, "v": v, "keep": 40, "rows": 8, **options(CASES[0])} | given
    with pytest.raises(ValueError, match=message):
        compress_step(**arguments)
