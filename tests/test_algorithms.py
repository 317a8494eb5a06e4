"""Each of examples/algorithms is its paper's algorithm: compared with the pseudo-code in float64, and run as it says.

The references know nothing of fedsplit: a model is a vector, and a round is what the paper writes. Some ranks sit out
rounds. On the other side every rank's workload is made anew for each round, and has only its saved local state, as
after a kill.
"""

from __future__ import annotations

import copy
import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from examples.algorithms import digits, lora
from fedsplit import EvaluateResult, TrainResult, Update, WorkloadContext
from fedsplit.__main__ import make_parser
from fedsplit.aggregation import Split, parse_rules
from fedsplit.trainer.progress import Progress
from fedsplit.workloads import create_workload
from fedsplit.workloads.runner import run_workload
from tests.bounds import BOUND_S
from tests.programs import ROOT
from tests.test_trainer import Federation as HandOff
from tests.training import end_well, federation

HERE = "examples.algorithms"
SHARED = ROOT / "examples/algorithms/digits.py"
PAGES = sorted(path for path in SHARED.parent.glob("*.py") if path != SHARED)
# Who takes part, of three ranks.
ROUNDS = ((1, 2, 3), (1, 3), (2, 3))
N, LR, SEED = 3, 0.1, 5
OPTIONS = {"partition": "dirichlet", "alpha": "0.5", "epochs": "1", "batch-size": "48", "lr": str(LR)}


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums may be in another order than the paper's, and nothing else may differ."""
    for module in (digits, lora):
        monkeypatch.setattr(module, "load_data", functools.cache(module.load_data))
    # It is the same network each time, and takes a second to train.
    adapted = functools.cache(lora.adapted)
    monkeypatch.setattr(lora, "adapted", lambda: copy.deepcopy(adapted()))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# -- the examples' side: trainers and rule, without programs -----------------------------------------------------------


@dataclass
class Federated:
    """What is left after the rounds: on the server, and with each rank."""

    state: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    local_part: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    local_state: dict[int, Any] = field(default_factory=dict)


def workload(name: str, rank: int, options: Mapping[str, str]) -> Any:
    context = WorkloadContext(rank=rank, num_partitions=N, seed=SEED, options={**OPTIONS, **options})
    return create_workload(f"{HERE}.{name}", context)


def federate(name: str, *rules: str, **options: str) -> Federated:
    """Run the rounds with a workload and the server's rules."""
    first = workload(name, 1, options).model.state_dict()
    split = Split.resolve(parse_rules(rules), first)
    local = {key for part in split.parts if part.rule is None for key in part.keys}
    found, memory = Federated(state={key: first[key].clone() for key in first if key not in local}), {}
    for number, ranks in enumerate(ROUNDS, start=1):
        merger = split.start_round(
            server_round=number, total_rounds=len(ROUNDS), previous=found.state, seed=0, memory=memory,
            extra=found.extra, ranks=ranks, num_ranks=N,
        )  # fmt: skip
        for rank in ranks:
            merger.add(train(workload(name, rank, options), rank, found, local))
        found.state, found.extra = merger.finish(), merger.extra
    return found


def train(trainer: Any, rank: int, found: Federated, local: set[str]) -> Update:
    """Do a task as `fedsplit.workloads.runner` does."""
    if rank in found.local_state:
        trainer.load_local_state(found.local_state[rank])
    trainer.model.load_state_dict(found.state | found.local_part.get(rank, {}), strict=False)
    result = trainer.train(SimpleNamespace(extra=found.extra, should_stop=lambda: False))
    state = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    found.local_part[rank] = {key: state[key] for key in local}
    found.local_state[rank] = trainer.local_state()
    return Update(
        rank=rank, state_dict={key: state[key] for key in state if key not in local}, extra=result.extra,
        num_examples=result.num_examples, metrics=result.metrics,
    )  # fmt: skip


# -- the papers' side --------------------------------------------------------------------------------------------------


class Reference:
    """What the papers take for granted: the model as a vector, a gradient, and each client's next mini-batches."""

    def __init__(self, name: str, **options: str) -> None:
        self._clients = {rank: workload(name, rank, options) for rank in range(1, N + 1)}
        self.model: nn.Module = self._clients[1].model
        named = [(key, tensor) for key, tensor in self.model.named_parameters() if tensor.requires_grad]
        self.names = [key for key, _ in named]
        self._shapes = [tensor.shape for _, tensor in named]
        self.start = torch.cat([tensor.detach().flatten() for _, tensor in named])

    def sizes(self) -> dict[int, int]:
        """n_i, the number of examples of each client."""
        return {rank: len(client.examples[1]) for rank, client in self._clients.items()}

    def batches(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        """The batches of a client's next round, drawn as the trainer draws them."""
        return list(self._clients[rank].batches())

    def gradient(self, w: Tensor, batch: tuple[Tensor, Tensor], buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        w = w.detach().requires_grad_()
        logits = functional_call(self.model, {**self.named(w), **(buffers or {})}, (batch[0],))
        return torch.autograd.grad(functional.cross_entropy(logits, batch[1]), w)[0]

    def named(self, w: Tensor) -> dict[str, Tensor]:
        parts = w.split([shape.numel() for shape in self._shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self._shapes, strict=True)}

    def of(self, tensors: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        """The vector of named tensors."""
        return torch.cat([tensors[prefix + name].flatten() for name in self.names])

    def mask(self, *beginnings: str) -> Tensor:
        """Which coordinates are those of parameters whose names begin so."""
        chosen = [name.startswith(beginnings) for name in self.names]
        return torch.cat([torch.full(shape, yes).flatten() for yes, shape in zip(chosen, self._shapes, strict=True)])

    def weights(self, ranks: tuple[int, ...]) -> dict[int, float]:
        """p_i among those that take part."""
        sizes = self.sizes()
        return {i: sizes[i] / sum(sizes[j] for j in ranks) for i in ranks}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("server_lr", [1.0, 0.7])
def test_scaffold(server_lr: float) -> None:
    """Karimireddy et al. 2020, Algorithm 1, option II."""
    ref = Reference("scaffold:Scaffold")
    x, c = ref.start, torch.zeros_like(ref.start)
    c_i = {i: torch.zeros_like(x) for i in range(1, N + 1)}
    for sampled in ROUNDS:
        delta_y, delta_c = [], []
        for i in sampled:
            y, batches = x, ref.batches(i)
            for batch in batches:
                y = y - LR * (ref.gradient(y, batch) - c_i[i] + c)
            c_plus = c_i[i] - c + (x - y) / (len(batches) * LR)
            delta_y.append(y - x)
            delta_c.append(c_plus - c_i[i])
            c_i[i] = c_plus
        x = x + server_lr * sum(delta_y) / len(sampled)
        c = c + sum(delta_c) / N
    found = federate("scaffold:Scaffold", f"{HERE}.scaffold:merge(server_lr={server_lr})")
    close(ref.of(found.state), x)
    close(ref.of(found.extra, "control:"), c)
    for i in c_i:
        close(ref.of(found.local_state[i]["own"]), c_i[i])


def test_fednova() -> None:
    """Wang et al. 2020, with a_i of ones: d_i is the mean gradient of a client's tau_i steps."""
    ref = Reference("fednova:FedNova", work="uneven", epochs="3")
    x, steps = ref.start, set()
    for sampled in ROUNDS:
        p, d, tau = ref.weights(sampled), {}, {}
        for i in sampled:
            y, gradients, batches = x, [], ref.batches(i)
            for batch in batches:
                gradients.append(ref.gradient(y, batch))
                y = y - LR * gradients[-1]
            tau[i], d[i] = len(batches), sum(gradients) / len(batches)
        tau_eff = sum(p[i] * tau[i] for i in sampled)
        x = x - tau_eff * sum(p[i] * LR * d[i] for i in sampled)
        steps |= set(tau.values())
    assert len(steps) > 1, "with equal steps it would be FedAvg"
    close(ref.of(federate("fednova:FedNova", f"{HERE}.fednova:merge", work="uneven", epochs="3").state), x)


def test_feddyn() -> None:
    """Acar et al. 2021, Algorithm 1, its argmin by SGD."""
    alpha, m = 0.2, N
    ref = Reference("feddyn:FedDyn", strength=str(alpha))
    theta, h = ref.start, torch.zeros_like(ref.start)
    grad = {k: torch.zeros_like(theta) for k in range(1, N + 1)}
    for active in ROUNDS:
        local = {}
        for k in active:
            local[k] = theta
            for batch in ref.batches(k):
                local[k] = local[k] - LR * (ref.gradient(local[k], batch) - grad[k] + alpha * (local[k] - theta))
            grad[k] = grad[k] - alpha * (local[k] - theta)
        h = h - alpha / m * sum(local[k] - theta for k in active)
        theta = sum(local.values()) / len(active) - h / alpha
    found = federate("feddyn:FedDyn", f"{HERE}.feddyn:merge", strength=str(alpha))
    close(ref.of(found.state), theta)
    for k in grad:
        close(ref.of(found.local_state[k]["gradient"]), grad[k])


def test_fedprox() -> None:
    """Li et al. 2020, Algorithm 2, its argmin by SGD on the loss with the proximal term."""
    mu, ref = 0.3, Reference("fedprox:FedProx", mu="0.3")
    w = ref.start
    for sampled in ROUNDS:
        w_next, p = torch.zeros_like(w), ref.weights(sampled)
        for k in sampled:
            w_k = w
            for batch in ref.batches(k):
                v = w_k.detach().requires_grad_()
                (term,) = torch.autograd.grad(mu / 2 * (v - w).square().sum(), v)
                w_k = w_k - LR * (ref.gradient(w_k, batch) + term)
            w_next = w_next + p[k] * w_k
        w = w_next
    close(ref.of(federate("fedprox:FedProx", "fedavg", mu="0.3").state), w)


def test_ditto() -> None:
    """Li et al. 2021, Algorithm 1, with FedAvg as the solver of the global model."""
    lam, ref = 0.4, Reference("ditto:Ditto", **{"lambda": "0.4"})
    w, v = ref.start, dict.fromkeys(range(1, N + 1), ref.start)
    for sampled in ROUNDS:
        delta, p = {}, ref.weights(sampled)
        for k in sampled:
            w_k = w
            for batch in ref.batches(k):
                w_k = w_k - LR * ref.gradient(w_k, batch)
            for batch in ref.batches(k):
                v[k] = v[k] - LR * (ref.gradient(v[k], batch) + lam * (v[k] - w))
            delta[k] = w_k - w
        w = w + sum(p[k] * delta[k] for k in sampled)
    found = federate("ditto:Ditto", "fedavg", **{"lambda": "0.4"})
    close(ref.of(found.state), w)
    for k in v:
        close(ref.of(found.local_state[k]["own_model"]), v[k])


def shared_without(ref: Reference, personal: Tensor) -> tuple[dict[int, Tensor], dict[int, dict[str, Tensor]]]:
    """FedAvg in which some coordinates, and all buffers, are each client's own: FedPer, LG-FedAvg and FedBN alike."""
    w = dict.fromkeys(range(1, N + 1), ref.start)
    buffers = {i: {key: tensor.clone() for key, tensor in ref.model.named_buffers()} for i in w}
    common = ref.start
    for sampled in ROUNDS:
        p = ref.weights(sampled)
        for i in sampled:
            w[i] = torch.where(personal, w[i], common)
            for batch in ref.batches(i):
                w[i] = w[i] - LR * ref.gradient(w[i], batch, buffers[i])
        common = sum(p[i] * w[i] for i in sampled)
    return {i: torch.where(personal, w[i], common) for i in w}, buffers


@pytest.mark.parametrize(
    ("name", "pattern", "personal"),
    [
        ("fedbn:FedBN", "norm*", "norm"),  # Li et al. 2021, Algorithm 1
        ("fedper:FedPer", "classifier.*", "classifier."),  # Arivazhagan et al. 2019, Algorithms 1 and 2
        ("fedper:FedPer", "features.*", "features."),  # Liang et al. 2020, Algorithm 1
    ],
    ids=["fedbn", "fedper", "lg-fedavg"],
)
def test_parts_that_are_each_ranks_own(name: str, pattern: str, personal: str) -> None:
    ref = Reference(name)
    expected, buffers = shared_without(ref, ref.mask(personal))
    found = federate(name, f"{pattern}=local", "fedavg")
    assert not any(key.startswith(personal) for key in found.state)
    for rank, vector in expected.items():
        close(ref.of(found.state | found.local_part[rank]), vector)
        for key, tensor in buffers[rank].items():
            close(found.local_part[rank][key], tensor)


def test_lora() -> None:
    """Zhang et al. 2023, Algorithm 1: FedAvg of A and B, each by itself; W is frozen."""
    ref = Reference("lora:Lora")
    w = ref.start
    for sampled in ROUNDS:
        p, ends = ref.weights(sampled), {}
        for i in sampled:
            ends[i] = w
            for batch in ref.batches(i):
                ends[i] = ends[i] - LR * ref.gradient(ends[i], batch)
        w = sum(p[i] * ends[i] for i in sampled)
    found = federate("lora:Lora", "*lora_*=fedavg", "*=local")
    close(ref.of(found.state), w)
    assert set(found.state) == set(ref.names) and all("lora_" in name for name in found.state)
    for key, tensor in ref.model.state_dict().items():
        if key not in ref.names:
            assert all(torch.equal(part[key], tensor) for part in found.local_part.values()), f"{key} is frozen"


def test_what_is_held_out_is_the_ranks_own_and_is_not_trained_on() -> None:
    found = workload("digits:Digits", 2, {})
    rows = {part: {tuple(row.tolist()) for row in images.flatten(1)}
            for part, images in (("train", found.examples[0]), ("own", found._own_test[0]))}  # fmt: skip
    assert not rows["train"] & rows["own"]
    assert len(found._own_test[1]) == (len(found._own_test[1]) + len(found.examples[1])) // 5
    assert set(found._own_test[1].tolist()) <= set(found.examples[1].tolist()), "the same mix of classes"
    result = found.evaluate(None)
    assert 0 <= result.metrics["own_accuracy"] <= 1 and result.num_examples == len(found._test[1])


class Personal:
    """Has a number of its own, which grows with each training and is what an evaluation finds."""

    def __init__(self) -> None:
        self.model, self.own = nn.Linear(1, 1), 0

    def train(self, task: Any) -> TrainResult:
        self.own += 1
        return TrainResult(1)

    def evaluate(self, task: Any) -> EvaluateResult:
        return EvaluateResult(float(self.own), 1)

    def local_state(self) -> dict[str, Any]:
        return {"own": self.own}

    def load_local_state(self, state: dict[str, Any]) -> None:
        self.own = state["own"]


def test_a_trainer_that_was_started_again_evaluates_what_is_its_own(tmp_path: Path) -> None:
    hand_off, state, losses = HandOff(tmp_path), nn.Linear(1, 1).state_dict(), []
    for tasks in ([("train", 1), ("train", 2)], [("evaluate", 2), ("train", 3), ("evaluate", 3)]):
        personal = Personal()
        with hand_off.script(lambda trainer, own=personal: run_workload(trainer, own, Progress(1)), personal.model):
            for kind, server_round in tasks:
                result = hand_off.wait(hand_off.ask(kind, server_round, state))
                losses += [result.loss] if kind == "evaluate" else []
    assert losses == [2.0, 3.0]


# -- the pages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_is_a_page(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= 70
    assert re.search(r"arXiv:\d{4}\.\d{5}", page.read_text())


@pytest.mark.parametrize("page", [*PAGES, SHARED], ids=lambda page: page.stem)
def test_the_commands_of_a_page_can_be_read(page: Path) -> None:
    found = [make_parser().parse_args(words[3:]) for words in commands(page)]
    assert found and all(parse_rules(each.aggregate) for each in found)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's docstring, in words."""
    text = page.read_text().split('"""')[1].replace("\\\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    (python -m fedsplit run .*)$", text, re.M)]


@pytest.mark.slow
@pytest.mark.parametrize("page", [*PAGES, SHARED], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for number, words in enumerate(commands(page)):
        words[words.index("--rounds") + 1], words[words.index("--ranks") + 1] = "2", "2"
        command = [sys.executable, *words[1:], "--checkpoint-dir", f"kept-{number}"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=BOUND_S)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert (tmp_path / f"kept-{number}/server/history.jsonl").read_text().count("accuracy") > 0


@pytest.mark.slow
def test_scaffold_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path) -> None:
    runs = []
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        trainer = (
            sys.executable, str(ROOT / "model_main.py"), "--rank", "{rank}", "--threads", "1",
            "--workload", "tests.held:scaffold", "--workload-option", "epochs=20",
        )  # fmt: skip
        flags = ("--rounds", "4", "--aggregate", f"{HERE}.scaffold:merge")
        with federation(tmp_path / name, trainer=trainer, server_flags=flags) as found:
            found.allow(4 if name == "undisturbed" else 1)
            found.start_all()
            if name == "killed":
                found.wait_until(lambda found=found: len(found.history()) >= 1)
                found.kill("model-2")
                found.start("model-2")
                found.allow(2)
                found.wait_until(lambda found=found: len(found.history()) >= 2)
                found.kill("server")
                found.start("server", "--resume")
                found.allow(4)
            end_well(found)
            lines = found.history()
            runs.append((found.final_state().read_bytes(), [line["evaluate"] for line in lines]))
    assert runs[0] == runs[1]
