"""Which updates are refused, and with what words."""

from __future__ import annotations

import math

import pytest
import torch

from fedsplit.aggregation import Update, check_update, validation


def reference():
    return {
        "w": torch.zeros(2, 3),
        "h": torch.zeros(4, dtype=torch.bfloat16),
        "n": torch.tensor(0),
        "e": torch.zeros(0),
    }


def update(changes=(), drop=(), num_examples=1):
    state = {key: tensor.clone() for key, tensor in reference().items() if key not in drop} | dict(changes)
    return Update(rank=1, state_dict=state, num_examples=num_examples)


def test_a_fit_update_passes():
    assert check_update(update(), reference()) is None


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (update(drop=["w"]), "it lacks 'w' of the global state"),
        (update({"x": torch.zeros(1)}), "it has 'x', which the global state does not have"),
        (
            update({"x": torch.zeros(1)}, drop=["w", "n"]),
            "it lacks 'w', 'n' of the global state; it has 'x', which the global state does not have",
        ),
        (
            update({f"x{i}": torch.zeros(1) for i in range(9)}),
            "it has 'x0', 'x1', 'x2' and 6 more, which the global state does not have",
        ),
        (update({"w": torch.zeros(3, 2)}), "'w': the global state has shape [2, 3], it has [3, 2]"),
        (update({"n": torch.tensor([0])}), "'n': the global state has shape [], it has [1]"),
        (update({"w": torch.zeros(2, 3).double()}), "'w': the global state has torch.float32, it has torch.float64"),
        (update({"w": torch.full((2, 3), math.nan)}), "NaN or Inf in 'w'"),
        (update({"h": torch.tensor([0, 0, 0, -math.inf]).bfloat16()}), "NaN or Inf in 'h'"),
        (update(num_examples=0), "num_examples is 0, expected at least 1"),
        (update(num_examples=-4), "num_examples is -4, expected at least 1"),
        (update(num_examples=1.5), "num_examples is 1.5, expected a whole number"),
        (update(num_examples=True), "num_examples is True, expected a whole number"),
    ],
)
def test_an_unfit_update_is_refused_with_the_reason(bad, says):
    assert check_update(bad, reference()) == says


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.float8_e5m2,
        torch.complex64,
        torch.complex128,
    ],
    ids=str,
)
def test_large_finite_numbers_whose_sum_overflows_pass_and_one_bad_among_them_does_not(dtype):
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
    large = torch.full((1000,), torch.finfo(real).max, dtype=torch.float64).to(dtype)
    known = {"w": torch.zeros(1000, dtype=dtype)}
    assert check_update(Update(rank=1, state_dict={"w": large}, num_examples=1), known) is None
    for bad in (math.nan, math.inf, -math.inf):
        poisoned = large.to(torch.complex128 if dtype.is_complex else torch.float64)
        poisoned[500] = bad
        state = {"w": poisoned.to(dtype)}
        assert check_update(Update(rank=1, state_dict=state, num_examples=1), known) == "NaN or Inf in 'w'"


def test_infinities_that_cancel_are_seen():
    state = {"w": torch.tensor([math.inf, -math.inf, 1.0])}
    update = Update(rank=1, state_dict=state, num_examples=1)
    assert check_update(update, {"w": torch.zeros(3)}) == "NaN or Inf in 'w'"


def test_what_the_reference_itself_holds_in_that_place_passes():
    mask = torch.tensor([0.0, -math.inf, math.nan])
    assert check_update(Update(rank=1, state_dict={"m": mask.clone()}, num_examples=1), {"m": mask}) is None
    moved = {"m": torch.tensor([-math.inf, -math.inf, math.nan])}
    assert check_update(Update(rank=1, state_dict=moved, num_examples=1), {"m": mask}) == "NaN or Inf in 'm'"
    turned = {"m": torch.tensor([0.0, math.inf, math.nan])}
    assert check_update(Update(rank=1, state_dict=turned, num_examples=1), {"m": mask}) == "NaN or Inf in 'm'"


def test_a_non_contiguous_entry_passes():
    state = {"w": torch.zeros(3, 2).t()}
    assert check_update(Update(rank=1, state_dict=state, num_examples=1), {"w": torch.zeros(2, 3)}) is None


def test_where_the_sum_of_an_entry_is_finite_its_elements_are_not_looked_at(monkeypatch):
    # Looking at each takes ten times as long as the sum, and more.
    monkeypatch.setattr(validation, "same", lambda *_: pytest.fail("the elements are looked at"))
    big = torch.randn(1000)
    assert check_update(Update(rank=1, state_dict={"w": big}, num_examples=1), {"w": big}) is None
