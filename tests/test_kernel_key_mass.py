"""`kernels/key_mass.py` against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import (
    CASES,
    DEVICE,
    DTYPES,
    Case,
    assert_near,
    attention_oracle,
    inside_workspace,
    logits_of,
    mass_of,
    masses_in_several_orders,
    poisoned_memory,
    unaligned,
)

pytest.importorskip("triton")

from imdc.kernels import reference
from imdc.kernels._launch import Config, target_of
from imdc.kernels.key_mass import key_mass, plan_key_mass
from imdc.kernels.limits import LEAST_REST, OUTPUT_CHANGE, POOLINGS, SCORINGS

RAGGED = Case(1, 2, 4, 50, 117, 64)
# Layers with a sliding window are not scored.
SCORED = tuple(case for case in CASES if case.window is None)


def options(case: Case) -> dict[str, Any]:
    return {"scale": case.logits["scale"], "softcap": case.softcap}


def check(
    case: Case, dtype: torch.dtype, rows: int, layout: Any = None, stride: int = 1, scoring: str = "attention"
) -> None:
    q, k, v = case.tensors(dtype)
    out, lse = attention_oracle(q, k, v, **case.logits)
    out, lse, layout = out.to(dtype), lse.float(), layout or (lambda x: x)
    changed = {"v": v, "out": out} if scoring == OUTPUT_CHANGE else {}
    with poisoned_memory():
        given = {name: layout(x) for name, x in changed.items()}
        mass = key_mass(q, layout(k), lse, rows=rows, stride=stride, **given, **options(case))
    assert mass.dtype == torch.float32
    truth = mass_of(q.double(), k.double(), rows=rows, stride=stride, **changed, **case.logits)
    # Products of 16-bit numbers are exact in float32, in which the kernel sums them: so does its rival.
    rivals = masses_in_several_orders(case, q, k, lse, rows=rows, stride=stride, **changed)
    assert_near(mass, truth, rivals, factor=4.0, softcap=case.softcap)
    plain = reference.key_mass(q.float(), k.float(), lse, rows=rows, stride=stride, **changed, **options(case))
    assert_near(plain, truth, rivals, factor=4.0, softcap=case.softcap)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("case", SCORED, ids=str)
def test_last_rows_agree_with_float64(case: Case, scoring: str) -> None:
    check(case, torch.bfloat16, rows=min(case.queries, 9), scoring=scoring)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SCORED[:3], ids=str)
def test_all_rows_agree_with_float64(case: Case, dtype: torch.dtype, scoring: str) -> None:
    check(case, dtype, rows=case.queries, scoring=scoring)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("stride", [2, 4, 9, 1000])
@pytest.mark.parametrize("case", SCORED[:4], ids=str)
def test_every_nth_row_votes(case: Case, stride: int, scoring: str) -> None:
    check(case, torch.bfloat16, rows=case.queries, stride=stride, scoring=scoring)


def test_the_change_of_the_output_is_what_leaving_the_key_out_changes() -> None:
    """Each key is left out by hand, and the softmax over the others taken anew."""
    q, k, v = RAGGED.tensors(torch.float32)
    q = q / 4  # no key gets nearly all attention
    out, lse = attention_oracle(q, k, v, **RAGGED.logits)
    rows = 9
    found = key_mass(q, k, lse.float(), rows=rows, v=v, out=out.float(), **options(RAGGED))
    table = logits_of(q.double(), k.double(), **RAGGED.logits)[:, :, -rows:]
    values = v.double().repeat_interleave(RAGGED.group, dim=1)
    assert table.softmax(-1).max() < 1 - LEAST_REST
    for key in (0, 7, 50, 107, 112):  # the last of them is not seen by every row
        without = table.clone()
        without[..., key] = float("-inf")
        changes = (without.softmax(-1) @ values - out[:, :, -rows:]).square().sum(-1)
        seeing = min(rows, RAGGED.keys - key)
        expected = changes[..., -seeing:].unflatten(1, (RAGGED.kv_heads, RAGGED.group)).mean(dim=(2, 3))
        torch.testing.assert_close(found[..., key].double(), expected, rtol=1e-4, atol=1e-9)


def test_a_key_with_nearly_all_attention_counts_by_its_value() -> None:
    """Between an output in 16 bits and nearly the same value there is only rounding, which a share would blow up."""
    q, k, v = (torch.zeros(1, 1, n, 16, device=DEVICE, dtype=torch.bfloat16) for n in (1, 40, 40))
    q[..., 0], k[:, :, 7, 0] = 4.0, 10.0
    v += torch.linspace(1, 2, 16, device=DEVICE)
    v[:, :, 7] *= 3.0
    out, lse = reference.chunk_attention(q, k, v, scale=1.0)
    mass = key_mass(q, k, lse, scale=1.0, rows=1, v=v, out=out)
    assert mass.argmax() == 7
    torch.testing.assert_close(mass[0, 0, 7], v[0, 0, 7].float().square().sum(), rtol=1e-5, atol=0.0)


def test_a_stride_is_unbiased() -> None:
    """The mean over its possible beginnings is what all rows say, for keys that all rows see."""
    q, k, v = RAGGED.tensors(torch.float32)
    lse = attention_oracle(q, k, v, **RAGGED.logits)[1].float()
    past = RAGGED.keys - RAGGED.queries
    begun = [
        key_mass(
            q[:, :, : 48 - shift], k[:, :, : past + 48 - shift], lse[:, :, : 48 - shift], rows=45, stride=4,
            scored_keys=past, **options(RAGGED),
        )
        for shift in range(4)
    ]  # fmt: skip
    whole = key_mass(q[:, :, :48], k[:, :, : past + 48], lse[:, :, :48], rows=48, scored_keys=past, **options(RAGGED))
    torch.testing.assert_close(torch.stack(begun).mean(dim=0), whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("blocks", [(64, 128), (64, 64), (16, 32)], ids=str)
@pytest.mark.parametrize("case", SCORED[:3], ids=str)
def test_blocks_of_production_agree_with_float64(case: Case, blocks: tuple[int, int], scoring: str) -> None:
    q, k, v = case.tensors(torch.bfloat16)
    out, lse = attention_oracle(q, k, v, **case.logits)
    out, lse = out.to(q.dtype), lse.float()
    rows, mass = case.queries, torch.full((case.batch, case.kv_heads, case.keys), float("nan"), device=DEVICE)
    config = Config(*blocks, num_warps=8, num_stages=1)
    changed = {"v": v, "out": out} if scoring == OUTPUT_CHANGE else {}
    plan_key_mass(
        q, k, v, out, lse, mass,
        rows=rows, scoring=scoring, **options(case), target=target_of(q.device), config=config,
    ).run(q.device)  # fmt: skip
    truth = mass_of(q.double(), k.double(), rows=rows, **changed, **case.logits)
    assert_near(mass, truth, masses_in_several_orders(case, q, k, lse, rows=rows, **changed), factor=4.0)


@pytest.mark.parametrize("layout", [lambda k: inside_workspace(k, 200), unaligned], ids=["workspace", "unaligned"])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_reads_slices_and_nothing_beside_them(layout: Any, scoring: str) -> None:
    check(RAGGED, torch.bfloat16, rows=16, layout=layout, scoring=scoring)


def test_one_observer_hands_out_all_of_its_attention() -> None:
    q, k, v = RAGGED.tensors(torch.float32)
    lse = attention_oracle(q, k, v, **RAGGED.logits)[1].float()
    mass = key_mass(q, k, lse, rows=1, **options(RAGGED))
    torch.testing.assert_close(mass.sum(dim=-1), torch.ones(1, 2, device=DEVICE), rtol=1e-5, atol=0.0)


def test_heads_are_pooled_within_their_own_group() -> None:
    q, k, v = RAGGED.tensors(torch.float32)
    lse = attention_oracle(q, k, v, **RAGGED.logits)[1].float()
    whole = key_mass(q, k, lse, rows=5, **options(RAGGED))
    for head in range(RAGGED.kv_heads):
        own = slice(head * RAGGED.group, (head + 1) * RAGGED.group)
        alone = key_mass(q[:, own], k[:, head : head + 1], lse[:, own], rows=5, **options(RAGGED))
        assert torch.equal(whole[:, head : head + 1], alone)


@pytest.mark.parametrize("scored", [0, 1, 67, 100, 117])
def test_scored_keys_are_the_first_ones(scored: int) -> None:
    q, k, v = RAGGED.tensors(torch.bfloat16)
    lse = attention_oracle(q, k, v, **RAGGED.logits)[1].float()
    whole = key_mass(q, k, lse, rows=20, **options(RAGGED))
    with poisoned_memory():
        part = key_mass(q, k, lse, rows=20, scored_keys=scored, **options(RAGGED))
    assert torch.equal(part, whole[..., :scored])


def test_two_runs_give_the_same_bits() -> None:
    q, k, v = RAGGED.tensors(torch.bfloat16)
    lse = attention_oracle(q, k, v, **RAGGED.logits)[1].float()
    first, second = (key_mass(q, k, lse, rows=50, **options(RAGGED)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("pool_kernel", [1, 3, 15, 301])
def test_pooling_is_the_reference_s(pool_kernel: int, pooling: str) -> None:
    q, k, v = RAGGED.tensors(torch.float32)
    lse = attention_oracle(q, k, v, **RAGGED.logits)[1].float()
    plain = key_mass(q, k, lse, rows=16, scored_keys=101, **options(RAGGED))
    with poisoned_memory():
        pooled = key_mass(
            q, k, lse, rows=16, scored_keys=101, pool_kernel=pool_kernel, pooling=pooling, **options(RAGGED)
        )
    assert_pooled(pooled, plain, pool_kernel, pooling)


def assert_pooled(pooled: torch.Tensor, scores: torch.Tensor, width: int, pooling: str) -> None:
    """Largest scores to the bit; means within the rounding of a sum of `width` terms in any order."""
    if pooling == "max" or width == 1:
        assert torch.equal(pooled, reference.pool(scores, width, pooling))
        return
    # Written out: the row is zero beyond its ends, and the width stays the divisor there.
    padded = torch.nn.functional.pad(scores.double(), (width // 2, width // 2))
    exact = torch.stack([padded[..., j : j + width].sum(-1) / width for j in range(scores.shape[-1])], dim=-1)
    largest = scores.abs().max().item()
    for found in (pooled, reference.pool(scores, width, pooling)):
        assert (found.double() - exact).abs().max() <= width * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, r"rows = 0: must be 1\.\.5"),
        ({"rows": 6}, r"rows = 6: must be 1\.\.5"),
        ({"stride": 0}, r"stride = 0: must be at least 1"),
        ({"scored_keys": 10}, r"scored_keys = 10: must be 0\.\.9"),
        ({"scored_keys": -1}, r"scored_keys = -1"),
        ({"pool_kernel": 4}, r"pool_kernel = 4: must be odd"),
        ({"pool_kernel": 0}, r"pool_kernel = 0"),
        ({"pooling": "mean"}, r"pooling = 'mean': must be one of 'max', 'avg'"),
        ({"lse": torch.zeros(1, 4, 6)}, r"lse\.shape = \[1, 4, 6\]: must be \[1, 4, 5\]"),
        ({"lse": torch.zeros(1, 4, 5, dtype=torch.float64)}, r"lse\.dtype = torch\.float64"),
        ({"v": torch.zeros(1, 2, 9, 16, device=DEVICE)}, r"out = None: must be given"),
        ({"out": torch.zeros(1, 4, 5, 16, device=DEVICE)}, r"v = None: must be given"),
        ({"scale": -1.0}, r"scale = -1\.0"),
        ({"softcap": float("inf")}, r"softcap = inf"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    q, k, _ = Case(1, 2, 2, 5, 9, 16).tensors(torch.float32)
    arguments = {"q": q, "k": k, "lse": torch.zeros(1, 4, 5), "scale": 0.25, "rows": 2} | changes
    arguments["lse"] = arguments["lse"].to(DEVICE)
    with pytest.raises(ValueError, match=message):
        key_mass(**arguments)
