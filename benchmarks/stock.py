"""Flower as its quickstart has it, for comparison: a FedAvg server, and clients that train inside a NumPyClient.

    python -m benchmarks.stock server --port 9999 --rounds 3 --ranks 2
    python -m benchmarks.stock client --port 9999 --rank 1 --bytes 100000 --stamps DIR

No torch: a stock PyTorch client also copies the arrays into a model and back, which is not counted against it here.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.client import NumPyClient, start_client
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg

from benchmarks.common import stamp, wait_for_port
from fedsplit.wire.protocol import MAX_MESSAGE_BYTES

LAYERS = 10
Arrays = list[npt.NDArray[np.float32]]


class NoopClient(NumPyClient):
    """Trains nothing: changes one number."""

    def __init__(self, rank: int, model_bytes: int, stamps: Path) -> None:
        self._rank = rank
        self._stamps = stamps
        self._arrays = [np.full(max(1, model_bytes // (4 * LAYERS)), 0.5, np.float32) for _ in range(LAYERS)]

    def get_parameters(self, config: dict[str, object]) -> Arrays:
        """Return the initial state."""
        return self._arrays

    def fit(self, parameters: Arrays, config: dict[str, object]) -> tuple[Arrays, int, dict[str, float]]:
        """Change one number."""
        stamp(self._stamps, self._rank)
        parameters[0][0] += 1
        return parameters, 1, {}

    def evaluate(self, parameters: Arrays, config: dict[str, object]) -> tuple[float, int, dict[str, float]]:
        """Look at nothing."""
        return 0.0, 1, {}


def main() -> int:
    """Run a server or a client."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("server", "client"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=100_000)
    parser.add_argument("--stamps", type=Path, default=Path())
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    address = f"127.0.0.1:{arguments.port}"
    if arguments.role == "server":
        everyone = {f"min_{what}_clients": arguments.ranks for what in ("fit", "evaluate", "available")}
        start_server(
            server_address=address, config=ServerConfig(num_rounds=arguments.rounds), strategy=FedAvg(**everyone),
            grpc_max_message_length=MAX_MESSAGE_BYTES,
        )  # fmt: skip
    else:
        wait_for_port(arguments.port)
        client = NoopClient(arguments.rank, arguments.bytes, arguments.stamps)
        start_client(
            server_address=address, client=client.to_client(), insecure=True,
            grpc_max_message_length=MAX_MESSAGE_BYTES,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
