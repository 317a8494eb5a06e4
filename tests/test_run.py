"""``python -m fedsplit run``: one command for all programs, with trainers that are scripts of the user's own."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedsplit import cli
from fedsplit.__main__ import main, make_parser
from fedsplit.commands import client, run, server, trainer
from fedsplit.engines import together
from fedsplit.engines.processes import Child
from fedsplit.errors import RunFailedError, UsageError
from fedsplit.run.directory import Places
from fedsplit.run.history import read_history
from tests.bounds import BOUND_S
from tests.programs import programs_of, still_runs
from tests.test_demo import LINE

COMMAND = [sys.executable, "-m", "fedsplit", "run"]
# Every flag of the server, with another value than its default.
OF_THE_SERVER = [
    "--address=0.0.0.0:8123", "--rounds=7", "--min-clients=3", "--min-results=2", "--fraction-train=0.5",
    "--evaluate-every=0", "--aggregate=bn*=local", "--aggregate=median", "--strategy=FedAdam(eta=0.1)",
    "--checkpoint-dir=kept", "--keep-checkpoints=9", "--resume", "--initial-checkpoint=a file.pt",
    "--round-timeout=2.5", "--client-wait=7", "--train-config=lr=0.1", "--train-config=name=a=b",
    "--train-config=on=true", "--payload-store=none", "--engine=superlink", "--seed=5", "--tracker=mlflow:here",
    "--ssl-ca-certfile=ca.pem", "--ssl-certfile=server.pem", "--ssl-keyfile=key.pem", "--insecure",
    "--join-token-file=token", "--supernode-public-key=1.pub", "--supernode-public-key=2.pub", "--verbose",
    "--log-format=json", "--split-learning=sfl-v1", "--exchange-dir=shared", "--upper-trainers=2",
    "--buffer=2", "--merge-after=3", "--max-staleness=4", "--staleness=constant", "--mix-states", "--server-lr=0.5",
    "--balance", "--verify=always", "--wire=head.*=delta+zstd", "--wire=delta+int8",
]  # fmt: skip
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import psutil, torch
from fedsplit import Trainer

rank, exchange_dir, victim = sys.argv[1:]
model = torch.nn.Linear(2, 1)


def kill_once():
    try:
        Path("killed").touch(exist_ok=False)
    except FileExistsError:
        return
    others = psutil.Process(os.getppid()).children(recursive=True)
    os.kill(next((each.pid for each in others if each.name() == victim), os.getpid()), signal.SIGKILL)


with Trainer(rank=int(rank), model=model, exchange_dir=exchange_dir) as trainer:
    for task in trainer:
        task.load_into(model)
        if task.server_round == 2 and victim != "nobody":
            kill_once()
        print(f"rank {rank} of one's own: {task.kind} {task.server_round}")
        if task.kind == "evaluate":
            task.reply(loss=0.5, num_examples=1)
        else:
            task.reply(model, num_examples=1)
print("and more after the run")
"""


def parse(*words: str) -> argparse.Namespace:
    return make_parser().parse_args(["run", *words])


def planned(*words: str) -> list[Child]:
    arguments = parse(*words)
    return run.plan(arguments, Places(arguments.checkpoint_dir))


def parsed(program: object, words: Sequence[str]) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    program.add_flags(parser)  # type: ignore[attr-defined]
    return vars(parser.parse_args(words))


def finish(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; a script that the words name is `train.py`."""
    (directory / "train.py").write_text(SCRIPT)
    return subprocess.run([*COMMAND, *words], cwd=directory, capture_output=True, text=True, timeout=BOUND_S)


# -- what is started ---------------------------------------------------------------------------------------------------


def test_every_flag_of_the_server_reaches_the_server_as_it_was_given() -> None:
    wanted = parsed(server, OF_THE_SERVER)
    started = planned(*OF_THE_SERVER)[0]
    assert started.command[:4] == [sys.executable, "-m", "fedsplit", "server"]
    assert parsed(server, started.command[4:]) == wanted
    same = {name for name, default in cli.defaults(server.add_flags).items() if wanted[name] == default}
    assert same == {"run", "program"}, "a new flag belongs into the list above"


def test_clients_find_the_server_and_trainers_know_how_many_they_are() -> None:
    children = planned("--ranks=3", "--cut=features.2", "--cut-dtype=int8", "--window=4", *OF_THE_SERVER)
    *children, upper, second = children
    assert [child.name for child in children[1:3]] == ["client of rank 1", "trainer of rank 1"]
    clients = [parsed(client, child.command[4:]) for child in children[1::2]]
    assert [each["rank"] for each in clients] == [1, 2, 3]
    assert {str(each["server_address"]) for each in clients} == {"127.0.0.1:8123"}, "not 0.0.0.0"
    first = {name: str(value) for name, value in clients[0].items()}
    assert first["verify"] == "always"
    assert (first["root_certificates"], first["join_token_file"]) == ("ca.pem", "token")
    assert (first["payload_store"], first["engine"], first["exchange_dir"]) == ("none", "superlink", "shared")
    trainers = [parsed(trainer, child.command[4:]) for child in children[2::2]]
    assert [(each["rank"], each["num_partitions"], each["client_wait"]) for each in trainers] == [
        (1, 3, None), (2, 3, None), (3, 3, None),
    ]  # fmt: skip
    assert str(trainers[0]["checkpoint_dir"]) == "kept"
    flags = ("part", "cut", "cut_dtype", "window")
    assert {tuple(each[name] for name in flags) for each in trainers} == {("lower", "features.2", "int8", 4)}
    found = parsed(trainer, upper.command[4:])
    assert [found[name] for name in flags] == ["upper", "features.2", None, 1]
    assert str(found["exchange_dir"]) == "shared"
    found = parsed(trainer, second.command[4:])
    assert (str(found["exchange_dir"]), str(found["checkpoint_dir"])) == ("shared/upper-2", "kept/upper-2")


def test_the_address_is_free_and_a_round_waits_for_every_rank_unless_they_are_given() -> None:
    served = parsed(server, planned("--ranks=5")[0].command[4:])
    assert served["min_clients"] == 5
    assert re.fullmatch(r"127\.0\.0\.1:\d+", str(served["address"]))
    assert parsed(server, planned("--ranks=5", "--min-clients=3")[0].command[4:])["min_clients"] == 3
    assert "--server-address=[::1]:8123" in planned("--address=[::]:8123")[1].command


def test_a_script_of_ones_own_is_filled_in_and_nothing_else_of_it_is_changed() -> None:
    words = ["python", "a.py", "--at={rank}/{ranks}", "{exchange_dir}", "{checkpoint_dir}", '{"json": {}}', "--", "{x}"]
    children = planned("--ranks=2", "--exchange-dir=shared", "--", *words)
    assert children[4].command == [
        sys.executable, "a.py", "--at=2/2", "shared", "checkpoints", '{"json": {}}', "--", "{x}",
    ]  # fmt: skip


def test_gpus_are_dealt_out_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run.gpus("3") == ["0", "1", "2"]
    assert run.gpus("0,1,3") == ["0", "1", "3"]
    assert run.gpus("3,") == ["3"]
    assert run.gpus("GPU-8932f937") == ["GPU-8932f937"]
    children = planned("--ranks=3", "--gpus=2")
    dealt = [child.command[1] for child in children[2::2]]
    assert dealt == [f"CUDA_VISIBLE_DEVICES={each}" for each in (0, 1, 0)]
    assert not any("CUDA" in word for child in [children[0], *children[1::2]] for word in child.command)
    # As a scheduler leaves them: what is not ours is not dealt out.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert run.gpus("2") == ["4", "6"]
    with pytest.raises(argparse.ArgumentTypeError, match="at most the 2 of CUDA_VISIBLE_DEVICES=4,6, not 3"):
        run.gpus("3")


@pytest.mark.parametrize("text", ["0", "1,,2", "-1", "", "0 1", "x,"])
def test_what_cannot_be_gpus_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        run.gpus(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "python", "train.py"], "expected {rank} in the command after --, as in --rank {rank}; found: python"),
        (["--", "no-such-program", "{rank}"], "there is no program no-such-program"),
        (["--workload=mnist", "--", "python", "train.py", "{rank}"], "--workload is for the trainer that comes with"),
        (["--data-dir=here", "--", "python", "train.py", "{rank}"], "--data-dir is for the trainer"),
        (["--supernode-public-key=1.pub"], "this command has no keys for its clients"),
        (["--fraction-train=2"], "--fraction-train must be above 0"),
        (["--aggregate=nonsense"], "nonsense"),
        (["--address=nowhere"], "'nowhere' is not an address"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_started(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Child, "start", lambda *_: pytest.fail("something was started"))
    assert main(["run", *words]) == UsageError.exit_code
    assert message in capsys.readouterr().err


def test_a_run_that_is_complete_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Child, "start", lambda *_: pytest.fail("something was started"))
    history = Places(Path("checkpoints")).history
    history.parent.mkdir(parents=True)
    history.write_text(json.dumps(LINE | {"round": 3}) + "\n")
    assert main(["run", "--resume", "--rounds=3"]) == 0
    assert capsys.readouterr().out == "the run in checkpoints/server has 3 rounds; to go on, give more --rounds\n"


# -- child processes, small ones ---------------------------------------------------------------------------------------


def small(name: str, code: str, directory: Path) -> Child:
    return Child(name, [sys.executable, "-u", "-c", code], directory / f"{name.split()[0]}.log")


def restarts(children: Sequence[Child], directory: Path, most: int) -> together.Restarts:
    return together.Restarts(children, os.environ, directory / "run.json", most)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small programs, of which none has more to do when another one has failed."""
    monkeypatch.setattr(together, "_SETTLE_S", 0.1)


def watch(
    children: Sequence[Child], directory: Path, most: int = 0, may_stay: Callable[[Child], bool] = lambda _: False
) -> list[Child]:
    again = restarts(children, directory, most)
    try:
        for child in children:
            child.start(os.environ)
        return together.watch(children, [], again.revive, may_stay)
    finally:
        together.end(children, [])


@pytest.mark.usefixtures("soon")
def test_what_dies_is_started_again_so_often_and_its_log_goes_on(tmp_path: Path) -> None:
    dies = small("trainer of rank 1", "print('was here'); raise SystemExit(7)", tmp_path)
    idle = small("server", "import time; time.sleep(600)", tmp_path)
    assert watch([idle, dies], tmp_path, most=2) == [dies]
    assert dies.tail().splitlines() == ["was here"] * 3
    assert dies.exit_code == 7


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("code", [2, 14, 15])
def test_wrong_usage_and_the_end_of_the_run_are_not_tried_again(code: int, tmp_path: Path) -> None:
    dies = small("trainer of rank 1", f"print('was here'); raise SystemExit({code})", tmp_path)
    idle = small("server", "import time; time.sleep(600)", tmp_path)
    assert watch([idle, dies], tmp_path, most=2) == [dies]
    assert dies.tail() == "was here"


def test_a_server_that_ended_by_itself_is_not_started_again(tmp_path: Path) -> None:
    ends = small("server", "print('was here'); raise SystemExit(12)", tmp_path)
    assert watch([ends], tmp_path, most=2) == [ends]
    assert ends.tail() == "was here"


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_killed_server_goes_on_with_its_own_run_and_not_with_an_earlier_one(
    has_begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text("an earlier run")
    code = f"""
import os, sys
from pathlib import Path
print(*sys.argv[1:] or ["anew"])
if {has_begun}: Path("run.json").write_text("ours")
if not Path("once").exists(): Path("once").touch(); os.kill(os.getpid(), 9)
"""
    killed = small("server", code, tmp_path)
    assert watch([killed], tmp_path, most=1) == []
    assert killed.tail().splitlines() == ["anew", "--resume" if has_begun else "anew"]


def test_the_first_that_failed_is_the_cause(tmp_path: Path) -> None:
    # Its process is gone once its end was seen.
    wait = "while not p.exists() or not p.read_text() or Path('/proc', p.read_text()).exists(): time.sleep(0.01)"
    code = f"import time; from pathlib import Path; p = Path({str(tmp_path / 'first')!r})\n{wait}\nraise SystemExit(3)"
    later = small("client of rank 1", code, tmp_path)
    code = f"import os; from pathlib import Path; Path({str(tmp_path / 'first')!r}).write_text(str(os.getpid()))"
    first = small("trainer of rank 1", f"{code}; raise SystemExit(7)", tmp_path)
    assert [child.exit_code for child in watch([later, first], tmp_path)] == [7, 3]


def test_a_trainer_that_leaves_before_the_end_is_told_apart_from_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "_FAREWELL_S", 0.2)
    children = [
        small("server", "import time; time.sleep(600)", tmp_path),
        small("client of rank 1", "import time; time.sleep(600)", tmp_path),
        small("trainer of rank 1", "pass", tmp_path),
    ]
    with pytest.raises(RunFailedError, match="the trainer of rank 1 ended with exit code 0, and 0 s later the run was"):
        watch(children, tmp_path)


def test_who_still_runs_after_the_end_is_stopped_unless_it_may_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "_FAREWELL_S", 0.2)
    ended = small("server", "pass", tmp_path)
    over = tmp_path / "over"
    code = f"import time; from pathlib import Path\nwhile not Path({str(over)!r}).exists(): time.sleep(0.01)"
    slow = small("trainer of rank 1", code, tmp_path)
    endless = small("trainer of rank 1", "import time; time.sleep(600)", tmp_path)

    def may_stay(child: Child) -> bool:
        over.touch()
        return child is slow

    assert watch([ended, slow], tmp_path, may_stay=may_stay) == []
    assert slow.exit_code == 0 and over.exists()
    with pytest.raises(RunFailedError, match="over, but 0 s later these still ran and were stopped: trainer of rank 1"):
        watch([ended, endless], tmp_path)
    assert endless.exit_code not in (None, 0)


# -- real runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_script_that_fails_is_shown_with_its_end_and_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        "import json, os, sys, time\n"
        "from pathlib import Path\n"
        "Path('seen-' + sys.argv[1]).write_text(json.dumps([*sys.argv[2:], os.environ['CUDA_VISIBLE_DEVICES']]))\n"
        "while len(list(Path().glob('seen-*'))) < 3: time.sleep(0.01)\n"
        "if sys.argv[1] == '2': sys.exit('there is no data')\n"
        "time.sleep(600)\n"
    )
    finished = finish(
        tmp_path, "--ranks=3", "--gpus=5,7", "--checkpoint-dir=kept", "--logs", "--",
        "python", "fails.py", "{rank}", "{ranks}", "{exchange_dir}", "{checkpoint_dir}",
    )  # fmt: skip
    assert finished.returncode == 1
    assert "the trainer of rank 2 ended with exit code 1; the last lines of its log, kept/logs/trainer-2.log:" in (
        finished.stderr
    )
    assert "    there is no data" in finished.stderr
    assert "trainer 2 | there is no data" in finished.stdout.splitlines()
    seen = [json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in (1, 2, 3)]
    assert seen == [["3", "exchange", "kept", gpu] for gpu in ("5", "7", "5")]
    logs = {path.name for path in (tmp_path / "kept/logs").iterdir()}
    assert logs == {"server.log", *(f"{role}-{rank}.log" for role in ("client", "trainer") for rank in (1, 2, 3))}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["nobody", "myself", "server", "client"])
def test_a_run_with_a_script_of_ones_own_ends_well_whoever_is_killed(victim: str, tmp_path: Path) -> None:
    finished = finish(
        tmp_path, "--ranks=2", "--rounds=3", "--restart=1", "--exchange-dir=shared", "--",
        "python", "train.py", "{rank}", "{exchange_dir}", victim,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr + finished.stdout
    assert [line["round"] for line in read_history(tmp_path / "checkpoints/server/history.jsonl")] == [1, 2, 3]
    assert "after 3 rounds" in finished.stdout
    assert finished.stderr.count("was killed by SIGKILL; starting it again (1 of 1)") == (victim != "nobody")
    log = (tmp_path / "checkpoints/logs/trainer-1.log").read_text()
    assert "rank 1 of one's own: train 1" in log, "also where it was started twice"
    assert log.endswith("and more after the run\n")


@pytest.mark.slow
def test_a_killed_script_ends_the_run_with_the_code_of_its_signal(tmp_path: Path) -> None:
    finished = finish(tmp_path, "--", "python", "train.py", "{rank}", "{exchange_dir}", "myself")
    assert finished.returncode == 128 + signal.SIGKILL
    assert re.search("error: the trainer of rank [12] was killed by SIGKILL", finished.stderr)


@pytest.mark.slow
def test_ctrl_c_ends_all_and_shows_their_last_lines(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--logs", "--rounds=100000"], cwd=tmp_path, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + BOUND_S
        while not read_history(tmp_path / "checkpoints/server/history.jsonl"):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = programs_of(process.pid)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=BOUND_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert len(children) == 5
    assert not [child for child in children if still_runs(child)]
    lines = output.splitlines()
    assert "interrupted by SIGINT: all 5 programs have ended" in lines
    assert {line.split(" | ")[0] for line in lines if " | " in line} >= {"server", "client 1", "trainer 2"}
    assert re.search(r"^client 1 \| .*interrupted$", output, re.M), "what it said after Ctrl-C"
