"""What a round costs on Flower's deployment engine, with a stock PyTorch client and with our detached trainer.

    python -m benchmarks.superlink DIR     (what the stock app's ServerApp is given; not for the command line)

The stock client is the quickstart's: each message starts a process that imports torch, loads its part of the digits,
copies the arrays into a model and back. It trains nothing, so that only what the engine costs is compared. Two
SuperNodes, an evaluation each round. `--engine superlink` of ours runs on the same engine with a warm trainer.

The last line compares our ordinary engine, the embedded one, with the stock client on this one.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.common import (
    BenchmarkError,
    Federation,
    Figure,
    Options,
    Programs,
    free_port,
    interleaved,
    periods,
)  # fmt: skip

TOPIC = "superlink"
SIZE = 100_000
BIN = Path(sys.executable).parent
STOCK = "SuperLink, stock PyTorch client"

_PROJECT = """\
[project]
name = "stock"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "stock_app:server_app"
clientapp = "stock_app:client_app"

[tool.flwr.app.config]
num-server-rounds = {rounds}
"""

_APP = """\
import sys

sys.path.insert(0, {root!r})
import numpy as np
from flwr.clientapp import ClientApp
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict, Message
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from benchmarks.common import stamp

LAYERS = 10
server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid, context):
    arrays = {{f"layer{{i}}": Array(np.full({size} // (4 * LAYERS), 0.5, np.float32)) for i in range(LAYERS)}}
    strategy = FedAvg(min_available_nodes=2, min_train_nodes=2, min_evaluate_nodes=2)
    strategy.start(grid, ArrayRecord(arrays), num_rounds=context.run_config["num-server-rounds"])


def load(message):
    import torch
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    DataLoader(TensorDataset(images, labels), batch_size=32)
    model = torch.nn.Module()
    for i in range(LAYERS):
        model.register_parameter(f"layer{{i}}", torch.nn.Parameter(torch.zeros({size} // (4 * LAYERS))))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return model


@client_app.train()
def train(message, context):
    model = load(message)
    stamp({directory!r}, context.node_config["rank"])
    with __import__("torch").no_grad():
        model.layer0[0] += 1
    record = {{"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({{"num-examples": 1}})}}
    return Message(RecordDict(record), reply_to=message)


@client_app.evaluate()
def evaluate(message, context):
    load(message)
    return Message(RecordDict({{"metrics": MetricRecord({{"num-examples": 1, "loss": 0.0}})}}), reply_to=message)
"""


def run(options: Options) -> list[Figure]:
    """Measure."""
    if options.tiny:
        return [Figure(topic=TOPIC, name="rounds on SuperLink", unit="s", missing="left out of a tiny run")]
    repeats, rounds = options.pick(2, 1, 1), options.pick(5, 4, 3)

    def ours(directory: Path) -> list[float]:
        return Federation(directory=directory, rounds=rounds, model_bytes=SIZE, engine="superlink").run()[0]

    def embedded(directory: Path) -> list[float]:
        return Federation(directory=directory, rounds=10 * rounds, model_bytes=SIZE).run()[0]

    sides = {"stock": lambda directory: stock(directory, rounds), "ours": ours, "embedded": embedded}
    samples = interleaved(repeats, sides)
    return [
        Figure(topic=TOPIC, name="relay and warm trainer on SuperLink, 0.1 MB", unit="s", samples=samples["ours"],
               peer=STOCK, peer_samples=samples["stock"], judged_by="ratio", target=0.4),
        Figure(topic=TOPIC, name="detached round on the embedded engine, 0.1 MB", unit="s", samples=samples["embedded"],
               peer=STOCK, peer_samples=samples["stock"], judged_by="speedup", target=1000.0),
    ]  # fmt: skip


def stock(directory: Path, rounds: int) -> list[float]:
    """Run the stock app on a SuperLink; returns the seconds of each full round but the first."""
    app, home = directory / "app", directory / "home"
    app.mkdir()
    home.mkdir()
    (app / "pyproject.toml").write_text(_PROJECT.format(rounds=rounds))
    (app / "stock_app.py").write_text(
        _APP.format(root=str(Path(__file__).parent.parent), size=SIZE, directory=str(directory))
    )
    address = f"127.0.0.1:{free_port()}"
    (home / "config.toml").write_text(f'[superlink.bench]\naddress = "{address}"\ninsecure = true\n')
    environment = {"FLWR_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    with Programs(directory, environment) as programs, _whole_groups(programs):
        programs.start("superlink", str(BIN / "flower-superlink"), "--insecure", "--port", address.rpartition(":")[2],
                       "--disable-runtime-dependency-installation")  # fmt: skip
        programs.wait_for("superlink", "running on")
        for rank in (1, 2):
            programs.start(f"supernode-{rank}", str(BIN / "flower-supernode"), "--insecure", "--superlink", address,
                           "--port", str(free_port()), "--node-config", f"rank={rank}")  # fmt: skip
        programs.start("run", str(BIN / "flwr"), "run", str(app), "bench", "--stream")
        programs.wait(["run"], timeout_s=120.0 * rounds)
        if not (directory / "stamps-1").exists():
            raise BenchmarkError(f"the stock client was never called\n{programs.tails()}")
        return periods(directory / "stamps-1")


@contextmanager
def _whole_groups(programs: Programs) -> Iterator[None]:
    """End each program with the processes that it started; each is in a group of its own."""
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for program in programs.all.values():
                with suppress(ProcessLookupError):
                    os.killpg(program.process.pid, number)
            for program in programs.all.values():
                with suppress(Exception):
                    program.process.wait(5)
