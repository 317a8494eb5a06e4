"""A federation with a model that is cut, in one process: real server, relays, exchange directories and trainers.

Each trainer is a thread, and so is the server; a question of the server's is a call of the relay. What is not here are
processes, Flower's engine and the wire. `unsplit` is what all of it must come to: plain loops over the whole model.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from torch import nn

from fedsplit.client.relay import Relay
from fedsplit.disk.remote_store import open_remote
from fedsplit.engines.assembly import open_server
from fedsplit.exchange.directory import Exchange
from fedsplit.server.server import Server
from fedsplit.server.settings import ServerSettings
from fedsplit.split_learning.cut import Parts, parts_of
from fedsplit.split_learning.lower import LowerPart
from fedsplit.split_learning.noise import CutNoise
from fedsplit.split_learning.upper import run_upper
from fedsplit.split_learning.uppers import Uppers
from fedsplit.states.state_dict import map_file
from fedsplit.trainer.progress import Progress
from fedsplit.trainer.trainer import Trainer
from fedsplit.wire.protocol import EMBEDDED
from fedsplit.workloads import WorkloadContext
from fedsplit.workloads.runner import run_workload
from tests.bounds import BOUND_S
from tests.reference import mean

State = dict[str, torch.Tensor]


class Small:
    """A workload of a few numbers: a chain with BatchNorm, and dropout where it is wanted."""

    def __init__(self, rank: int, *, batches: int = 3, dropout: float = 0.0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.model = nn.Sequential(
                nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(dropout) if dropout else nn.ReLU(inplace=True),
                nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(dropout) if dropout else nn.Tanh()),
                nn.Linear(8, 3),
            )  # fmt: skip
        data = torch.Generator().manual_seed(rank)
        count = batches + rank - 1  # the ranks have different numbers of batches
        self._inputs = torch.randn(4 * count, 6, generator=data)
        self._targets = torch.randint(0, 3, (4 * count,), generator=data)
        self._order = torch.Generator().manual_seed(100 + rank)
        self.num_examples = 4 * count

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, target)

    def metrics(self, output: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
        return {"accuracy": (output.argmax(dim=1) == target).float().mean().item()}

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

    def batches(self, task: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = len(self._targets)
        order = torch.randperm(count, generator=self._order) if task.kind == "train" else torch.arange(count)
        for chosen in order.split(4):
            yield self._inputs[chosen], self._targets[chosen]

    def local_state(self) -> dict[str, Any]:
        return {"order": self._order.get_state()}

    def load_local_state(self, state: dict[str, Any]) -> None:
        self._order.set_state(state["order"])


class Local(ClientProxy):
    """A relay without a wire."""

    def __init__(self, relay: Relay, rank: int, said: list[bytes]) -> None:
        super().__init__(f"{rank}" * 8)
        self._relay, self._said = relay, said

    def get_properties(self, ins: Any, *_: object) -> Any:
        return self._say(self._relay.get_properties(ins))

    def get_parameters(self, ins: Any, *_: object) -> Any:
        return self._say(self._relay.get_parameters(ins))

    def fit(self, ins: Any, *_: object) -> Any:
        return self._say(self._relay.fit(ins))

    def evaluate(self, ins: Any, *_: object) -> Any:
        return self._say(self._relay.evaluate(ins))

    def reconnect(self, *_: object) -> Any:
        return None

    def _say(self, answer: Any) -> Any:
        fields = {name: value for name, value in vars(answer).items() if name != "parameters"}
        self._said += [*(answer.parameters.tensors if hasattr(answer, "parameters") else []), repr(fields).encode()]
        return answer


@contextmanager
def connected(proxy: ClientProxy, roster: ClientManager) -> Iterator[None]:
    """Have a connection for the length of a block; a roster pings for as long as there is one."""
    roster.register(proxy)
    try:
        yield
    finally:
        roster.unregister(proxy)


def serve(server: Server, rounds: int, trainers: Sequence[threading.Thread]) -> None:
    """Run all rounds with these trainers."""
    for trainer in trainers:
        trainer.start()
    serving = threading.Thread(target=server.fit, args=(rounds, None), daemon=True)
    serving.start()
    serving.join(BOUND_S)
    assert not serving.is_alive(), "the server is still running"


def end(server: Server, trainers: Sequence[threading.Thread]) -> None:
    """Wait for the trainers, once the server is closed: those of the upper part hear of the end only then."""
    if server.failure:
        raise server.failure
    for trainer in trainers:
        trainer.join(BOUND_S)
        assert not trainer.is_alive(), "a trainer is still running"


class KilledError(BaseException):
    """Ends a trainer's thread as SIGKILL ends a process, but for its locks, which the kernel would take."""


@dataclass
class Halves:
    """A server, relays and trainers; ``kills`` maps ``(rank or "upper", hand-over)`` to nothing: ended there, once."""

    directory: Path
    mode: str
    ranks: int = 2
    rounds: int = 2
    cut: str = "2"
    tail: str | None = None
    make: Callable[[int], Any] = Small
    settings: dict[str, Any] = field(default_factory=dict)
    kills: set[tuple[int | str, int]] = field(default_factory=set)
    errors: list[BaseException] = field(default_factory=list)
    by_reference: bool = True
    # The client of a rank, where it is not an honest one.
    clients: dict[int, type[Local]] = field(default_factory=dict)
    noise: float | None = None
    whole_model: bool = False
    dtype: torch.dtype | None = None
    window: int = 1
    # How many trainers of upper parts: "upper", "upper-2" and so on.
    uppers: int = 1
    # What runs at a rank instead of `LowerPart`: a script of one's own.
    script: Callable[[Trainer, Any, Parts], None] | None = None
    # All that left the ranks in messages.
    said: list[bytes] = field(default_factory=list)
    _making: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> State:
        """Run all rounds; returns the last state under the whole model's names."""
        settings = ServerSettings(
            rounds=self.rounds, min_clients=self.ranks, checkpoint_dir=self.directory / "checkpoints",
            **self.settings,
        )  # fmt: skip
        more = [f"upper-{number}" for number in range(2, self.uppers + 1)]
        places: list[int | str] = [*range(1, self.ranks + 1), "upper", *more]
        threads = [threading.Thread(target=self._train, args=(place,), daemon=True) for place in places]
        with ExitStack() as stack:
            upper = Uppers(settings, self.mode, self.directory / "exchange", self.uppers)
            server = stack.enter_context(open_server(settings, EMBEDDED, uppers=upper))
            for rank in range(1, self.ranks + 1):
                exchange = Exchange(self.directory / "exchange", rank)
                stack.enter_context(exchange.hold("client"))
                relay = Relay(
                    exchange, trainer_wait_s=BOUND_S, use_store=self.by_reference,
                    remote=open_remote(settings.payload_store),
                )  # fmt: skip
                proxy = self.clients.get(rank, Local)(relay, rank, self.said)
                stack.enter_context(connected(proxy, server.client_manager()))
            serve(server, self.rounds, threads)
        end(server, threads)
        assert not self.errors, self.errors
        assert not self.kills, f"not reached: {self.kills}"
        self.history = server.run.history.lines
        return whole(map_file(max((self.directory / "checkpoints" / "server").glob("round-*/state.safetensors"))))

    def _train(self, place: int | str) -> None:
        while True:
            try:
                self._start(place)
                return
            except KilledError:
                continue
            except BaseException as exc:  # noqa: BLE001  (for the main thread)
                self.errors.append(exc)
                return

    def _start(self, place: int | str) -> None:
        rank = place if isinstance(place, int) else 1
        run: Callable[..., None]
        with self._making:  # torch's generator is that of the process
            workload = self.make(rank)
            parts = parts_of(workload, self.cut, self.tail)
            if isinstance(place, str):
                model, run = parts.beyond(), partial(run_upper, workload=workload, parts=parts)
            elif self.script:
                model = parts.at_rank()

                def run(trainer: Trainer, **_: object) -> None:
                    self.script(trainer, workload, parts)

            elif self.whole_model:
                model, run = workload.model, partial(run_workload, workload=workload)
            else:
                noise = CutNoise(self.noise, b"secret") if self.noise else None
                context = WorkloadContext(rank=rank, num_partitions=self.ranks)
                lower = LowerPart(workload, parts, context, self.dtype, noise, self.window)
                model, run = lower.model, partial(run_workload, workload=lower)
        end = place if isinstance(place, str) and place != "upper" else ""
        trainer = Trainer(
            place if isinstance(place, int) else "upper", model, exchange_dir=self.directory / "exchange" / end,
            checkpoint_dir=self.directory / "checkpoints" / end,
        )  # fmt: skip
        count = 0
        answer = trainer._channel.answer

        def counted(*arguments: Any) -> bool:
            nonlocal count
            count += 1
            if (place, count) in self.kills:
                self.kills.discard((place, count))
                raise KilledError
            return answer(*arguments)

        trainer._channel.answer = counted  # type: ignore[method-assign]
        with trainer:
            run(trainer, progress=Progress(rank, shown=False))


def whole(state: State) -> State:
    """Return a state under the names of the whole model."""
    return {name.partition(".")[2]: tensor.clone() for name, tensor in state.items()}


def unsplit(mode: str, *, ranks: int = 2, rounds: int = 2, cut: int = 3, tail: int | None = None, seed: int = 0,
            make: Callable[[int], Any] = Small, between: nn.Module | None = None,
            window: int = 1) -> State:  # fmt: skip
    """Train the whole model in plain loops, in the order of a mode; `cut` is how many modules are in the lower part.

    Each rank has its optimizer of the lower part, and of the upper one under ``sfl-v1``. `between` stands at the
    cut. With a `window` so many batches go through the lower part before it is trained with all of their gradients.
    """
    workloads = {rank: make(rank) for rank in range(1, ranks + 1)}
    model = workloads[1].model
    end = len(model) if tail is None else tail
    if ranks == 1 and any(isinstance(each, nn.Dropout) for each in model.modules()):
        LowerPart(workloads[1], parts_of(workloads[1], "0", None), WorkloadContext(rank=1, num_partitions=1))
    task: Any = SimpleNamespace(kind="train", config={})
    lowers = {rank: copy.deepcopy(nn.ModuleList([*model[:cut], *model[end:]])) for rank in workloads}
    owners = {rank: rank if mode == "sfl-v1" else 0 for rank in workloads}
    uppers = {owner: copy.deepcopy(model[cut:end]) for owner in set(owners.values())}
    optimizers = {("lower", rank): workloads[rank].optimizer(each) for rank, each in lowers.items()}
    optimizers |= {("upper", owner): workloads[1].optimizer(each) for owner, each in uppers.items()}
    state = copy.deepcopy(model.state_dict())

    def put_together(rank: int) -> nn.Sequential:
        lower = lowers[rank]
        return nn.Sequential(*lower[:cut], *uppers[owners[rank]], *lower[cut:])

    def step(rank: int, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        mine = [optimizers["lower", rank], optimizers["upper", owners[rank]]]
        for each in mine:
            each.zero_grad()
        links = list(put_together(rank).train())
        if between is not None:
            links.insert(cut, between)
        workloads[rank].loss(nn.Sequential(*links)(batch[0]), batch[1]).backward()
        for each in mine:
            each.step()

    def steps(rank: int, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        lower, upper = nn.Sequential(*lowers[rank]).train(), uppers[owners[rank]].train()
        weights, optimizer = list(lower.parameters()), optimizers["upper", owners[rank]]
        activations, late = [lower(inputs) for inputs, _ in batches], []
        for given, (_, targets) in zip(activations, batches, strict=True):
            at_cut = given.detach().requires_grad_()
            optimizer.zero_grad()
            workloads[rank].loss(upper(at_cut.clone()), targets).backward()
            optimizer.step()
            late.append(torch.autograd.grad(given, weights, at_cut.grad))
        for gradients in late:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizers["lower", rank].step()

    for server_round in range(1, rounds + 1):
        for rank in workloads:
            put_together(rank).load_state_dict(state)
        waiting = {rank: list(workload.batches(task)) for rank, workload in workloads.items()}
        for turn in range(sum(map(len, waiting.values()))):
            order = random.Random(f"{seed}/{server_round}/{turn}").sample(sorted(workloads), ranks)
            if mode == "sequential":
                rank = next((rank for rank in sorted(waiting) if waiting[rank]), 0)
                for batch in waiting.get(rank, []):
                    step(rank, batch)
                if rank in waiting:
                    waiting[rank] = []
                    for other in workloads:
                        lowers[other].load_state_dict(lowers[rank].state_dict())
                continue
            for rank in order:
                chosen, waiting[rank] = waiting[rank][:window], waiting[rank][window:]
                if window > 1:
                    steps(rank, chosen)
                elif chosen:
                    step(rank, chosen[0])
        states = {rank: copy.deepcopy(put_together(rank).state_dict()) for rank in workloads}
        counts = {rank: workload.num_examples for rank, workload in workloads.items()}
        state = {name: mean([(counts[rank], states[rank][name]) for rank in workloads]) for name in state}
    return state
