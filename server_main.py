"""Runs the server of a federation: rounds, merging, checkpoints. It holds no model code and no data.

    python server_main.py --rounds 5

A tiny run on one machine, in five terminals and any order:

    python server_main.py --rounds 2
    python client_main.py --rank 1        python client_main.py --rank 2
    python model_main.py --rank 1         python model_main.py --rank 2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedsplit import cli, embedded
from fedsplit.errors import UsageError


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.make_parser(__doc__, "server_main.py")
    add = parser.add_argument
    add("--address", "-addr", metavar="HOST:PORT", default="127.0.0.1:8080", help="where to listen")
    add("-r", "--rounds", type=cli.positive_int, default=3, metavar="N", help="rounds to run in all")
    add("--min-clients", type=cli.positive_int, default=2, metavar="N",
        help="a round starts once so many clients are connected")
    add("--min-results", type=cli.positive_int, default=1, metavar="N",
        help="with fewer accepted updates a round leaves the state as it was")
    add("--fraction-train", type=float, default=1.0, metavar="F", help="share of the connected clients that train in a round")
    add("--evaluate-every", type=cli.natural, default=1, metavar="N", help="evaluate after every N-th round; 0 is never")
    add("--aggregate", action="append", default=[], metavar="RULE",
        help="how the state_dict is merged: NAME, NAME(key=value), PATTERN=RULE or @FILE.toml; repeatable, "
             "first match wins (default: fedavg)")
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), metavar="DIR", help="where server/ is kept")
    add("--keep-checkpoints", type=cli.positive_int, default=3, metavar="N",
        help="keep the newest N rounds (at least 2) and the best one")
    add("--resume", action="store_true", help="go on with the run in --checkpoint-dir")
    add("--initial-checkpoint", type=Path, metavar="FILE",
        help="start from a state_dict in a .safetensors or .pt file instead of asking a trainer")
    add("--round-timeout", type=cli.seconds, metavar="S",
        help="seconds after which a round goes on without what it has not got (default: never)")
    add("--client-wait", type=cli.seconds, default=300.0, metavar="S",
        help="seconds that a round waits for a client that went away")
    add("--train-config", action="append", type=cli.key_value, default=[], metavar="KEY=VALUE",
        help="reaches every trainer as task.config; repeatable")
    add("--payload-store", default="auto", metavar="auto|none|URL",
        help="auto: clients that see this machine's disk exchange files by reference; none: all bytes in messages")
    add("--engine", choices=("embedded", "superlink"), default="embedded", help="which of Flower's engines to run on")
    add("--seed", type=cli.natural, default=0, metavar="N", help="of the sampling of clients and of rules that draw")
    add("--ssl-ca-certfile", type=Path, metavar="FILE", help="CA certificate, PEM; with the two below it turns TLS on")
    add("--ssl-certfile", type=Path, metavar="FILE", help="this server's certificate, PEM")
    add("--ssl-keyfile", type=Path, metavar="FILE", help="this server's private key, PEM")
    cli.add_verbose(parser)
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Run the server."""
    embedded.quiet_flower(arguments.verbose)
    embedded.parse_address(arguments.address)
    embedded.check_port_is_free(arguments.address)
    certificates = cli.read_certificates(arguments.ssl_ca_certfile, arguments.ssl_certfile, arguments.ssl_keyfile)
    if arguments.engine == "superlink":
        raise UsageError("--engine superlink is not there yet; run without it")
    if arguments.payload_store not in ("auto", "none"):
        raise UsageError(f"--payload-store {arguments.payload_store}: only auto and none are there yet")
    if arguments.keep_checkpoints < 2:
        raise UsageError("--keep-checkpoints must be at least 2: the newest checkpoint may be the corrupt one")
    if arguments.initial_checkpoint and not arguments.initial_checkpoint.is_file():
        raise UsageError(f"--initial-checkpoint {arguments.initial_checkpoint} does not exist")

    from fedsplit.aggregation.spec import parse_rules
    from fedsplit.run import Run
    from fedsplit.server import Server
    from fedsplit.settings import StrategySettings, initial_from

    settings = StrategySettings(
        rules=parse_rules(arguments.aggregate),
        min_clients=arguments.min_clients,
        min_results=arguments.min_results,
        fraction_train=arguments.fraction_train,
        evaluate_every=arguments.evaluate_every,
        train_config={key: cli.scalar(value) for key, value in arguments.train_config},
        seed=arguments.seed,
    )
    run = Run(
        arguments.checkpoint_dir,
        keep_checkpoints=arguments.keep_checkpoints,
        resume=arguments.resume,
        settings={key: str(value) for key, value in vars(arguments).items()},
        initial=initial_from(arguments.initial_checkpoint),
    )
    with run:
        server = Server(
            run,
            settings,
            rounds=arguments.rounds,
            round_timeout_s=arguments.round_timeout,
            client_wait_s=arguments.client_wait,
            offer_store=arguments.payload_store == "auto",
        )
        embedded.serve(server, arguments.address, certificates=certificates)
    if server.failure:
        raise server.failure
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, make_parser(), None, "server"))
