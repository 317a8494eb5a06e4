"""Runs the server of a federation: rounds, merging, checkpoints. It holds no model code and no data.

    python -m fedsplit server --rounds 5

A tiny run on one machine, in five terminals and any order:

    python -m fedsplit server --rounds 2
    python -m fedsplit client --rank 1      python -m fedsplit client --rank 2
    python -m fedsplit trainer --rank 1     python -m fedsplit trainer --rank 2
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit import cli
from fedsplit.errors import UsageError
from fedsplit.run.directory import Places
from fedsplit.run.events import event
from fedsplit.run.history import Line
from fedsplit.split_learning.order import MODES
from fedsplit.watch.rounds import value

if TYPE_CHECKING:
    from fedsplit.server.round import Rounds
    from fedsplit.server.settings import ServerSettings
    from fedsplit.split_learning.uppers import Uppers

log = logging.getLogger("fedsplit")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, and what is run."""
    add_own_flags(parser)
    parser.add_argument("--exchange-dir", type=Path, default=Path("exchange"), metavar="DIR",
        help="with --split-learning: holds upper/, shared with the trainer of the upper part")  # fmt: skip


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that no other program has."""
    add = parser.add_argument
    _add_rounds(parser)
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), metavar="DIR", help="the run is kept in DIR/server")
    add("--keep-checkpoints", type=cli.positive_int, default=3, metavar="N",
        help="how many of the newest rounds are kept, at least 2; the best one is kept too")  # fmt: skip
    add("--resume", action="store_true", help="go on with the run in --checkpoint-dir")
    add("--initial-checkpoint", type=Path, metavar="FILE",
        help="start from the state_dict in a .safetensors or .pt file (default: ask a trainer for one)")  # fmt: skip
    add("--payload-store", default="auto", metavar="auto|none|URL",
        help="how states travel. auto: as files, with clients that see this machine's disk, else in messages; none: "
        "always in messages; URL: as files at a place that fsspec knows, such as s3://bucket/prefix, with clients that "
        "were given the same URL")  # fmt: skip
    add("--wire", action="append", default=[], metavar="CODECS",
        help="how states and updates travel in messages, in both directions: [PATTERN=]CODEC[+CODEC] of delta, "
        "top-k(fraction=F), bfloat16, float16, int8 and zstd; repeatable, the first that matches an entry wins "
        "(default: as they are)")  # fmt: skip
    add("--tracker", action="append", default=[], metavar="NAME[:PLACE]",
        help="also write metrics to tensorboard or mlflow; PLACE is a directory or a tracking URI (default: inside "
        "--checkpoint-dir); repeatable")  # fmt: skip
    add_connection(parser)
    cli.make_program(parser, "server", run, flower=True)


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-r", "--rounds", type=cli.positive_int, default=3, metavar="N",
        help="rounds of the whole run, those before --resume included")  # fmt: skip
    add("--min-clients", type=cli.positive_int, default=2, metavar="N",
        help="a round starts once this many clients are connected")  # fmt: skip
    add("--min-results", type=cli.positive_int, default=1, metavar="N",
        help="a round with fewer accepted updates leaves the state as it was")  # fmt: skip
    add("--fraction-train", type=float, default=1.0, metavar="F",
        help="share of the connected clients that train in a round, above 0 and at most 1")  # fmt: skip
    add("--evaluate-every", type=cli.natural, default=1, metavar="N",
        help="evaluate after every N-th round; 0: never")  # fmt: skip
    add("--aggregate", action="append", default=[], metavar="RULE",
        help="how the state_dict is merged: NAME, NAME(key=value), PATTERN=RULE, '<TYPE OF MODULE>=local' or "
        "@FILE.toml; repeatable, the first that matches an entry wins (default: fedavg)")  # fmt: skip
    add("--strategy", metavar="CLASS",
        help="let a Flower strategy choose the clients and merge, instead of --aggregate: package.module:Class, or a "
        "class of flwr.server.strategy, with parameters as in 'FedAdam(eta=0.01)' (default: none)")  # fmt: skip
    add("--split-learning", choices=MODES, metavar="MODE",
        help="the model is cut: its upper part trains beside this server, in a trainer started with --part upper. "
        "sfl-v1: a copy of it for each rank, merged each round; sfl-v2: one for all ranks, a batch of each in turn; "
        "sequential: one rank after the other (default: the model is whole)")  # fmt: skip
    add("--upper-trainers", type=cli.positive_int, default=1, metavar="K",
        help="with sfl-v1: so many trainers of upper parts, each of some ranks, do steps at the same time; "
        "the k-th shares DIR/upper-k of --exchange-dir DIR with its trainer, the first DIR itself")  # fmt: skip
    add("--balance", action="store_true",
        help="tell each rank which share of its usual work to do, from its measured speed, so that all are done at the "
        "same time")  # fmt: skip
    _add_asynchronous(parser)
    add("--train-config", action="append", type=cli.key_scalar, default=[], metavar="KEY=VALUE",
        help="reaches every trainer in task.config; repeatable")  # fmt: skip
    add("--round-timeout", type=cli.seconds, metavar="S",
        help="seconds for the training of a round, and again for its evaluation, after which it goes on without the "
             "results that are missing (default: never)")  # fmt: skip
    add("--client-wait", type=cli.seconds, default="300", metavar="S",
        help="seconds that a round waits for a client whose connection was lost")  # fmt: skip
    add("--seed", type=cli.natural, default=0, metavar="N",
        help="seed for choosing clients, and for rules that draw random numbers")  # fmt: skip


def _add_asynchronous(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--buffer", type=cli.positive_int, metavar="B",
        help="merge after every B updates, whoever sent them; nobody waits for the slowest (default: rounds wait for "
        "all that were asked)")  # fmt: skip
    add("--merge-after", type=cli.positive_int, metavar="K",
        help="a round ends with the first K of its updates; later ones count in the round in which they come "
        "(default: rounds wait for all that were asked)")  # fmt: skip
    add("--max-staleness", type=cli.natural, metavar="N",
        help="refuse updates of a state that more than N merges followed (default: none is too old)")  # fmt: skip
    add("--staleness", default="polynomial:0.5", metavar="WEIGHT",
        help="how much an update counts that started from an older state: constant, polynomial:A for "
        "(1 + staleness)^-A, or package.module:function")  # fmt: skip
    add("--mix-states", action="store_true",
        help="with --buffer: mix what was trained into the state, as FedAsync does, instead of adding what training "
        "changed")  # fmt: skip
    add("--server-lr", type=cli.positive, default="1.0", metavar="LR",
        help="with --buffer or --merge-after: how far each merge moves the state")  # fmt: skip


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how clients connect."""
    add = parser.add_argument
    add("--address", "-addr", metavar="HOST:PORT", default="127.0.0.1:8080", help="where to listen")
    add("--engine", choices=("embedded", "superlink"), default="embedded", help="which of Flower's engines to run on")
    add("--ssl-ca-certfile", type=Path, metavar="FILE",
        help="CA certificate, PEM; TLS needs this and the two below (default: no TLS)")  # fmt: skip
    add("--ssl-certfile", type=Path, metavar="FILE", help="this server's certificate, PEM")
    add("--ssl-keyfile", type=Path, metavar="FILE", help="this server's private key, PEM")
    add("--insecure", action="store_true", help="listen without TLS where other machines can connect")
    add("--join-token-file", type=Path, metavar="FILE",
        help="let in only clients that prove they know the token in this file, of mode 0600; needs TLS or a loopback "
        "address (default: let in every client)")  # fmt: skip
    add("--supernode-public-key", type=Path, action="append", default=[], metavar="FILE",
        help="with --engine superlink: let in only SuperNodes that hold one of these keys; repeatable "
        "(default: let in every SuperNode)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the server; returns when the run is over."""
    settings, uppers = read_settings(arguments), None
    if mode := arguments.split_learning:
        from fedsplit.split_learning.uppers import Uppers

        uppers = Uppers(settings, mode, arguments.exchange_dir, arguments.upper_trainers)
    serve(arguments, settings, uppers)
    return 0


def serve(
    arguments: argparse.Namespace, settings: ServerSettings, uppers: Uppers | None = None,
    rounds: Callable[..., Rounds] | None = None,
) -> None:  # fmt: skip
    """Run a server with these settings, where `add_connection` says, to the end of the run; raises its failure."""
    from fedsplit.engines import embedded, tls
    from fedsplit.engines.assembly import open_server
    from fedsplit.wire.join import read_token
    from fedsplit.wire.protocol import EMBEDDED, SUPERLINK

    embedded.quiet_flower(arguments.verbose and arguments.log_format == "text")
    host, _ = embedded.parse_address(arguments.address)
    certificates = _read_certificates(arguments)
    join_key = read_token(arguments.join_token_file)
    tls.check_exposure(
        host, encrypted=certificates is not None, insecure=arguments.insecure, has_token=join_key is not None
    )
    if certificates is not None:
        tls.check_server_files(certificates)
    engine = SUPERLINK if embedded.choose_engine(arguments.engine) == "superlink" else EMBEDDED
    cli.check_keys(
        engine.name, join_token_file=arguments.join_token_file, keys=arguments.supernode_public_key,
        keys_flag="--supernode-public-key",
    )  # fmt: skip
    live = arguments.log_format == "text" and not arguments.verbose
    with (
        embedded.claim_port(arguments.address),
        open_server(
            settings, engine, join_key=join_key, live=live, command=cli.typed_command(), uppers=uppers, rounds=rounds
        ) as server,
    ):
        if engine is SUPERLINK:
            from fedsplit.engines.superlink.serve import serve as serve_superlink

            files = (arguments.ssl_certfile, arguments.ssl_keyfile) if certificates else None
            serve_superlink(server, arguments.address, tls=files, node_keys=arguments.supernode_public_key)
        else:
            embedded.serve(server, arguments.address, certificates=certificates)
    if server.failure:
        raise server.failure
    conclude(server.run.history.lines, arguments.checkpoint_dir, arguments.log_format)


def read_settings(arguments: argparse.Namespace) -> ServerSettings:
    """Return the settings that the flags make; raises UsageError for what cannot be."""
    from fedsplit.server.settings import ServerSettings

    values: dict[str, Any] = {name: getattr(arguments, name) for name in ServerSettings.__dataclass_fields__}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return ServerSettings(**values)


def conclude(lines: Sequence[Line], checkpoint_dir: Path, log_format: str) -> None:
    """Say what came out and where it is."""
    places, rounds = Places(checkpoint_dir), lines[-1]["round"] if lines else 0
    judged = {name: value(lines[-1], "evaluate", name) for name in ("accuracy", "loss")} if lines else {}
    name, number = next(((name, number) for name, number in judged.items() if number == number), ("", 0.0))
    report = f"python -m fedsplit report --checkpoint-dir {shlex.quote(str(checkpoint_dir))} --output report.html"
    facts = {"checkpoints": str(places.server)}
    facts |= {"plot": str(places.final_plot)} if places.final_plot.exists() else {}
    shown = f"{f'final {name} {number:.4f}' if name else 'finished'} after {cli.count(rounds, 'round')}"
    if log_format == "json":
        log.info("%s", shown, extra=event("complete", rounds=rounds, **facts))
        return
    print(shown)
    for title, text in {**facts, "report": report}.items():
        print(f"{title + ':':<12} {text}", flush=True)


def _read_certificates(arguments: argparse.Namespace) -> tuple[bytes, bytes, bytes] | None:
    """Read the three TLS files: CA, certificate, key; None without them, UsageError for only some."""
    paths = {"--ssl-ca-certfile": arguments.ssl_ca_certfile, "--ssl-certfile": arguments.ssl_certfile,
             "--ssl-keyfile": arguments.ssl_keyfile}  # fmt: skip
    match [content for flag, path in paths.items() if (content := cli.read_file(path, flag)) is not None]:
        case []:
            return None
        case [ca, certificate, key]:
            return ca, certificate, key
    raise UsageError(f"TLS needs all of {', '.join(paths)}")
