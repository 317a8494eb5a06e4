"""What gRPC alone takes for a round's messages: streams like Flower's, without Flower or fedsplit around them.

    python -m benchmarks.bare server --port 9999 --rounds 3 --ranks 2 --bytes 100000000
    python -m benchmarks.bare client --port 9999

In a round each client is sent the state in pieces, each of which it confirms, is asked for as much, piece by piece, and
then asked for an evaluation. Of 0 bytes are the two questions and their answers alone, as where payloads travel by
reference. What a client was sent is what it sends back.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc

from benchmarks.common import Programs, free_port, wait_for_port
from fedsplit.wire.protocol import EMBEDDED

_MOST = [(f"grpc.max_{way}_message_length", 4 * EMBEDDED.piece_bytes) for way in ("send", "receive")]
_METHOD = "/bare/Join"
# As long as the record of a question, or of an answer.
_RECORD = b"x" * 600


def run(directory: Path, rounds: int, size: int) -> float:
    """Return the processor time of a server and two clients, in seconds."""
    with Programs(directory) as programs:
        port = str(free_port())
        programs.start("server", "-m", "benchmarks.bare", "server", "--port", port, "--rounds", str(rounds),
                       "--ranks", "2", "--bytes", str(size))  # fmt: skip
        for rank in ("1", "2"):
            programs.start(f"client-{rank}", "-m", "benchmarks.bare", "client", "--port", port)
        programs.wait()
    return sum(program.cpu_s for program in programs.all.values())


def _serve(port: int, rounds: int, ranks: int, size: int) -> None:
    piece = os.urandom(min(size, EMBEDDED.piece_bytes))
    pieces = -(-size // EMBEDDED.piece_bytes)
    together, done = threading.Barrier(ranks), threading.Semaphore(0)

    def join(answers: Iterator[bytes], _: object) -> Iterator[bytes]:
        for _ in range(rounds):
            for question in (*[b"+" + piece] * pieces, *[b"?"] * max(1, pieces), _RECORD):
                yield question
                next(answers)
            together.wait()
        done.release()

    server = grpc.server(ThreadPoolExecutor(max_workers=ranks), options=_MOST)
    handlers = {"Join": grpc.stream_stream_rpc_method_handler(join)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    for _ in range(ranks):
        done.acquire()
    server.stop(1.0).wait()


def _take_part(port: int) -> None:
    wait_for_port(port)
    answers: SimpleQueue[Any] = SimpleQueue()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=_MOST) as channel:
        piece = _RECORD
        for question in channel.stream_stream(_METHOD)(iter(answers.get, None)):
            if question[:1] == b"+":
                piece = question
            answers.put(piece if question == b"?" else _RECORD)
        answers.put(None)


def main() -> int:
    """Be the server, or a client."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("server", "client"))
    for name, default in (("port", 0), ("rounds", 3), ("ranks", 2), ("bytes", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    if arguments.role == "server":
        _serve(arguments.port, arguments.rounds, arguments.ranks, arguments.bytes)
    else:
        _take_part(arguments.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
