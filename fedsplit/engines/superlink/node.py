"""``client_main.py --engine superlink``: starts Flower's ``flower-supernode`` for a rank, and ends it again.

The SuperNode starts a process for each message, in which the relay runs (`fedsplit.engines.superlink.apps`). The relay
logs to a file in this script's format, and what comes there is shown. Flower's own log is shown with ``--verbose``,
and its last lines where the server does not let the SuperNode in. ``finished.json`` in the exchange directory tells of
the run's end.
"""

import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import fedsplit
from fedsplit.engines.embedded import parse_address, wait_for_server
from fedsplit.engines.processes import Child, free_port, handled_signals
from fedsplit.engines.tls import client_context
from fedsplit.errors import FedSplitError, RefusedError, UsageError
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord

log = logging.getLogger("fedsplit")

_END_S = 10.0
_LOOK_S = 0.2
_CONNECTION_LOOK_S = 2.0
# How often a SuperNode's helper looks for a message to work on: Flower's own setting, 1 s if it is not set.
_TASK_POLL_S = "0.1"
# What a relay leaves in the `script-dir` of its SuperNode, for this script to show.
REFUSAL, RELAY_LOG = "refusal", "relay.log"


def connect(
    exchange: Exchange, address: str, *, root_certificates: Path | None, node_key: Path | None = None,
    trainer_wait_s: float, payload_store: str = "auto", max_wait_s: float | None = None, verbose: bool = False,
    log_format: str = "text", mask_here: bool = False,
) -> FinishedRecord:  # fmt: skip
    """Run a SuperNode for a rank until the run is over, with the client's flags; returns how it ended.

    The caller holds the client's role all the while. Raises RefusedError if the server does not let this node in, and
    ConnectionFailedError as `wait_for_server` does.
    """
    if node_key and root_certificates is None:
        raise UsageError("--supernode-private-key needs TLS: --root-certificates")
    context = None if root_certificates is None else client_context(root_certificates.read_bytes())
    earlier = exchange.read_finished()
    before = earlier.version if earlier else 0
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedsplit-supernode-")))
        (home / RELAY_LOG).touch(mode=0o600)
        lines = stack.enter_context((home / RELAY_LOG).open())
        config: dict[str, str | int | float] = {
            "rank": exchange.rank, "exchange-dir": str(exchange.directory.parent.absolute()),
            "trainer-wait": trainer_wait_s, "payload-store": payload_store, "verify": exchange.verify,
            "mask-here": mask_here, "verbose": verbose, "log-format": log_format, "script-pid": os.getpid(),
            "script-dir": str(home),
        }  # fmt: skip
        # Whatever asks to stop ends this block in order, so that nothing is left running.
        stack.enter_context(handled_signals(_interrupt))
        while True:
            wait_for_server(address, max_wait_s, context, grpc=False)
            command = _command(address, config, root_certificates, node_key)
            node = Child("SuperNode", command, None if verbose and log_format == "text" else home / "supernode.log")
            try:
                node.start(_environment(home))
                finished = _watch(node, exchange, before, home / REFUSAL, lines, address)
            finally:
                node.stop()
                _show(lines)
            if finished:
                return finished
            log.warning("lost the server at %s; connecting again", address)


def _watch(
    node: Child, exchange: Exchange, before: int, refusal: Path, lines: TextIO, address: str
) -> FinishedRecord | None:
    """Wait until the run is over; None if the server went away meanwhile."""
    looked, failures = time.monotonic(), 0
    while True:
        _show(lines)
        finished = exchange.read_finished()
        if finished and finished.version > before:
            # With all answers in, the server leaves: until then the SuperNode passes the relay's last answer on.
            deadline = time.monotonic() + _END_S
            while time.monotonic() < deadline and node.is_running and _listens(address):
                time.sleep(_LOOK_S)
            return finished
        if refusal.exists():
            raise RefusedError(refusal.read_text())
        if not node.is_running:
            if not _listens(address):
                return None
            if node.exit_code and node.exit_code > 0:
                # It waits by itself for a server that cannot be reached, so this is an answer that it got. To a server
                # that was restarted it is a stranger: for that it sends SIGINT to itself, sometimes from two threads.
                raise RefusedError(f"the server at {address} does not let this SuperNode in: {node.tail()}")
            time.sleep(_CONNECTION_LOOK_S)
            return None
        if time.monotonic() - looked > _CONNECTION_LOOK_S:
            looked = time.monotonic()
            failures = 0 if _listens(address) else failures + 1
            if failures > 1:
                return None
        time.sleep(_LOOK_S)


def _show(lines: TextIO) -> None:
    """Show what the relay has logged since the last time."""
    sys.stderr.write(lines.read())
    sys.stderr.flush()


def _command(
    address: str, config: dict[str, str | int | float], root_certificates: Path | None, key: Path | None
) -> list[str]:
    command = [
        "flower-supernode", "--superlink", address, "--port", str(free_port()),
        "--node-config", " ".join(f"{name}={json.dumps(value)}" for name, value in config.items()),
    ]  # fmt: skip
    if root_certificates is None:
        return [*command, "--insecure"]
    command += ["--root-certificates", str(root_certificates.absolute())]
    return command if key is None else [*command, "--auth-supernode-private-key", str(key.absolute())]


def _environment(home: Path) -> dict[str, str]:
    # Flower's commands start each other by name: those beside this interpreter come first, whatever PATH says.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if shutil.which("flower-supernode", path=path) is None:
        raise FedSplitError(f"flower-supernode is not in {path}; install Flower in this environment: pip install flwr")
    packages = (str(Path(fedsplit.__file__).parent.parent), os.environ.get("PYTHONPATH", ""))
    return {
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _TASK_POLL_S, **os.environ, "FLWR_HOME": str(home), "PATH": path,
        "PYTHONPATH": os.pathsep.join(each for each in packages if each), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def _interrupt(_: signal.Signals) -> None:
    raise KeyboardInterrupt


def _listens(address: str) -> bool:
    try:
        socket.create_connection(parse_address(address), timeout=2.0).close()
    except OSError:
        return False
    return True
