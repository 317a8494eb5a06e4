"""The picture of a run: what is drawn is what the history says."""

from __future__ import annotations

import io
import logging
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsplit.__main__ import main
from fedsplit.engines.assembly import watching
from fedsplit.errors import CheckpointError, UsageError
from fedsplit.run.directory import Places, Run
from fedsplit.run.history import History, Line
from fedsplit.run.time_account import describe_round
from fedsplit.server.settings import ServerSettings
from fedsplit.watch import rounds
from fedsplit.watch.plot import charts, draw, make_figure

LINES: list[Line] = [
    {
        "round": server_round,
        "seconds": 2.0,
        "train": {"loss": 1 / server_round, "accuracy": 0.5},
        "evaluate": {"loss": 0.5 / server_round, "accuracy": 0.8},
        "clients": {
            str(rank): {
                "num_examples": 10, "seconds": 1.0 / rank, "loss": rank / server_round, "accuracy": 0.5,
                "evaluate": {"num_examples": 5, "seconds": 0.25, "loss": 0.1 * rank, "accuracy": 0.8},
            }
            for rank in (1, 2)
        },
    }
    for server_round in (1, 2, 3)
]  # fmt: skip


def many_ranks(ranks: int) -> list[Line]:
    """Two rounds, in which all begin alike and each rank ends a little better than the one before it."""
    accuracies = [{str(rank): 0.5 + last * rank / 100 for rank in range(1, ranks + 1)} for last in (0, 1)]
    return [
        {
            "round": number + 1, "seconds": 1.0, "evaluate": {"loss": 1.0, "accuracy": (0.5, 0.8)[number]},
            "clients": {rank: {"evaluate": {"accuracy": each}} for rank, each in found.items()},
        }
        for number, found in enumerate(accuracies)
    ]  # fmt: skip


def drawn(lines: list[Line], panel: int) -> list[list[float]]:
    """Return what stands on the vertical axis of each line of a panel."""
    return [np.asarray(line.get_ydata(), float).tolist() for line in make_figure(lines).axes[panel].get_lines()]


def decoded(png: bytes) -> Image.Image:
    with Image.open(io.BytesIO(png)) as picture:
        picture.load()
        return picture


def test_the_loss_of_each_client_is_faint_and_the_mean_is_bold() -> None:
    lines = make_figure(LINES).axes[0].get_lines()
    bold = [line for line in lines if line.get_linewidth() > 2]
    faint = [line for line in lines if (line.get_alpha() or 1) < 0.5]
    assert [line.get_label() for line in bold] == ["training", "test"]
    assert len(faint) == 4
    assert drawn(LINES, 0)[-2:] == [[1.0, 1 / 2, 1 / 3], [0.5, 0.25, 0.5 / 3]]
    assert drawn(LINES, 0)[0] == [1.0, 1 / 2, 1 / 3]
    assert drawn(LINES, 0)[1] == [0.1, 0.1, 0.1]


def test_the_seconds_of_a_round_are_divided_by_stage_without_a_rest() -> None:
    stages = {"wait for clients": 0.5, "train": 1.5, "merge": 0.25, "evaluate": 0.75}
    clients = {"1": {"stages": {"waiting": 0.0, "training": 1.0, "hand-off": 0.5}}}
    line = {**LINES[0], "seconds": 3.0, "stages": stages, "clients": clients}
    bars = make_figure([line]).axes[2].containers
    assert {bar.get_label(): bar[0].get_height() for bar in bars} == {
        "training": 1.0, "hand-off": 0.5, "merging": 0.25, "evaluation": 0.75, "waiting": 0.5,
    }  # fmt: skip


def test_every_panel_has_a_title_and_labels_with_units() -> None:
    axes = make_figure(LINES).axes
    assert [each.get_title(loc="left") for each in axes] == [
        "Loss", "Accuracy", "Accuracy of each rank", "Time per round",
    ]  # fmt: skip
    assert all(each.get_xlabel() == "round" for each in axes)
    assert [each.get_ylabel() for each in axes[2:]] == ["test accuracy", "seconds"]


def test_each_rank_has_a_curve_of_its_own_with_its_name_and_look() -> None:
    axes = make_figure(many_ranks(10)).axes[2]
    curves = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}
    assert list(curves) == [*map(str, range(1, 11)), "mean"]
    assert curves["3"] == [0.5, 0.53]
    assert curves["mean"] == [0.5, 0.8]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}) == 11
    legend = axes.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == list(curves)


def test_of_very_many_ranks_the_best_and_the_worst_are_named() -> None:
    axes = make_figure(many_ranks(25)).axes[2]
    legend = axes.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == ["25 (best)", "1 (worst)", "mean"]
    faint = [line for line in axes.get_lines() if line.get_color() == "#b4b4b4"]
    assert len(faint) == 23 and len(axes.get_lines()) == 26


def test_without_an_accuracy_the_ranks_are_told_apart_by_their_loss() -> None:
    lines = many_ranks(12)
    for line in lines:
        for row in line["clients"].values():
            row["evaluate"] = {"loss": row["evaluate"]["accuracy"]}
    axes = make_figure(lines).axes[2]
    assert axes.get_title(loc="left") == "Loss of each rank"
    legend = axes.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()][:2] == ["1 (best)", "12 (worst)"]


def test_a_single_rank_has_no_panel_of_its_own() -> None:
    assert len(make_figure(many_ranks(1)).axes) == 3


def test_null_is_a_gap_and_a_client_that_was_away_is_one_too() -> None:
    gap: Line = {"round": 4, "seconds": 1.0, "train": {"loss": None}, "evaluate": {}, "clients": {}}
    losses = drawn([*LINES, gap], 0)
    assert all(math.isnan(line[3]) for line in losses)
    assert decoded(draw([*LINES, gap])).size == (2040, 504)


def test_another_metric_takes_the_place_of_a_missing_accuracy() -> None:
    lines = [
        {
            "round": 1,
            "seconds": 1.0,
            "train": {"loss": 1.0},
            "evaluate": {"loss": 1.0, "f1": 0.5},
            "clients": {},
        }
    ]
    axes = make_figure(lines).axes
    assert [each.get_title(loc="left") for each in axes] == ["Loss", "F1", "Time per round"]


@pytest.mark.parametrize("rounds", [1, 200])
def test_one_round_and_very_many_are_drawn(rounds: int) -> None:
    lines: list[Any] = [{**LINES[0], "round": number + 1} for number in range(rounds)]
    picture = decoded(draw(lines))
    assert picture.size == (2040, 504)
    assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20


def test_a_line_without_any_number_is_no_reason_to_fail() -> None:
    assert decoded(draw([{"round": 1}])).size == (1080, 504)


def test_plot_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "server").mkdir()
    for line in LINES:
        History(tmp_path / "server/history.jsonl").append(line)
    output = tmp_path / "plot.png"
    assert main(["plot", "--checkpoint-dir", str(tmp_path), "--output", str(output)]) == 0
    assert decoded(output.read_bytes()).format == "PNG"
    assert "3 rounds" in capsys.readouterr().out


def test_plot_of_nothing_and_under_a_wrong_name_are_errors(tmp_path: Path) -> None:
    command = ["plot", "--checkpoint-dir", str(tmp_path), "--output"]
    assert main([*command, str(tmp_path / "plot.png")]) == CheckpointError.exit_code
    assert main([*command, str(tmp_path / "plot.jpg")]) == UsageError.exit_code
    assert main([*command, str(tmp_path / "nowhere/plot.png")]) == UsageError.exit_code
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_matplotlib_ends_well_and_says_that_there_is_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(logging.getLogger("fedsplit"), "propagate", True)
    with Run(tmp_path) as run:
        run.history.append(LINES[0])
        server = SimpleNamespace(run=run, failure=None, end_at_signals=lambda: None)
        with caplog.at_level(logging.INFO), watching(server, ServerSettings(rounds=1), live=False):  # type: ignore[arg-type]
            pass
    assert not Places(tmp_path).server.joinpath("plot.png").exists()
    assert {record.getMessage() for record in caplog.records if "plot" in record.getMessage()} == {
        "no plot is drawn: a plot needs matplotlib, which is not installed: pip install 'fedsplit[plot]'"
    }


def test_charts_for_a_page_leave_the_colours_to_it_and_are_always_the_same() -> None:
    drawn = charts(LINES)
    assert list(drawn) == ["loss", "accuracy", "accuracy of each rank", "time"]
    for name, svg in drawn.items():
        assert svg.startswith("<svg ") and svg.rstrip().endswith("</svg>")
        assert not re.search(r"(fill|stroke): #", svg), name
        assert f'aria-label="{"seconds" if name == "time" else name} by round"' in svg
    assert charts(LINES) == drawn


def test_of_very_many_metrics_a_page_gets_eight_charts() -> None:
    line = {**LINES[0], "train": {f"metric {number}": 1.0 for number in range(20)} | {"loss": 1.0}}
    assert list(charts([line]))[:2] == ["loss", "accuracy"]
    assert len(charts([line])) == 8 + 2, "and one of the ranks, and one of the time"


SPLIT = {
    "mode": "sfl-v2", "steps": 40, "steps_per_second": 20.0, "bytes_up": 4_000_000, "bytes_down": 2_000_000,
    "seconds": {"lower": 0.4, "upper": 0.2, "turn": 0.0, "upper hand-off": 0.6, "rank hand-off": 0.8},
}  # fmt: skip


def test_a_step_of_a_model_that_is_cut_has_a_panel_a_column_and_its_bytes_in_the_log() -> None:
    lines = [{**line, "split": SPLIT} for line in LINES]
    figure = make_figure(lines)
    axes = figure.axes[-2]
    assert axes.get_title("left") == "Time per step" and axes.get_ylabel() == "milliseconds, mean"
    heights = {bars.get_label(): bars[0].get_height() for bars in axes.containers}
    expected = {"lower": 10.0, "rank hand-off": 20.0, "upper hand-off": 15.0, "upper": 5.0}
    assert heights == pytest.approx(expected), "what took no time is left out"
    metrics = rounds.columns(lines)
    assert (rounds.headings(metrics)[5], rounds.cells(lines[0], metrics)[5]) == ("steps/s", "20.0")
    line = {**LINES[0], "split": SPLIT, "asked": 2, "accepted": 2, "refused": {}}
    assert "40 steps, 20.0 a second, 4.0 MB up, 2.0 MB down" in describe_round(line, 3)
