"""The server's terminal and its log: a live table on a terminal, the same facts as lines and as JSON elsewhere."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsplit.cli import set_up_logging
from fedsplit.commands.server import conclude
from fedsplit.run.directory import Places
from fedsplit.run.events import JsonFormatter, event, format_bytes
from fedsplit.run.history import Line, PartRow
from fedsplit.run.time_account import account
from fedsplit.server.observer import Observer, Observers
from fedsplit.watch.console import LiveConsole, rounds_table
from fedsplit.watch.rounds import cells, columns, headings
from tests.in_process import Scripts
from tests.programs import Programs, programs
from tests.slow_digits import PAUSE_S
from tests.terminal import ESCAPES, on_a_terminal
from tests.test_recovery import start_trainers_first

LINE: Line = {
    "round": 1, "seconds": 1.5, "asked": 2, "accepted": 2, "refused": {},
    "train": {"loss": 1.25, "grad_norm": 3.0}, "evaluate": {"loss": 0.5, "f1": 0.25, "accuracy": 0.75},
    "clients": {"1": {"bytes": 1_000_000}, "2": {"bytes": 1_500_000}},
}  # fmt: skip


@pytest.fixture
def fedsplit_log() -> Any:
    """Put the log back as it was."""
    log = logging.getLogger("fedsplit")
    before = log.handlers[:], log.level, log.propagate
    yield log
    log.handlers[:], log.level, log.propagate = before[0], before[1], before[2]


def console(screen: io.StringIO, *, height: int = 40, width: int = 140) -> Console:
    return Console(file=screen, force_terminal=True, width=width, height=height, color_system=None)


def text_of(screen: io.StringIO) -> str:
    return ESCAPES.sub(b"", screen.getvalue().encode()).decode()


def shown(live: LiveConsole) -> str:
    """Return what the terminal shows now."""
    screen = io.StringIO()
    console(screen).print(live.render())
    return screen.getvalue()


# -- the table ---------------------------------------------------------------------------------------------------------


def test_a_row_has_the_metrics_of_the_user_and_the_bytes_of_all_updates() -> None:
    metrics = columns([LINE])
    row = dict(zip(headings(metrics), cells(LINE, metrics), strict=True))
    assert row == {
        "round": "1", "clients": "2/2", "train loss": "1.2500", "test loss": "0.5000", "accuracy": "0.7500",
        "test f1": "0.2500", "train grad_norm": "3.0000", "seconds": "1.50", "bytes": "2.5 MB",
    }  # fmt: skip


def test_a_narrow_terminal_leaves_metrics_out_and_never_a_loss() -> None:
    shown = [str(column.header) for column in rounds_table([LINE], "run", width=70, room=9).columns]
    assert shown == ["round", "clients", "train loss", "test loss", "accuracy", "seconds", "bytes"]


def test_a_round_without_evaluation_or_with_nan_has_dashes() -> None:
    line = {"round": 7, "train": {"loss": None}, "evaluate": {}, "asked": 1, "accepted": 1}
    assert cells(line, columns([line])) == ["7", "1/1", "–", "–", "–", "–", "–"]


def test_a_metric_may_have_any_name_also_one_that_looks_like_markup() -> None:
    screen = io.StringIO()
    console(screen).print(rounds_table([{**LINE, "train": {"[/red]": 1.0}}], "run [/b]", width=140, room=9))
    assert "train [/red]" in screen.getvalue()
    assert "run [/b]" in screen.getvalue()


def test_bytes_are_written_in_the_unit_that_reads_best() -> None:
    sizes = (0, 999, 1000, 2_500_000, 7e9)
    assert [format_bytes(size) for size in sizes] == ["0 B", "999 B", "1.0 kB", "2.5 MB", "7.0 GB"]


# -- the terminal ------------------------------------------------------------------------------------------------------


def test_who_is_waited_for_is_shown_until_they_have_answered(fedsplit_log: logging.Logger) -> None:
    with LiveConsole(console(io.StringIO()), "run") as live:
        live.clients_awaited([2], 3)
        assert "waiting for clients: 1 of 3 are here (rank 2)" in shown(live)
        live.asked("train", 4, 9, [1, 2, 3])
        assert "round 4 of 9: training, waiting for rank 1, 2, 3" in shown(live)
        live.answered(2, None)
        live.waiting(3, "trainer")
        assert "waiting for rank 1, 3 (no trainer)" in shown(live)
        live.waiting(3, None)
        live.answered(1, "NaN in fc.weight")
        assert "waiting for rank 3" in shown(live)
        live.answered(3, None)
        assert "waiting for rank" not in shown(live)


def test_of_asynchronous_rounds_every_rank_is_shown_with_what_it_does_and_how_far_it_is_behind(
    fedsplit_log: logging.Logger,
) -> None:
    with LiveConsole(console(io.StringIO()), "run", asynchronous=True) as live:
        live.asked("train", 1, 9, [1, 2, 3])
        live.answered(1, None)
        live.answered(2, "NaN in fc.weight")
        assert "round 1 of 9, waiting for a merge: rank 1, training: rank 3" in shown(live)
        live.waiting(3, "trainer")
        live.asked("evaluate", 1, 9, [1, 2])
        assert "round 1 of 9, evaluating: rank 1, 2, training: rank 3 (no trainer, 1 behind)" in shown(live)
        live.answered(1, None)
        live.answered(2, None)
        live.round_ended({**LINE, "round": 1, "clients": {"1": {}}}, 9)
        live.asked("train", 2, 9, [1, 2])
        live.waiting(3, None)
        live.answered(1, None)
        live.answered(3, None)
        assert "waiting for a merge: rank 1, 3 (1 behind), training: rank 2" in shown(live)
        live.round_ended({**LINE, "round": 2, "clients": {"1": {}}}, 9)
        live.asked("train", 3, 9, [1])
        assert "round 3 of 9, training: rank 1, 2 (1 behind), waiting for a merge: rank 3 (2 behind)" in shown(live)


def test_the_split_stands_above_the_rounds_and_log_lines_go_above_both(fedsplit_log: logging.Logger) -> None:
    screen = io.StringIO()
    set_up_logging("server", verbose=False)
    with LiveConsole(console(screen), "run abc") as live:
        live.split_resolved([PartRow("head.*", 2, 2_560, "local"), PartRow("*", 4, 1_000_000, "fedavg")])
        fedsplit_log.info("split: in the table", extra=event("split"))
        fedsplit_log.warning("rank 2: train not counted: NaN in fc.weight")
        live.round_ended({**LINE, "refused": {"2": "NaN"}}, 2)
        fedsplit_log.info("round 1/2: in the table", extra=event("round"))
    text = text_of(screen)
    assert "server rank 2: train not counted: NaN in fc.weight" in text
    assert "in the table" not in text
    end = text[text.rindex("part ") :]
    assert re.search(r"head\.\* +local +2 +2\.6 kB", end)
    assert end.index("1.0 MB") < end.index("run abc") < end.index("1.2500")
    assert "starting" not in end, "nothing is going on any more"
    assert [type(each) for each in fedsplit_log.handlers] == [logging.StreamHandler], "the log is as before"


def test_only_the_newest_rounds_are_shown_when_the_terminal_is_small(fedsplit_log: logging.Logger) -> None:
    live = LiveConsole(console(io.StringIO(), height=16), "run", [{**LINE, "round": number} for number in range(1, 9)])
    live.round_ended({**LINE, "round": 9}, 9)
    assert [f"│     {number} │" in shown(live) for number in (5, 6, 9)] == [False, True, True]


def test_an_observer_that_fails_is_let_go_and_the_others_are_told(fedsplit_log: logging.Logger) -> None:
    class Broken(Observer):
        def round_ended(self, line: Line, total_rounds: int) -> None:
            raise RuntimeError("dashboard")

    class Counting(Observer):
        rounds = 0

        def round_ended(self, line: Line, total_rounds: int) -> None:
            self.rounds += 1

    said = io.StringIO()
    fedsplit_log.handlers[:] = [logging.StreamHandler(said)]
    observers, counting = Observers(), Counting()
    for observer in (Broken(), counting):
        observers.add(observer)
    for _ in range(2):
        observers.round_ended(LINE, 2)
    assert counting.rounds == 2
    assert said.getvalue() == "Broken failed and is told nothing more: RuntimeError: dashboard\n"


def test_every_event_is_passed_on() -> None:
    events = {name for name in vars(Observer) if not name.startswith("_")}
    assert events <= vars(Observers).keys()


# -- the end of a run --------------------------------------------------------------------------------------------------


def test_the_end_of_a_run_is_told_with_every_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = Places(tmp_path / "my runs")
    conclude([LINE], tmp_path / "my runs", "text")
    assert capsys.readouterr().out.splitlines() == [
        "final accuracy 0.7500 after 1 round",
        f"checkpoints: {places.server}",
        f"report:      python -m fedsplit report --checkpoint-dir '{tmp_path}/my runs' --output report.html",
    ]
    places.server.mkdir(parents=True)
    places.final_plot.touch()
    conclude([{**LINE, "evaluate": {}}], tmp_path / "my runs", "text")
    assert capsys.readouterr().out.splitlines()[::2] == ["finished after 1 round", f"plot:        {places.final_plot}"]


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_an_event_carries_its_fields_and_what_is_not_finite_is_null() -> None:
    record = logging.makeLogRecord({"msg": "round %d", "args": (1,), "levelno": logging.INFO, "levelname": "INFO"})
    record.__dict__.update(event("round", train={"loss": float("nan")}, ranks=(1, 2)))
    line = json.loads(JsonFormatter("server").format(record))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "program": "server", "level": "info", "message": "round 1", "event": "round",
        "data": {"train": {"loss": None}, "ranks": [1, 2]},
    }  # fmt: skip


# -- the real programs -------------------------------------------------------------------------------------------------


def run_on_a_terminal(programs: Programs) -> tuple[int, str]:
    """Run the server on a terminal of its own, the others without; returns its exit code and what it showed."""
    for name in programs.names[1:]:
        programs.start(name)
    return on_a_terminal(programs.command("server"), programs.directory)


@pytest.mark.slow
def test_a_server_on_a_terminal_shows_the_split_the_rounds_and_leaves_a_plot(tmp_path: Path) -> None:
    flags = ("--rounds", "2", "--aggregate", "classifier.*=median", "--aggregate", "fedavg")
    programs = Programs(tmp_path, server_flags=flags)
    code, text = run_on_a_terminal(programs)
    assert (code, programs.wait(names=programs.names[1:])) == (0, dict.fromkeys(programs.names[1:], 0)), text
    final = text[text.rindex("part ") :]
    assert re.search(r"classifier\.\* +median", final)
    assert "2 rounds" in final
    for line in programs.history():
        assert f"{line['evaluate']['accuracy']:.4f}" in final  # type: ignore[index]
    assert re.search(r"round [12] of 2: (training|evaluating), waiting for rank", text)
    assert "round 1/2 |" not in text, "the plain line is in the table"
    assert (tmp_path / "checkpoints/server/plot.png").read_bytes().startswith(b"\x89PNG")
    server = tmp_path / "checkpoints/server"
    assert text.splitlines()[-4:] == [
        f"final accuracy {programs.history()[-1]['evaluate']['accuracy']:.4f} after 2 rounds",  # type: ignore[index]
        f"checkpoints: {server}",
        f"plot:        {server / 'plot.png'}",
        f"report:      python -m fedsplit report --checkpoint-dir {server.parent} --output report.html",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("-v",), ()])
def test_what_flower_logs_is_shown_with_verbose_only(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with programs(tmp_path, server_flags=("--rounds", "1", *flags), client_flags=flags) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert ("Starting Flower server" in federation.log("server")) == bool(flags)
        assert ("Received:" in federation.log("client-1")) == bool(flags)


@pytest.mark.slow
def test_the_stages_of_a_real_round_are_where_the_seconds_went(tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(Path(__file__).parent)
    flags = ("--threads", "1", "--workload", "tests.slow_digits:slow_digits")
    with programs(tmp_path, server_flags=("--rounds", "2"), model_flags=flags) as federation:
        start_trainers_first(federation)
        assert set(federation.wait().values()) == {0}, federation.tails()
        lines: list[Any] = federation.history()
    for line in lines:
        assert sum(line["stages"].values()) == pytest.approx(line["seconds"], abs=0.001)
        for row in line["clients"].values():
            assert row["stages"]["training"] == pytest.approx(row["seconds"], abs=0.001)
            assert PAUSE_S < row["seconds"] <= sum(row["stages"].values()) <= line["stages"]["train"] + 0.05
        # Not in waiting, where whatever nobody accounts for ends up.
        assert account(line)["training"] > max(PAUSE_S, account(line)["waiting"])


@pytest.mark.slow
def test_without_a_terminal_the_same_facts_are_lines_of_json(tmp_path: Path) -> None:
    json_flags = ("--log-format", "json")
    programs = Programs(
        tmp_path, server_flags=("--rounds", "2", *json_flags), client_flags=json_flags,
        model_flags=("--threads", "1", *json_flags),
    )  # fmt: skip
    programs.start_all()
    assert set(programs.wait().values()) == {0}, programs.tails()
    lines = [json.loads(text) for text in programs.log("server").splitlines()]
    assert {line["program"] for line in lines} == {"server"}
    rounds = [line["data"] for line in lines if line.get("event") == "round"]
    assert [
        {key: value for key, value in data.items() if key != "total_rounds"} for data in rounds
    ] == programs.history()
    assert [line["data"]["rule"] for line in lines if line.get("event") == "split"] == ["fedavg"]
    assert lines[-1]["event"] == "complete"
    assert lines[-1]["data"]["checkpoints"] == str(tmp_path / "checkpoints/server")
    for name in programs.names[1:]:
        assert all(json.loads(text)["level"] in ("info", "warning") for text in programs.log(name).splitlines())


def test_an_error_is_one_line_of_json_too(scripts: Scripts) -> None:
    ended = scripts.run("server_main.py", "--rounds", "1", "--aggregate", "nonsense", "--log-format", "json")
    assert ended.code == 2
    (line,) = [json.loads(text) for text in ended.errors.splitlines()]
    assert (line["event"], line["data"]["exit_code"], line["data"]["error"]) == ("exit", 2, "UsageError")
    assert "nonsense" in line["message"]
