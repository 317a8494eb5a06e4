"""Extra tensors beside the model: both ways, for single ranks, checked, kept out of the model, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.common import FitRes, Parameters, Status
from torch import nn

from fedsplit import AggregationContext, EvaluateResult, Strategy, TrainResult, Update, WorkloadContext
from fedsplit.aggregation import Split, check_update, parse_rules
from fedsplit.errors import AggregationError, UsageError
from fedsplit.states.extra import join, separate
from fedsplit.states.state_dict import decode, encode, export_state, read_initial_checkpoint
from fedsplit.trainer.channel import StandaloneChannel
from fedsplit.trainer.trainer import Trainer
from tests.held import held
from tests.programs import Programs, programs
from tests.test_five_programs import link_tests

STATE = {"body.weight": torch.zeros(2), "head.weight": torch.zeros(3)}
HERE = "tests.test_extra"


# Rules for ``--aggregate``: each is found by its name in this module.


def counting(updates: list[Update], context: AggregationContext) -> dict[str, torch.Tensor]:
    """Send down how many numbers came up so far, and to rank 2 something else; the state grows by the same."""
    count = context.extra.get("count", torch.zeros((), dtype=torch.int64))
    count = count + sum(each.extra["numbers"].numel() for each in updates)
    context.extra["count"] = count
    context.rank_extra[2] = {"own": torch.tensor([context.server_round, context.num_ranks, len(context.ranks)])}
    return {name: tensor + count for name, tensor in context.previous.items()}


def changing(updates: list[Update], context: AggregationContext) -> dict[str, torch.Tensor]:
    context.extra["c"].add_(1.0)
    return context.previous


def changing_update(updates: list[Update], context: AggregationContext) -> dict[str, torch.Tensor]:
    updates[0].extra["c"].add_(1.0)
    return context.previous


def losing(updates: list[Update], context: AggregationContext) -> dict[str, torch.Tensor]:
    context.extra["c"] = torch.tensor([1.0, float("nan")])
    return context.previous


def listing(updates: list[Update], context: AggregationContext) -> dict[str, torch.Tensor]:
    context.rank_extra[1] = {"c": [1.0]}  # type: ignore[dict-item]
    return context.previous


def seeing(updates: list[Update], context: AggregationContext) -> dict[str, torch.Tensor]:
    """Note for the rule of the next part what this one saw."""
    context.extra[context.part] = torch.tensor([len(each.extra) for each in updates] + [len(context.extra)])
    return context.previous


def update(extra: dict[str, Any] | None = None) -> Update:
    return Update(rank=1, state_dict=STATE, num_examples=1, extra=extra or {})


def merge(*rules: str, extra: dict[str, torch.Tensor] | None = None, up: dict[str, Any] | None = None) -> Any:
    split = Split.resolve(parse_rules(rules), STATE)
    merger = split.start_round(server_round=1, total_rounds=1, previous=STATE, seed=0, memory={}, extra=extra)
    merger.add(update({"c": torch.ones(1)} if up is None else up))
    merger.finish()
    return merger


# In a payload, and beside one


def test_a_payload_gives_back_both_and_ties_stay_within_it() -> None:
    extra = {"c": torch.ones(4, dtype=torch.bfloat16), "start": STATE["body.weight"], "": torch.tensor(3)}
    state, found = separate(decode(b"".join(encode(join(STATE, extra)))))
    assert state.keys() == STATE.keys() and found.keys() == extra.keys()
    assert all(torch.equal(found[name], extra[name]) and found[name].dtype == extra[name].dtype for name in extra)


@pytest.mark.parametrize(
    ("state", "extra", "said"),
    [
        ({"extra:c": torch.ones(1)}, {}, "names that begin with 'extra:'"),
        (STATE, {"c": [1.0]}, "extra has 'c': list"),
        (STATE, {1: torch.ones(1)}, "extra has 1: Tensor"),
    ],
)
def test_what_cannot_travel_so_is_named(state: Any, extra: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        join(state, extra)


def test_the_model_is_exported_and_begun_without_them(tmp_path: Path) -> None:
    payload = tmp_path / "state.safetensors"
    payload.write_bytes(b"".join(encode(join(STATE, {"c": torch.ones(1)}))))
    assert decode(bytearray().join(export_state(payload, tmp_path / "out.safetensors"))).keys() == STATE.keys()
    (tmp_path / "out.pt").write_bytes(b"".join(export_state(payload, tmp_path / "out.pt")))
    assert torch.load(tmp_path / "out.pt", weights_only=True).keys() == STATE.keys()
    assert decode(bytearray().join(read_initial_checkpoint(payload))).keys() == STATE.keys()


# Rules


def test_rules_of_all_parts_share_them() -> None:
    merger = merge(f"head.*={HERE}:seeing", f"{HERE}:seeing", extra={"old": torch.ones(1)})
    assert {name: tensor.tolist() for name, tensor in merger.extra.items()} == {
        "old": [1.0], "head.*": [1, 1], "*": [1, 2],
    }  # fmt: skip


def test_no_rule_of_ours_averages_them() -> None:
    before = {"c": torch.full((1,), 5.0)}
    for rule in ("fedavg", "median", "trimmed-mean", "max", "flower.FedAdam"):
        merger = merge(rule, extra=before)
        assert not Split.resolve(parse_rules([rule]), STATE).reads_extra
        assert merger.extra == before and merger.extra["c"] is before["c"]
    assert Split.resolve(parse_rules(["head.*=fedavg", f"{HERE}:seeing"]), STATE).reads_extra


def test_a_rule_inside_dp_is_given_none_as_they_are_not_clipped() -> None:
    pytest.importorskip("dp_accounting")
    rule = f"dp({HERE}:seeing, clip=1.0, noise=1.0)"
    assert merge(rule).extra == {}
    assert not Split.resolve(parse_rules([rule]), STATE).reads_extra


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("changing", "it changed 'c' in the extra tensors"),
        ("changing_update", "it changed 'c' in the extra tensors of the update of rank 1"),
        ("losing", "it left NaN or Inf in the extra tensor 'c'"),
        ("listing", "it left the extra tensor 'c': expected a name and a tensor on the CPU, found a list"),
    ],
)
def test_a_rule_that_misuses_them_is_named(rule: str, said: str) -> None:
    with pytest.raises(AggregationError, match=f"{HERE}:{rule} of part '\\*': {said}"):
        merge(f"{HERE}:{rule}", extra={"c": torch.ones(1)})


def test_an_update_with_a_nan_among_them_is_refused() -> None:
    assert check_update(update({"c": torch.tensor([1, 2])}), STATE) is None
    huge = torch.full((4,), torch.finfo(torch.float32).max)
    assert check_update(update({"c": huge}), STATE) is None
    assert check_update(update({"c": torch.tensor([1.0, float("inf")])}), STATE) == "NaN or Inf in the extra tensor 'c'"


def test_in_flowers_own_server_a_rule_that_sends_them_is_told_that_nobody_takes_them() -> None:
    class Client:
        cid = "a"

    class Manager:
        def wait_for(self, number: int, timeout: int) -> bool:
            return True

        def all(self) -> dict[str, Client]:
            return {"a": Client()}

    strategy = Strategy(f"{HERE}:losing2", min_clients=1, keys=["w"])
    arrays = [torch.zeros(1).numpy()]
    from flwr.common import Code, ndarrays_to_parameters

    strategy.configure_fit(1, ndarrays_to_parameters(arrays), Manager())  # type: ignore[arg-type]
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), 1, {})
    with pytest.raises(UsageError, match="clients of Flower's own do not take"):
        strategy.aggregate_fit(1, [(Client(), result)], [])  # type: ignore[list-item]
    assert isinstance(result.parameters, Parameters)


def losing2(updates: list[Update], context: AggregationContext) -> dict[str, torch.Tensor]:
    context.extra["c"] = torch.ones(1)
    return context.previous


# The trainer


def test_they_go_with_an_answer_to_train_only_and_standalone_has_none() -> None:
    model = nn.Linear(1, 1)
    with Trainer(rank=1, model=model, standalone=True, standalone_rounds=2) as trainer:
        for task in trainer:
            assert task.extra == {} and task.state_dict.keys() == {"weight", "bias"}
            if task.kind == "evaluate":
                with pytest.raises(UsageError, match="extra tensors go with the answer to train"):
                    task.reply(loss=0.0, num_examples=1, extra={"c": torch.ones(1)})
                task.reply(loss=0.0, num_examples=1)
            else:
                task.reply(model, num_examples=1, extra={"c": torch.ones(1)})
    assert isinstance(trainer._channel, StandaloneChannel)


# The five programs


class Sending:
    """Sends as many numbers as its rank, and reports what it was given, -1 for nothing."""

    def __init__(self, rank: int) -> None:
        self.model, self._rank = nn.Linear(1, 1), rank

    def train(self, task: Any) -> TrainResult:
        own = task.extra.get("own", torch.full((3,), -1))
        assert task.state_dict.keys() == {"weight", "bias"}
        seen = {"count": int(task.extra.get("count", -1)), "own": str(own.tolist())}
        return TrainResult(1, seen, extra={"numbers": torch.ones(self._rank, dtype=torch.float64)})

    def evaluate(self, task: Any) -> EvaluateResult:
        return EvaluateResult(0.0, 1, {"count": int(task.extra["count"])})


def sending(context: WorkloadContext) -> Sending:
    torch.manual_seed(context.seed)
    return Sending(context.rank)


def held_sending(context: WorkloadContext) -> Any:
    return held(sending(context))


def federation(directory: Path, *flags: str, workload: str = "sending") -> Any:
    link_tests(directory)
    return programs(
        directory,
        server_flags=("--rounds", "3", *flags),
        model_flags=("--threads", "1", "--workload", f"{HERE}:{workload}"),
    )


def check_counts(found: Programs) -> None:
    lines: Any = found.history()
    none = [-1, -1, -1]
    assert [[(row["count"], row["own"]) for row in line["clients"].values()] for line in lines] == [
        [(-1, str(none)), (-1, str(none))],
        [(3, str(none)), (3, str([1, 2, 2]))],
        [(6, str(none)), (6, str([2, 2, 2]))],
    ]
    assert [line["evaluate"]["count"] for line in lines] == [3, 6, 9]
    state, extra = separate(decode(bytearray(found.final_state().read_bytes())))
    assert state.keys() == {"weight", "bias"} and extra["count"] == 9


@pytest.mark.smoke
def test_they_travel_both_ways_and_to_single_ranks(tmp_path: Path) -> None:
    with federation(tmp_path, "--aggregate", f"{HERE}:counting") as found:
        found.start_all()
        assert set(found.wait().values()) == {0}, found.tails()
        check_counts(found)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["auto", "none"])
def test_they_are_resumed_after_a_kill(tmp_path: Path, store: str) -> None:
    flags = ("--aggregate", f"{HERE}:counting", "--payload-store", store)
    with federation(tmp_path, *flags, workload="held_sending") as found:
        found.allow(1)
        found.start_all()
        found.wait_until(lambda: len(found.history()) >= 1)
        found.kill("server")
        found.kill("model-2")
        found.start("model-2")
        found.start("server", "--resume")
        found.allow(3)
        assert set(found.wait().values()) == {0}, found.tails()
        check_counts(found)


@pytest.mark.slow
def test_without_a_rule_that_reads_them_they_are_dropped_with_a_word(tmp_path: Path) -> None:
    with federation(tmp_path, "--evaluate-every", "0") as found:
        found.start_all()
        assert set(found.wait().values()) == {0}, found.tails()
        assert found.log("server").count("sent extra tensors, which no rule reads: 'numbers'") == 1
        assert [line["accepted"] for line in found.history()] == [2, 2, 2]
