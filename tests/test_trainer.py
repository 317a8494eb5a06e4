"""`fedsplit.Trainer` as a library: a training script in a thread or a process, its client played by the test."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit import Trainer
from fedsplit.engines.forked import FORKS, Forked
from fedsplit.errors import (
    CheckpointError,
    FedSplitError,
    PeerMissingError,
    RoleTakenError,
    SchemaError,
    StateMismatchError,
    UsageError,
)  # fmt: skip
from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import Request, ResultRecord
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.states.state_dict import StateDict, decode, encode, own_state
from fedsplit.trainer.local_state import KEEP_ROUNDS
from tests.bounds import BOUND_S
from tests.handoffs import digest_of, wait_until

LOCAL_HEAD = (("head.*", True), ("*", False))


class Net(torch.nn.Module):
    """A body that travels and a head that may stay at home; a buffer that is a 0-d counter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(3, 4)
        self.head = torch.nn.Linear(4, 2)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def bits(state: StateDict) -> dict[str, tuple[Any, ...]]:
    return {name: (t.dtype, tuple(t.shape), encode({"x": t})[1].tobytes()) for name, t in state.items()}


class Script:
    """A training script with momentum and a generator of its own, as people write them."""

    def __init__(self) -> None:
        self.model = make_net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.generator = torch.Generator().manual_seed(7)

    def serve(self, trainer: Trainer) -> None:
        for task in trainer:
            task.load_into(self.model)
            if task.kind == "evaluate":
                task.reply(loss=0.25, num_examples=5, metrics={"accuracy": 0.5})
                continue
            if state := task.local_state:
                self.optimizer.load_state_dict(state["optimizer"])
                self.generator.set_state(state["generator"])
            self.train()
            kept = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
            task.reply(self.model, num_examples=3, metrics={"loss": 1.0}, local_state=kept)

    def train(self) -> None:
        for _ in range(3):
            x = torch.randn(8, 3, generator=self.generator)
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.model.steps += 1


class Federation:
    """The client and the server of one rank, played by the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.client = ClientSide(Exchange(directory / "exchange", 1))
        self.client.exchange.directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def ask(
        self, kind: str, server_round: int, state: StateDict | None = None, *, run_id: str = "run-a", **fields: Any
    ) -> int:
        asked = Request(run_id=run_id, kind=kind, server_round=server_round, total_rounds=9, **fields)
        payload = None if state is None else b"".join(encode(state))
        digest = None if payload is None else digest_of(payload)

        def fetch(wanted: str) -> Source | None:
            return None if payload is None else Source(bytes=len(payload), content=payload)

        version = self.client.offer(asked, digest, fetch)
        assert version is not None
        return version

    def wait(self, version: int) -> ResultRecord:
        found: list[ResultRecord] = []

        def look() -> bool:
            if result := self.client.result(version):
                found.append(result)
            return bool(found)

        wait_until(look)
        return found[0]

    def state_of(self, result: ResultRecord) -> StateDict:
        assert result.payload is not None
        return decode(bytearray((self.client.exchange.directory / result.payload.file).read_bytes()))

    def run(self, kind: str, server_round: int, state: StateDict | None = None, **fields: Any) -> StateDict:
        """Ask, wait, and return the state that comes back."""
        result = self.wait(self.ask(kind, server_round, state, **fields))
        assert result.status == "ok", result.error
        return self.state_of(result) if result.payload else {}

    def finish(self, run_id: str = "run-a") -> None:
        self.client.finish(run_id, "complete")

    def trainer(self, model: Any = None, **options: Any) -> Trainer:
        return Trainer(
            1, model, exchange_dir=self.directory / "exchange", checkpoint_dir=self.directory / "kept", **options
        )

    @contextmanager
    def script(
        self,
        serve: Callable[[Trainer], None],
        model: Any = None,
        *,
        fails: type[Exception] | None = None,
        **options: Any,
    ) -> Iterator[list[BaseException]]:
        """Run a script in a thread; at the end of the block it must have ended by itself, or be told to."""
        raised: list[BaseException] = []

        def main() -> None:
            try:
                with self.trainer(model, **options) as trainer:
                    serve(trainer)
            except BaseException as exc:  # noqa: BLE001  (handed to the test)
                raised.append(exc)

        thread = threading.Thread(target=main, daemon=True)
        thread.start()
        try:
            yield raised
            if fails is None:
                self.finish()
        finally:
            if fails is None and thread.is_alive():
                self.finish()
            thread.join(BOUND_S)
        assert not thread.is_alive()
        if fails is None and raised:
            raise raised[0]
        assert fails is None or [type(exc) for exc in raised] == [fails], raised


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


def answer_all(trainer: Trainer) -> None:
    """Give every state back as it came."""
    for task in trainer:
        if task.kind == "evaluate":
            task.reply(loss=0.0, num_examples=1)
        else:
            task.reply(dict(task.state_dict), num_examples=1)


# -- the three kinds -----------------------------------------------------------------------------------------------


def test_a_script_of_five_lines_initializes_trains_and_evaluates(federation):
    script = Script()
    start = own_state(make_net())
    with federation.script(script.serve, script.model):
        assert bits(federation.run("initialize", 0)) == bits(start)
        after = federation.run("train", 1, start)
        assert after["steps"].item() == 3 and after["steps"].shape == ()
        result = federation.wait(federation.ask("evaluate", 1, after))
        assert (result.loss, result.num_examples, result.metrics, result.payload) == (0.25, 5, {"accuracy": 0.5}, None)


def test_training_starts_from_the_received_state_and_not_from_ones_own(federation):
    """The original program trained on what it had: parameters that were received were never loaded."""
    script = Script()
    sent = {name: torch.zeros_like(tensor) for name, tensor in own_state(make_net()).items()} | {
        "steps": torch.tensor(2**53 + 1)
    }
    with federation.script(script.serve, script.model):
        after = federation.run("train", 1, sent)
    assert after["steps"].item() == 2**53 + 4
    assert torch.equal(after["body.weight"], torch.zeros(4, 3))


def test_initialize_is_the_state_on_entering_also_after_training_changed_the_model(federation):
    script = Script()
    start = bits(own_state(make_net()))
    with federation.script(script.serve, script.model):
        federation.run("train", 1, own_state(make_net()))
        assert bits(own_state(script.model)) != start
        assert bits(federation.run("initialize", 0, run_id="run-b")) == start


@pytest.mark.parametrize("form", ["module", "state_dict", "function of a module", "function of a state_dict"])
def test_the_model_may_be_a_module_a_state_dict_or_a_function(federation, form):
    model: Any = make_net()
    if "state_dict" in form:
        model = model.state_dict()
    source = (lambda: model) if "function" in form else model
    with federation.script(answer_all, source):
        assert bits(federation.run("initialize", 0)) == bits(own_state(make_net()))


def test_a_trainer_without_a_model_sees_initialize_in_its_loop(federation):
    def serve(trainer: Trainer) -> None:
        for task in trainer:
            assert task.kind == "initialize" and task.state_dict == {}
            task.reply({"a": torch.ones(2)}, num_examples=0)

    with federation.script(serve):
        assert bits(federation.run("initialize", 0)) == bits({"a": torch.ones(2)})


def test_the_loop_ends_when_the_run_is_over_and_says_how(federation):
    outcomes = []

    def serve(trainer: Trainer) -> None:
        answer_all(trainer)
        outcomes.append(trainer.outcome)

    with federation.script(serve):
        federation.run("train", 1, {"a": torch.ones(1)})
    assert (outcomes[0].run_id, outcomes[0].outcome) == ("run-a", "complete")


def test_the_task_tells_the_round_the_rounds_and_the_servers_config(federation):
    seen = []

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            seen.append((task.kind, task.server_round, task.total_rounds, dict(task.config)))
            task.reply(dict(task.state_dict), num_examples=1)

    with federation.script(serve):
        federation.run("train", 4, {"a": torch.ones(1)}, config={"lr": 0.5, "name": "x", "flag": True})
    assert seen == [("train", 4, 9, {"lr": 0.5, "name": "x", "flag": True})]


def test_writing_into_the_received_state_changes_no_file(federation):
    def serve(trainer: Trainer) -> None:
        for task in trainer:
            task.state_dict["a"].zero_()
            task.reply({"a": task.state_dict["a"]}, num_examples=1)

    with federation.script(serve):
        version = federation.ask("train", 1, {"a": torch.ones(3)})
        assert federation.state_of(federation.wait(version))["a"].tolist() == [0, 0, 0]
        path = federation.client.exchange.payload_path("task", version)
        assert path.read_bytes() == b"".join(encode({"a": torch.ones(3)}))


def test_numbers_of_numpy_and_torch_are_taken_as_metrics(federation):
    def serve(trainer: Trainer) -> None:
        for task in trainer:
            metrics = {"a": np.float32(0.5), "b": torch.tensor(3), "c": np.int64(4), "d": np.bool_(True)}
            task.reply(loss=torch.tensor(0.5), num_examples=1, metrics=metrics)

    with federation.script(serve):
        result = federation.wait(federation.ask("evaluate", 1, {"a": torch.ones(1)}))
    assert result.metrics == {"a": 0.5, "b": 3, "c": 4, "d": True} and result.loss == 0.5


def test_every_dtype_comes_back_with_its_bits_when_it_is_returned_unchanged(federation):
    state = {
        "f32": torch.randn(3), "bf16": torch.randn(3).bfloat16(), "f16": torch.randn(3).half(),
        "f64": torch.randn(2, 2).double(), "count": torch.tensor(2**53 + 1), "flag": torch.tensor([True, False]),
        "u8": torch.arange(5, dtype=torch.uint8), "none": torch.empty(0, 3),
    }  # fmt: skip
    with federation.script(answer_all):
        assert bits(federation.run("train", 1, state)) == bits(state)


# -- mistakes and failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reply", "says"),
    [
        ("evaluate", lambda task: task.reply(num_examples=1), "loss="),
        ("train", lambda task: task.reply(num_examples=1), r"task\.reply\(model"),
        ("train", lambda task: task.reply({}, num_examples=1.5), "num_examples must be a whole number"),
        ("train", lambda task: task.reply({}, num_examples=True), "num_examples must be a whole number"),
        ("train", lambda task: task.reply({}, num_examples=-1), "num_examples must be a whole number"),
        ("train", lambda task: task.reply({}, num_examples=1, metrics={"x": [1]}), "'x' is a list"),
        (
            "train",
            lambda task: task.reply({}, num_examples=1, metrics={"big": 10**400}),
            "'big' cannot be sent",
        ),
        (
            "train",
            lambda task: task.reply({}, num_examples=1, metrics={"x": "y" * 5_000_000}),
            "'x' cannot be sent",
        ),
        ("train", lambda task: task.reply({}, num_examples=2**63), "num_examples"),
        ("train", lambda task: task.reply({"x": 3}, num_examples=1), "'x' of the state_dict is a int"),
    ],
)
def test_a_wrong_reply_is_named_in_the_script_and_to_the_client(federation, kind, reply, says):
    def serve(trainer: Trainer) -> None:
        for task in trainer:
            with pytest.raises(FedSplitError, match=says) as caught:
                reply(task)
            task.fail(caught.value)

    with federation.script(serve):
        result = federation.wait(federation.ask(kind, 1, {"a": torch.ones(1)}))
    assert result.status == "error" and result.error["traceback"]
    assert federation.client.exchange.payload_versions("result") == []
    assert not list((federation.directory / "kept").glob("rank-1/round-*"))


def test_a_second_reply_is_an_error(federation):
    def serve(trainer: Trainer) -> None:
        for task in trainer:
            task.reply(dict(task.state_dict), num_examples=1)
            with pytest.raises(UsageError, match="was answered already"):
                task.reply(dict(task.state_dict), num_examples=1)

    with federation.script(serve):
        federation.run("train", 1, {"a": torch.ones(1)})


def test_an_exception_reaches_the_client_with_its_traceback_before_it_ends_the_script(federation):
    def a_function_of_the_user() -> None:
        raise ZeroDivisionError("the user's own")

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            task.load_into(make_net())
            a_function_of_the_user()

    with federation.script(serve, fails=ZeroDivisionError):
        result = federation.wait(federation.ask("train", 1, own_state(make_net())))
        assert (result.status, result.error["type"], result.error["message"]) == (
            "error", "ZeroDivisionError", "the user's own",
        )  # fmt: skip
        assert "a_function_of_the_user" in result.error["traceback"]


def test_the_middle_of_an_error_that_is_too_long_for_a_record_is_left_out(federation):
    def serve(trainer: Trainer) -> None:
        for _ in trainer:
            raise ValueError("it began " + "\U0001f600" * 4_000_000 + " and ended")

    with federation.script(serve, fails=ValueError):
        result = federation.wait(federation.ask("train", 1, own_state(make_net())))
    for text in (result.error["message"], result.error["traceback"]):
        assert "it began" in result.error["message"] and text.rstrip().endswith("and ended")
        assert len(text) < 110_000 and "characters …" in text


def test_a_failure_that_is_reported_does_not_end_the_script(federation):
    def serve(trainer: Trainer) -> None:
        for task in trainer:
            if task.server_round == 1:
                task.fail(ValueError("not this one"))
            else:
                task.reply(dict(task.state_dict), num_examples=1)

    with federation.script(serve):
        assert federation.wait(federation.ask("train", 1, {"a": torch.ones(1)})).error["message"] == "not this one"
        assert federation.run("train", 2, {"a": torch.ones(1)})


def test_a_loop_that_goes_on_without_a_reply_is_an_error_on_both_sides(federation):
    def serve(trainer: Trainer) -> None:
        for _ in trainer:
            pass

    with federation.script(serve, fails=UsageError):
        result = federation.wait(federation.ask("train", 3, {"a": torch.ones(1)}))
        assert result.status == "error" and "without task.reply() for train, round 3" in result.error["message"]


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_torchs_own_error_over_the_names_of_wrappers_says_what_to_call(federation, wrap):
    model = wrap(make_net())

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            model.load_state_dict(task.state_dict)

    with federation.script(serve, fails=RuntimeError) as raised:
        result = federation.wait(federation.ask("train", 1, own_state(make_net())))
    assert "Missing key(s) in state_dict" in str(raised[0]) and "task.load_into(model)" in raised[0].__notes__[0]
    assert "fedsplit: task.load_into(model) loads what was received" in result.error["traceback"]


def test_a_state_that_does_not_fit_is_named_and_changes_nothing(federation):
    model = make_net()
    before = bits(own_state(model))

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            task.load_into(model)

    state = own_state(make_net())
    wrong = {name: tensor for name, tensor in state.items() if name != "head.bias"} | {"extra": torch.ones(1)}
    with federation.script(serve, fails=StateMismatchError):
        result = federation.wait(federation.ask("train", 1, wrong))
    assert "'head.bias'" in result.error["message"] and "'extra'" in result.error["message"]
    assert bits(own_state(model)) == before


def test_a_second_trainer_of_a_rank_is_refused_and_told_the_process_of_the_first(federation):
    with federation.script(answer_all):
        federation.run("train", 1, {"a": torch.ones(1)})
        with pytest.raises(RoleTakenError, match=f"process {os.getpid()} on"), federation.trainer():
            pass


def test_a_newer_schema_ends_the_script(federation):
    federation.client.exchange.task_path.write_text('{"schema": "fedsplit/2"}')
    with federation.script(answer_all, fails=SchemaError):
        pass


def test_a_torn_state_is_waited_out_and_done_once_it_is_whole(federation, caplog):
    version = federation.ask("train", 1, {"a": torch.ones(1)})
    path = federation.client.exchange.payload_path("task", version)
    path.write_bytes(path.read_bytes()[:-2])
    with caplog.at_level(logging.WARNING, "fedsplit"), federation.script(answer_all):
        wait_until(lambda: "waiting for the client to write it anew" in caplog.text)
        assert federation.run("train", 1, {"a": torch.ones(1)})


def test_a_client_that_does_not_come_is_not_waited_for_longer_than_said(federation):
    with (
        pytest.raises(PeerMissingError, match=r"within 0\.2 s; start the client of rank 1"),
        federation.trainer(client_wait_s=0.2) as trainer,
    ):
        next(iter(trainer))


def test_a_client_that_is_there_is_waited_for_without_a_limit(federation):
    with (
        Exchange(federation.directory / "exchange", 1).hold("client"),
        federation.script(answer_all, client_wait_s=0.1) as raised,
    ):
        time.sleep(1.5)
        assert not raised
        assert federation.run("train", 1, {"a": torch.ones(1)})


# -- nobody waits any more -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancelled", "finished", "newer task"])
def test_should_stop_turns_true_when_nobody_waits_any_more(federation, how):
    begun, noticed = threading.Event(), threading.Event()

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            if task.server_round == 1:
                assert not task.should_stop()
                begun.set()
                wait_until(task.should_stop)
                noticed.set()
                assert task.should_stop()
            task.reply(dict(task.state_dict), num_examples=1)

    with federation.script(serve):
        version = federation.ask("train", 1, {"a": torch.ones(1)})
        assert begun.wait(BOUND_S)
        time.sleep(0.1)
        assert not noticed.is_set()
        if how == "cancelled":
            federation.client.cancel(version)
        elif how == "finished":
            federation.finish()
        else:
            federation.ask("train", 2, {"a": torch.ones(1)})
        assert noticed.wait(BOUND_S)
        assert federation.client.result(version) is None


def test_an_answer_that_nobody_waits_for_leaves_no_local_state(federation):
    begun, go = threading.Event(), threading.Event()

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            begun.set()
            assert go.wait(BOUND_S)
            task.reply(dict(task.state_dict), num_examples=1, local_state={"round": task.server_round})

    with federation.script(serve):
        version = federation.ask("train", 1, {"a": torch.ones(1)})
        assert begun.wait(BOUND_S)
        federation.client.cancel(version)
        go.set()
        federation.run("train", 2, {"a": torch.ones(1)})
    assert sorted(path.name for path in (federation.directory / "kept" / "rank-1").glob("round-*")) == ["round-000002"]


# -- local state ---------------------------------------------------------------------------------------------------


def counting(seen: list[Any]) -> Callable[[Trainer], None]:
    """Make a script that notes the local state that each task begins with."""

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            seen.append((task.kind, task.server_round, task.local_state))
            if task.kind == "evaluate":
                task.reply(loss=0.0, num_examples=1)
                continue
            kept = {"after": task.server_round, "numbers": [torch.tensor(1.5), (2, "x", None)]}
            task.reply(dict(task.state_dict), num_examples=1, local_state=kept)

    return serve


def rounds_seen(seen: list[Any]) -> list[tuple[str, int, int | None]]:
    return [(kind, at, state and state["after"]) for kind, at, state in seen]


def test_local_state_comes_back_with_the_next_round_and_after_a_restart(federation):
    seen: list[Any] = []
    state = {"a": torch.ones(1)}
    with federation.script(counting(seen)):
        federation.run("train", 1, state)
        federation.run("evaluate", 1, state)
        federation.run("train", 2, state)
    with federation.script(counting(seen)):
        federation.run("train", 3, state)
    assert rounds_seen(seen) == [("train", 1, None), ("evaluate", 1, 1), ("train", 2, 1), ("train", 3, 2)]
    assert seen[1][2]["numbers"] == [torch.tensor(1.5), (2, "x", None)]


def test_a_server_that_goes_back_finds_the_local_state_of_that_round(federation):
    seen: list[Any] = []
    with federation.script(counting(seen)):
        for server_round in (1, 2, 3, 2, 3, 1):
            federation.run("train", server_round, {"a": torch.full((1,), float(len(seen)))})
    assert rounds_seen(seen) == [
        ("train", 1, None), ("train", 2, 1), ("train", 3, 2), ("train", 2, 1), ("train", 3, 2), ("train", 1, None),
    ]  # fmt: skip


def test_another_run_begins_without_the_local_state_of_the_one_before(federation):
    seen: list[Any] = []
    with federation.script(counting(seen)):
        federation.run("train", 1, {"a": torch.ones(1)})
        federation.run("train", 2, {"a": torch.ones(1)}, run_id="run-b")
    assert rounds_seen(seen) == [("train", 1, None), ("train", 2, None)]


def test_with_reset_each_round_starts_fresh(federation):
    seen: list[Any] = []
    with federation.script(counting(seen), state="reset"):
        federation.run("train", 1, {"a": torch.ones(1)})
        federation.run("train", 2, {"a": torch.ones(1)})
    assert rounds_seen(seen) == [("train", 1, None), ("train", 2, None)]


class OfTheUser:
    pass


def test_a_local_state_that_cannot_be_read_back_safely_is_refused_by_name(federation):
    def serve(trainer: Trainer) -> None:
        for task in trainer:
            task.reply(dict(task.state_dict), num_examples=1, local_state={"mine": OfTheUser()})

    with federation.script(serve, fails=UsageError) as raised:
        federation.ask("train", 1, {"a": torch.ones(1)})
        wait_until(lambda: bool(raised))
    assert "OfTheUser" in str(raised[0])


def test_a_reply_that_cannot_be_saved_reaches_the_client_too(federation):
    def serve(trainer: Trainer) -> None:
        for task in trainer:
            task.reply(dict(task.state_dict), num_examples=1, local_state={"mine": OfTheUser()})

    with federation.script(serve, fails=UsageError):
        result = federation.wait(federation.ask("train", 1, {"a": torch.ones(1)}))
    assert result.status == "error" and "OfTheUser" in result.error["message"]


def test_a_round_whose_local_state_was_pruned_is_refused_and_the_client_is_told(federation):
    with federation.script(counting([]), fails=CheckpointError):
        for server_round in range(1, KEEP_ROUNDS + 3):
            federation.run("train", server_round, {"a": torch.ones(1)})
        version = federation.ask("train", 2, {"a": torch.ones(1)})
        wait_until(lambda: federation.client.result(version) is not None)
        assert "begin with round 3" in federation.wait(version).error["message"]


# -- parts that stay at home ---------------------------------------------------------------------------------------


def travelling(state: StateDict) -> StateDict:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def test_local_entries_never_travel_and_come_back_after_a_restart(federation):
    start = own_state(make_net())
    script = Script()
    with federation.script(script.serve, script.model):
        result = federation.wait(federation.ask("initialize", 0, split=LOCAL_HEAD))
        assert sorted(federation.state_of(result)) == sorted(travelling(start))
        assert result.local_entries["head.weight"] == ("float32", (2, 4))
        first = federation.run("train", 1, travelling(start), split=LOCAL_HEAD)
        assert sorted(first) == sorted(travelling(start))
        head = script.model.head.weight.detach().clone()
        assert not torch.equal(head, start["head.weight"])
        federation.run("evaluate", 1, first, split=LOCAL_HEAD)
        assert torch.equal(script.model.head.weight, head)
    again = Script()
    began_with: list[torch.Tensor] = []
    again.train = lambda: began_with.append(again.model.head.weight.detach().clone())  # type: ignore[method-assign]
    with federation.script(again.serve, again.model):
        federation.run("train", 2, first, split=LOCAL_HEAD)
    assert torch.equal(began_with[0], head)
    for path in federation.client.exchange.directory.glob("*.safetensors"):
        assert not any(name.startswith("head.") for name in decode(bytearray(path.read_bytes())))


def test_a_server_that_goes_back_finds_the_local_entries_of_that_round(federation):
    script = Script()
    heads = {}

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            task.load_into(script.model)
            heads.setdefault(task.server_round, []).append(script.model.head.weight.detach().clone())
            script.train()
            task.reply(script.model, num_examples=1)

    state = travelling(own_state(make_net()))
    with federation.script(serve, script.model):
        for server_round in (1, 2, 3):
            federation.run("train", server_round, state, split=LOCAL_HEAD)
        federation.run("train", 2, travelling(own_state(make_net())), split=LOCAL_HEAD)
        federation.run("train", 1, state, split=LOCAL_HEAD)
    assert torch.equal(heads[2][0], heads[2][1]) and torch.equal(heads[1][0], heads[1][1])
    assert not torch.equal(heads[1][0], heads[2][0])


# -- kills ---------------------------------------------------------------------------------------------------------


def script_process(directory: Path, die_at: tuple[str, int] | None) -> None:
    """Be a training script; with ``die_at`` kill oneself right before or after the answer to that round is offered."""
    torch.set_num_threads(1)
    answer = TrainerSide.answer

    def dying(self: TrainerSide, task: Any, *args: Any, **kwargs: Any) -> bool:
        here = task.kind == "train" and die_at is not None and task.server_round == die_at[1]
        if here and die_at[0] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        accepted = answer(self, task, *args, **kwargs)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return accepted

    TrainerSide.answer = dying  # type: ignore[method-assign]
    script = Script()
    with Federation(directory).trainer(script.model) as trainer:
        script.serve(trainer)


@pytest.mark.slow
def test_a_trainer_killed_before_or_after_it_offered_goes_on_as_if_it_had_never_died(tmp_path):
    undisturbed, script = Federation(tmp_path / "undisturbed"), Script()
    state = own_state(make_net())
    with undisturbed.script(script.serve, script.model):
        for server_round in range(1, 6):
            state = undisturbed.run("train", server_round, state)
    expected = bits(state)

    federation, state = Federation(tmp_path / "killed"), own_state(make_net())
    deaths: dict[int, str] = {2: "before", 3: "after", 4: "before"}
    process: Any = None
    try:
        for server_round in range(1, 6):
            version = federation.ask("train", server_round, state)
            if process is None:
                die_at = min(((how, at) for at, how in deaths.items()), key=lambda pair: pair[1], default=None)
                process = FORKS.Process(target=script_process, args=(federation.directory, die_at))
                process.start()
            if server_round in deaths:
                process.join(BOUND_S)
                assert process.exitcode == -signal.SIGKILL
                assert (federation.client.result(version) is None) == (deaths[server_round] == "before")
                deaths.pop(server_round)
                die_at = min(((how, at) for at, how in deaths.items()), key=lambda pair: pair[1], default=None)
                process = FORKS.Process(target=script_process, args=(federation.directory, die_at))
                process.start()
            state = federation.state_of(federation.wait(version))
        federation.finish()
        process.join(BOUND_S)
        assert process.exitcode == 0
    finally:
        if process is not None and process.is_alive():
            process.kill()
            process.join(10)
    assert bits(state) == expected


# -- what is imported ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fedsplit.trainer.trainer", ("flwr", "grpc")),
        ("fedsplit.client.relay", ("torch",)),
        ("fedsplit", ("torch", "flwr", "grpc")),
    ],
)
def test_neither_role_loads_what_belongs_to_the_other(module, absent):
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=BOUND_S, check=True)
    assert done.stdout.strip() == "[]"


# -- what a script says while it waits ---------------------------------------------------------------------------------

WAITING = """
import logging, sys
if len(sys.argv) > 1:
    logging.basicConfig(level=sys.argv[1], format="configured %(message)s")
from fedsplit import Trainer
with Trainer(1) as trainer:
    print("ready", file=sys.stderr, flush=True)
    for task in trainer:
        pass
"""


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("level", "client", "said"),
    [
        ([], False, ["fedsplit: rank 1: waiting for a client (exchange/rank-1)"]),
        ([], True, ["fedsplit: rank 1: waiting for the server's next task (exchange/rank-1)"]),
        (["INFO"], False, ["configured rank 1: waiting for a client (exchange/rank-1, 0 s)"]),
        (["WARNING"], False, []),
    ],
)
def test_a_script_says_for_whom_it_waits_unless_it_has_set_up_logging(
    tmp_path: Path, level: list[str], client: bool, said: list[str]
) -> None:
    side, log, script = ClientSide(Exchange(tmp_path / "exchange", 1)), tmp_path / "log", tmp_path / "script.py"
    script.write_text(WAITING)
    with side.exchange.hold("client") if client else nullcontext():
        process = Forked([sys.executable, str(script), *level], os.environ, log, tmp_path)
        wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > len(said))
        time.sleep(0.7)
        side.finish("a run", "complete")
        assert process.wait(BOUND_S) == 0
    assert log.read_text().splitlines() == ["ready", *said]
