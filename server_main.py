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

from fedsplit import cli
from fedsplit.engines import embedded, tls
from fedsplit.engines.assembly import check_trackers, open_server
from fedsplit.errors import UsageError
from fedsplit.server.settings import ServerSettings
from fedsplit.wire.join import read_token
from fedsplit.wire.protocol import EMBEDDED, SUPERLINK

# Options that are what their flag gives.
_PLAIN = (
    "rounds", "min_clients", "min_results", "fraction_train", "evaluate_every", "strategy", "checkpoint_dir",
    "keep_checkpoints", "resume", "initial_checkpoint", "round_timeout", "client_wait", "payload_store", "seed",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.make_parser(__doc__, "server_main.py")
    add = parser.add_argument
    add("--address", "-addr", metavar="HOST:PORT", default="127.0.0.1:8080", help="where to listen")
    add("-r", "--rounds", type=cli.positive_int, default=3, metavar="N", help="rounds to run in all")
    add(
        "--min-clients",
        type=cli.positive_int,
        default=2,
        metavar="N",
        help="a round starts once so many clients are connected",
    )
    add(
        "--min-results",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="with fewer accepted updates a round leaves the state as it was",
    )
    add(
        "--fraction-train",
        type=float,
        default=1.0,
        metavar="F",
        help="share of the connected clients that train in a round",
    )
    add(
        "--evaluate-every", type=cli.natural, default=1, metavar="N", help="evaluate after every N-th round; 0 is never"
    )
    add(
        "--aggregate",
        action="append",
        default=[],
        metavar="RULE",
        help="how the state_dict is merged: NAME, NAME(key=value), PATTERN=RULE or @FILE.toml; repeatable, "
        "first match wins (default: fedavg)",
    )
    add(
        "--strategy",
        metavar="CLASS",
        help="let a Flower strategy choose the clients and merge, instead of --aggregate: package.module:Class, or a "
        "class of flwr.server.strategy, with parameters as in 'FedAdam(eta=0.01)'",
    )
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), metavar="DIR", help="where server/ is kept")
    add(
        "--keep-checkpoints",
        type=cli.positive_int,
        default=3,
        metavar="N",
        help="keep the newest N rounds (at least 2) and the best one",
    )
    add("--resume", action="store_true", help="go on with the run in --checkpoint-dir")
    add(
        "--initial-checkpoint",
        type=Path,
        metavar="FILE",
        help="start from a state_dict in a .safetensors or .pt file instead of asking a trainer",
    )
    add(
        "--round-timeout",
        type=cli.seconds,
        metavar="S",
        help="seconds after which a round goes on without what it has not got (default: never)",
    )
    add(
        "--client-wait",
        type=cli.seconds,
        default="300",
        metavar="S",
        help="seconds that a round waits for a client that went away",
    )
    add(
        "--train-config",
        action="append",
        type=cli.key_value,
        default=[],
        metavar="KEY=VALUE",
        help="tell every trainer, as task.config; repeatable",
    )
    add(
        "--payload-store",
        default="auto",
        metavar="auto|none|URL",
        help="auto: clients that see this machine's disk exchange files by reference; none: all bytes in messages; "
        "URL: by way of a place that fsspec knows, such as s3://bucket/prefix, for clients given the same",
    )
    add("--engine", choices=("embedded", "superlink"), default="embedded", help="which of Flower's engines to run on")
    add("--seed", type=cli.natural, default=0, metavar="N", help="seed for sampling clients and for rules that draw")
    add("--ssl-ca-certfile", type=Path, metavar="FILE", help="CA certificate, PEM; with the two below it turns TLS on")
    add("--ssl-certfile", type=Path, metavar="FILE", help="this server's certificate, PEM")
    add("--ssl-keyfile", type=Path, metavar="FILE", help="this server's private key, PEM")
    add("--insecure", action="store_true", help="listen beyond loopback without TLS; refused without this")
    add(
        "--join-token-file",
        type=Path,
        metavar="FILE",
        help="let in only clients that prove they know the token in this file (mode 0600; over TLS or on loopback)",
    )
    add(
        "--supernode-public-key",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="with --engine superlink: let in only SuperNodes that hold one of these keys; repeatable",
    )
    add(
        "--tracker",
        action="append",
        default=[],
        metavar="NAME[:PLACE]",
        help="also write metrics to tensorboard or mlflow; PLACE is a directory or a tracking URI (default: in "
        "--checkpoint-dir); repeatable",
    )
    cli.add_logging(parser, flower=True)
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Run the server."""
    embedded.quiet_flower(arguments.verbose and arguments.log_format == "text")
    settings = ServerSettings(
        **{name: getattr(arguments, name) for name in _PLAIN},
        aggregate=tuple(arguments.aggregate),
        train_config=tuple((key, cli.scalar(value)) for key, value in arguments.train_config),
        tracker=tuple(arguments.tracker),
    )
    check_trackers(settings)
    host, _ = embedded.parse_address(arguments.address)
    certificates = cli.read_certificates(arguments.ssl_ca_certfile, arguments.ssl_certfile, arguments.ssl_keyfile)
    join_key = read_token(arguments.join_token_file)
    tls.check_exposure(
        host, encrypted=certificates is not None, insecure=arguments.insecure, has_token=join_key is not None
    )
    files = None
    if certificates is not None:
        tls.check_server_files(certificates)
        files = tls.TlsFiles(
            ca=arguments.ssl_ca_certfile, certificate=arguments.ssl_certfile, key=arguments.ssl_keyfile
        )
    embedded.check_port_is_free(arguments.address)
    on_superlink = embedded.choose_engine(arguments.engine) == "superlink"
    if on_superlink and join_key is not None:
        raise UsageError(
            "--join-token-file works with --engine embedded only; with --engine superlink, let SuperNodes in by their "
            "keys: --supernode-public-key"
        )
    if arguments.supernode_public_key and not on_superlink:
        raise UsageError("--supernode-public-key works with --engine superlink only; here, use --join-token-file")
    live = arguments.log_format == "text" and not arguments.verbose
    engine = SUPERLINK if on_superlink else EMBEDDED
    with open_server(settings, engine, join_key=join_key, live=live, command=["python", *sys.argv]) as server:
        if on_superlink:
            from fedsplit.engines.superlink.serve import serve

            serve(server, arguments.address, tls=files, node_keys=arguments.supernode_public_key)
        else:
            embedded.serve(server, arguments.address, certificates=certificates)
    if server.failure:
        raise server.failure
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, make_parser(), None, "server"))
