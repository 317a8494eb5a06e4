"""A round of other federations, each from its released package, and of ours: two ranks that train nothing.

    FLARE_PYTHON=PATH python -m benchmarks peers

``FLARE_PYTHON`` is an interpreter that has nvflare: ``python -m venv flare && flare/bin/pip install nvflare torch``.
The sides take turns. Ours and Flower's embedded engine evaluate in each round, FLARE only trains. Of NVIDIA FLARE two
modes are measured: with an external process a site of its simulator starts the trainer, a process of its own, once; in
attach mode the trainer is started by hand as here, at sites that the benchmark has provisioned, with certificates.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import superlink
from benchmarks.common import (
    ROOT,
    BenchmarkError,
    Federation,
    Figure,
    Options,
    StockFederation,
    free_port,
    periods,
    scratch_directory,
)  # fmt: skip

TOPIC = "peers"
Side = Callable[[Path], Sequence[float]]


def run(options: Options) -> list[Figure]:
    """Measure; whoever cannot be measured is named with the reason."""
    if options.tiny:
        return [Figure(topic=TOPIC, name="rounds of others", unit="s", missing="left out of a tiny run")]
    figures = []
    for size in (100_000, 10_000_000):
        samples, missing = _in_turns(options, size)
        for peer, found in samples.items():
            if peer != "fedsplit":
                figures.append(
                    Figure(topic=TOPIC, name=f"round, {size / 1e6:g} MB", unit="s", samples=samples["fedsplit"],
                           peer=peer, peer_samples=found, judged_by="ratio")
                )  # fmt: skip
        for peer, why in missing.items():
            figures.append(Figure(topic=TOPIC, name=f"{peer}, {size / 1e6:g} MB", unit="s", missing=why))
    return figures


def _in_turns(options: Options, size: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    rounds, repeats = options.pick(20, 10, 3), options.pick(3, 1, 1)
    few = max(3, rounds // 4)
    sides: dict[str, Side] = {
        "fedsplit": lambda directory: Federation(directory=directory, rounds=rounds, model_bytes=size).run()[0],
        "Flower, embedded engine, NumPyClient": lambda directory: StockFederation(
            directory=directory, rounds=rounds, model_bytes=size
        ).run()[0],
        "NVIDIA FLARE, external process": lambda directory: _flare("external", directory, size, few),
        "NVIDIA FLARE, attach mode": lambda directory: _flare("attach", directory, size, few),
    }
    if size == superlink.SIZE:
        sides[superlink.STOCK] = lambda directory: superlink.stock(directory, few)
    samples: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for _ in range(repeats):
        for name, measure in sides.items():
            if name in missing:
                continue
            try:
                with scratch_directory() as directory:
                    samples.setdefault(name, []).extend(measure(directory))
            except (BenchmarkError, OSError, subprocess.SubprocessError) as exc:
                if name == "fedsplit":
                    raise
                samples.pop(name, None)
                missing[name] = f"not measured: {str(exc).splitlines()[0]}"
    return samples, missing


def _flare(mode: str, directory: Path, size: int, rounds: int) -> list[float]:
    python = os.environ.get("FLARE_PYTHON")
    if not python:
        raise BenchmarkError("set FLARE_PYTHON to an interpreter that has nvflare")
    done = subprocess.run(
        [python, str(ROOT / "benchmarks/flare_fedavg.py"), mode, str(size), str(rounds), str(directory),
         str(free_port()), str(free_port())],
        # Longer than a job may take there: whoever is killed here would leave sites behind.
        cwd=directory, env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks"), "HOME": str(directory)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60.0 * rounds + 600.0,
    )  # fmt: skip
    if not (directory / "stamps-1").exists():
        raise BenchmarkError(f"FLARE ended with exit code {done.returncode}: {(done.stdout.splitlines() or [''])[-1]}")
    return periods(directory / "stamps-1")
