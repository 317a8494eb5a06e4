"""Runs the client of a rank: a relay between the server and the exchange directory of the trainer of the same rank.

    python client_main.py --rank 1

It may be started before the server and before the trainer, and waits for both. Beside it runs, started by hand:

    python model_main.py --rank 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedsplit import cli, embedded
from fedsplit.errors import RunFailedError, RunStoppedError, UsageError


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.make_parser(__doc__, "client_main.py")
    add = parser.add_argument
    add("--rank", "-rank", type=cli.positive_int, default=1, metavar="K", help="rank of this client and its trainer")
    add("--server-address", "-addr", metavar="HOST:PORT", default="127.0.0.1:8080", help="where the server listens")
    add("--exchange-dir", type=Path, default=Path("exchange"), metavar="DIR",
        help="holds rank-K/, shared with the trainer; a RAM disk such as /dev/shm is fastest")
    add("--root-certificates", type=Path, metavar="FILE", help="CA certificate, PEM; turns TLS on")
    add("--max-wait", type=cli.seconds, metavar="S", help="seconds to wait for the server (default: for ever)")
    add("--trainer-wait", type=cli.seconds, default=300.0, metavar="S",
        help="seconds to wait for a trainer before a task is reported as failed")
    add("--payload-store", default="auto", metavar="auto|none|URL",
        help="auto: exchange files with a server on this machine by reference; none: all bytes in messages")
    add("--engine", choices=("embedded", "superlink"), default="embedded", help="which of Flower's engines to run on")
    cli.add_verbose(parser)
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Run the relay."""
    embedded.quiet_flower(arguments.verbose)
    embedded.parse_address(arguments.server_address)
    if arguments.engine == "superlink":
        raise UsageError("--engine superlink is not there yet; run without it")
    if arguments.payload_store not in ("auto", "none"):
        raise UsageError(f"--payload-store {arguments.payload_store}: only auto and none are there yet")
    certificates = cli.read_file(arguments.root_certificates, "--root-certificates")

    from fedsplit.client import Relay
    from fedsplit.exchange import Exchange

    exchange = Exchange(arguments.exchange_dir, arguments.rank)
    with exchange.hold("client"):
        relay = Relay(
            exchange, trainer_wait_s=arguments.trainer_wait, use_store=arguments.payload_store == "auto"
        )
        embedded.connect(
            relay, arguments.server_address, root_certificates=certificates, max_wait_s=arguments.max_wait
        )
    if relay.outcome and relay.outcome.outcome != "complete":
        kind = RunStoppedError if relay.outcome.outcome == "stopped" else RunFailedError
        raise kind(f"the run ended before it was complete: {relay.outcome.reason or relay.outcome.outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, make_parser(), None, "client"))
