"""True split learning: a model that is cut comes to what the whole model does, bit for bit."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedsplit import AggregationContext, Update
from fedsplit.commands.status import find_ranks, read_status
from fedsplit.disk import files
from fedsplit.errors import RunFailedError, TaskOverError, UsageError, WorkloadError
from fedsplit.exchange.directory import Exchange
from fedsplit.run.time_account import STEP_STAGES
from fedsplit.server.settings import ServerSettings
from fedsplit.split_learning.cut import parts_of
from fedsplit.split_learning.noise import CutNoise, read_secret
from fedsplit.split_learning.order import Order
from fedsplit.split_learning.uppers import Uppers
from fedsplit.split_learning.workload import create_split_workload
from fedsplit.states.state_dict import StateDict
from fedsplit.trainer.trainer import Trainer
from fedsplit.workloads import WorkloadContext
from tests.halves import Halves, Small, State, unsplit
from tests.in_process import Scripts

MODES = ["sfl-v1", "sfl-v2", "sequential"]
# The same as a case that is not, in another mode or place: `make test-all` runs it.
SLOW = pytest.mark.slow


def same(found: State, expected: State) -> None:
    assert list(found) == list(expected) or set(found) == set(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


@pytest.mark.parametrize("mode", MODES)
def test_the_parts_come_to_what_the_whole_model_does_in_the_same_order(mode: str, tmp_path: Path) -> None:
    same(Halves(tmp_path, mode).run(), unsplit(mode))


# The names after which the model is cut, and how many of its modules are in front.
CUTS = {"0": 1, "1": 2, "2": 3, "3": 4}


@pytest.mark.parametrize("cut", ["0", pytest.param("1", marks=SLOW), pytest.param("2", marks=SLOW), "3"])
def test_with_one_rank_it_is_ordinary_training_with_dropout_and_batch_norm(cut: str, tmp_path: Path) -> None:
    make = partial(Small, dropout=0.3)
    same(
        Halves(tmp_path, "sfl-v1", ranks=1, cut=cut, make=make).run(),
        unsplit("sfl-v1", ranks=1, cut=CUTS[cut], make=make),
    )


@pytest.mark.parametrize("mode", [pytest.param("sfl-v1", marks=SLOW), "sfl-v2", pytest.param("sequential", marks=SLOW)])
def test_u_shaped_it_comes_to_the_same(mode: str, tmp_path: Path) -> None:
    same(Halves(tmp_path, mode, cut="0", tail="3").run(), unsplit(mode, cut=1, tail=4))


@pytest.mark.parametrize(("cut", "tail"), [("1", None), ("0", "1")])
def test_a_part_may_begin_with_a_module_that_works_in_place(cut: str, tail: str | None, tmp_path: Path) -> None:
    end = None if tail is None else CUTS[tail]
    same(
        Halves(tmp_path, "sfl-v1", ranks=1, cut=cut, tail=tail).run(),
        unsplit("sfl-v1", ranks=1, cut=CUTS[cut], tail=end),
    )


class Rounding(nn.Module):
    """What a narrow cut does to activations and gradients, in the whole model."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        rounded: torch.Tensor = _Straight.apply(given, self.rounded(given))
        rounded.register_hook(self.rounded)
        return rounded

    def rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.dtype != torch.int8:
            return tensor.detach().to(self.dtype).float()
        scale = tensor.detach().abs().max() / 127
        return (tensor.detach() / scale).round().to(torch.int8).float() * scale


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        return outer[0], None


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=SLOW), pytest.param(torch.bfloat16, marks=SLOW), torch.int8]
)
def test_a_narrow_cut_is_the_whole_model_with_rounding_there(dtype: torch.dtype, tmp_path: Path) -> None:
    halves = Halves(tmp_path, "sfl-v2", dtype=dtype, kills={("upper", 5), (1, 8)})
    same(halves.run(), unsplit("sfl-v2", between=Rounding(dtype)))
    bytes_of_a_gradient = 4 * 8 * dtype.itemsize
    assert 0 < halves.history[0]["split"]["bytes_down"] - 7 * bytes_of_a_gradient < 7 * 300


@pytest.mark.parametrize(("mode", "window"), [("sfl-v2", 2), pytest.param("sfl-v1", 3, marks=SLOW), ("sfl-v1", 9)])
def test_a_window_of_batches_is_their_steps_with_late_gradients_whoever_is_killed(
    mode: str, window: int, tmp_path: Path
) -> None:
    """The ranks have 3 and 4 batches, so that a window of 2 and of 3 has a rest; 9 are more than there are."""
    halves = Halves(tmp_path, mode, window=window, kills={("upper", 3), (1, 2), (2, 2)})
    same(halves.run(), unsplit(mode, window=window))
    for line in halves.history:
        assert line["split"]["steps"] == 7
        # What a header says of each entry, and an entry or two for each batch.
        assert 0 < line["split"]["bytes_up"] - 7 * (4 * 8 * 4 + 4 * 8) < 7 * 400
        assert 0 < line["split"]["bytes_down"] - 7 * 4 * 8 * 4 < 7 * 200
        assert set(line["evaluate"]) == set(line["train"]) == {"loss", "accuracy"}


def test_in_a_window_dropout_draws_from_one_stream_of_random_numbers(tmp_path: Path) -> None:
    make = partial(Small, dropout=0.3)
    same(
        Halves(tmp_path, "sfl-v1", ranks=1, window=2, make=make, kills={(1, 3), ("upper", 3)}).run(),
        unsplit("sfl-v1", ranks=1, window=2, make=make),
    )


def test_a_window_that_no_server_takes_costs_the_rank_its_round(tmp_path: Path) -> None:
    def greedy(trainer: Trainer, workload: Any, parts: Any) -> None:
        if trainer.exchange.rank == 1:
            return script(trainer, workload, parts)
        for task in trainer:
            try:
                task.hand_over({"activations": torch.zeros(4, 8)}, {"what": "loss", "window": 101})
            except TaskOverError:
                continue
        return None

    halves = Halves(tmp_path, "sfl-v1", rounds=1, script=greedy, settings={"evaluate_every": 0})
    halves.run()
    refused = halves.history[0]["refused"]
    assert refused == {"2": "its trainer gave a window of 101 batches, expected 1 to 100"}


def test_where_payloads_travel_in_messages_it_comes_to_the_same(tmp_path: Path) -> None:
    same(Halves(tmp_path, "sfl-v2", by_reference=False).run(), unsplit("sfl-v2"))


def test_a_trainer_that_is_killed_between_steps_changes_nothing(tmp_path: Path) -> None:
    """Each answer of a trainer is one that it may not live to give; a rank gives 4 or 5 a round, the upper one 9."""
    kills: set[tuple[int | str, int]] = {(1, 3), (2, 2), (2, 4), ("upper", 4), ("upper", 9)}
    halves = Halves(tmp_path, "sfl-v2", kills=kills)
    same(halves.run(), unsplit("sfl-v2"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sfl-v1", "sequential"])
def test_in_the_other_modes_neither(mode: str, tmp_path: Path) -> None:
    same(
        Halves(tmp_path, mode, kills={(1, 3), (2, 3), ("upper", 5)}, cut="0", tail="3").run(),
        unsplit(mode, cut=1, tail=4),
    )


@pytest.mark.parametrize("uppers", [2, pytest.param(3, marks=SLOW)])
def test_several_trainers_of_upper_parts_come_to_what_one_does_whoever_is_killed(uppers: int, tmp_path: Path) -> None:
    """The third of three has no rank, and hears of no step."""
    kills: set[tuple[int | str, int]] = {("upper", 3), ("upper-2", 4), (1, 3), (2, 4)}
    same(Halves(tmp_path, "sfl-v1", uppers=uppers, kills=kills).run(), unsplit("sfl-v1"))
    tasks = [path.parent.relative_to(tmp_path / "exchange") for path in (tmp_path / "exchange").rglob("task.json")]
    assert sorted(map(str, tasks)) == ["rank-1", "rank-2", "upper", "upper-2/upper"]


def test_what_differs_when_a_step_is_done_again_is_an_error_that_names_rank_and_step(tmp_path: Path) -> None:
    class Drifting(Small):
        """Draws from a generator that nobody keeps."""

        def batches(self, task: object) -> object:
            for inputs, targets in super().batches(task):
                yield inputs + torch.rand(1), targets

    halves = Halves(tmp_path, "sfl-v2", ranks=1, rounds=1, make=Drifting, kills={(1, 4)})
    with pytest.raises(RunFailedError, match=r"rank 1 did step 0 of train, round 1, again and gave other values"):
        halves.run()


def test_the_history_has_the_steps_and_their_bytes(tmp_path: Path) -> None:
    config = {"train_config": (("epochs", 3), ("note", "what a server says is no metric"))}
    halves = Halves(tmp_path, "sfl-v2", settings=config)
    halves.run()
    for line in halves.history:
        split = line["split"]
        assert (split["mode"], split["steps"]) == ("sfl-v2", 7)
        # With each batch activations of 4 x 8 numbers and 4 targets; gradients of that size; each time a header.
        assert 0 < split["bytes_up"] - 7 * (4 * 8 * 4 + 4 * 8) < 7 * 400
        assert 0 < split["bytes_down"] - 7 * 4 * 8 * 4 < 7 * 200
        assert set(line["evaluate"]) == set(line["train"]) == {"loss", "accuracy"}
        seconds = split["seconds"]
        assert list(seconds) == list(STEP_STAGES) and all(each > 0 for each in seconds.values())
        # Both ranks are under way for as long as the training of the round takes.
        assert sum(seconds.values()) <= 2 * line["stages"]["train"]
    left = [path.name for path in (tmp_path / "checkpoints" / "server" / "payloads").glob("*")]
    assert len(left) <= 1, left


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cut", "tail", "says"), [
    ("features.9", None, "cannot be cut there; it can be after features.0, features.1, features.2"),
    ("classifier.3", None, "--cut classifier.3: the model cannot be cut there"),
    ("features.2", "features.1", "--tail features.1: the model cannot be cut there; it can be after features.3"),
    (None, None, "--cut NAME says after which module the model is cut; there are features.0"),
    ("features", "classifier.1", None),
])  # fmt: skip
def test_a_wrong_cut_says_which_there_are(cut: str | None, tail: str | None, says: str | None) -> None:
    from fedsplit.workloads.image import small_conv_net

    workload = SimpleNamespace(model=small_conv_net(8))
    if says is None:
        parts = parts_of(workload, cut, tail)
        names = [*parts.lower.state_dict(), *parts.upper.state_dict(), *(parts.tail or nn.Module()).state_dict()]
        assert names == list(workload.model.state_dict()), "the parts have the names of the whole"
        return
    with pytest.raises(UsageError, match=re.escape(says)):
        parts_of(workload, cut, tail)


def test_what_cannot_be_cut_says_why() -> None:
    with pytest.raises(WorkloadError, match=r"is a Linear, and only an nn\.Sequential can be cut by name"):
        parts_of(SimpleNamespace(model=nn.Linear(2, 2)), "0", None)
    with pytest.raises(UsageError, match="the part of the model beside the server has no weights to train"):
        parts_of(SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2), nn.ReLU())), "0", None)
    tied = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"'lower.0.weight' and 'upper.2.weight' are one tensor"):
        parts_of(SimpleNamespace(model=nn.Sequential(tied, nn.ReLU(), tied)), "0", None)
    with pytest.raises(WorkloadError, match=r"lacks loss\(output, target\), batches\(task\), optimizer\(module\)"):
        create_split_workload(f"{__name__}:nothing", WorkloadContext(rank=1), cut="0", tail=None)


@pytest.mark.parametrize(("flags", "says"), [
    ("--part upper --cut features.2 --cut-dtype int8", "--cut-dtype is for the ranks"),
    ("--part upper --cut features.2 --cut-noise 0.1", "--cut-noise is for the ranks"),
    ("--cut features.2 --cut-noise nan", "--cut-noise: expected a number above 0, not 'nan'"),
    ("--cut-dtype int8", "--cut NAME says after which module the model is cut"),
    ("--tail classifier.1", "--cut NAME says after which module the model is cut"),
    ("--part upper --cut features.2 --window 2", "--window is for the ranks"),
    ("--cut features.2 --tail classifier.1 --window 2", "--window cannot go with --tail"),
    ("--cut features.2 --window 101", "expected a whole number from 1 to 100, not '101'"),
    ("--cut features.7", "--cut features.7: the model cannot be cut there"),
])  # fmt: skip
def test_a_wrong_flag_of_a_trainer_is_told_of_at_once(flags: str, says: str, scripts: Scripts) -> None:
    code, errors = scripts.run("model_main.py", *flags.split())
    assert code == 2 and says in errors


def nothing(context: WorkloadContext) -> object:
    return SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_a_mode_that_there_is_not_is_refused_before_anything_starts(tmp_path: Path) -> None:
    says = "--split-learning v3: expected one of sfl-v1, sfl-v2, sequential"
    with pytest.raises(UsageError, match=re.escape(says)):
        Uppers(ServerSettings(checkpoint_dir=tmp_path), "v3", tmp_path)
    for mode in ("sfl-v2", "sequential"):
        with pytest.raises(UsageError, match=f"--upper-trainers 2: {mode} has one upper part"):
            Uppers(ServerSettings(checkpoint_dir=tmp_path), mode, tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def test_an_upper_part_cannot_be_local(tmp_path: Path) -> None:
    halves = Halves(tmp_path, "sfl-v1", settings={"aggregate": ("upper.4.*=local", "fedavg")})
    with pytest.raises(UsageError, match=r"'upper.4.weight', 'upper.4.bias' cannot be local"):
        halves.run()


def test_a_trainer_with_the_whole_model_is_told_how_to_start(tmp_path: Path) -> None:
    halves = Halves(tmp_path, "sfl-v1")
    halves.whole_model = True
    with pytest.raises(RunFailedError, match="start them with --cut NAME, or with --part lower"):
        halves.run()


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_a_lower_part_may_have_local_entries_and_a_rule_of_its_own(tmp_path: Path) -> None:
    """BatchNorm stays with each rank; what is merged is as ever the first rank's and the second's."""
    rules = {"aggregate": ("lower.1.*=local", "upper.*=median", "fedavg")}
    found = Halves(tmp_path, "sfl-v1", settings=rules).run()
    assert not [name for name in found if name.startswith("1.")] and "0.weight" in found and "4.weight" in found


def test_what_one_rank_sends_wrong_costs_it_its_round_and_nobody_else(tmp_path: Path) -> None:
    class Wrong(Small):
        """Of rank 2 the targets are no classes."""

        def batches(self, task: Any) -> Any:
            for inputs, targets in super().batches(task):
                yield inputs, targets + (99 if len(self._targets) == 16 else 0)

    halves = Halves(tmp_path, "sfl-v1", rounds=1, make=Wrong)
    halves.run()
    (line,) = halves.history
    assert list(line["clients"]) == ["1"] and line["merged"]
    assert "the trainer of the upper part could not do its step: IndexError" in line["refused"]["2"]


def test_a_rank_has_its_turn_once_in_each_turn_and_the_order_is_the_seeds() -> None:
    def passed(mode: str, counts: dict[int, int], seed: str) -> list[int]:
        order, left, found = Order(mode, list(counts), seed), dict(counts), []
        while left:
            (rank,) = [rank for rank in left if order._may(rank)]
            if left[rank]:
                found.append(rank)
                left[rank] -= 1
                order.done(rank)
            else:
                del left[rank]
                assert order.leave(rank) == (not left)
        return found

    counts = {1: 3, 2: 5, 3: 1}
    first = passed("sfl-v2", counts, "7/1")
    assert first == passed("sfl-v2", counts, "7/1") and sorted(first[:3]) == [1, 2, 3] and sorted(first[3:5]) == [1, 2]
    assert len({tuple(passed("sfl-v2", counts, f"{seed}/1")) for seed in range(20)}) > 1
    assert passed("sequential", counts, "7/1") == [1] * 3 + [2] * 5 + [3]


def test_without_split_learning_there_is_no_other_half() -> None:
    with Trainer(1, nn.Linear(2, 2), standalone=True) as trainer, pytest.raises(UsageError, match="--split-learning"):
        for task in trainer:
            task.remote(torch.zeros(1, 2), torch.zeros(1))


def script(trainer: Trainer, workload: Any, parts: Any) -> None:
    """What docs/split-learning.md shows: a training script of one's own."""
    model = parts.at_rank()
    lower, tail, optimizer = parts.lower, parts.tail, workload.optimizer(model)
    for task in trainer:
        task.load_into(model)
        if task.restore and task.local_state is not None:
            optimizer.load_state_dict(task.local_state["optimizer"])
            workload.load_local_state(task.local_state["workload"])
        try:
            total = 0.0
            for inputs, targets in workload.batches(task):
                if task.kind == "evaluate":
                    with torch.no_grad():
                        total += float(task.remote(lower.eval()(inputs), targets)) * len(targets)
                    continue
                optimizer.zero_grad()
                if tail is None:
                    task.remote(lower.train()(inputs), targets).backward()
                else:
                    workload.loss(tail.train()(task.remote(lower.train()(inputs))), targets).backward()
                optimizer.step()
            state = {"optimizer": optimizer.state_dict(), "workload": workload.local_state()}
            count = workload.num_examples
            if task.kind == "evaluate":
                task.reply(loss=total / count, num_examples=count)
            else:
                task.reply(model, num_examples=count, local_state=state)
        except TaskOverError:
            continue


def test_a_script_of_ones_own_comes_to_the_same(tmp_path: Path) -> None:
    halves = Halves(tmp_path, "sfl-v2", script=script, kills={("upper", 5), (1, 8)})
    same(halves.run(), unsplit("sfl-v2"))
    assert halves.history[-1]["evaluate"]["loss"] > 0


def test_a_rank_that_does_no_step_is_refused_and_costs_nobody_else_anything(tmp_path: Path) -> None:
    def idle(trainer: Trainer, workload: Any, parts: Any) -> None:
        if trainer.exchange.rank == 1:
            return script(trainer, workload, parts)
        for task in trainer:
            if task.kind == "evaluate":
                task.reply(loss=1.0, num_examples=1)
            else:
                task.reply(parts.at_rank(), num_examples=1)
        return None

    halves = Halves(tmp_path, "sfl-v1", rounds=1, script=idle)
    halves.run()
    assert halves.history[0]["refused"] == {"2": "it did no step with the upper part"} and halves.history[0]["merged"]


@pytest.mark.parametrize(
    ("tail", "by_reference"),
    [("3", False), pytest.param("3", True, marks=SLOW), pytest.param(None, False, marks=SLOW), (None, True)],
)
def test_u_shaped_no_label_leaves_the_rank(
    tail: str | None, by_reference: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a message, nor in any file that there ever was outside the ranks' own directories."""
    number = 0.12345679
    marks = [struct.pack("<f", number), struct.pack("<d", number), b"0.12345"]
    remove, write, records = files.remove, Exchange.write, list[bytes]()

    def keep(path: Path) -> None:
        if path.name.startswith(".") or any(each.name.startswith("rank-") for each in path.parents):
            remove(path)

    def note(self: Exchange, path: Path, record: Any) -> None:
        if self.directory.name == "upper":
            records.append(repr(record).encode())
        write(self, path, record)

    class Marked(Small):
        """Its targets are one number that is easily found."""

        def batches(self, task: Any) -> Any:
            for inputs, targets in super().batches(task):
                yield inputs, torch.full(targets.shape, number)

        def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return nn.functional.mse_loss(output.mean(dim=1), target)

        def metrics(self, output: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
            return {}

    monkeypatch.setattr(files, "remove", keep)
    monkeypatch.setattr(Exchange, "write", note)
    halves = Halves(tmp_path, "sfl-v1", rounds=2, cut="0", tail=tail, make=Marked, by_reference=by_reference)
    halves.run()
    paths = [path for path in tmp_path.rglob("*") if path.is_file() and "rank-" not in str(path)]
    payloads = [path for path in paths if path.suffix == ".safetensors" or path.parent.name == "payloads"]
    assert len(payloads) > 30 and len(records) > 30 and len(halves.said) > 20
    left = [*halves.said, *records, *(path.read_bytes() for path in paths)]
    found = any(mark in each for each in left for mark in marks)
    assert found == (tail is None), "without a tail the labels do go out"


@pytest.mark.parametrize("mode", ["sequential", pytest.param("sfl-v1", marks=SLOW)])
def test_payloads_may_travel_by_a_store_at_a_url(mode: str, tmp_path: Path) -> None:
    # Not memory://, all of whose readers share one position.
    url = (tmp_path / "shared").as_uri()
    halves = Halves(tmp_path, mode, settings={"payload_store": url})
    same(halves.run(), unsplit(mode))
    assert not [each for each in halves.said if not each.startswith(b"{")], "no payload in a message"
    left = [path for path in (tmp_path / "shared").rglob("*") if len(path.name) == 64]
    assert len(left) == 1, "the last state, and no activations"


def tallying(updates: list[Update], context: AggregationContext) -> StateDict:
    """Send down the sum of the numbers that came up so far."""
    count = context.extra.get("count", torch.zeros(()))
    context.extra["count"] = count + sum(each.extra["number"] for each in updates)
    return updates[0].state_dict


def with_extra(seen: list[float]) -> Callable[..., None]:
    def run(trainer: Trainer, workload: Any, parts: Any) -> None:
        for task in trainer:
            seen.append(float(task.extra.get("count", torch.zeros(()))))
            task.load_into(parts.at_rank())
            task.remote(parts.lower(torch.ones(4, 6)), torch.zeros(4, dtype=torch.int64))
            task.reply(parts.at_rank(), num_examples=4, extra={"number": torch.tensor(float(trainer.exchange.rank))})  # type: ignore[arg-type]

    return run


def test_extra_tensors_go_with_the_lower_part(tmp_path: Path) -> None:
    seen: list[float] = []
    rules = (f"lower.*={__name__}:tallying", "fedavg")
    halves = Halves(tmp_path, "sfl-v2", rounds=3, script=with_extra(seen),
                    settings={"aggregate": rules, "evaluate_every": 0})  # fmt: skip
    halves.run()
    assert sorted(seen) == [0, 0, 3, 3, 6, 6]


def test_in_sequence_extra_tensors_are_refused_by_name(tmp_path: Path) -> None:
    halves = Halves(tmp_path, "sequential", rounds=1, script=with_extra([]), settings={"evaluate_every": 0})
    with pytest.raises(RunFailedError, match="rank 1: extra tensors 'number', which sequential has no place for"):
        halves.run()


def test_noise_at_the_cut_is_drawn_again_as_it_was(tmp_path: Path) -> None:
    """A step that is done again must give the same bytes, or its rank is refused."""
    halves = Halves(tmp_path, "sfl-v2", noise=0.5, kills={(1, 3), (2, 8), ("upper", 5)})
    found = halves.run()
    assert not [line["refused"] for line in halves.history if line["refused"]]
    expected = unsplit("sfl-v2")
    assert not all(torch.equal(found[name], expected[name]) for name in expected)


def test_noise_has_its_deviation_and_is_another_in_every_task_and_for_every_secret(tmp_path: Path) -> None:
    def draw(secret: bytes, **task: Any) -> torch.Tensor:
        noise = CutNoise(0.5, secret)
        noise.begin(SimpleNamespace(**{"run_id": "r", "kind": "train", "server_round": 1, **task}))  # type: ignore[arg-type]
        return noise(torch.ones(10_000))

    first = draw(b"a")
    assert torch.equal(first, draw(b"a"))
    assert first.mean().item() == pytest.approx(1.0, abs=0.03) and first.std().item() == pytest.approx(0.5, rel=0.03)
    others = [draw(b"b"), draw(b"a", server_round=2), draw(b"a", kind="evaluate"), draw(b"a", run_id="s")]
    assert not any(torch.equal(first, each) for each in others)
    secret = read_secret(tmp_path / "rank-1")
    assert len(secret) == 32 and secret == read_secret(tmp_path / "rank-1") != read_secret(tmp_path / "rank-2")
    assert (tmp_path / "rank-1" / "cut-noise.key").stat().st_mode & 0o777 == 0o600


def test_a_server_that_is_stopped_goes_on_with_resume(tmp_path: Path) -> None:
    """The first server ends after two rounds; another one takes up its run, with trainers that are new too."""
    Halves(tmp_path, "sfl-v2", rounds=2).run()
    shutil.rmtree(tmp_path / "exchange")
    same(Halves(tmp_path, "sfl-v2", rounds=4, settings={"resume": True}).run(), unsplit("sfl-v2", rounds=4))


def test_status_shows_the_upper_part_too(tmp_path: Path) -> None:
    halves = Halves(tmp_path, "sfl-v1", rounds=1)
    halves.run()
    found = find_ranks(tmp_path / "exchange")
    assert [place for _, place in found] == [1, 2, "upper"]
    assert read_status(*found[-1])["now"] == "the run is over: complete"
