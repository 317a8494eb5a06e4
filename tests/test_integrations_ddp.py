"""One trainer in several processes: the client is played by the test, or all programs are real and torchrun is used."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsplit import Trainer
from fedsplit.engines.forked import FORKS
from fedsplit.errors import RoleTakenError, TrainingError
from fedsplit.exchange.directory import Exchange
from fedsplit.states.state_dict import StateDict, own_state
from fedsplit.trainer.channel import Answer
from fedsplit.trainer.process_group import merge
from fedsplit.workloads import WorkloadContext, create_workload
from tests.bounds import BOUND_S
from tests.programs import ROOT
from tests.training import TORCHRUN, Client, end_well, federation, kill_a_process, wait_until

# -- one answer of all ------------------------------------------------------------------------------------------------


def part(num_examples: int, loss: float | None = None, **metrics: Any) -> dict[str, Any]:
    return {"num_examples": num_examples, "loss": loss, "metrics": metrics}


def merged(*parts: dict[str, Any]) -> Answer:
    return merge(Answer(state=None, **parts[0]), parts)


def test_examples_are_added_and_numbers_are_weighted_with_them() -> None:
    found = merged(part(3, 1.0, accuracy=0.5), part(1, 2.0, accuracy=0.9))
    assert (found.num_examples, found.loss) == (4, 1.25)
    assert found.metrics == {"accuracy": pytest.approx(0.6)}


def test_what_all_agree_on_stays_as_it_is_and_texts_are_those_of_process_0() -> None:
    found = merged(part(1, None, steps=7, name="a", flag=True), part(2, None, steps=7, name="b", flag=False))
    assert found.metrics == {"steps": 7, "name": "a", "flag": True}
    assert type(found.metrics["steps"]) is int and found.loss is None


def test_a_process_without_examples_spoils_no_mean_not_even_with_nan() -> None:
    assert merged(part(0, float("nan"), x=float("nan")), part(2, 0.5, x=1.0)).metrics == {"x": 1.0}
    assert merged(part(0, 1.0), part(0, 2.0)).loss == 1.5


def test_a_metric_that_some_processes_lack_is_the_mean_of_the_others() -> None:
    assert merged(part(1, None, x=1.0), part(5), part(3, None, x=2.0)).metrics == {"x": 1.75}


# -- five lines in several processes ----------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(0))


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def process_main(script: Callable[..., None], directory: Path, group: str, process: int, processes: int) -> None:
    """Be one of the processes; what is raised ends it with 1, what the script prints is in its log."""
    log = (directory / f"process-{process}.log").open("a", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/{group}", rank=process, world_size=processes,
        timeout=timedelta(seconds=10 * BOUND_S),
    )  # fmt: skip
    script(directory, process)
    torch.distributed.destroy_process_group()


class Processes:
    """A trainer in several processes, and its client played by the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.client = Client(directory)
        self.all: list[Any] = []
        self._groups = 0

    def start(self, script: Callable[..., None], processes: int = 2) -> list[Any]:
        self._groups += 1
        started = [
            FORKS.Process(
                target=process_main, args=(script, self.directory, f"group-{self._groups}", process, processes)
            )
            for process in range(processes)
        ]
        for process in started:
            process.start()
        self.all += started
        return started

    def end(self, started: list[Any], timeout_s: float = BOUND_S) -> list[int]:
        """Wait until processes have ended by themselves; returns their exit codes."""
        deadline = time.monotonic() + timeout_s
        for process in started:
            process.join(max(0.1, deadline - time.monotonic()))
        assert not any(process.is_alive() for process in started), self.logs()
        return [process.exitcode for process in started]

    def log(self, process: int) -> str:
        path = self.directory / f"process-{process}.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        return "\n".join(f"--- {process}\n{self.log(process)[-1500:]}" for process in (0, 1))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    for process in found.all:
        if process.is_alive():
            process.kill()
        process.join(10)


@contextmanager
def trainer_of(directory: Path, model: Any = None, **options: Any) -> Iterator[Trainer]:
    with Trainer(
        1, model, exchange_dir=directory / "exchange", checkpoint_dir=directory / "kept", **options
    ) as trainer:
        yield trainer


def train_together(model: Model, parallel: Any, optimizer: torch.optim.Optimizer, data: torch.Generator) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        parallel(torch.randn(4, 3, generator=data)).square().mean().backward()
        optimizer.step()
    model.steps += 3


class Parallel(torch.nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inner = torch.nn.parallel.DistributedDataParallel(model.layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def five_lines(directory: Path, process: int, hook: Callable[[Any], None] = lambda task: None) -> None:
    """Momentum that is the same in all processes, and a generator that is not."""
    model = make_model()
    parallel = Parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.Generator().manual_seed(process)
    with trainer_of(directory, model) as trainer:
        assert (trainer.process, trainer.processes) == (process, torch.distributed.get_world_size())
        for task in trainer:
            task.load_into(model)
            print(task.kind, task.server_round, float(task.state_dict["layer.weight"].double().sum()))
            if task.kind == "evaluate":
                task.reply(loss=float(process), num_examples=process + 1, metrics={"accuracy": float(process)})
                continue
            if kept := task.local_state:
                optimizer.load_state_dict(kept["optimizer"])
                data.set_state(kept["data"])
            hook(task)
            train_together(model, parallel, optimizer, data)
            kept = {"optimizer": optimizer.state_dict(), "data": data.get_state()}
            task.reply(model, num_examples=10 + process, metrics={"loss": 1.0 + process}, local_state=kept)
        assert trainer.outcome is not None
        print("outcome", trainer.outcome.outcome)


def expected_after(rounds: int, world: int = 2) -> StateDict:
    """The same without processes: every gradient is the mean of the processes' gradients."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = [torch.Generator().manual_seed(process) for process in range(world)]
    for _ in range(3 * rounds):
        optimizer.zero_grad()
        sum(model.layer(torch.randn(4, 3, generator=one)).square().mean() for one in data).div(world).backward()
        optimizer.step()
        model.steps += 1
    return own_state(model)


def assert_close(found: StateDict, expected: StateDict) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


@pytest.mark.slow
def test_five_lines_in_three_processes_are_one_trainer(processes: Processes) -> None:
    started = processes.start(five_lines, 3)
    client = processes.client
    state = client.run("initialize", 0)
    assert_close(state, own_state(make_model()))
    result = client.wait(client.ask("train", 1, state))
    assert (result.num_examples, result.metrics) == (33, {"loss": pytest.approx((10 + 22 + 36) / 33)})
    state = client.state_of(result)
    assert_close(state, expected_after(1, 3))
    result = client.wait(client.ask("evaluate", 1, state))
    assert (result.num_examples, result.loss) == (6, pytest.approx((0 + 2 + 6) / 6))
    client.finish()
    assert processes.end(started) == [0, 0, 0], processes.logs()
    # Process 0 alone waits for the client, and says so.
    waiting, first = processes.log(0).split("\n", 1)
    assert waiting.startswith("fedsplit: rank 1: waiting for a client")
    assert first == processes.log(1) == processes.log(2)
    assert "outcome complete" in first


def fail_in_process_1(task: Any) -> None:
    if task.server_round == 1 and torch.distributed.get_rank() == 1:
        raise ArithmeticError("only here")


def failing(directory: Path, process: int) -> None:
    five_lines(directory, process, fail_in_process_1)


@pytest.mark.slow
def test_an_error_in_one_process_is_one_error_while_the_other_is_stuck_in_a_collective(processes: Processes) -> None:
    started = processes.start(failing)
    client = processes.client
    state = own_state(make_model())
    result = client.wait(client.ask("train", 1, state))
    assert result.status == "error" and result.error["type"] == "ArithmeticError"
    assert result.error["message"] == "process 1 of 2: only here"
    assert "fail_in_process_1" in result.error["traceback"]
    # Well before the collective itself would give up.
    assert 0 not in processes.end(started)
    # Started anew they take the next task, as torchrun --max-restarts does it.
    version = client.ask("train", 2, state)
    again = processes.start(failing)
    assert client.wait(version).status == "ok"
    client.finish()
    assert processes.end(again) == [0, 0], processes.logs()


def fail_in_process_0(directory: Path, process: int) -> None:
    def hook(task: Any) -> None:
        if process == 0:
            raise ArithmeticError("at the top")

    five_lines(directory, process, hook)


@pytest.mark.slow
def test_an_error_in_process_0_ends_the_others_too(processes: Processes) -> None:
    started = processes.start(fail_in_process_0)
    result = processes.client.wait(processes.client.ask("train", 1, own_state(make_model())))
    assert result.error["message"] == "process 0 of 2: at the top"
    assert 0 not in processes.end(started)


def reported_and_going_on(directory: Path, process: int) -> None:
    with trainer_of(directory) as trainer:
        for task in trainer:
            task.fail(ValueError("everywhere the same"))


@pytest.mark.slow
def test_a_failure_that_a_script_reports_ends_its_processes(processes: Processes) -> None:
    started = processes.start(reported_and_going_on)
    result = processes.client.wait(processes.client.ask("train", 1, own_state(make_model())))
    assert result.error["message"].endswith("everywhere the same")
    assert 0 not in processes.end(started)
    assert "must be started again" in processes.log(0) + processes.log(1)


def uneven(directory: Path, process: int) -> None:
    with trainer_of(directory) as trainer:
        for task in trainer:
            for _ in range(3 + process):
                task.should_stop()
            task.reply(dict(task.state_dict), num_examples=1)


@pytest.mark.slow
def test_processes_that_are_out_of_step_say_so(processes: Processes) -> None:
    started = processes.start(uneven)
    result = processes.client.wait(processes.client.ask("train", 1, own_state(make_model())))
    assert result.error["type"] == TrainingError.__name__
    assert "process 1 is at should_stop(), process 0 at reply()" in result.error["message"]
    assert 0 not in processes.end(started)


def until_told(directory: Path, process: int) -> None:
    with trainer_of(directory) as trainer:
        for task in trainer:
            calls = 0
            while not task.should_stop():
                calls += 1
                time.sleep(0.001 * process)
            print("stopped after", calls)
            task.reply(dict(task.state_dict), num_examples=1)


@pytest.mark.slow
def test_all_processes_see_the_same_should_stop_at_the_same_call(processes: Processes) -> None:
    started = processes.start(until_told)
    version = processes.client.ask("train", 1, own_state(make_model()))
    wait_until(lambda: len(list((processes.directory / "kept").glob("rank-1/process-1"))) == 1)
    time.sleep(1)
    processes.client.client.cancel(version)
    wait_until(lambda: all("stopped after" in processes.log(process) for process in (0, 1)))
    processes.client.finish()
    assert processes.end(started) == [0, 0], processes.logs()
    counts = [processes.log(process).split()[2] for process in (0, 1)]
    assert counts[0] == counts[1] and int(counts[0]) > 5


def without_ddp(directory: Path, process: int) -> None:
    with trainer_of(directory) as trainer:
        for task in trainer:
            model = make_model()
            task.load_into(model)
            with torch.no_grad():
                model.layer.weight += process
            task.reply(model, num_examples=1)


@pytest.mark.slow
def test_processes_that_do_not_train_together_are_warned_about(processes: Processes) -> None:
    started = processes.start(without_ddp)
    processes.client.run("train", 1, own_state(make_model()))
    processes.client.finish()
    assert processes.end(started) == [0, 0]
    assert "is the model wrapped in DistributedDataParallel?" in processes.log(0)


def taken(directory: Path, process: int) -> None:
    try:
        with trainer_of(directory):
            raise AssertionError("two trainers of one rank")
    except RoleTakenError as exc:
        print("refused:", exc)


@pytest.mark.slow
def test_a_taken_rank_is_told_in_every_process(processes: Processes) -> None:
    with Exchange(processes.directory / "exchange", 1).hold("trainer"):
        assert processes.end(processes.start(taken)) == [0, 0], processes.logs()
    assert all(f"process {os.getpid()} on" in processes.log(process) for process in (0, 1))


def die_in_round_2(task: Any) -> None:
    if task.server_round == 2 and torch.distributed.get_rank() == 1 and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def dying(directory: Path, process: int) -> None:
    os.chdir(directory)
    five_lines(directory, process, die_in_round_2)


@pytest.mark.slow
def test_a_killed_process_leaves_the_task_to_the_next_start_which_goes_on_as_if_nothing_was(
    processes: Processes,
) -> None:
    client = processes.client
    started = processes.start(dying)
    state = client.run("train", 1, own_state(make_model()))
    version = client.ask("train", 2, state)
    assert processes.end(started) == [1, -signal.SIGKILL]
    assert client.client.result(version) is None
    assert "stays unanswered" in processes.log(0)
    again = processes.start(dying)
    state = client.state_of(client.wait(version))
    client.finish()
    assert processes.end(again) == [0, 0], processes.logs()
    # Momentum and each process's own generator have gone on.
    assert_close(state, expected_after(2))


@pytest.mark.slow
def test_with_another_number_of_processes_each_goes_on_from_the_local_state_of_process_0(processes: Processes) -> None:
    client = processes.client
    started = processes.start(five_lines)
    state = client.run("train", 1, own_state(make_model()))
    client.finish()
    assert processes.end(started) == [0, 0], processes.logs()
    version = client.ask("train", 2, state)
    started = processes.start(five_lines, 3)
    assert client.wait(version).num_examples == 33
    client.finish("run-a")
    assert processes.end(started) == [0, 0, 0], processes.logs()
    assert "was saved by 2 processes, now there are 3" in processes.log(2)


def alone(directory: Path, process: int) -> None:
    seen = []
    with Trainer(1, make_model(), standalone=True, standalone_rounds=2) as trainer:
        for task in trainer:
            seen.append((task.kind, task.server_round, int(task.state_dict["steps"])))
            if task.kind == "evaluate":
                task.reply(loss=0.0, num_examples=1)
            else:
                task.reply({**task.state_dict, "steps": task.state_dict["steps"] + 1}, num_examples=1)
    assert seen == [("train", 1, 0), ("evaluate", 1, 1), ("train", 2, 1), ("evaluate", 2, 2)]


@pytest.mark.slow
def test_standalone_works_in_several_processes(processes: Processes) -> None:
    assert processes.end(processes.start(alone)) == [0, 0], processes.logs()


# -- the shipped workloads --------------------------------------------------------------------------------------------

# The last batch of a batch size of 479 is a single image: one process has none.
BATCH_SIZES = (32, 479)


def digits_of(batch_size: int) -> Any:
    options = {"epochs": "1", "batch-size": str(batch_size), "lr": "0.02", "proximal": "0.1"}
    return create_workload("digits", WorkloadContext(rank=1, num_partitions=1, options=options))


def train_digits(directory: Path, process: int) -> None:
    task = SimpleNamespace(config={}, should_stop=lambda: False)
    for batch_size in BATCH_SIZES:
        workload = digits_of(batch_size)
        trained, judged = workload.train(task), workload.evaluate(task)
        results = [[one.num_examples, dict(one.metrics)] for one in (trained, judged)]
        torch.save([own_state(workload.model), results], directory / f"digits-{batch_size}-{process}.pt")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(processes: Processes) -> None:
    assert processes.end(processes.start(train_digits)) == [0, 0], processes.logs()
    torch.set_num_threads(1)
    task = SimpleNamespace(config={}, should_stop=lambda: False)
    for batch_size in BATCH_SIZES:
        workload = digits_of(batch_size)
        single = [workload.train(task), workload.evaluate(task)]
        (state, first), (_, second) = (
            torch.load(processes.directory / f"digits-{batch_size}-{process}.pt") for process in (0, 1)
        )
        for name, tensor in own_state(workload.model).items():
            assert torch.allclose(state[name], tensor, atol=1e-4), (name, (state[name] - tensor).abs().max())
        for whole, (n, one), (m, other) in zip(single, first, second, strict=True):
            assert n + m == whole.num_examples and abs(n - m) < 50
            for name, value in whole.metrics.items():
                assert (n * one[name] + m * other[name]) / (n + m) == pytest.approx(value, abs=1e-3), name


# -- torchrun ---------------------------------------------------------------------------------------------------------

ROUNDS, EPOCHS = 2, 10


MODEL = (str(ROOT / "model_main.py"), "--rank", "{rank}", "--num-partitions", "1", "--threads", "1")
DIGITS = (*TORCHRUN, *MODEL, "--workload-option", f"epochs={EPOCHS}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    flags = ("--rounds", str(ROUNDS), "--min-clients", "1")
    with federation(tmp_path_factory.mktemp("undisturbed"), ranks=1, trainer=DIGITS, server_flags=flags) as found:
        found.start_all()
        end_well(found, 120)
        yield found


@pytest.mark.slow
def test_torchrun_trains_the_shipped_workload_on_all_of_the_ranks_examples_and_learns_it(undisturbed: Any) -> None:
    line = undisturbed.history()[-1]
    assert line["clients"]["1"]["num_examples"] == 1438
    assert line["clients"]["1"]["evaluate"]["num_examples"] == 359
    assert line["evaluate"]["accuracy"] >= 0.93


@pytest.mark.slow
def test_killing_a_process_in_the_middle_of_a_round_is_mended_by_starting_torchrun_again(
    tmp_path: Path, undisturbed: Any
) -> None:
    flags = ("--rounds", str(ROUNDS), "--min-clients", "1")
    with federation(tmp_path, ranks=1, trainer=DIGITS, server_flags=flags) as found:
        found.start_all()
        wait_until(lambda: "round 1: evaluated" in found.log("model-1"), 60)
        wait_until(lambda: '"kind": "train"' in (found.exchange / "rank-1" / "task.json").read_text())
        time.sleep(0.3)
        kill_a_process(found, "model-1", 1)
        assert found.wait(names=["model-1"])["model-1"] != 0
        assert "round 2: trained" not in found.log("model-1"), "killed too late to show anything"
        found.start("model-1")
        end_well(found, 90)
        assert [line["refused"] for line in found.history()] == [{}] * ROUNDS
        assert found.final_state().read_bytes() == undisturbed.final_state().read_bytes()


@pytest.mark.slow
def test_torchrun_starts_its_processes_again_after_an_error_and_the_next_task_is_done(tmp_path: Path) -> None:
    trainer = (*TORCHRUN, "--max-restarts", "3", *MODEL, "--workload", "tests.test_integrations_ddp:fails_in_round_1")
    flags = ("--rounds", "2", "--min-clients", "1")
    with federation(tmp_path, ranks=1, trainer=trainer, server_flags=flags) as found:
        found.start_all()
        end_well(found, 120)
        refused, accepted = found.history()
        assert "process 1 of 2: once" in str(refused["refused"])
        assert accepted["accepted"] == 1


class FailsInRound1:
    """In process 1 the first round fails, while process 0 is in a collective with it."""

    def __init__(self) -> None:
        self.model = make_model()

    def train(self, task: Any) -> Any:
        from fedsplit import TrainResult

        if task.server_round == 1 and torch.distributed.get_rank() == 1:
            raise ArithmeticError("once")
        torch.distributed.all_reduce(torch.ones(1))
        return TrainResult(1)

    def evaluate(self, task: Any) -> Any:
        from fedsplit import EvaluateResult

        return EvaluateResult(0.0, 1)


def fails_in_round_1(context: WorkloadContext) -> FailsInRound1:
    return FailsInRound1()


def test_the_process_group_is_not_touched_where_there_is_none() -> None:
    assert "fedsplit.trainer.process_group" in sys.modules  # by this file; no trainer of a single process uses it
    with Trainer(1, make_model(), standalone=True, standalone_rounds=1) as trainer:
        assert (trainer.process, trainer.processes) == (0, 1)
