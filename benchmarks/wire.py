"""``--wire``: how many bytes travel, what that does to the accuracy, and how long a round takes over a slow link.

Accuracy: real programs, two ranks, 20 rounds, three seeds; the digits, and a small language model
(`benchmarks.letters`) with three of the codecs. Seconds: 20 MB of which each rank
moves every number by a Gaussian, the worst case for what packs, over cables of 50 Mbit/s and 40 ms there and back, in
network namespaces as in ``tests/test_network.py`` (that needs root; a thread makes the delay, as netem is often not
built in). The same as Markdown goes to ``benchmarks/results/wire.md``. Only where it is named.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.common import RESULTS, ROOT, Figure, Options, history_of_run, scratch_directory
from examples.make_certificates import make_certificates
from fedsplit import EvaluateResult, TrainResult, WorkloadContext
from fedsplit.trainer import channel
from tests.test_network import Cable, Distributed, Network, missing

TOPIC = "wire"
ROUNDS, RANKS = 20, 2
BITS_PER_S, DELAY_S = 50e6, 0.020
BYTES = 20_000_000
CODECS: dict[str, Sequence[str]] = {
    "as it is": (), "delta+zstd": ("delta+zstd",), "delta+bfloat16+zstd": ("delta+bfloat16+zstd",),
    "delta+int8+zstd": ("delta+int8+zstd",), "delta+top-k(fraction=0.1)+zstd": ("delta+top-k(fraction=0.1)+zstd",),
    "delta+top-k(fraction=0.01)+zstd": ("delta+top-k(fraction=0.01)+zstd",),
}  # fmt: skip
WORKLOADS = {"digits": "digits", "letters": "benchmarks.letters:letters"}
OF_LETTERS = ("as it is", "delta+bfloat16+zstd", "delta+int8+zstd")


@dataclass(frozen=True)
class Outcome:
    """What a run reached in its last round, in percent; the bytes of its rounds, as sent and as they would be."""

    accuracy: float
    sent: int
    plain: int


class Drift:
    """A model that each training moves a little, at random."""

    def __init__(self, context: WorkloadContext) -> None:
        self._generator = torch.Generator().manual_seed(context.rank)
        channel.PART_BYTES = int(context.options.get("part-bytes", channel.PART_BYTES))
        self.model = torch.nn.Module()
        start = torch.Generator().manual_seed(0)
        for index in range(10):
            weight = 0.05 * torch.randn(int(context.options["bytes"]) // 40, generator=start)
            self.model.register_parameter(f"layer{index}", torch.nn.Parameter(weight))

    def train(self, task: object) -> TrainResult:
        """Move every number."""
        with torch.no_grad():
            for weight in self.model.parameters():
                weight += 1e-3 * torch.randn(weight.shape, generator=self._generator)
        return TrainResult(1)

    def evaluate(self, task: object) -> EvaluateResult:
        """Look at nothing."""
        return EvaluateResult(0.0, 1)


def drift(context: WorkloadContext) -> Drift:
    """Make the workload; options: ``bytes`` of the model, and ``part-bytes`` of what an update is packed in at once."""
    return Drift(context)


def run(options: Options) -> list[Figure]:
    """Measure."""
    seeds, rounds = range(options.pick(3, 1, 1)), options.pick(ROUNDS, ROUNDS, 2)
    reached = {
        (name, codec): [_train(name, wire, seed, rounds) for seed in seeds]
        for name in WORKLOADS for codec, wire in CODECS.items() if name == "digits" or codec in OF_LETTERS
    }  # fmt: skip
    figures = [_accuracy(name, codec, found) for (name, codec), found in reached.items()]
    text = markdown(reached)
    if reason := missing():
        figures.append(Figure(topic=TOPIC, name="a round over a slow link", unit="s", missing=reason))
    else:
        size, few = options.pick(BYTES, BYTES, 1_000_000), options.pick(6, 4, 3)
        slow = {codec: _slow(wire, size, few) for codec, wire in CODECS.items()}
        figures += [_seconds(codec, found, slow["as it is"][0]) for codec, found in slow.items()]
        figures.append(_in_parts(5 * size, few, options.pick(3, 1, 1)))
        text += "\n" + slow_markdown(slow)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "wire.md").write_text(text)
    return figures


def _train(name: str, wire: Sequence[str], seed: int, rounds: int) -> Outcome:
    lines, _ = history_of_run(
        "--ranks", str(RANKS), "--rounds", str(rounds), "--seed", str(seed), "--payload-store", "none",
        *(f"--wire={each}" for each in wire), "--workload", WORKLOADS[name],
    )  # fmt: skip
    sums = {key: sum(line.get("wire", {}).get(key, 0) for line in lines) for key in ("sent", "sent_plain", "received",
                                                                                     "received_plain")}  # fmt: skip
    return Outcome(
        accuracy=100 * lines[-1]["evaluate"]["accuracy"], sent=sums["sent"] + sums["received"],
        plain=sums["sent_plain"] + sums["received_plain"],
    )  # fmt: skip


def _slow(wire: Sequence[str], size: int, rounds: int, *options: str) -> tuple[list[float], float]:
    """Return the seconds of each round but the first, and the bytes of one rank's round in both directions."""
    link = partial(Cable, delay_s=DELAY_S, jitter_s=0.0, loss=0.0, bits_per_s=BITS_PER_S)
    workload = [flag for each in (f"bytes={size}", *options) for flag in ("--workload-option", each)]
    with scratch_directory() as directory, Network(RANKS, link) as network:
        make_certificates(directory / "certificates", [f"10.213.{rank}.1" for rank in range(1, RANKS + 1)])
        (directory / "token").write_text("a secret of many letters")
        (directory / "token").chmod(0o600)
        federation = Distributed(
            directory, network=network, forked=False,
            server_flags=("--rounds", str(rounds), "--payload-store", "none", *(f"--wire={each}" for each in wire)),
            model_flags=("--threads", "1", "--workload", "benchmarks.wire:drift", *workload),
        )  # fmt: skip
        for name in ("benchmarks", "tests", "examples"):
            (directory / name).symlink_to(ROOT / name)
        try:
            federation.start_all()
            codes = federation.wait(1200.0)
            assert set(codes.values()) == {0}, federation.tails()
        finally:
            federation.stop()
        lines = federation.history()[1:]
        whole = federation.final_state().stat().st_size
    moved = [sum(line["wire"][key] for key in ("sent", "received")) for line in lines if "wire" in line]
    return [line["seconds"] for line in lines], statistics.median(moved) / RANKS if moved else 2.0 * whole


def _in_parts(size: int, rounds: int, repeats: int) -> Figure:
    """Compare rounds whose updates travel in parts with rounds whose updates travel whole, in turns."""
    parts, whole = list[float](), list[float]()
    for _ in range(repeats):
        parts += _slow(("delta+int8+zstd",), size, rounds)[0]
        whole += _slow(("delta+int8+zstd",), size, rounds, f"part-bytes={size}")[0]
    return Figure(
        topic=TOPIC, name=f"{size / 1e6:g} MB, delta+int8+zstd, in parts", unit="s", samples=parts,
        peer="the same updates whole", peer_samples=whole, judged_by="ratio",
    )  # fmt: skip


def markdown(reached: Mapping[tuple[str, str], Sequence[Outcome]]) -> str:
    """Return the table of accuracies for docs/wire.md."""
    rows = [["", "codecs", "accuracy after the last round", "bytes, of what they would be"], ["---"] * 4]
    for (name, codec), found in reached.items():
        rows.append(
            [name, f"`{codec}`" if codec in map("".join, CODECS.values()) else codec, _shown(found), _share(found)]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def slow_markdown(slow: Mapping[str, tuple[Sequence[float], float]]) -> str:
    """Return the table of seconds for docs/wire.md."""
    rows = [["codecs", "seconds a round", "bytes a rank and round"], ["---"] * 3]
    first = statistics.median(next(iter(slow.values()))[0])
    for codec, (seconds, size) in slow.items():
        median = statistics.median(seconds)
        rows.append([codec, f"{median:.2f} ({first / median:.1f} times quicker)", f"{size / 1e6:.2f} MB"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _shown(found: Sequence[Outcome]) -> str:
    samples = [each.accuracy for each in found]
    deviation = f" ± {statistics.stdev(samples):.2f}" if len(samples) > 1 else ""
    return f"{statistics.mean(samples):.2f}{deviation}"


def _share(found: Sequence[Outcome]) -> str:
    plain = sum(each.plain for each in found)
    if not plain:
        return "100 %"
    share = sum(each.sent for each in found) / plain
    return f"{100 * share:.1f} % ({1 / share:.1f} times fewer)"


def _accuracy(name: str, codec: str, found: Sequence[Outcome]) -> Figure:
    samples = [each.accuracy for each in found]
    return Figure(topic=TOPIC, name=f"{name}, {codec}", unit="%", samples=samples, note=f"bytes: {_share(found)}")


def _seconds(codec: str, found: tuple[Sequence[float], float], plain: Sequence[float]) -> Figure:
    seconds, size = found
    return Figure(
        topic=TOPIC, name=f"a round of 20 MB at 50 Mbit/s, {codec}", unit="s", samples=seconds, peer="as it is",
        peer_samples=plain, judged_by="speedup", target=4.0 if "int8" in codec else None,
        note=f"{size / 1e6:.2f} MB a rank and round, both ways",
    )  # fmt: skip
