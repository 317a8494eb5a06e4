"""Slow ranks: how soon the digits reach 0.95 when one of eight ranks is four times, and one ten times slower.

The server's real rounds, rules and store, and the digits' real training, in one process (`benchmarks.inside`); the
clock is simulated. A rank of speed 1 takes one second for its work in a round, and a share of the work that share of a
second; everything else takes none. So the figures do not depend on the machine and come out the same each time; they
leave out the hand-offs, which take milliseconds. The same as Markdown goes to ``benchmarks/results/stragglers.md``, and
the accuracies over time to ``stragglers.json`` beside it, which docs/images/stragglers.py draws.

Accuracy is that of the global state on all test images. At the end it is the mean over the last tenth of the time, as
that of few updates goes up and down. What is thrown away are trainings that were finished, or under way for the whole
of a round, and never merged. In `one class`, all images of the nine are at the slowest rank.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import json
import math
import statistics
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.common import RESULTS, Figure, Options, scratch_directory
from benchmarks.inside import Federation, InsideRank
from fedsplit.asynchronous.rounds import AsyncRounds
from fedsplit.exchange.work import WORK_SHARE, steps_to_do, work_share
from fedsplit.run.history import Line
from fedsplit.server.observer import Observer
from fedsplit.server.settings import ServerSettings
from fedsplit.states.state_dict import StateDict
from fedsplit.workloads.digits import load_data
from fedsplit.workloads.partition import partition

TOPIC = "stragglers"
PACES = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 10.0)
WANTED, NINE, PEER = 0.95, 9, "synchronous"
LEAST_SPEEDUP, MOST_POINTS_LESS = 2.5, 1.0
CONSTANT = {"staleness": "constant"}
MODES: dict[str, dict[str, Any]] = {
    PEER: {}, "--round-timeout 2": {"round_timeout": 2.0}, "--merge-after 6": {"merge_after": 6},
    "--merge-after 6 --staleness constant": {"merge_after": 6, **CONSTANT}, "--buffer 3": {"buffer": 3},
    "--buffer 3 --staleness constant": {"buffer": 3, **CONSTANT}, "--balance": {"balance": True},
    "--buffer 3 --balance": {"buffer": 3, "balance": True},
}  # fmt: skip
# In all modes; chosen so that synchronous rounds come to 0.95 soon, with Dirichlet(0.3) too.
EPOCHS, BATCH_SIZE, LR, HIDDEN = 3, 16, 0.5, 64
# For all modes the same: long enough for synchronous rounds to come to 0.95.
HORIZONS_S = {"IID": 80, "Dirichlet 0.3": 240, "one class": 160}
ALPHAS = {"IID": None, "Dirichlet 0.3": 0.3}


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
    # Seconds, accuracy, and accuracy on the nines, after each merge.
    curve: list[tuple[float, float, float]] = field(default_factory=list)
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
        if self.now > self.most_s:
            raise _OverError
        self.thrown += len(line["refused"])
        self.curve.append((self.now, *self.accuracy()))


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

    def _is_gone(self, task: Any) -> bool:
        # By the machine's clock a slow rank would be, on a slow machine.
        return False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to: its `curve` has seconds, accuracy, and accuracy on the nines, after each merge."""

    curve: list[tuple[float, float, float]]
    thrown: int
    trained: int
    most_s: float

    @property
    def seconds(self) -> float | None:
        """When 0.95 was reached first."""
        return next((now for now, accuracy, _ in self.curve if accuracy >= WANTED), None)

    def at_end(self, which: int) -> float:
        """Return the mean of the last tenth of the time, in percent; ``which`` is the place in the curve's entries."""
        late = [entry[which] for entry in self.curve if entry[0] > 0.9 * self.most_s] or [self.curve[-1][which]]
        return 100 * statistics.mean(late)


loaded = functools.cache(load_data)
# By data and mode, an outcome for each seed.
Found = dict[tuple[str, str], list[Outcome]]


def simulate(mode: dict[str, Any], data: str, *, most_s: float, seed: int = 0) -> Outcome:
    """Run the digits on eight ranks for so many simulated seconds."""
    ranks = [Digits(data, rank, seed) for rank in range(1, len(PACES) + 1)]
    initial = first_state(seed)
    is_stepped = "buffer" in mode or "merge_after" in mode
    with scratch_directory() as directory:
        wanted = ServerSettings(
            rounds=100_000, min_clients=len(PACES), evaluate_every=0, seed=seed, checkpoint_dir=directory,
            **{name: value for name, value in mode.items() if name != "round_timeout"},
        )  # fmt: skip
        federation = Federation(directory, wanted, initial, [])
        clock = Clock(most_s, lambda: _accuracy(_state(federation)), is_stepped, mode.get("round_timeout"))
        federation.observer = clock
        federation.ranks = [_rank(number, each, clock) for number, each in enumerate(ranks, start=1)]
        federation.make_rounds = partial(SimulatedRounds, clock=clock) if is_stepped else None
        with contextlib.suppress(_OverError):
            federation.run()
        for each in federation.ranks:
            if each.worker:
                # A thread that still lets go of torch's memory when the process ends would abort it.
                each.worker.join(60)
    return Outcome(curve=clock.curve, thrown=clock.thrown, trained=clock.trained, most_s=most_s)


def _state(federation: Federation) -> StateDict:
    assert federation.rounds is not None
    return federation.rounds._state.entries


def first_state(seed: int) -> StateDict:
    """Return a model of two layers, drawn as PyTorch draws one."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"w1": (64, HIDDEN), "b1": (64, HIDDEN), "w2": (HIDDEN, 10), "b2": (HIDDEN, 10)}
    state = {}
    for name, (into, out) in sizes.items():
        shape = (into, out) if name.startswith("w") else (out,)
        state[name] = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(into)
    return state


class Digits:
    """A rank's digits. Its gradients are written out: PyTorch's would take ten times as long as all the rest."""

    def __init__(self, data: str, rank: int, seed: int) -> None:
        found, ranks = loaded(), len(PACES)
        labels = found.train_labels
        if data == "one class":
            nines = torch.nonzero(labels == NINE).flatten()
            others = torch.nonzero(labels != NINE).flatten()
            mine = (
                nines
                if rank == ranks
                else others[torch.from_numpy(partition(labels[others], ranks - 1, seed)[rank - 1])]
            )
        else:
            mine = torch.from_numpy(partition(labels, ranks, seed, ALPHAS[data])[rank - 1])
        self._images, self._wanted = scaled(found.train_images[mine]), functional.one_hot(labels[mine], 10).float()
        self._generator = torch.Generator().manual_seed(1000 * seed + rank)

    def train(self, state: StateDict, share: float) -> tuple[StateDict, int]:
        """Do a share of the epochs of plain SGD; returns the state, and how many different examples were seen."""
        w1, b1, w2, b2 = (state[name].clone() for name in ("w1", "b1", "w2", "b2"))
        number = len(self._images)
        batches = [
            batch
            for _ in range(EPOCHS)
            for batch in torch.randperm(number, generator=self._generator).split(BATCH_SIZE)
        ]
        batches = batches[: steps_to_do({WORK_SHARE: share}, len(batches))]
        for batch in batches:
            images = self._images[batch]
            hidden = torch.relu(torch.addmm(b1, images, w1))
            wrong = (torch.softmax(torch.addmm(b2, hidden, w2), 1) - self._wanted[batch]) / len(batch)
            back = (wrong @ w2.T) * (hidden > 0)
            w2.addmm_(hidden.T, wrong, alpha=-LR)
            b2.sub_(wrong.sum(0), alpha=LR)
            w1.addmm_(images.T, back, alpha=-LR)
            b1.sub_(back.sum(0), alpha=LR)
        return {"w1": w1, "b1": b1, "w2": w2, "b2": b2}, min(number, sum(map(len, batches)))


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Return images as rows of numbers around 0."""
    return (images.flatten(1).float() / 16 - 0.3) / 0.4


def _rank(rank: int, digits: Digits, clock: Clock) -> InsideRank:
    def train(task: Any) -> tuple[StateDict, int]:
        share = work_share(task.config)
        task.seconds = PACES[rank - 1] * share
        clock.took(task.seconds)
        if clock.timeout_s is not None and task.seconds > clock.timeout_s:
            raise TimeoutError(f"not completed within {clock.timeout_s:g} s")
        return digits.train(task.state_dict, share)

    return InsideRank(rank, train)


def _accuracy(state: StateDict) -> tuple[float, float]:
    """Return the share of all test images that a state knows, and that of the nines."""
    found = loaded()
    hidden = torch.relu(torch.addmm(state["b1"], scaled(found.test_images), state["w1"]))
    hits = torch.addmm(state["b2"], hidden, state["w2"]).argmax(dim=1) == found.test_labels
    return float(hits.float().mean()), float(hits[found.test_labels == NINE].float().mean())


def run(options: Options) -> list[Figure]:
    """Measure."""
    torch.set_num_threads(1)
    found: Found = {}
    RESULTS.mkdir(exist_ok=True)
    for seed in range(options.pick(3, 1, 1)):
        for data in list(HORIZONS_S)[: options.pick(3, 3, 1)]:
            for name, mode in MODES.items():
                most_s = options.pick(HORIZONS_S[data], HORIZONS_S[data], 4)
                found.setdefault((data, name), []).append(simulate(mode, data, most_s=most_s, seed=seed))
                # After each run: many minutes must not be lost to the last one.
                _write(found)
    return [figure for (data, name) in found for figure in _figures(data, name, found)]


def _write(found: Found) -> None:
    (RESULTS / "stragglers.md").write_text(markdown(found))
    record = [{"data": data, "mode": name, "runs": list(map(asdict, runs))} for (data, name), runs in found.items()]
    (RESULTS / "stragglers.json").write_text(json.dumps(record) + "\n")


def markdown(found: Found) -> str:
    """Return the table for docs/benchmarks.md: means over the seeds, and of the seconds all of them."""
    rows = [["data", "rounds", "seconds to 0.95", "times quicker", "accuracy at the end", "of the nines", "trainings",
             "thrown away"], ["---"] * 8]  # fmt: skip
    for (data, name), runs in found.items():
        ratio = _ratio(runs, found[data, PEER])
        rows.append([
            data, name if name == PEER else f"`{name}`", ", ".join(_shown(run.seconds) for run in runs),
            f"{ratio:.1f}" if ratio else "", *(f"{_mean(run.at_end(which) for run in runs):.1f} %" for which in (1, 2)),
            f"{_mean(run.trained for run in runs):,.0f}", f"{_mean(run.thrown for run in runs):,.0f}",
        ])  # fmt: skip
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _shown(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.3g}"


def _mean(numbers: Iterable[float]) -> float:
    return statistics.mean(numbers)


def _ratio(runs: Sequence[Outcome], peer: Sequence[Outcome]) -> float | None:
    """Return how many times quicker, by the sums over all seeds; None if one never came there."""
    ours, theirs = ([run.seconds for run in side if run.seconds is not None] for side in (runs, peer))
    return sum(theirs) / sum(ours) if len(ours) == len(theirs) == len(runs) else None


def _figures(data: str, name: str, found: Found) -> list[Figure]:
    runs, peer = found[data, name], found[data, PEER]
    is_judged = name != PEER and data != "one class"
    against = {"peer": PEER} if name != PEER else {}
    note = f"{_mean(run.thrown for run in runs):.0f} of {_mean(run.trained for run in runs):.0f} trainings thrown away"
    seconds, theirs = ([run.seconds for run in side if run.seconds is not None] for side in (runs, peer))
    what = f"{data}, {name}"
    first = Figure(topic=TOPIC, name=f"{what}, to {WANTED}", unit="s", missing=f"not always in {runs[0].most_s:g} s")
    if len(seconds) == len(runs):
        first = replace(
            first, samples=seconds, missing="", note=note, **against,
            **({"peer_samples": theirs, "judged_by": "speedup"} if against and len(theirs) == len(peer) else {}),
            target=LEAST_SPEEDUP if is_judged else None,
        )  # fmt: skip
    end = Figure(
        topic=TOPIC, name=f"{what}, accuracy", unit="points", samples=[run.at_end(1) for run in runs], **against,
        **({"peer_samples": [run.at_end(1) for run in peer], "judged_by": "difference"} if against else {}),
        target=-MOST_POINTS_LESS if is_judged else None, at_least=True,
    )  # fmt: skip
    return [first, end]
