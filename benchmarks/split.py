"""Split learning: what a step costs, how ranks share it, and what each way to train reaches, sends and takes.

    python -m benchmarks.split BYTES BATCHES DIR     (the plain split in one process; not for the command line)

**Step.** Batches of 32, with activations of 0.1 and 4 MB, through the real programs on one machine; a step is the time
from one batch of a rank to its next, beside the same halves in one process, in turns. The model is the least there is:
what a step takes beyond the plain one is the way between the halves; the machine's limit is the plain one and what its
two payloads take to be written, digested and copied. Where it goes is what the history says of a mean step, and the
processor time of all programs together is from `benchmarks.traced`. With ``FLARE_PYTHON``, a Python that has nvflare
2.9 and torch, the same halves also train in NVIDIA FLARE's simulator (`benchmarks.flare_split`).

**Ranks.** The lower part sleeps 40 ms in place of computing: on a machine with two cores the cores would else be the
limit, and not the way.

**Table.** FedAvg and the modes of ``--split-learning``, on the digits and on generated pictures of 3 x 32 x 32, cut in
several places; also as Markdown in ``benchmarks/results/split.md``. Bytes are compared with what Thapa et al. 2022
count: 2pq for activations and gradients, p examples with q numbers at the cut, and each rank's lower part there and
back. More than headers and labels beside it is an error.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, BenchmarkError, Figure, Options, Programs, free_port, scratch_directory
from benchmarks.limits import passes_ms
from fedsplit.run.time_account import account_step

TOPIC = "split"
SMALL, LARGE = 100_000, 4_000_000
STEP_TARGETS = {SMALL: 8.0, LARGE: 15.0}
MODES = ("sfl-v1", "sfl-v2", "sequential")
SLEEP_S = 0.04
# The header of a payload, and what it says of its entries.
_FRAME_BYTES = 1_000
_PLAIN, _FLARE = "plain split in one process", "NVIDIA FLARE, Collab API, simulator"
_LIMIT = "the plain split, and its two payloads written, digested and copied"


@dataclass(kw_only=True)
class SplitFederation:
    """The programs of a model that is cut, or of a whole one, on a directory of the RAM disk; no evaluation in between.

    With a `mode` the workload is cut at `cut`.
    """

    directory: Path
    workload: Sequence[str]
    mode: str | None = None
    cut: str = ""
    ranks: int = 1
    uppers: int = 1
    rounds: int = 2
    server_flags: Sequence[str] = ()
    rank_flags: Sequence[str] = field(default_factory=tuple)

    def run(self) -> list[dict[str, Any]]:
        """Run to the end; returns the lines of the history."""
        address, exchange = f"127.0.0.1:{free_port()}", ("--exchange-dir", str(self.directory / "exchange"))
        checkpoints = ("--checkpoint-dir", str(self.directory / "checkpoints"))
        split = ("--split-learning", self.mode, *exchange, "--upper-trainers", str(self.uppers)) if self.mode else ()
        cut = ("--cut", self.cut) if self.mode else ()
        trainer = (*exchange, *checkpoints, "--num-partitions", str(self.ranks), "--threads", "1", *self.workload, *cut)
        with Programs(self.directory, forked=True) as programs:
            self._start(
                programs, "server", "--address", address, "--rounds", str(self.rounds), "--min-clients",
                str(self.ranks), *checkpoints, *split, *self.server_flags,
            )  # fmt: skip
            for number in range(1, self.uppers + 1 if self.mode else 1):
                end = f"upper-{number}" if number > 1 else ""
                # The last one of a flag counts.
                own = ("--exchange-dir", f"{exchange[1]}/{end}", "--checkpoint-dir", f"{checkpoints[1]}/{end}")
                self._start(programs, "trainer", "--part", "upper", *trainer, *own, name=f"upper-{number}")
            for rank in range(1, self.ranks + 1):
                which = ("--rank", str(rank))
                name = f"-{rank}"
                self._start(programs, "client", *which, "--server-address", address, *exchange, name=f"client{name}")
                self._start(programs, "trainer", *which, *trainer, *self.rank_flags, name=f"model{name}")
            programs.wait(timeout_s=1800.0)
        history = self.directory / "checkpoints" / "server" / "history.jsonl"
        lines = [json.loads(line) for line in history.read_text().splitlines()]
        if refused := [line["refused"] for line in lines if line["refused"]]:
            raise BenchmarkError(f"{self.mode or 'FedAvg'}, {self.cut}: an update was refused: {refused[0]}")
        return lines

    def processor_s(self) -> float:
        """Return the median processor time of a step, all programs together."""
        found = [json.loads(path.read_text()) for path in self.directory.glob("processor-*.json")]
        return sum(statistics.median(each) for each in found if each)

    def _start(self, programs: Programs, program: str, *flags: str, name: str = "") -> None:
        name = name or program
        path = self.directory / f"processor-{name}.json"
        programs.start(name, "-m", "benchmarks.traced", str(path), program, *flags)


def run(options: Options) -> list[Figure]:
    """Measure."""
    return [*steps(options), *two_ranks(options), *table(options)]


# -- what a step costs -------------------------------------------------------------------------------------------------


def steps(options: Options) -> list[Figure]:
    """Measure steps of both sizes, and say where their time goes."""
    figures = []
    repeats = options.pick(3, 1, 1)
    for size, batches in ((SMALL, options.pick(200, 100, 10)), (LARGE, options.pick(60, 40, 6))):
        split, alone, flare, shares = list[float](), list[float](), list[float](), list[dict[str, float]]()
        for _ in range(repeats):
            with scratch_directory() as directory:
                alone += _alone(size, batches, directory)
            if python := os.environ.get("FLARE_PYTHON"):
                with scratch_directory() as directory:
                    flare += _in_flare(python, size, batches, directory)
            with scratch_directory() as directory:
                periods, parts = _step(size, batches, directory)
                split += periods
                shares.append(parts)
        where = {name: statistics.median(each[name] for each in shares) for name in shares[0]}
        payloads = 2 * sum(passes_ms(size))
        figures.append(Figure(
            topic=TOPIC, name=f"step, batch of 32, activations of {size / 1e6:g} MB", unit="ms", samples=split,
            peer=_PLAIN, peer_samples=alone, judged_by="difference", target=STEP_TARGETS[size],
            note=", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in where.items()),
        ))  # fmt: skip
        figures.append(Figure(
            topic=TOPIC, name=f"step, {size / 1e6:g} MB", unit="ms", samples=split, judged_by="ratio",
            peer=_LIMIT, peer_samples=[each + payloads for each in alone],
        ))  # fmt: skip
        figures.append(Figure(
            topic=TOPIC, name=f"the same step, {size / 1e6:g} MB", unit="ms", samples=split if flare else (),
            peer=_FLARE, peer_samples=flare, judged_by="ratio", missing="" if flare else "FLARE_PYTHON is not set",
        ))  # fmt: skip
    return figures


def _cut_of(size: int, batches: int, directory: Path, **more: float) -> list[str]:
    options = {"bytes": size, "batches": batches, "stamps": directory}
    options |= {name.replace("_", "-"): value for name, value in more.items()}
    flags = [flag for name, value in options.items() for flag in ("--workload-option", f"{name}={value}")]
    return ["--workload", "benchmarks.split_work:cut_of", *flags]


def _step(size: int, batches: int, directory: Path) -> tuple[list[float], dict[str, float]]:
    """Return the milliseconds of each step, and the seconds of a step's parts."""
    federation = SplitFederation(
        directory=directory, workload=_cut_of(size, batches, directory), mode="sfl-v1", cut="lower",
        server_flags=("--evaluate-every", "0"),
    )  # fmt: skip
    line = federation.run()[-1]
    periods = json.loads((directory / "periods-1.json").read_text())
    return [1000 * each for each in periods], account_step(line) | {"processor time": federation.processor_s()}


def _alone(size: int, batches: int, directory: Path) -> list[float]:
    with Programs(directory, forked=True) as programs:
        programs.start("plain", "-m", "benchmarks.split", str(size), str(batches), str(directory))
        programs.wait()
    return [1000 * each for each in json.loads((directory / "periods-1.json").read_text())]


def _in_flare(python: str, size: int, batches: int, directory: Path) -> list[float]:
    # Not this package's PYTHONPATH: that Python has its own torch.
    command = [python, str(ROOT / "benchmarks" / "flare_split.py"), str(size), str(batches), str(directory)]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=1800.0)
    return [1000 * each for each in json.loads((directory / "periods.json").read_text())]


# -- how ranks share it ------------------------------------------------------------------------------------------------


def two_ranks(options: Options) -> list[Figure]:
    """Measure the steps a second of one rank and of two, where the lower part sleeps; of two uppers, where these do."""
    batches, repeats = options.pick(50, 25, 5), options.pick(3, 1, 1)
    figures = []
    for mode in ("sfl-v1", "sfl-v2"):
        name = f"steps a second, two ranks, {mode}, 0.1 MB, lower part sleeps 40 ms"
        sides = (replace(_SLEEPY, mode=mode), replace(_SLEEPY, mode=mode, ranks=2))
        figures.append(_compare(name, "one rank", sides, {"sleep": SLEEP_S}, batches, repeats))
    name = "steps a second, two ranks, sfl-v1, 0.1 MB, upper part sleeps 40 ms, two trainers of it"
    sides = (replace(_SLEEPY, ranks=2), replace(_SLEEPY, ranks=2, uppers=2))
    return [*figures, _compare(name, "one trainer", sides, {"upper_sleep": SLEEP_S}, batches, repeats)]


_SLEEPY = SplitFederation(
    directory=Path(), workload=(), mode="sfl-v1", cut="lower", server_flags=("--evaluate-every", "0")
)  # fmt: skip


def _compare(
    name: str, peer: str, sides: Sequence[SplitFederation], sleeps_s: Mapping[str, float], batches: int, repeats: int
) -> Figure:  # fmt: skip
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, found in zip(sides, rates, strict=True):
            with scratch_directory() as directory:
                workload = _cut_of(SMALL, batches, directory, **sleeps_s)
                line = replace(side, directory=directory, workload=workload).run()[-1]
                found.append(line["split"]["steps_per_second"])
    return Figure(
        topic=TOPIC, name=name, unit="1/s", samples=rates[1], peer=peer, peer_samples=rates[0], judged_by="ratio",
        at_least=True, target=1.6,
    )  # fmt: skip


# -- what each way reaches, sends and takes ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Data:
    """Something to learn: a workload, the names to cut at, and for how many rounds of one epoch."""

    name: str
    workload: Sequence[str]
    cuts: Sequence[str]
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to: accuracy in percent, MB that cross the cut or are states in an epoch, seconds of an epoch."""

    accuracy: float
    cut_mb: float
    state_mb: float
    seconds: float
    expected_mb: float


DIGITS = Data(name="digits", workload=("--workload", "digits", "--workload-option", "epochs=1"),
              cuts=("features.2", "features.5", "classifier.2"), rounds=10)  # fmt: skip
PICTURES = Data(name="pictures", workload=("--workload", "benchmarks.split_work:pictures"),
                cuts=("2", "5", "8"), rounds=5)  # fmt: skip


def table(options: Options) -> list[Figure]:
    """Run each way on each data set, two ranks; writes ``results/split.md`` too."""
    outcomes: dict[tuple[str, str, str], Outcome] = {}
    failed: list[Figure] = []
    for data in (DIGITS, PICTURES)[: options.pick(2, 2, 1)]:
        rounds = options.pick(data.rounds, data.rounds // 2, 2)
        for cut in ["", *data.cuts[: options.pick(3, 1, 1)]]:
            for mode in MODES if cut else ("FedAvg",):
                try:
                    outcomes[data.name, mode, cut] = _outcome(data, mode, cut, rounds)
                except BenchmarkError as exc:  # one that fails must not lose the others
                    failed.append(Figure(topic=TOPIC, name=_name(data.name, mode, cut), unit="%", missing=str(exc)))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "split.md").write_text(markdown(outcomes))
    return [*(_figure(*what, found) for what, found in outcomes.items()), *failed]


def _name(data: str, mode: str, cut: str) -> str:
    return f"{data}, {mode}, cut at {cut}" if cut else f"{data}, {mode}"


def _figure(data: str, mode: str, cut: str, found: Outcome) -> Figure:
    sent = f"{found.cut_mb:.2f} MB at the cut, {found.state_mb:.2f} MB of states; formula: {found.expected_mb:.2f} MB"
    note = f"an epoch: {found.seconds:.2f} s, {sent}"
    return Figure(topic=TOPIC, name=_name(data, mode, cut), unit="%", samples=[found.accuracy], note=note)


def _outcome(data: Data, mode: str, cut: str, rounds: int) -> Outcome:
    with scratch_directory() as directory:
        lines = SplitFederation(
            directory=directory, workload=data.workload, mode=mode if cut else None, cut=cut, ranks=2, rounds=rounds,
            server_flags=("--evaluate-every", str(rounds)),
        ).run()  # fmt: skip
    line = lines[-1]
    seconds = statistics.median(each["stages"]["train"] for each in lines[1:])
    examples, batches, numbers, state_bytes = _shapes(data, cut)
    # Each rank's part goes to it and comes back.
    states = 2 * 2 * state_bytes
    if not cut:
        sent = sum(row["bytes"] for row in line["clients"].values())
        _check(f"{data.name}: updates", sent, states / 2, 2)
        return Outcome(
            accuracy=100 * line["evaluate"]["accuracy"], cut_mb=0.0, state_mb=2 * sent / 1e6, seconds=seconds,
            expected_mb=states / 1e6,
        )  # fmt: skip
    up, down = line["split"]["bytes_up"], line["split"]["bytes_down"]
    sent = sum(row["bytes"] for row in line["clients"].values())
    # Labels are int64.
    _check(f"{data.name}, {cut}: activations", up, 4 * examples * numbers + 8 * examples, batches)
    _check(f"{data.name}, {cut}: gradients", down, 4 * examples * numbers, batches)
    _check(f"{data.name}, {cut}: lower parts", sent, states / 2, 2)
    return Outcome(
        accuracy=100 * line["evaluate"]["accuracy"], cut_mb=(up + down) / 1e6, state_mb=2 * sent / 1e6, seconds=seconds,
        expected_mb=(2 * 4 * examples * numbers + states) / 1e6,
    )  # fmt: skip


@functools.cache
def _shapes(data: Data, cut: str) -> tuple[int, int, int, int]:
    """Return examples and batches of an epoch of both ranks, numbers at the cut, and the bytes of a rank's state."""
    import torch

    from fedsplit.split_learning.cut import parts_of
    from fedsplit.workloads import WorkloadContext, load_workload

    options = {"epochs": "1"}
    workloads: list[Any] = [
        load_workload(data.workload[1])(WorkloadContext(rank=rank, num_partitions=2, options=options))
        for rank in (1, 2)
    ]
    examples = [each.num_examples for each in workloads]
    model = parts_of(workloads[0], cut, None).lower if cut else workloads[0].model
    state = sum(each.nbytes for each in model.state_dict().values())
    shape = (1, 1, 8, 8) if data.name == "digits" else (1, 3, 32, 32)
    return sum(examples), sum(-(-each // 32) for each in examples), model(torch.zeros(shape)).numel(), state


def _check(what: str, found: float, expected: float, payloads: int) -> None:
    """Raise AssertionError if there are fewer bytes than by the formula, or more than frame so many payloads."""
    if not 0 <= found - expected <= _FRAME_BYTES * payloads:
        raise AssertionError(f"{what}: {found:,} bytes, by the formula {expected:,} in {payloads} payloads")


def markdown(outcomes: dict[tuple[str, str, str], Outcome]) -> str:
    """Return the table for docs/benchmarks.md."""
    heads = ["data", "how", "cut", "accuracy", "at the cut", "states", "by the formula", "an epoch"]
    rows = [heads, ["---"] * len(heads)]
    for (data, mode, cut), found in outcomes.items():
        rows.append([
            data, mode, f"`{cut}`" if cut else "", f"{found.accuracy:.1f} %", f"{found.cut_mb:.2f} MB" if cut else "",
            f"{found.state_mb:.2f} MB", f"{found.expected_mb:.2f} MB", f"{found.seconds:.2f} s",
        ])  # fmt: skip
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    import torch

    from benchmarks.split_work import plain

    torch.set_num_threads(1)
    plain(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
