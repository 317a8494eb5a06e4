"""What a workload is made with: options by name and type, and the context's own checks."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.errors import UsageError
from fedsplit.workloads import OptionReader, WorkloadContext


@pytest.mark.parametrize(("value", "expected"), [("3", 3), (3, 3), (3.0, 3), ("1e2", 100), (" 7 ", 7)])
def test_whole_numbers_are_read_from_text_and_numbers(value: object, expected: int) -> None:
    found = OptionReader({"epochs": value}).integer("epochs", default=1)
    assert found == expected
    assert type(found) is int


@pytest.mark.parametrize("value", ["", "x", "1.5", 0, "-1", True, "nan", "inf", "9" * 5000, [2]])
def test_what_is_no_whole_number_is_refused_with_name_expected_and_found(value: object) -> None:
    with pytest.raises(UsageError, match=r"--workload-option epochs: expected a whole number of at least 1, found"):
        OptionReader({"epochs": value}).integer("epochs", default=1)


@pytest.mark.parametrize(("value", "expected"), [("0.5", 0.5), (1, 1.0), ("1e-3", 1e-3)])
def test_numbers_are_read_from_text_and_numbers(value: object, expected: float) -> None:
    assert OptionReader({"lr": value}).number("lr", default=1.0, above=0.0) == expected


@pytest.mark.parametrize("value", ["x", "nan", "inf", 0, "-0.1", False])
def test_what_is_not_above_the_bound_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match=r"lr: expected a number of more than 0, found"):
        OptionReader({"lr": value}).number("lr", default=1.0, above=0.0)


def test_an_upper_bound_is_said() -> None:
    with pytest.raises(UsageError, match=r"momentum: expected a number of at least 0 and less than 1, found '1'"):
        OptionReader({"momentum": "1"}).number("momentum", default=0.9, below=1.0)


def test_a_choice_lists_its_words() -> None:
    with pytest.raises(UsageError, match=r"norm: expected one of batch, group, found 'layer'"):
        OptionReader({"norm": "layer"}).choice("norm", default="batch", choices=("batch", "group"))


def test_what_was_not_given_is_the_default() -> None:
    reader = OptionReader({})
    assert reader.integer("a", default=2) == 2
    assert reader.number("b", default=0.5) == 0.5
    assert reader.choice("c", default="x", choices=("x", "y")) == "x"


def test_unknown_options_are_refused_and_the_known_ones_listed() -> None:
    reader = OptionReader({"epochs": "1", "batch_size": "8", "zeal": "1"})
    reader.integer("epochs", default=1)
    reader.integer("batch-size", default=1)
    with pytest.raises(UsageError, match=r"no option batch_size, zeal; it knows: batch-size, epochs"):
        reader.finish()


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": -1}, {"num_partitions": 0}, {"seed": -1}])
def test_a_context_refuses_what_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        WorkloadContext(**{"rank": 1, **wrong})


def test_a_rank_without_a_partition_is_told_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"rank 3 .* 2 partitions.*--num-partitions 3"):
        WorkloadContext(rank=3, num_partitions=2)
