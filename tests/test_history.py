"""history.jsonl: one line a round, whatever happened to the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsplit.run.history import History, read_history, weighted_mean


def line(number: int, **metrics: float) -> dict[str, object]:
    return {"round": number, "evaluate": metrics}


def test_lines_are_read_back_and_a_torn_last_one_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.append(line(1, loss=0.5))
    history.append(line(2, loss=0.25))
    with path.open("a") as file:
        file.write('{"round": 3, "eval')
    assert [entry["round"] for entry in read_history(path)] == [1, 2]
    again = History(path)
    again.keep_up_to(2)
    again.append(line(3, loss=0.1))
    assert [json.loads(text)["round"] for text in path.read_text().splitlines()] == [1, 2, 3]


def test_a_resumed_run_drops_the_rounds_that_it_does_again(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for number in (1, 2, 3):
        history.append(line(number))
    history.keep_up_to(1)
    assert history.last_round() == 1
    assert [entry["round"] for entry in read_history(history.path)] == [1]


def test_numbers_that_are_not_finite_stand_as_null(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.append(line(1, loss=float("nan"), accuracy=float("inf")))
    assert json.loads(history.path.read_text(), parse_constant=pytest.fail)["evaluate"] == {
        "loss": None,
        "accuracy": None,
    }


@pytest.mark.parametrize(
    ("rounds", "best"),
    [
        ([], None),
        ([{"loss": 3.0}, {"loss": 1.0}, {"loss": 2.0}], 2),
        ([{"loss": 1.0, "accuracy": 0.2}, {"loss": 2.0, "accuracy": 0.9}, {"loss": 3.0, "accuracy": 0.9}], 2),
        ([{"other": 1.0}], None),
    ],
)
def test_the_best_round_has_the_highest_accuracy_or_else_the_lowest_loss(
    tmp_path: Path, rounds: list[dict[str, float]], best: int | None
) -> None:
    history = History(tmp_path / "history.jsonl")
    for number, metrics in enumerate(rounds, start=1):
        history.append(line(number, **metrics))
    assert history.best_round() == best


def test_each_metric_is_averaged_over_those_who_have_it() -> None:
    rows = [(1, {"loss": 1.0, "note": "text"}), (3, {"loss": 2.0, "accuracy": 0.5}), (0, {"loss": 100.0})]
    assert weighted_mean(rows) == {"loss": 1.75, "accuracy": 0.5}
