"""How much memory each program takes at its peak with a model of 100 MB: by reference, and with bytes in messages."""

from __future__ import annotations

from benchmarks.common import Federation, Figure, Options, StockFederation, scratch_directory

TOPIC = "memory"
BASE_MB = 150.0
MODELS = 5


def run(options: Options) -> list[Figure]:
    """Measure; one run each, as memory hardly varies."""
    size = options.pick(100_000_000, 100_000_000, 5_000_000)
    peaks = {}
    for store in ("auto", "none"):
        with scratch_directory() as directory:
            _, programs = Federation(directory=directory, rounds=4, model_bytes=size, store=store).run()
            peaks[store] = {name: program.peak_bytes / 1e6 for name, program in programs.all.items()}
    with scratch_directory() as directory:
        _, programs = StockFederation(directory=directory, rounds=3, model_bytes=size).run()
        stock = {name: program.peak_bytes / 1e6 for name, program in programs.all.items()}
    megabytes = size / 1e6
    figures = []
    for store, name, target in (
        ("auto", "by reference", BASE_MB), ("none", "bytes in messages", BASE_MB + MODELS * megabytes),
    ):  # fmt: skip
        for program, limit in (("client", target), ("server", None), ("model", None)):
            found = [peak for each, peak in peaks[store].items() if each.startswith(program)]
            peer = [peak for each, peak in stock.items() if each.startswith(program)]
            figures.append(
                Figure(
                    topic=TOPIC,
                    name=f"{program}_main.py, {megabytes:g} MB, {name}",
                    unit="MB",
                    samples=found,
                    peer="Flower in-process NumPyClient" if peer else "",
                    peer_samples=peer,
                    target=limit,
                )
            )
    return figures
