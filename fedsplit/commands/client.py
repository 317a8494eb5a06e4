"""Runs the client of a rank: a relay between the server and the exchange directory of the trainer of the same rank.

    python -m fedsplit client --rank 1

It may be started before the server and before the trainer, and waits for both. Beside it runs, started by hand:

    python -m fedsplit trainer --rank 1
"""

import argparse
import logging
from pathlib import Path

from fedsplit import cli
from fedsplit.disk.remote_store import open_remote
from fedsplit.engines import embedded, tls
from fedsplit.engines.superlink import node
from fedsplit.errors import RunFailedError, RunStoppedError, UsageError
from fedsplit.exchange.directory import Exchange, forgive
from fedsplit.exchange.records import FinishedRecord
from fedsplit.wire.join import read_token

log = logging.getLogger("fedsplit")


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rank", "-rank", type=cli.positive_int, default=1, metavar="K", help="rank of this client and its trainer")
    add("--server-address", "-addr", metavar="HOST:PORT", default="127.0.0.1:8080", help="where the server listens")
    add("--exchange-dir", type=Path, default=Path("exchange"), metavar="DIR",
        help="holds rank-K/, shared with the trainer; a RAM disk such as /dev/shm is fastest")  # fmt: skip
    add("--root-certificates", type=Path, metavar="FILE", help="CA certificate, PEM; turns TLS on (default: no TLS)")
    add("--max-wait", type=cli.seconds, metavar="S", help="seconds to wait for the server (default: forever)")
    add("--trainer-wait", type=cli.seconds, default="300", metavar="S",
        help="seconds to wait for this rank's trainer before a task is reported as failed")  # fmt: skip
    add("--payload-store", default="auto", metavar="auto|none|URL",
        help="how states travel. auto: as files, if the server is on this machine, else in messages; none: always in "
        "messages; URL: as files at a place that fsspec knows, the same as the server's")  # fmt: skip
    add("--engine", choices=("embedded", "superlink"), default="embedded",
        help="which of Flower's engines to run on, the same as the server's")  # fmt: skip
    add("--join-token-file", type=Path, metavar="FILE",
        help="prove to the server that this client knows the token in this file, of mode 0600, and have the server "
        "prove the same; needs TLS or a loopback address (default: no proof)")  # fmt: skip
    add("--supernode-private-key", type=Path, metavar="FILE",
        help="with --engine superlink: this SuperNode's key, if the server asks for one (default: no key)")  # fmt: skip
    add("--mask-here", action="store_true",
        help="mask updates for secure sums in this program, for a trainer that cannot, and let none leave it openly "
        "(default: the trainer masks them where the server's rules ask for it)")  # fmt: skip
    cli.make_program(parser, "client", run, flower=True)


def run(arguments: argparse.Namespace) -> int:
    embedded.quiet_flower(arguments.verbose and arguments.log_format == "text")
    host, _ = embedded.parse_address(arguments.server_address)
    certificates = cli.read_file(arguments.root_certificates, "--root-certificates")
    join_key = read_token(arguments.join_token_file)
    if join_key is not None and certificates is None and not tls.is_loopback(host):
        raise UsageError("--join-token-file works over TLS (--root-certificates) or on loopback only")
    engine = embedded.choose_engine(arguments.engine)
    cli.check_keys(
        engine, join_token_file=arguments.join_token_file, keys=arguments.supernode_private_key,
        keys_flag="--supernode-private-key",
    )  # fmt: skip

    exchange = Exchange(arguments.exchange_dir, arguments.rank, arguments.verify)
    with exchange.hold("client"):
        finished = _take_part(exchange, arguments, engine, certificates, join_key)
    if finished and finished.outcome != "complete":
        kind = RunStoppedError if finished.outcome == "stopped" else RunFailedError
        raise kind(f"the run ended before it was complete: {finished.reason or finished.outcome}")
    task = forgive(exchange.read_task)
    is_known = finished and task and task.run_id == finished.run_id
    rounds = f": {task.total_rounds} of {task.total_rounds} rounds" if task and is_known else ""
    log.info("rank %d: the run is complete%s", arguments.rank, rounds)
    return 0


def _take_part(
    exchange: Exchange, arguments: argparse.Namespace, engine: str, certificates: bytes | None, join_key: bytes | None
) -> FinishedRecord | None:
    address, max_wait_s, wait_s = arguments.server_address, arguments.max_wait, arguments.trainer_wait
    store = arguments.payload_store
    if engine == "superlink":
        return node.connect(
            exchange, address, root_certificates=arguments.root_certificates, node_key=arguments.supernode_private_key,
            trainer_wait_s=wait_s, payload_store=store, max_wait_s=max_wait_s, verbose=arguments.verbose,
            log_format=arguments.log_format, mask_here=arguments.mask_here,
        )  # fmt: skip
    # Late: it imports Flower, and a role that is taken is told of at once.
    from fedsplit.client.relay import Relay

    remote = open_remote(store)
    relay = Relay(
        exchange, trainer_wait_s=wait_s, remote=remote, use_store=store == "auto", join_key=join_key,
        mask_here=arguments.mask_here,
    )  # fmt: skip
    embedded.connect(relay, address, root_certificates=certificates, max_wait_s=max_wait_s)
    return relay.outcome
