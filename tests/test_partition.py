"""The division of the training set: disjoint, complete, seeded, never an empty part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import UsageError
from fedsplit.workloads import OptionReader
from fedsplit.workloads.partition import partition, read_alpha
from tests.depth import scaled

ALPHAS = st.one_of(st.none(), st.floats(1e-3, 1e3))


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    # Class 7 but no 5 or 6: labels need not be contiguous.
    labels = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 7]), min_size=1, max_size=80))
    return np.array(labels), draw(st.integers(1, len(labels)))


@settings(max_examples=scaled(40, 200))
@given(problems(), ALPHAS, st.integers(0, 2**40))
def test_parts_are_disjoint_complete_ascending_and_differ_in_size_by_one_at_most(
    problem: tuple[np.ndarray, int], alpha: float | None, seed: int
) -> None:
    labels, num_partitions = problem
    parts = partition(labels, num_partitions, seed, alpha)
    assert len(parts) == num_partitions
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)


@settings(max_examples=scaled(10, 50))
@given(problems(), ALPHAS, st.integers(0, 2**40))
def test_the_same_seed_gives_the_same_parts(problem: tuple[np.ndarray, int], alpha: float | None, seed: int) -> None:
    labels, num_partitions = problem
    again = partition(labels.copy(), num_partitions, seed, alpha)
    for one, other in zip(partition(labels, num_partitions, seed, alpha), again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_another_seed_gives_other_parts(alpha: float | None) -> None:
    labels = np.arange(1000) % 10
    assert not np.array_equal(partition(labels, 2, 0, alpha)[0], partition(labels, 2, 1, alpha)[0])


def test_the_global_generator_is_neither_used_nor_changed() -> None:
    labels = np.arange(100) % 10
    np.random.seed(1)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    partition(labels, 3, 0, 0.5)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def _skew(alpha: float | None) -> float:
    """Total variation between a part's mix of classes and the whole's: mean over parts and 10 seeds."""
    labels = np.arange(2000) % 10
    distances = []
    for seed in range(10):
        for part in partition(labels, 10, seed, alpha):
            mix = np.bincount(labels[part], minlength=10) / len(part)
            distances.append(np.abs(mix - 0.1).sum() / 2)
    return float(np.mean(distances))


def test_iid_parts_have_the_mix_of_the_whole() -> None:
    # A sample of 200 out of ten classes is about 0.08 away by chance.
    assert _skew(None) < 0.12


def test_skew_grows_as_alpha_falls() -> None:
    skews = [_skew(alpha) for alpha in (1000.0, 10.0, 1.0, 0.1)]
    assert skews == sorted(skews)
    assert skews[0] < 0.15
    assert skews[-1] > 0.6


def test_with_a_tiny_alpha_the_first_part_drawn_has_one_class() -> None:
    labels = np.arange(1000) % 10
    parts = partition(labels, 10, 0, 1e-6)
    assert any(len(np.unique(labels[part])) == 1 for part in parts)


@pytest.mark.parametrize("alpha", [1e-300, 1e300])
def test_an_extreme_alpha_still_gives_complete_parts(alpha: float) -> None:
    parts = partition(np.arange(100) % 7, 6, 3, alpha)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))


def test_more_parts_than_examples_is_a_usage_error_that_names_both() -> None:
    with pytest.raises(UsageError, match=r"3 training examples into 4 partitions.*--num-partitions"):
        partition([0, 1, 2], 4, 0)


@pytest.mark.parametrize(
    ("options", "alpha"),
    [
        ({}, None),
        ({"partition": "iid"}, None),
        ({"partition": "iid", "alpha": "2"}, None),
        ({"partition": "dirichlet"}, 0.5),
        ({"partition": "dirichlet", "alpha": "0.1"}, 0.1),
    ],
)
def test_the_options_choose_the_scheme(options: dict[str, str], alpha: float | None) -> None:
    reader = OptionReader(options)
    assert read_alpha(reader) == alpha
    reader.finish()


@pytest.mark.parametrize("options", [{"partition": "random"}, {"alpha": "0"}, {"alpha": "-1"}, {"alpha": "x"}])
def test_options_that_name_no_scheme_are_usage_errors(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        read_alpha(OptionReader(options))
