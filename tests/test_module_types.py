"""Parts that stay at home by the type of their module, as ``<BatchNorm*>=local``: only the trainer knows the types."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fedsplit import EvaluateResult, TrainResult, WorkloadContext
from fedsplit.aggregation import Split, parse_rules
from fedsplit.errors import UsageError
from fedsplit.states.local_keys import is_local
from fedsplit.states.module_types import ModuleTypes, types_of
from fedsplit.states.state_dict import StateDict, map_file, own_state
from fedsplit.trainer.trainer import Trainer
from tests.held import held
from tests.programs import Programs, programs
from tests.test_five_programs import link_tests
from tests.test_trainer import Federation

SPLIT = (("<*BatchNorm*>", True), ("*", False))
NORMS = [
    f"{module}.{name}"
    for module in ("0", "2.norm")
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
]


class Head(nn.Module):
    """A class of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.SyncBatchNorm(2)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), Head())


def local_names(model: nn.Module, *patterns: str) -> list[str]:
    types, split = ModuleTypes(None), [(pattern, True) for pattern in patterns]
    types.see(model, split)
    return [name for name in own_state(model) if is_local(name, split, types.is_of_type)]


# -- the types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("<*BatchNorm*>", NORMS),
        ("<_BatchNorm>", NORMS),
        ("<BatchNorm*>", NORMS[:5]),
        ("<SyncBatchNorm>", NORMS[5:]),
        ("<Linear>", ["1.weight", "1.bias", "2.linear.weight", "2.linear.bias"]),
        ("<Head>", ["2.linear.weight", "2.linear.bias", *NORMS[5:]]),
    ],
)
def test_a_pattern_takes_all_that_is_in_modules_of_a_type_or_of_a_base_class(pattern: str, names: list[str]) -> None:
    assert local_names(make_net(), pattern) == names


def test_the_first_pattern_that_matches_wins_whichever_its_kind() -> None:
    types = ModuleTypes(make_net())
    split = (("0.bias", False), ("<BatchNorm1d>", True), ("0.*", False), ("*.norm.*", False), ("<_BatchNorm>", True))
    assert [name for name in NORMS if is_local(name, split, types.is_of_type)] == [
        n for n in NORMS[:5] if n != "0.bias"
    ]


@pytest.mark.parametrize("wrap", [
    nn.DataParallel, torch.compile, lambda net: nn.DataParallel(torch.compile(net)),
    lambda net: nn.Sequential(torch.compile(net[0]), net[1], torch.compile(net[2])),
])  # fmt: skip
def test_wrappers_leave_no_trace_in_the_types(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert local_names(wrap(make_net()), "<*BatchNorm*>") == NORMS


def test_what_torch_puts_around_a_weight_is_still_of_the_modules_type() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.BatchNorm1d(2))
    assert [name for name in local_names(model, "<Linear>") if "original" in name] == [
        "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"
    ]  # fmt: skip


def test_a_tied_weight_is_of_the_types_of_all_its_modules() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
    model[1].weight = model[0].weight
    assert types_of(model) == {name: {"Sequential", "Embedding", "Linear"} for name in ("0.weight", "1.weight")}


def test_a_pattern_of_which_the_model_has_no_type_is_refused_with_those_that_it_has() -> None:
    with pytest.raises(
        UsageError, match=r"<BatchNrom\*> of the server's rules matches no type .* BatchNorm1d, Head, L"
    ):
        local_names(make_net(), "<BatchNrom*>")
    with pytest.raises(UsageError, match=r"<ReLU> of the server's rules matches no type of a module with entries"):
        local_names(nn.Sequential(nn.ReLU(), nn.Linear(1, 1)), "<ReLU>")


def test_an_entry_that_is_in_no_module_must_have_a_rule_by_name() -> None:
    model = make_net()
    model.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(extra=torch.ones(1)))
    with pytest.raises(
        UsageError, match=r"'extra' is no parameter or buffer .*, for example --aggregate 'extra=local'"
    ):
        local_names(model, "<BatchNorm*>")
    assert local_names(model, "extra", "<*BatchNorm*>") == [*NORMS, "extra"]


@pytest.mark.parametrize("pattern", ["<", "<>", "<Batch", "Batch>", "><", "<[>"])
def test_a_task_with_half_a_pattern_keeps_nothing_and_breaks_nothing(pattern: str) -> None:
    """Of a server that is not ours: ours refuses them."""
    types = ModuleTypes(make_net())
    assert not any(is_local(name, ((pattern, True),), types.is_of_type) for name in NORMS)


# -- the rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<=local", "'<' is not a pattern over types: expected a glob over names of classes"),
        ("<>=local", "'<>' is not a pattern over types"),
        ("<Batch=local", "'<Batch' is not a pattern over types"),
        ("Batch*>=local", "'Batch*>' is not a pattern over types"),
        ("<nn.BatchNorm1d>=local", "without their modules"),
        ("<A><B>=local", "'<A><B>' is not a pattern over types"),
        ("< A >=local", "'< A >' is not a pattern over types"),
        ("<BatchNorm*>=median", "<BatchNorm*> goes with local only, not with median"),
        ("<BatchNorm*>=dp(fedavg, clip=1.0, noise=1.0)", "<BatchNorm*> goes with local only, not with dp"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rules([text, "fedavg"])
    assert says in str(caught.value)


def split_of(*rules: str, local: tuple[str, ...] = ("bn.weight", "bn.bias"), withheld: bool = False) -> Any:
    state = {name: torch.zeros(2) for name in ("fc.weight", *local)}
    split = Split.resolve(parse_rules(rules), state, local_withheld=withheld, at_home=local)
    return [(part.name, part.keys) for part in split.parts]


def test_what_is_at_home_and_not_by_its_name_belongs_to_the_patterns_over_types() -> None:
    both = ("bn.weight", "bn.bias")
    assert split_of("<A>=local", "fedavg") == [("<A>", both), ("*", ("fc.weight",))]
    assert split_of("bn.bias=local", "<A>=local", "fc*=max") == [
        ("bn.bias", ("bn.bias",)), ("<A>", ("bn.weight",)), ("fc*", ("fc.weight",))
    ]  # fmt: skip
    assert split_of("<A>=local", "bn.bias=local", "fedavg") == [
        ("<A>", ("bn.weight",)), ("bn.bias", ("bn.bias",)), ("*", ("fc.weight",))
    ]  # fmt: skip
    assert split_of("<A>=local", "fc*=max", "<B>=local", "<A>=local") == [("<A>, <B>", both), ("fc*", ("fc.weight",))]


def test_a_pattern_over_types_that_kept_nothing_at_home_is_refused_also_where_a_name_may() -> None:
    for withheld in (False, True):
        with pytest.raises(UsageError, match="the pattern of <A>=local matches nothing: the trainer that gave"):
            split_of("<A>=local", "fedavg", local=(), withheld=withheld)
    for rules in (("bn.*=local", "<A>=local"), ("<A>=local", "bn.*=local")):
        with pytest.raises(UsageError, match=r"<A>=local is for nothing: patterns over keys keep 'bn\.weight'"):
            split_of(*rules, "fedavg")


# -- the trainer -------------------------------------------------------------------------------------------------------


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


def travelling(state: StateDict) -> StateDict:
    return {name: tensor for name, tensor in state.items() if name not in NORMS}


def serving(model: nn.Module, reply: Callable[[nn.Module], Any] = lambda model: model) -> Callable[[Trainer], None]:
    def serve(trainer: Trainer) -> None:
        for task in trainer:
            task.load_into(model)
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor += 1
            task.reply(reply(model), num_examples=1)

    return serve


@pytest.mark.parametrize("form", ["module", "function"])
def test_entries_of_a_type_never_travel_and_come_back_after_a_restart(federation: Federation, form: str) -> None:
    start, first = own_state(make_net()), make_net()
    with federation.script(serving(first), first if form == "module" else make_net):
        result = federation.wait(federation.ask("initialize", 0, split=SPLIT))
        assert result.status == "ok", result.error
        assert list(result.local_entries) == NORMS
        assert list(federation.state_of(result)) == list(travelling(start))
        after = federation.run("train", 1, travelling(start), split=SPLIT)
        assert list(after) == list(travelling(start))
    again = make_net()
    with federation.script(serving(again), again):
        federation.run("train", 2, after, split=SPLIT)
    assert all(torch.allclose(tensor, start[name] + 2) for name, tensor in own_state(again).items())


def test_a_state_dict_has_the_types_of_the_module_that_was_seen_before_it(federation: Federation) -> None:
    model = make_net()
    with federation.script(serving(model, lambda model: model.state_dict())):
        assert list(federation.run("train", 1, travelling(own_state(model)), split=SPLIT)) == ["1.weight", "1.bias",
            "2.linear.weight", "2.linear.bias"]  # fmt: skip


@pytest.mark.parametrize("model", [make_net().state_dict(), lambda: make_net().state_dict()])
def test_where_no_module_was_ever_given_the_client_is_told_to_give_it(federation: Federation, model: Any) -> None:
    with federation.script(lambda trainer: list(trainer), model, fails=UsageError):  # type: ignore[arg-type, return-value]
        error = federation.wait(federation.ask("initialize", 0, split=SPLIT)).error
        assert error and "(<*BatchNorm*>), which a state_dict does not have; give the module itself" in error["message"]


def test_a_script_can_ask_what_stays_at_home(federation: Federation) -> None:
    found: list[list[str]] = []

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            found.append([name for name in own_state(make_net()) if task.is_local(name)])
            task.reply(dict(task.state_dict), num_examples=1)

    with federation.script(serve, make_net()):
        federation.run("train", 1, travelling(own_state(make_net())), split=SPLIT)
    assert found == [NORMS]


def test_a_tied_weight_of_which_one_name_would_travel_is_refused_with_both(federation: Federation) -> None:
    model = make_net()
    model.scale = nn.Parameter(model[0].weight.data)
    with federation.script(serving(model), model, fails=UsageError):
        error = federation.wait(federation.ask("initialize", 0, split=SPLIT)).error
        assert error and "'0.weight' and 'scale' share their memory (tied weights)" in error["message"]


# -- five programs -----------------------------------------------------------------------------------------------------


class Normed:
    """Training that one can follow by hand: every number grows by the rank."""

    def __init__(self, context: WorkloadContext) -> None:
        self.model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self._rank = context.rank
        with torch.no_grad():
            for number, tensor in enumerate((*self.model.parameters(), *self.model.buffers())):
                tensor.fill_(100 * number + 37)

    def train(self, task: Any) -> TrainResult:
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                tensor += self._rank
        return TrainResult(1)

    def evaluate(self, task: Any) -> EvaluateResult:
        norms = own_state(self.model[1])
        return EvaluateResult(0.0, 1, {name: float(tensor.reshape(-1)[0]) for name, tensor in norms.items()})


def held_norms(context: WorkloadContext) -> Any:
    return held(Normed(context))


START = {
    name: float(tensor.reshape(-1)[0]) for name, tensor in own_state(Normed(WorkloadContext(rank=1)).model).items()
}
AT_HOME = [name for name in START if name.startswith("1.")]


@pytest.mark.slow
def test_batch_norms_differ_between_ranks_and_are_nowhere_but_at_home_whoever_is_killed(tmp_path: Path) -> None:
    rounds = 8
    with run(tmp_path, "--rounds", str(rounds), workload="held_norms") as federation:
        federation.allow(2)
        federation.start_all()
        federation.wait_until(lambda: len(federation.history()) >= 2)
        federation.kill("model-2", signal.SIGKILL)
        federation.start("model-2")
        federation.allow(5)
        federation.wait_until(lambda: len(federation.history()) >= 5)
        federation.kill("server", signal.SIGKILL)
        federation.start("server", "--resume")
        federation.allow(rounds)
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert len(federation.history()) == rounds
        assert "split: <BatchNorm*>: 5 entries" in federation.log("server")
        assert "goes on after round" in federation.log("server")
    assert_split(federation, rounds)


@pytest.mark.slow
def test_a_state_to_start_from_is_taken_apart_by_what_a_trainer_says(tmp_path: Path) -> None:
    model = Normed(WorkloadContext(rank=1)).model
    torch.save(model.state_dict(), tmp_path / "start.pt")
    with run(tmp_path, "--rounds", "2", "--initial-checkpoint", str(tmp_path / "start.pt")) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
    assert_split(federation, 2)


@pytest.mark.slow
def test_a_resumed_run_cannot_drop_or_add_a_pattern_over_types(tmp_path: Path) -> None:
    with run(tmp_path, "--rounds", "2") as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        federation.server_flags = ("--rounds", "3", "--aggregate", "fedavg", "--resume")
        federation.start("server")
        assert federation.wait(names=["server"]) == {"server": 2}
        assert "'1.weight', '1.bias', '1.running_mean' and 2 more stayed with the trainers" in federation.log("server")
    with run(tmp_path / "other", "--rounds", "2", rules=("fedavg",)) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        federation.server_flags = ("--rounds", "3", "--aggregate", "<BatchNorm*>=local", "--aggregate", "fedavg")
        federation.start("server", "--resume")
        assert federation.wait(names=["server"]) == {"server": 2}
        assert "the pattern of <BatchNorm*>=local matches nothing" in federation.log("server")


@pytest.mark.slow
def test_a_type_that_no_trainer_has_is_told_before_any_round(tmp_path: Path) -> None:
    with run(tmp_path, rules=("<BatchNrom*>=local", "fedavg")) as federation:
        federation.start_all()
        assert federation.wait()["server"] == 15, federation.tails()
        assert "there are BatchNorm1d, Linear, Sequential" in federation.log("server")
        assert federation.history() == []


def assert_split(federation: Programs, rounds: int) -> None:
    found = map_file(federation.final_state())
    assert {name: tensor.unique().tolist() for name, tensor in found.items()} == {
        name: [value + 1.5 * rounds] for name, value in START.items() if name not in AT_HOME
    }
    clients: Any = federation.history()[-1]["clients"]
    for rank in (1, 2):
        evaluated = clients[str(rank)]["evaluate"]
        assert [evaluated[name[2:]] for name in AT_HOME] == [START[name] + rank * rounds for name in AT_HOME]
    payloads = [
        path
        for top in ("exchange", "checkpoints/server")
        for path in (federation.directory / top).rglob("*.safetensors")
    ]
    assert payloads
    for path in payloads:
        assert not set(map_file(path)) & set(AT_HOME), f"{path} has a batch norm in it"


def run(
    directory: Path, *server_flags: str, rules: tuple[str, ...] = ("<BatchNorm*>=local", "fedavg"),
    workload: str = "Normed",
) -> Any:  # fmt: skip
    directory.mkdir(exist_ok=True)
    link_tests(directory)
    flags = [flag for rule in rules for flag in ("--aggregate", rule)]
    model_flags = ("--threads", "1", "--workload", f"tests.test_module_types:{workload}")
    return programs(directory, model_flags=model_flags, server_flags=(*server_flags, *flags))
