"""Slow ranks: how soon the digits reach 0.95 when one of eight ranks is four times, and one ten times slower.

The server's real rounds, rules and store, and the digits' real training, in one process (`benchmarks.inside`); the
clock is simulated. A rank of speed 1 takes one second for its work in a round, and a share of the work that share of a
second; everything else takes none. So the figures do not depend on the machine, and leave out its hand-offs, which take
milliseconds. The same as Markdown goes to ``benchmarks/results/stragglers.md``.

Accuracy is that of the global state on all test images. What is thrown away are trainings that were finished, or under
way for the whole of a round, and never merged. In `one class`, all images of the nine are at the slowest rank.
"""

from __future__ import annotations

import contextlib
import heapq
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Figure, Options
from benchmarks.inside import Federation, InsideRank
from fedsplit.asynchronous.rounds import AsyncRounds
from fedsplit.exchange.work import work_share
from fedsplit.run.history import Line
from fedsplit.server.observer import Observer
from fedsplit.server.settings import ServerSettings
from fedsplit.states.state_dict import StateDict
from fedsplit.workloads import WorkloadContext, create_workload

TOPIC = "stragglers"
PACES = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 10.0)
WANTED, NINE = 0.95, 9
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {}, "--round-timeout 2": {"round_timeout": 2.0}, "--merge-after 5": {"merge_after": 5},
    "--buffer 4": {"buffer": 4}, "--balance": {"balance": True},
}  # fmt: skip
DATA = {"IID": {}, "Dirichlet 0.3": {"partition": "dirichlet", "alpha": "0.3"}, "one class": {}}


class _OverError(BaseException):
    """The time is up."""


@dataclass
class Clock(Observer):
    """The simulated seconds, and what was reached when; ends the run when `most_s` of them are over."""

    most_s: float
    accuracy: Callable[[], tuple[float, float]]
    is_stepped: bool
    timeout_s: float | None
    now: float = 0.0
    reached: float | None = None
    last: tuple[float, float] = (0.0, 0.0)
    thrown: int = 0
    trained: int = 0
    _longest: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def took(self, seconds: float) -> None:
        """Note how long a training of this round takes."""
        with self._lock:
            self.trained += 1
            self._longest = max(self._longest, seconds)

    def round_ended(self, line: Line, total_rounds: int) -> None:
        if not self.is_stepped:
            self.now += self._longest if self.timeout_s is None else min(self._longest, self.timeout_s)
        self._longest = 0.0
        self.thrown += len(line["refused"])
        if self.now > self.most_s:
            raise _OverError
        self.last = self.accuracy()
        if self.reached is None and self.last[0] >= WANTED:
            self.reached = self.now


class Simulated(threading.Condition):
    """Where asynchronous rounds would wait, the rank that is done next hands in."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._done: list[tuple[float, int, Callable[[], None]]] = []

    def add(self, rank: int, seconds: float, job: Callable[[], None]) -> None:
        """Let a rank be done so many seconds from now."""
        heapq.heappush(self._done, (self._clock.now + seconds, rank, job))

    def wait(self, timeout: float | None = None) -> bool:
        self._clock.now, _, job = heapq.heappop(self._done)
        job()
        return True


class SimulatedRounds(AsyncRounds):
    """Asynchronous rounds by a simulated clock."""

    def __init__(self, *, clock: Clock, **parts: Any) -> None:
        self._simulated = Simulated(clock)
        super().__init__(**parts)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._changed = self._simulated

    def _spawn(self, job: Any, task: Any) -> None:
        seconds = PACES[task.rank - 1] * work_share(task.request.config)
        self._simulated.add(task.rank, seconds, partial(job, task))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to."""

    seconds: float | None
    accuracy: float
    nines: float
    thrown: int
    trained: int


def simulate(mode: dict[str, Any], data: str, *, most_s: float, seed: int = 0) -> Outcome:
    """Run the digits on eight ranks for so many simulated seconds."""
    workloads: list[Any] = [
        create_workload(
            "digits",
            WorkloadContext(rank=rank, num_partitions=len(PACES), seed=seed, device="cpu", options=DATA[data]),
        )
        for rank in range(1, len(PACES) + 1)
    ]
    if data == "one class":
        _give_all_nines_to_the_last(workloads)
    judge: Any = create_workload("digits", WorkloadContext(rank=1, num_partitions=1, seed=seed, device="cpu"))
    initial: StateDict = {name: tensor.clone() for name, tensor in judge.model.state_dict().items()}
    is_stepped = "buffer" in mode or "merge_after" in mode
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        wanted = ServerSettings(
            rounds=100_000, min_clients=len(PACES), evaluate_every=0, seed=seed, checkpoint_dir=Path(directory),
            **{name: value for name, value in mode.items() if name != "round_timeout"},
        )  # fmt: skip
        federation = Federation(Path(directory), wanted, initial, [])
        clock = Clock(most_s, lambda: _accuracy(judge, federation), is_stepped, mode.get("round_timeout"))
        federation.observer = clock
        federation.ranks = [_rank(number, each, clock) for number, each in enumerate(workloads, start=1)]
        federation.make_rounds = partial(SimulatedRounds, clock=clock) if is_stepped else None
        with contextlib.suppress(_OverError):
            federation.run()
    accuracy, nines = clock.last
    return Outcome(seconds=clock.reached, accuracy=accuracy, nines=nines, thrown=clock.thrown, trained=clock.trained)


def _rank(rank: int, workload: Any, clock: Clock) -> InsideRank:
    def train(task: Any) -> tuple[StateDict, int]:
        task.seconds = PACES[rank - 1] * work_share(task.config)
        clock.took(task.seconds)
        if clock.timeout_s is not None and task.seconds > clock.timeout_s:
            raise TimeoutError(f"not completed within {clock.timeout_s:g} s")
        workload.model.load_state_dict(task.state_dict)
        result = workload.train(task)
        state = {name: tensor.clone() for name, tensor in workload.model.state_dict().items()}
        return state, result.num_examples

    return InsideRank(rank, train)


def _give_all_nines_to_the_last(workloads: Sequence[Any]) -> None:
    labels = workloads[0]._data.train_labels
    for each in workloads[:-1]:
        each._train_indices = each._train_indices[labels[each._train_indices] != NINE]
    workloads[-1]._train_indices = torch.nonzero(labels == NINE).flatten()


@torch.no_grad()
def _accuracy(judge: Any, federation: Federation) -> tuple[float, float]:
    """Return the share of all test images that the global state knows, and that of the nines."""
    assert federation.rounds is not None
    judge.model.load_state_dict(federation.rounds._state.entries)
    judge.model.eval()
    images, labels = judge._load(judge._data.test_images, judge._data.test_labels, judge._test_indices)
    hits = judge.model(images).argmax(dim=1) == labels
    return float(hits.float().mean()), float(hits[labels == NINE].float().mean())


def run(options: Options) -> list[Figure]:
    """Measure."""
    torch.set_num_threads(1)
    most_s = options.pick(60.0, 60.0, 4.0)
    found: dict[tuple[str, str], Outcome] = {}
    for data in list(DATA)[: options.pick(3, 3, 1)]:
        for name, mode in MODES.items():
            found[data, name] = simulate(mode, data, most_s=most_s)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "stragglers.md").write_text(markdown(found))
    return [_figure(data, name, outcome, found[data, "synchronous"]) for (data, name), outcome in found.items()]


def markdown(found: dict[tuple[str, str], Outcome]) -> str:
    """Return the table for docs/benchmarks.md."""
    rows = [
        [
            "data",
            "rounds",
            "seconds to 0.95",
            "times quicker",
            "accuracy at the end",
            "of the nines",
            "trainings",
            "thrown away",
        ],
        ["---"] * 8,
    ]
    for (data, name), outcome in found.items():
        shown = "never" if outcome.seconds is None else f"{outcome.seconds:.1f}"
        ratio = _ratio(outcome, found[data, "synchronous"])
        rows.append([
            data, name if name == "synchronous" else f"`{name}`", shown, f"{ratio:.1f}" if ratio else "-",
            f"{100 * outcome.accuracy:.1f} %", f"{100 * outcome.nines:.1f} %", str(outcome.trained),
            str(outcome.thrown),
        ])  # fmt: skip
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _ratio(outcome: Outcome, peer: Outcome) -> float | None:
    return peer.seconds / outcome.seconds if outcome.seconds and peer.seconds else None


def _figure(data: str, name: str, outcome: Outcome, peer: Outcome) -> Figure:
    note = f"at the end {100 * outcome.accuracy:.1f} %, {outcome.thrown} of {outcome.trained} trainings thrown away"
    if outcome.seconds is None:
        return Figure(topic=TOPIC, name=f"{data}, {name}", unit="s", missing=f"never at {WANTED}; {note}")
    return Figure(topic=TOPIC, name=f"{data}, {name}, to {WANTED}", unit="s", samples=[outcome.seconds], note=note)
