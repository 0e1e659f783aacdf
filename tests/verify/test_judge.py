"""What counts as rounding, and what is named as something else."""

from __future__ import annotations

import pytest
import torch

from anychip.verify.probe.judge import UNIT, flaw, limits
from anychip.verify.probe.measure import FLUSHES, NOT_REPEATABLE, Finding
from anychip.verify.probe.verdict import judge_chip
from anychip.verify.probe.worker import groups_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(*shape: int) -> torch.Tensor:
    return torch.randn(*shape or (300, 200), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_rounded_once_is_right(dtype: torch.dtype) -> None:
    assert flaw(exact().to(dtype), exact(), limits(dtype, 1, 1.0)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [64, 4096])
def test_sums_in_float32_are_right_in_any_order(dtype: torch.dtype, length: int) -> None:
    x = exact(length, 96).to(dtype)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(96)
    for row in x[order].float():
        total += row
    assert flaw(total.to(dtype), x.double().sum(0), limits(dtype, length, 1.0)) is None


def test_bfloat16_accumulation_is_wrong() -> None:
    x = exact(512, 96).to(torch.bfloat16)
    total = torch.zeros(96, dtype=torch.bfloat16)
    for row in x:
        total += row
    found = flaw(total, x.double().sum(0), limits(torch.bfloat16, 512, 1.0))
    assert found is not None and found.kind == "is wrong"


def test_cutting_off_leans_to_one_side() -> None:
    cut = (exact().float().view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()
    found = flaw(cut, exact(), limits(torch.bfloat16, 1, 1.2))
    assert found is not None and found.kind == "leans to one side"


def test_a_bias_inside_the_norm_limit_is_seen() -> None:
    found = flaw((exact() * (1 + UNIT[torch.bfloat16] / 2)).bfloat16(), exact(), limits(torch.bfloat16, 1, 1.0))
    assert found is not None and found.kind == "leans to one side"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_which_each_has_a_wrong_factor_are_seen(dtype: torch.dtype) -> None:
    right, allowed = exact(160, 1024), limits(torch.bfloat16, 1024, 1.0)
    chance = torch.Generator().manual_seed(2)
    wrong = right * (1 + UNIT[torch.bfloat16] / 2 * (2 * torch.rand(160, 1, generator=chance, dtype=torch.float64) - 1))
    assert flaw(wrong.bfloat16(), right, allowed) is None  # neither its norm nor its direction shows it
    found = flaw(wrong.bfloat16(), right, allowed, one_factor=True)
    assert found is not None and found.kind == "is too large or too small by rows"
    assert flaw(right.to(dtype), right, limits(dtype, 1024, 1.0), one_factor=True) is None


@pytest.mark.parametrize("line", [(7, slice(None)), (slice(None), 11)])
def test_one_wrong_row_or_column_is_seen(line: tuple[object, object]) -> None:
    wrong = exact(3000, 3000)
    wrong[line] *= 1.2  # 0.4 % of the whole norm
    found = flaw(wrong.bfloat16(), exact(3000, 3000), limits(torch.bfloat16, 1, 2.0))
    assert found is not None and found.kind == "is wrong in places"


def test_elements_near_zero_do_not_decide() -> None:
    """Each of them is entirely wrong, and the result right."""
    tiny = exact()
    tiny[::2] *= 1e-6
    found = tiny.clone()
    found[::2] += 1e-5
    assert flaw(found.bfloat16(), tiny, limits(torch.bfloat16, 1, 1.5)) is None


def test_infinities_belong_where_they_are() -> None:
    right = exact()
    right[3, 4] = -torch.inf
    assert flaw(right.clone(), right, limits(torch.float32, 1, 1.0)) is None
    for value in (torch.inf, torch.nan, 1e30):
        wrong = right.clone()
        wrong[3, 4] = value
        assert flaw(wrong, right, limits(torch.float32, 1, 1.0)) is not None
    assert flaw(right, exact(), limits(torch.float32, 1, 1.0)) is not None


def finding(operator: str, version: str, kind: str = "is wrong") -> Finding:
    return Finding(operator, version, "result", "case", kind, 1.0, 0.1)


def test_the_verdict_replaces_what_can_be_replaced() -> None:
    verdict = judge_chip([finding("attention", "vendor")], "", deterministic=False)
    assert verdict.fitness == "fit with fall-backs" and list(verdict.fallbacks) == ["attention"]
    verdict = judge_chip([finding("attention", "vendor"), finding("attention", "reference")], "", deterministic=False)
    assert verdict.fitness == "unfit" and "plain PyTorch" in verdict.reasons[0]
    assert judge_chip([finding("product", "")], "", deterministic=False).fitness == "unfit"
    assert judge_chip([], "the loss is NaN", deterministic=False).fitness == "unfit"


@pytest.mark.parametrize(("deterministic", "fitness"), [(False, "fit"), (True, "unfit")])
def test_other_bits_from_run_to_run_matter_where_determinism_is_asked_for(deterministic: bool, fitness: str) -> None:
    verdict = judge_chip([finding("product", "", NOT_REPEATABLE)], "", deterministic=deterministic)
    assert verdict.fitness == fitness


def test_lost_subnormal_numbers_are_a_note() -> None:
    verdict = judge_chip([finding("residual", "", FLUSHES)], "", deterministic=False)
    assert verdict.fitness == "fit" and len(verdict.notes) == 1


def test_groups_are_those_of_the_layout() -> None:
    assert groups_of({"tensor": 8, "shard": 1}, 8) == {"tensor": [[0, 1]]}
    assert groups_of({"shard": 4, "tensor": 8}, 8)["tensor"] == [[0, 1], [2, 3]]
    assert groups_of({"shard": 4, "tensor": 8}, 1) == {}
