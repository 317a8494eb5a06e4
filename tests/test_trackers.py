"""Trackers: what a run measures arrives in TensorBoard and MLflow, by rank, and none of them can hold a run up."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedsplit.errors import UsageError
from fedsplit.run.directory import Run
from fedsplit.run.history import Line
from fedsplit.watch import trackers
from fedsplit.watch.trackers import (
    EXPERIMENT,
    MLflowTracker,
    TensorBoardTracker,
    TrackerThread,
    parse_tracker,
    scalars_of,
)  # fmt: skip
from tests.programs import Programs

LINE: Line = {
    "round": 1, "seconds": 2.0, "asked": 2, "accepted": 1, "refused": {"2": "NaN"},
    "train": {"loss": 1.25, "broken": float("nan")}, "evaluate": {"loss": 0.5, "accuracy": 0.75, "note": "text"},
    "clients": {"1": {
        "num_examples": 10, "loss": 1.25, "bytes": 100, "stages": {"training": 1.5}, "ok": True,
        "evaluate": {"loss": 0.5, "accuracy": 0.75},
    }},
    "stages": {"train": 1.75, "evaluate": 0.25}, "privacy": {"epsilon": 1.5},
}  # fmt: skip


@pytest.fixture
def said() -> Any:
    """What was logged."""
    log, screen = logging.getLogger("fedsplit"), io.StringIO()
    handler = logging.StreamHandler(screen)
    log.addHandler(handler)
    yield screen
    log.removeHandler(handler)


@pytest.fixture
def tracker_class(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    """Put a class of the test's in the place of the TensorBoard tracker."""

    def put(kind: type) -> None:
        monkeypatch.setitem(trackers.TRACKERS, "tensorboard", kind)

    return put


def test_names_tell_the_phase_and_the_rank_and_what_is_no_number_stays_away() -> None:
    assert scalars_of(LINE) == {
        "seconds/round": 2.0, "seconds/training": 1.5, "seconds/hand-off": 0.0, "seconds/transfer": 0.0,
        "seconds/merging": 0.0, "seconds/evaluation": 0.25, "seconds/waiting": 0.25,
        "clients/asked": 2.0, "clients/accepted": 1.0, "clients/bytes": 100.0,
        "train/loss": 1.25, "evaluate/loss": 0.5, "evaluate/accuracy": 0.75,
        "rank-1/train/num_examples": 10.0, "rank-1/train/loss": 1.25, "rank-1/train/bytes": 100.0,
        "rank-1/evaluate/loss": 0.5, "rank-1/evaluate/accuracy": 0.75, "privacy/epsilon": 1.5,
    }  # fmt: skip


def test_an_unknown_tracker_and_a_missing_package_are_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="there is no 'wandb'; expected tensorboard or mlflow"):
        parse_tracker("wandb")
    monkeypatch.setitem(trackers.PACKAGES, "tensorboard", ("no_such_package",))
    with pytest.raises(UsageError, match=r"needs no_such_package, .*: pip install 'fedsplit\[tensorboard\]'"):
        parse_tracker("tensorboard")


@pytest.mark.slow
def test_a_place_may_be_an_address_with_colons() -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    assert parse_tracker("mlflow:http://host:5000/x") == ("mlflow", "http://host:5000/x")
    assert parse_tracker("mlflow") == ("mlflow", None)


def test_a_tracker_that_hangs_delays_no_round_and_a_short_end(
    tmp_path: Path, tracker_class: Callable[[type], None], said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging:
        def __init__(self, *arguments: object) -> None:
            threading.Event().wait()

    monkeypatch.setattr(trackers, "FLUSH_S", 0.2)
    tracker_class(Hanging)
    with Run(tmp_path) as run, closing(TrackerThread("tensorboard", run)) as tracker:
        for _ in range(100):
            tracker.round_ended(LINE, 1)
    assert "tracker tensorboard: still writing 0 s after the end of the run; left behind" in said.getvalue()


def test_a_tracker_that_fails_is_named_and_the_run_goes_on(
    tmp_path: Path, tracker_class: Callable[[type], None], said: io.StringIO
) -> None:
    class Failing:
        def __init__(self, *arguments: object) -> None:
            raise OSError("no space\nand more")

    tracker_class(Failing)
    with Run(tmp_path) as run, closing(TrackerThread(f"tensorboard:{tmp_path}/there", run)) as tracker:
        tracker.round_ended(LINE, 1)
    assert said.getvalue() == (
        f"tracker tensorboard: gave up at {tmp_path}/there (OSError: no space); "
        "the run goes on, history.jsonl has it all\n"
    )


def test_rounds_arrive_in_order_and_the_end_says_whether_the_run_was_complete(
    tmp_path: Path, tracker_class: Callable[[type], None]
) -> None:
    seen: list[object] = []

    class Noting:
        def __init__(self, place: str, run_id: str, first_round: int, settings: Mapping[str, Any]) -> None:
            seen.extend([place, first_round, dict(settings)])

        def log(self, scalars: Mapping[str, float], server_round: int) -> None:
            seen.append((server_round, scalars["train/loss"]))

        def close(self, *, complete: bool) -> None:
            seen.append(complete)

    tracker_class(Noting)
    with (
        Run(tmp_path, settings={"tracker": "mlflow:http://me:secret@host"}) as run,
        closing(TrackerThread("tensorboard", run)) as tracker,
    ):
        for server_round in (1, 2):
            tracker.round_ended({**LINE, "round": server_round}, 3)
    settings = {"tracker": "mlflow:http://…@host"}
    assert seen == [str(tmp_path / "tensorboard"), 1, settings, (1, 1.25), (2, 1.25), False]


# -- the real libraries ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboards_own_reader_finds_the_history_of_a_real_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'fedsplit[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    programs = Programs(tmp_path, server_flags=("--rounds", "2", "--tracker", "tensorboard"))
    programs.start_all()
    assert set(programs.wait().values()) == {0}, programs.tails()
    (directory,) = (programs.checkpoints / "tensorboard").iterdir()
    reader = EventAccumulator(str(directory))
    reader.Reload()
    history = programs.history()
    for line in history:
        for name, value in scalars_of(line).items():
            found = {event.step: event.value for event in reader.Scalars(name)}
            assert found[line["round"]] == pytest.approx(value, rel=1e-6), name
    assert {"rank-1/train/loss", "rank-2/evaluate/accuracy", "seconds/hand-off"} <= set(reader.Tags()["scalars"])
    text = reader.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| rounds | 2 |" in text


def test_a_resumed_run_goes_on_in_the_same_tensorboard_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'fedsplit[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_round, last_round, loss in ((1, 3, 1.0), (3, 4, 2.0)):
        if first_round > 1:
            # Readers take the files in the order of their names, which have the second in them.
            time.sleep(1.1)
        tracker = TensorBoardTracker(str(tmp_path), "abc", first_round, {})
        for server_round in range(first_round, last_round + 1):
            tracker.log({"train/loss": loss}, server_round)
        tracker.close(complete=False)
    reader = EventAccumulator(str(tmp_path / "abc"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("train/loss")] == [(1, 1), (2, 1), (3, 2), (4, 2)]


@pytest.mark.slow
def test_mlflow_has_one_run_for_each_of_ours_also_when_it_is_resumed(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="pip install 'fedsplit[mlflow]'")
    pytest.importorskip("sqlalchemy", reason="pip install 'fedsplit[mlflow]'")
    from mlflow.tracking import MlflowClient

    lines = [{**LINE, "round": 1}, {**LINE, "round": 2, "train": {"loss": 1.0, "f1@5, é": 0.5}}]
    for server_round, line in enumerate(lines, start=1):
        tracker = MLflowTracker(str(tmp_path), "abc", server_round, {"rounds": 2, "long": "x" * 9000})
        tracker.log(scalars_of(line), server_round)
        tracker.close(complete=server_round == 2)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert (run.data.params["rounds"], len(run.data.params["long"])) == ("2", 500)
    history = client.get_metric_history(run.info.run_id, "rank-1/evaluate/accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.75), (2, 0.75)]
    assert run.data.metrics["train/loss"] == 1.0
    assert run.data.metrics["train/f1_5_ é"] == 0.5
