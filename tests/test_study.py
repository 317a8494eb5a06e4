"""``python -m fedsplit study``: what a file asks for, what is skipped, and studies that are ended in the middle."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fedsplit.__main__ import main
from fedsplit.commands import study
from fedsplit.engines.processes import Child
from fedsplit.errors import CheckpointError, RunFailedError, UsageError
from fedsplit.run.directory import Places
from fedsplit.run.history import History, read_history
from fedsplit.study.plan import plan_runs, read_study
from tests.bounds import BOUND_S
from tests.held import allow
from tests.programs import ROOT
from tests.test_compare import line, table
from tests.test_five_programs import link_tests

FLAGS = ("ranks", "rounds", "seed", "aggregate", "workload", "train-config", "insecure")
STUDY = """
ranks = 3
rounds = 2
seed = [0, 1, 2]
aggregate = ["fedavg", "median"]

[options]
partition = "dirichlet"
alpha = [0.1, 0.5]
epochs = 1
"""
# For real studies: a run with the seed 1 stays in the middle until the test lets it go on.
HELD = 'workload = "tests.held:digits"\n'


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study's file, in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("study.toml")
    path.write_text(STUDY)
    return path


# -- what a file asks for ----------------------------------------------------------------------------------------------


def test_a_list_is_varied_over_and_the_seeds_stand_side_by_side(file: Path) -> None:
    runs = plan_runs(read_study(file), FLAGS)
    assert [run.name for run in runs[:4]] == [
        "aggregate=fedavg,alpha=0.1,seed=0", "aggregate=fedavg,alpha=0.1,seed=1", "aggregate=fedavg,alpha=0.1,seed=2",
        "aggregate=fedavg,alpha=0.5,seed=0",
    ]  # fmt: skip
    assert len({run.name for run in runs}) == 12
    assert runs[-1].words() == [
        "--ranks=3", "--rounds=2", "--aggregate=median", "--workload-option=partition=dirichlet",
        "--workload-option=alpha=0.5", "--workload-option=epochs=1", "--seed=2",
    ]  # fmt: skip
    assert runs[-1].command() == []


def test_a_list_in_a_list_is_one_flag_given_several_times() -> None:
    first, second = plan_runs({"aggregate": [["norm*=local", "fedavg"], "median"], "insecure": True}, FLAGS)
    assert first.words() == ["--aggregate=norm*=local", "--aggregate=fedavg", "--insecure", "--seed=0"]
    assert second.words()[0] == "--aggregate=median"
    assert first.name == "aggregate=norm-local-fedavg,seed=0", "a name that every file system takes"


def test_a_flag_that_is_off_is_not_given() -> None:
    assert [run.words()[:-1] for run in plan_runs({"insecure": [True, False]}, FLAGS)] == [["--insecure"], []]


def test_a_command_is_filled_in_but_for_what_run_fills_in() -> None:
    command = ["python", "train.py", "{rank}", "{exchange_dir}", "{checkpoint_dir}", "--lr={lr}", "{seed}", "{other}"]
    first, second = plan_runs({"command": command, "options": {"lr": [0.1, 0.01]}, "seed": 7}, FLAGS)
    assert first.command() == [*command[:5], "--lr=0.1", "7", "{other}"]
    assert second.command()[5] == "--lr=0.01"
    assert first.words() == ["--seed=7"]


def test_names_that_would_be_equal_or_too_long_are_told_apart() -> None:
    rules = ["a*=median", "a?=median", *(f"{'x' * 300}{number}*=median" for number in (1, 2))]
    names = [run.name for run in plan_runs({"aggregate": rules}, FLAGS)]
    assert len(set(names)) == 4 and max(map(len, names)) < 200
    assert names == [run.name for run in plan_runs({"aggregate": rules}, FLAGS)]


def test_a_change_replaces_what_the_file_says(file: Path) -> None:
    changes = [("seed", "[5]"), ("options.alpha", "0.9"), ("aggregate", "krum"), ("options.epochs", "[1, 2]")]
    names = [run.name for run in plan_runs(read_study(file, changes), FLAGS)]
    assert names == ["epochs=1,seed=5", "epochs=2,seed=5"]
    assert "--aggregate=krum" in plan_runs(read_study(None, changes), FLAGS)[0].words()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds = [0]", "seeds: python -m fedsplit run has no such flag that a study may set; did you mean seed?"),
        ("zzz = 1", "there are: aggregate, "),
        ("address = 'x:1'", "address: python -m fedsplit run has no such flag that a study may set"),
        ("seed = []", "seed: expected at least one value, found an empty list"),
        ("seed = [0, 0]", "seed: 0 stands there twice"),
        ("seed = [2026-01-31]", "seed: expected a text, a number, true or false"),
        ("options = 3", "options: expected a table of workload options"),
        ("[grid]\nseed = 0", "grid: python -m fedsplit run has no such flag"),
        ("seed = ", "Invalid value"),
        ("rounds = 'many'", "argument -r/--rounds: expected a positive integer, not 'many'"),
        ("aggregate = 'fedagv'", "unknown rule 'fedagv' (did you mean 'fedavg'?)"),
        ("fraction-train = [0.5, 2]", "--fraction-train must be above 0"),
        ("command = 'python train.py'", "command: expected a list of words"),
        ("command = ['train', '{rank}', '{checkpoint_dir}']", "command: put {exchange_dir} into one of its words"),
        ("command = ['a', '{rank}', '{exchange_dir}', '{checkpoint_dir}']\n[options]\nlr = 1",
         "options.lr: the command does not use it; put {lr} into one of its words"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_file_and_key(
    text: str, said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    assert main(["study", str(file)]) == UsageError.exit_code
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith("fedsplit: error: study.toml: ") and said in shown
    assert not Path("study").exists()


def test_no_file_and_a_missing_one_are_errors(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == main(["study", "missing.toml"]) == UsageError.exit_code
    said = capsys.readouterr().err.splitlines()
    assert "expected FILE, a study in TOML, or --set" in said[0]
    assert said[1] == "fedsplit: error: missing.toml: No such file or directory"
    for changes in (["options=3"], ["options=3", "options.lr=1"]):
        assert main(["study", *(f"--set={change}" for change in changes)]) == UsageError.exit_code
        assert "--set: options: expected a table of workload options" in capsys.readouterr().err


def test_the_example_is_one_that_can_be_run() -> None:
    jobs = study.plan_jobs(ROOT / "examples/study.toml", [], Path("study"))
    assert len(jobs) == 12 and {job.flags.rounds for job in jobs} == {5}


# -- which runs are started --------------------------------------------------------------------------------------------


class Pretended(Child):
    """A run without a process, which ends at once: with exit code 4 for the seed 2, else as it should."""

    started: list[Pretended]
    most_at_once = 0

    def start(self, environment: Mapping[str, str]) -> None:
        self.started.append(self)
        running = [child for child in self.started if child.exit_code is None]
        type(self).most_at_once = max(self.most_at_once, len(running))
        assert self.log
        self.log.write_text("why it failed")

    def poll(self) -> int | None:
        if self.exit_code is None:
            self.exit_code = 4 if "seed=2" in self.name else 0
            assert self.log
            directory = self.log.parent.parent
            for number in (1, 2) if self.exit_code == 0 else ():
                write_round(directory, number)
        return self.exit_code

    @property
    def is_running(self) -> bool:
        return self.poll() is None


def write_round(directory: Path, number: int, accepted: int = 2) -> None:
    places = Places(directory)
    places.server.mkdir(parents=True, exist_ok=True)
    places.run.write_text("{}")
    if number not in [each["round"] for each in read_history(places.history)]:
        History(places.history).append({**line(number, 0.5, 0.7), "accepted": accepted})


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    class Counted(Pretended):
        started: list[Pretended] = []  # noqa: RUF012

    monkeypatch.setattr(study, "Child", Counted)
    return Counted


def test_when_one_fails_the_others_are_run_and_it_is_named(
    file: Path, pretended: type[Pretended], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(file), "--jobs", "2"]) == RunFailedError.exit_code
    said = capsys.readouterr()
    assert len(pretended.started) == 12 and pretended.most_at_once == 2
    failed = [f"aggregate={rule},alpha={alpha},seed=2" for rule in ("fedavg", "median") for alpha in (0.1, 0.5)]
    assert f"4 of 12 runs failed: {', '.join(failed)}" in said.err
    assert f"{failed[0]}: the run {failed[0]} ended with exit code 4; the last lines of its log, study/" in said.out
    assert "    why it failed" in said.out
    rows = table(Path("study/results.csv"))
    assert [(row["aggregate"], row["alpha"], row["seeds"], row["accuracy"]) for row in rows] == [
        (rule, alpha, "2", "0.6") for rule in ("fedavg", "median") for alpha in ("0.1", "0.5")
    ]
    assert len(table(Path("study/by-rank.csv"))) == 8 * 2 * 2
    assert Path("study/results.md").exists() and Path("study/plot.png").exists()


def test_what_is_done_is_skipped_and_what_is_not_goes_on(
    file: Path, pretended: type[Pretended], capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("rounds = 2\nseed = [0, 1, 3, 4]")
    assert main(["study", str(file)]) == 0
    assert all("--resume" not in child.command for child in pretended.started)
    pretended.started.clear()
    Places(Path("study/seed=1")).history.write_text("")
    write_round(Path("study/seed=1"), 1)
    # A run that learned nothing has all its rounds, and nothing to go on with.
    Places(Path("study/seed=3")).history.write_text("")
    for number in (1, 2):
        write_round(Path("study/seed=3"), number, accepted=0)
    assert main(["study", str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "run\tstate", "seed=0\tdone", "seed=1\tround 1 of 2", "seed=3\tround 2 of 2", "seed=4\tdone",
    ]  # fmt: skip
    assert pretended.started == []
    main(["study", str(file)])
    assert [child.name for child in pretended.started] == ["run seed=1", "run seed=3"]
    assert ["--resume" in child.command for child in pretended.started] == [True, False]


def test_every_run_has_its_own_places_and_the_command_comes_last(file: Path, pretended: type[Pretended]) -> None:
    file.write_text('rounds = 2\ncommand = ["python", "{seed}", "{rank}", "{exchange_dir}", "{checkpoint_dir}"]')
    assert main(["study", str(file), "--output-dir", "elsewhere"]) == 0
    assert pretended.started[0].command[1:] == [
        "-m", "fedsplit", "run", "--rounds=2", "--seed=0", "--checkpoint-dir=elsewhere/seed=0",
        "--exchange-dir=elsewhere/seed=0/exchange", "--", "python", "0", "{rank}", "{exchange_dir}", "{checkpoint_dir}",
    ]  # fmt: skip


def test_other_settings_under_the_same_name_are_refused_before_anything_is_run(
    file: Path, pretended: type[Pretended], capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("rounds = 2\nseed = [0, 1]")
    assert main(["study", str(file)]) == 0
    pretended.started.clear()
    assert main(["study", str(file), "--set", "rounds=5"]) == UsageError.exit_code
    assert (
        "study/seed=0 was run with rounds 2, and now it is rounds 5; take another --output-dir"
        in capsys.readouterr().err
    )
    assert main(["study", str(file), "--set", "options.lr=0.1"]) == UsageError.exit_code
    assert "study/seed=0 was run with no options.lr, and now it is options.lr 0.1" in capsys.readouterr().err
    Places(Path("study/seed=0")).settings.unlink()
    assert main(["study", str(file)]) == UsageError.exit_code
    assert "study/seed=0 has a run that is not of a study" in capsys.readouterr().err
    assert pretended.started == []


def test_more_values_in_the_file_leave_what_is_done_as_it_is(file: Path, pretended: type[Pretended]) -> None:
    file.write_text("rounds = 2\nseed = [0]\naggregate = ['fedavg']")
    assert main(["study", str(file)]) == 0
    pretended.started.clear()
    assert main(["study", str(file), "--set", "seed=[0,1]", "--set", "aggregate=['fedavg','max']"]) == 0
    assert len(pretended.started) == 3


def test_two_studies_in_one_directory_are_refused(
    file: Path, pretended: type[Pretended], capsys: pytest.CaptureFixture[str]
) -> None:
    codes = []

    def start(self: Child, environment: Mapping[str, str]) -> None:
        codes.append(main(["study", str(file)]))
        Pretended.start(self, environment)  # type: ignore[arg-type]

    pretended.start = start  # type: ignore[method-assign]
    file.write_text("rounds = 2")
    assert main(["study", str(file)]) == 0
    assert codes == [CheckpointError.exit_code]
    assert "another study is at work in study" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_table_and_no_plot(
    file: Path, pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["study", str(file), "--set", "seed=0"]) == 0
    assert "there is no study/plot.png: a plot needs matplotlib" in capsys.readouterr().err
    assert Path("study/results.csv").exists() and not Path("study/plot.png").exists()
    logging.getLogger("fedsplit").handlers.clear()


# -- real studies ------------------------------------------------------------------------------------------------------


def start_study(directory: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedsplit", "study", "study.toml", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=directory, text=True, start_new_session=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not come to it in time"
        time.sleep(0.02)


def rounds_of(run: Path) -> list[int]:
    return [each["round"] for each in read_history(Places(run).history)]


def finish(directory: Path, *flags: str) -> str:
    process = start_study(directory, *flags)
    said = process.communicate(timeout=3 * BOUND_S)[0]
    assert process.returncode == 0, said
    return str(said)


def outcome(run: Path, last_round: int) -> tuple[object, bytes]:
    """Return all test metrics of a run, and its last state."""
    history = read_history(Places(run).history)
    evaluated = [(each["round"], each["evaluate"], [row["evaluate"]["loss"] for row in each["clients"].values()])
                 for each in history]  # fmt: skip
    return evaluated, (Places(run).server / f"round-{last_round:06}/state.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_study_that_is_ended_in_the_middle_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    # The second run is held in the middle.
    (tmp_path / "study.toml").write_text(f"rounds = 4\nseed = [0, 1]\n{HELD}options.held-seed = 1\n")
    link_tests(tmp_path)
    allow(tmp_path, 2)
    first, second = tmp_path / "study/seed=0", tmp_path / "study/seed=1"
    process = start_study(tmp_path)
    try:
        wait_until(lambda: len(rounds_of(second)) >= 2, process)
    finally:
        os.kill(process.pid, number)
        said = process.communicate(timeout=BOUND_S)[0]
    assert process.returncode == (128 + number if number == signal.SIGINT else -number), said
    if number == signal.SIGINT:
        assert "interrupted by SIGINT: 1 of 2 runs are done; start it again to go on" in said
    allow(tmp_path, 4)
    run_id, history = (json.loads(Places(second).run.read_bytes())["run_id"], Places(first).history.read_bytes())
    said = finish(tmp_path)
    assert said.startswith("2 runs, 1 done already\nseed=1: goes on: round ")
    assert Places(first).history.read_bytes() == history
    assert rounds_of(second) == [1, 2, 3, 4]
    assert json.loads(Places(second).run.read_bytes())["run_id"] == run_id
    assert finish(tmp_path).startswith("2 runs, 2 done already\nsettings\t")


SCRIPT = """
import sys, torch
from fedsplit import Trainer

rank, exchange_dir, checkpoint_dir, step = sys.argv[1:]
model = torch.nn.Linear(1, 1)
model.bias.data.zero_()
with Trainer(int(rank), model, exchange_dir=exchange_dir, checkpoint_dir=checkpoint_dir) as trainer:
    for task in trainer:
        task.load_into(model)
        if task.kind == "evaluate":
            task.reply(loss=model.bias.item(), num_examples=1)
        else:
            model.bias.data += float(step)
            task.reply(model, num_examples=1)
"""


@pytest.mark.slow
def test_a_script_of_ones_own_is_varied_over_too(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    words = ["python", "train.py", "{rank}", "{exchange_dir}", "{checkpoint_dir}", "{step}"]
    (tmp_path / "study.toml").write_text(f"rounds = 2\ncommand = {json.dumps(words)}\noptions.step = [1.5, 2.5]")
    finish(tmp_path, "--jobs", "2")
    rows = table(tmp_path / "study/results.csv")
    assert [(row["settings"], float(row["loss"])) for row in rows] == [("step=1.5", 3.0), ("step=2.5", 5.0)]


@pytest.mark.slow
def test_two_rules_by_two_alphas_by_two_seeds_are_killed_in_the_middle_and_end_as_if_they_had_not(
    tmp_path: Path,
) -> None:
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    for directory in (disturbed, undisturbed):
        directory.mkdir()
        link_tests(directory)
        (directory / "study.toml").write_text(
            HELD
            + STUDY.replace("ranks = 3\nrounds = 2\nseed = [0, 1, 2]", "ranks = 2\nrounds = 3\nseed = [0, 1]")
            + "held-seed = 1\n"
        )
    # Of two runs at once, one with the seed 1 is held, then a second one.
    allow(disturbed, 2)
    allow(undisturbed, 3)
    names = [run.name for run in plan_runs(read_study(disturbed / "study.toml"), FLAGS)]
    process = start_study(disturbed, "--jobs", "2")
    try:
        # In the middle of the study, and of two runs that have something to lose.
        wait_until(lambda: all(rounds_of(disturbed / "study" / names[number]) == [1, 2] for number in (1, 3)), process)
    finally:
        process.kill()
        process.communicate(timeout=BOUND_S)
    allow(disturbed, 3)
    runs = {name: disturbed / "study" / name for name in names}
    begun = [name for name in names if rounds_of(runs[name]) and rounds_of(runs[name]) != [1, 2, 3]]
    assert begun == [names[1], names[3]]
    said = finish(disturbed, "--jobs", "2")
    assert f"{begun[0]}: goes on: round " in said
    assert all(rounds_of(run) == [1, 2, 3] for run in runs.values())
    rows = table(disturbed / "study/results.csv")
    assert [(row["aggregate"], row["alpha"], row["seeds"]) for row in rows] == [
        (rule, alpha, "2") for rule in ("fedavg", "median") for alpha in ("0.1", "0.5")
    ]
    assert len(table(disturbed / "study/by-rank.csv")) == 8 * 3 * 2
    assert (disturbed / "study/plot.png").stat().st_size > 10_000
    # One of those that were killed, by itself: to the last bit.
    rule, alpha, seed = (part.partition("=")[2] for part in begun[0].split(","))
    finish(
        undisturbed, "--set", f"aggregate=['{rule}']", "--set", f"options.alpha=[{alpha}]", "--set", f"seed=[{seed}]"
    )
    assert outcome(runs[begun[0]], 3) == outcome(undisturbed / "study" / begun[0], 3)
