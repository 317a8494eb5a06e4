"""``python -m fedsplit compare``: means and deviations that were computed by hand, from histories that were written."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsplit.__main__ import main
from fedsplit.disk.files import write_json
from fedsplit.errors import CheckpointError, UsageError
from fedsplit.run.directory import Places
from fedsplit.run.history import History, Line
from fedsplit.study.results import find_runs, group, spread
from fedsplit.watch.plot import make_comparison


def line(server_round: int, *accuracies: float, loss: float | None = 0.5) -> Line:
    """A round in which every rank, from 1 on, found an accuracy, and all had as many examples."""
    clients = {
        str(rank): {"num_examples": 10, "loss": 1.0, "bytes": 1500, "evaluate": {"loss": loss, "accuracy": accuracy}}
        for rank, accuracy in enumerate(accuracies, start=1)
    }
    mean = {"loss": loss, "accuracy": sum(accuracies) / len(accuracies)}
    return {"round": server_round, "seconds": 2.0, "evaluate": mean, "clients": clients, "accepted": len(accuracies)}


def write_run(directory: Path, *lines: Line, **settings: Any) -> Path:
    """Write a run as its server would have left it."""
    places = Places(directory)
    places.server.mkdir(parents=True)
    for each in lines:
        History(places.history).append(each)
    write_json(places.run, {"run_id": "abc", "settings": {"seed": 0, "checkpoint-dir": str(directory), **settings}})
    return directory


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Three runs of one rule and two of another."""
    for seed, best in enumerate((0.7, 0.8, 0.9)):
        write_run(
            tmp_path / f"mean-{seed}", line(1, best, best), line(2, 0.5, 0.7 + seed / 10), seed=seed, aggregate="fedavg"
        )
    for seed in (0, 1):
        write_run(tmp_path / f"median-{seed}", line(1, 0.1, 0.1), line(2, 0.9, 0.9), seed=seed, aggregate="median")
    return tmp_path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as rows:
        return list(csv.DictReader(rows))


def test_runs_that_differ_only_in_the_seed_are_one_group_with_mean_and_deviation(study: Path) -> None:
    mean, median = group(find_runs([study]))
    assert (mean.label, median.label) == ("aggregate=fedavg", "aggregate=median")
    assert (len(mean.runs), len(median.runs)) == (3, 2)
    # By hand: the final accuracies are 0.6, 0.65 and 0.7, and the sample's deviation is sqrt(2 * 0.05² / 2).
    assert mean.numbers()["accuracy"] == pytest.approx((0.65, 0.05))
    assert mean.numbers()["best accuracy"] == pytest.approx((0.8, 0.1))
    assert mean.numbers()["worst rank's accuracy"] == pytest.approx((0.5, 0.0))
    assert mean.numbers()["seconds"] == (4.0, 0.0)
    assert mean.numbers()["bytes a round"] == (3000, 0.0)
    assert median.numbers()["accuracy"] == pytest.approx((0.9, 0.0))
    assert mean.curve("accuracy") == [
        (1, pytest.approx(0.8), pytest.approx(0.1)),
        (2, pytest.approx(0.65), pytest.approx(0.05)),
    ]


def test_a_single_run_has_no_deviation_and_a_number_that_one_run_lacks_is_missing_for_all() -> None:
    assert spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7.0)))
    assert spread([1.0])[0] == 1.0 and math.isnan(spread([1.0])[1])
    assert all(map(math.isnan, spread([1.0, math.nan])))


def test_a_loss_that_became_nan_is_not_hidden_by_an_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", line(1, 0.5, 0.5, loss=0.25), line(2, 0.5, 0.5, loss=None))
    (found,) = group(find_runs([run]))
    assert math.isnan(found.numbers()["loss"][0])
    assert found.numbers()["best loss"][0] == 0.25
    assert main(["compare", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split("\t")[5] == "–"


def test_the_table_is_printed_with_headings(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, sorted(study.iterdir()))]) == 0
    headings, first, second = (row.split("\t") for row in capsys.readouterr().out.splitlines())
    assert headings == [
        "settings",
        "seeds",
        "accuracy",
        "best",
        "worst rank",
        "loss",
        "rounds",
        "seconds",
        "bytes a round",
    ]
    assert first == [
        "aggregate=fedavg", "3", "0.650 ± 0.050", "0.800 ± 0.100", "0.500 ± 0.000", "0.500 ± 0.000", "2", "4.0",
        "3.0 kB",
    ]  # fmt: skip
    assert second[:3] == ["aggregate=median", "2", "0.900 ± 0.000"]


def test_the_files_have_the_same_numbers(study: Path, tmp_path: Path) -> None:
    for name in ("table.csv", "table.md", "curves.png"):
        assert main(["compare", str(study), "--output", str(tmp_path / name)]) == 0
    first, second = table(tmp_path / "table.csv")
    assert (first["settings"], first["aggregate"], first["seeds"]) == ("aggregate=fedavg", "fedavg", "3")
    assert float(first["accuracy"]) == pytest.approx(0.65)
    assert float(first["accuracy deviation"]) == pytest.approx(0.05)
    assert float(second["worst rank's accuracy"]) == pytest.approx(0.9)
    heading, ruler, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert heading.startswith("| settings | seeds | accuracy |")
    assert ruler.count("---") == heading.count("|") - 1
    assert rows[0].startswith("| aggregate=fedavg | 3 | 0.650 ± 0.050 |")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20) or []) > 20


def test_there_is_a_line_for_each_run_round_and_rank(study: Path, tmp_path: Path) -> None:
    assert main(["compare", str(study), "--by-rank", str(tmp_path / "ranks.csv")]) == 0
    rows = table(tmp_path / "ranks.csv")
    assert len(rows) == 5 * 2 * 2
    of_one = [row for row in rows if row["run"].endswith("mean-2") and row["round"] == "2"]
    assert [(row["rank"], float(row["evaluate/accuracy"])) for row in of_one] == [("1", 0.5), ("2", pytest.approx(0.9))]
    assert {(row["aggregate"], row["seed"]) for row in of_one} == {("fedavg", "2")}
    assert {row["train/num_examples"] for row in of_one} == {"10"}


def test_a_band_of_one_deviation_is_drawn_around_each_curve(study: Path) -> None:
    groups = group(find_runs([study]))
    (axes,) = make_comparison({"accuracy": {each.label: each.curve("accuracy") for each in groups}}).axes
    assert [each.get_label() for each in axes.get_lines()] == ["aggregate=fedavg", "aggregate=median"]
    assert np.allclose(axes.get_lines()[0].get_ydata(), [0.8, 0.65])
    (outline,) = axes.collections[0].get_paths()
    corners = {(round(x), round(y, 6)) for x, y in outline.vertices}
    assert corners == {(1, 0.7), (1, 0.9), (2, 0.6), (2, 0.7)}
    assert len({each.get_color() for each in axes.get_lines()}) == 2


# -- what belongs together ---------------------------------------------------------------------------------------------


def test_runs_of_equal_settings_and_seed_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, line(1, 0.5, 0.5)) for name in ("a", "b")]
    assert [each.label for each in group(find_runs(runs))] == [str(run) for run in runs]


def test_a_run_that_is_still_on_is_not_averaged_with_those_that_are_done(tmp_path: Path) -> None:
    write_run(tmp_path / "a", line(1, 0.5, 0.5), line(2, 0.9, 0.9), seed=0, rounds=2)
    write_run(tmp_path / "b", line(1, 0.5, 0.5), seed=1, rounds=2)
    assert [each.label for each in group(find_runs([tmp_path]))] == ["rounds=2", "rounds=1"]


def test_what_a_study_noted_tells_what_the_server_does_not_know(tmp_path: Path) -> None:
    for name, alpha in (("a", 0.1), ("b", 0.5)):
        run = write_run(tmp_path / name, line(1, 0.5, 0.5))
        write_json(
            Places(run).settings, {"rounds": 1, "options.alpha": alpha, "seed": 0, "aggregate": ["x=median", "max"]}
        )
    found = group(find_runs([tmp_path]))
    assert [each.label for each in found] == ["alpha=0.1", "alpha=0.5"]
    assert found[0].runs[0].settings["aggregate"] == "x=median; max"


def test_where_nothing_varies_the_runs_are_named(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"run-{seed}", line(1, 0.5, 0.5), seed=seed)
    (only,) = group(find_runs([tmp_path]))
    assert only.label == f"{tmp_path / 'run-0'} to {tmp_path / 'run-1'}"


def test_an_evaluation_on_the_server_alone_is_compared_too(tmp_path: Path) -> None:
    lines: list[Line] = [{"round": 1, "seconds": 1.0, "clients": {}, "central": {"loss": 0.25}}]
    (only,) = group(find_runs([write_run(tmp_path / "run", *lines)]))
    assert only.numbers()["loss"][0] == only.numbers()["best loss"][0] == 0.25
    assert "worst rank's loss" not in only.numbers()


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_a_directory_without_a_run_is_an_error_that_names_it(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = study / "empty"
    empty.mkdir()
    for directory in (empty, study / "nowhere"):
        assert main(["compare", str(study / "mean-0"), str(directory)]) == CheckpointError.exit_code
        said = capsys.readouterr()
        assert f"no rounds in {directory}/server/history.jsonl" in said.err and said.out == ""


def test_settings_that_cannot_be_read_are_an_error(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Places(study / "mean-0").run.write_text(json.dumps([]))
    assert main(["compare", str(study)]) == CheckpointError.exit_code
    assert f"the settings of the run in {study / 'mean-0'} cannot be read" in capsys.readouterr().err


def test_files_under_a_wrong_name_and_curves_of_nothing_are_errors(study: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    assert main(["compare", str(study), "--output", str(tmp_path / "table.xlsx")]) == UsageError.exit_code
    assert main(["compare", str(study), "--by-rank", str(tmp_path / "ranks.md")]) == UsageError.exit_code
    run = write_run(tmp_path / "blind/run", {"round": 1, "seconds": 1.0})
    assert main(["compare", str(run), "--output", str(tmp_path / "curves.png")]) == CheckpointError.exit_code
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "blind"}
