"""`kernels/select.py` against the reference and a sort in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, ON_DEVICE, poisoned_memory
from torch import Tensor

pytest.importorskip("triton")

from imdc.kernels import reference
from imdc.kernels.limits import POOLINGS
from imdc.kernels.select import INTERPRETED_RESIDENT, RESIDENT, plan_select, select


def chosen_by_hand(row: list[float], keep: int, sink_tokens: int, recent_tokens: int) -> list[int]:
    """The rule in plain Python: forced keys first, then by falling score, then by rising index."""
    total = len(row)
    free = [i for i in range(total) if sink_tokens <= i < total - recent_tokens]
    forced = [i for i in range(total) if not sink_tokens <= i < total - recent_tokens]
    best = sorted(free, key=lambda i: (-row[i], i))
    return sorted(forced + best[: keep - len(forced)])


def check(scores: Tensor, keep: int, sink_tokens: int = 0, recent_tokens: int = 0) -> None:
    scores = scores.to(DEVICE)
    forced = {"sink_tokens": sink_tokens, "recent_tokens": recent_tokens}
    with poisoned_memory():
        indices = select(scores, keep, **forced)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, reference.select(scores, keep, **forced))
    for row, found in zip(scores.flatten(0, 1).tolist(), indices.flatten(0, 1).tolist(), strict=True):
        assert found == chosen_by_hand(row, keep, sink_tokens, recent_tokens)


# Lengths on both sides of what a program holds in registers, on the interpreter and on the device.
LENGTHS = [1, 2, 100, INTERPRETED_RESIDENT, INTERPRETED_RESIDENT + 1, 300]
if ON_DEVICE:
    LENGTHS += [1000, 4097, RESIDENT, RESIDENT + 1, 40_000, 65_536]


@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_agrees_with_a_sort(total: int, share: float) -> None:
    check(torch.randn(2, 1, total, generator=torch.Generator().manual_seed(total)), max(1, int(total * share)))


# On an eighth of whole numbers, means of neighbours are exact up to their last division: equal sums stay ties.
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("width", [3, 31])
@pytest.mark.parametrize("total", LENGTHS)
def test_pooled_scores_are_chosen_as_the_reference_chooses(total: int, width: int, pooling: str) -> None:
    generator = torch.Generator().manual_seed(total)
    scores = torch.randint(-9, 9, (1, 2, total), generator=generator) / 8
    # Ties at both ends of the row, where neighbours are missing, and zeros of both signs beside each other.
    scores[..., :2], scores[..., -2:] = 1.0, 1.0
    scores[0, 0, total // 3 : total // 2] = -0.0
    scores[0, 0, total // 2 : total * 3 // 4] = 0.0
    padded = torch.full((1, 2, total + 7), float("nan"), device=DEVICE)
    padded[..., :total] = scores.to(DEVICE)
    scores = padded[..., :total]
    for keep, sinks, recent in ((1, 0, 0), ((total + 1) // 2, total // 8, total // 9)):
        ranks = torch.full((1, 2, total), -1, dtype=torch.int32, device=DEVICE)
        indices = torch.full((1, 2, keep), -1, device=DEVICE)
        forced = {"sink_tokens": sinks, "recent_tokens": recent}
        launch = plan_select(scores, indices, ranks=ranks, pool_kernel=width, pooling=pooling, **forced)
        launch.run(DEVICE)
        assert torch.equal(indices, reference.select(reference.pool(scores, width, pooling), keep, **forced))


def test_rows_are_chosen_apart() -> None:
    check(torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(3)), 20)


@pytest.mark.parametrize("choose", [select, reference.select], ids=["triton", "reference"])
@pytest.mark.parametrize("total", [0, 10])
def test_nothing_kept_is_an_empty_choice(choose: Any, total: int) -> None:
    chosen = choose(torch.zeros(2, 3, total, device=DEVICE), 0)
    assert chosen.shape == (2, 3, 0) and chosen.dtype == torch.int64 and chosen.device.type == DEVICE.type


@pytest.mark.parametrize("total", LENGTHS)
def test_ties_go_to_the_lowest_index(total: int) -> None:
    generator = torch.Generator().manual_seed(total)
    for levels in (1, 3):
        check(torch.randint(levels, (1, 1, total), generator=generator) * 0.25, (total + 1) // 2)


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (4, 0), (0, 16), (4, 16), (40, 60)])
@pytest.mark.parametrize("total", [101, 150])
def test_forced_keys_are_kept(total: int, sinks: int, recent: int) -> None:
    scores = torch.rand(1, 1, total, generator=torch.Generator().manual_seed(1)) + 1.0
    scores[..., :sinks] = 0.0
    scores[..., total - recent :] = 0.0
    for keep in {max(1, sinks + recent), min(total, sinks + recent + 7), total}:
        check(scores, keep, sinks, recent)


def test_every_finite_float_has_its_rank() -> None:
    large, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal
    row = torch.tensor([0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 4, 1.0, -1.0, large, -large, 1.0000001, 0.9999999])
    for keep in range(1, len(row) + 1, 2):
        check(row.view(1, 1, -1), keep)
    # The two zeros are one score, so the first is kept, in both orders: a rank of its own for -0.0 would show.
    for zeros in ([0.0, -0.0], [-0.0, 0.0]):
        check(torch.tensor([-1.0, *zeros, 1.0]).view(1, 1, -1), 2)
    check(row.view(1, 1, -1), 2, sink_tokens=1, recent_tokens=1)


def test_reads_a_slice() -> None:
    scores = torch.full((2, 3, 200), float("nan"), device=DEVICE)
    scores[..., :110] = torch.rand(2, 3, 110, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    check(scores[..., :110], 70)


@pytest.mark.parametrize("choose", [select, reference.select], ids=["triton", "reference"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 11}, r"keep = 11: must be 0 \(sink_tokens \+ recent_tokens\)\.\.10 \(the keys\)"),
        ({"keep": -1}, r"keep = -1"),
        ({"keep": 3, "sink_tokens": 2, "recent_tokens": 2}, r"keep = 3: must be 4 "),
        ({"keep": 3, "sink_tokens": -1}, r"sink_tokens = -1: must be at least 0"),
        ({"keep": 3, "recent_tokens": -2}, r"recent_tokens = -2"),
        ({"keep": 0, "sink_tokens": 1}, r"keep = 0: must be 1 "),
    ],
)
def test_bad_arguments_are_named(choose: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(torch.zeros(1, 2, 10, device=DEVICE), **arguments)


def test_scores_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores\.dtype = torch\.float16"):
        select(torch.zeros(1, 2, 10, dtype=torch.float16, device=DEVICE), 3)
