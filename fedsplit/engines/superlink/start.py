"""``--engine superlink``: starts Flower's deployment engine for the user, and stops all of it again.

For ``server_main.py`` a SuperLink and a run of `fedsplit.engines.superlink.apps` on it, for ``client_main.py`` a
SuperNode. Each gets a ``FLWR_HOME`` of its own that vanishes with it, its ports are chosen, its log is ours (Flower's
with ``--verbose``), and whatever it starts is ended with it, also when the script is killed.

A SuperLink has one port for SuperNodes and for whoever may start runs, that is, run code on the server and on every
node; and it has no password for the latter. So it listens on loopback, and what others can reach is
`fedsplit.engines.superlink.gate`, which lets through what SuperNodes say and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import fedsplit
from fedsplit.disk.files import write_chunks
from fedsplit.engines.embedded import check_port_is_free, parse_address, wait_for_server
from fedsplit.engines.superlink.app_log import Reports
from fedsplit.engines.superlink.gate import Gate
from fedsplit.engines.superlink.processes import Command, free_port, interrupt, on_signals, path_of
from fedsplit.engines.tls import TlsFiles, client_context
from fedsplit.errors import (
    ConnectionFailedError,
    RefusedError,
    RunFailedError,
    RunStoppedError,
    UsageError,
)  # fmt: skip
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord
from fedsplit.server.settings import ServerSettings

log = logging.getLogger("fedsplit")

_START_S = 60.0
_APP_START_S = 180.0
_END_S = 10.0
_LOOK_S = 0.2
_FAREWELL_S = 60.0
_CONNECTION_LOOK_S = 2.0
# How a SuperNode words an answer of the SuperLink's own that is an error, unlike one that it could not reach.
_REFUSAL = "[code: "
# Flower's own setting, 1 s if it is not set: how often a process is looked for something to do.
_TASK_POLL_S = "0.1"
_NAME = "fedsplit"
_APP = """\
import fedsplit.engines.superlink.apps

server_app = fedsplit.engines.superlink.apps.server_app
client_app = fedsplit.engines.superlink.apps.client_app
"""
_PROJECT = """\
[project]
name = "fedsplit-app"
version = "{version}"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsplit"

[tool.flwr.app.components]
serverapp = "fedsplit_app:server_app"
clientapp = "fedsplit_app:client_app"

[tool.flwr.app.config]
"""


def serve(
    options: ServerSettings,
    address: str,
    *,
    tls: TlsFiles | None,
    node_keys: Sequence[Path] = (),
    verbose: bool = False,
) -> None:
    """Run a SuperLink at an address and a run of this server on it, until the run is over.

    Parameters
    ----------
    options
        The server's settings; they become the run config.
    address
        ``HOST:PORT`` for the SuperNodes.
    tls
        The files of TLS; None goes without.
    node_keys
        Public keys of the SuperNodes that may join; without any, each one may.
    verbose
        Whether the server's debug lines are shown.

    Raises
    ------
    FedSplitError
        What ended the run early.
    """
    if node_keys and tls is None:
        raise UsageError("--supernode-public-key needs TLS: --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile")
    check_port_is_free(address)
    with ExitStack() as stack:
        # From the first process on nothing may be left running, whenever the user loses patience.
        stack.enter_context(on_signals(interrupt))
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedsplit-superlink-")))
        inner_port = free_port()
        inner_tls = make_inner_certificates(home) if node_keys else None
        environment = _environment(home)
        _write_connection(home, inner_port, inner_tls)
        superlink = Command(_superlink_command(inner_port, inner_tls), environment)
        stack.callback(superlink.stop)
        _wait_until_up(superlink, inner_port)
        for key in node_keys:
            _flwr(environment, "supernode", "register", str(key.absolute()), _NAME)
        gate = Gate(address, inner_port, tls=tls, inner_ca=inner_tls.ca if inner_tls else None)
        stack.callback(gate.close)
        reports = Reports(home / "report.jsonl")
        stack.callback(reports.close)
        script: dict[str, str | int | float] = {
            "report-file": str(reports.path),
            "verbose": verbose,
            "script-pid": os.getpid(),
            "script-command": shlex.join(["python", *sys.argv]),
        }
        _write_app(home, {**options.to_run_config(), **script})
        _flwr(environment, "run", str(home / "fedsplit-app"), _NAME)
        log.debug("the run was submitted to the SuperLink on port %d", inner_port)
        stopped = _Stop()
        with on_signals(stopped):
            _follow(superlink, reports, stopped)
    if reports.error:
        raise reports.error


class _Stop:
    """Notes a signal that asks to stop; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number


def _follow(superlink: Command, reports: Reports, stopped: _Stop) -> None:
    """Wait for the run's end; a signal is passed on to it, so that the clients are told."""
    deadline, began = None, time.monotonic()
    while not reports.ended:
        if _is_lost(reports, began):
            raise RunFailedError("the server's process ended without a word; see --verbose")
        if not superlink.is_running:
            raise RunFailedError(f"flower-superlink ended before the run did: {superlink.problem()}")
        if stopped.number and deadline is None:
            deadline = time.monotonic() + _FAREWELL_S
            if reports.pid is None:
                raise RunStoppedError("stopped before the run began")
            log.info("telling the clients that the run is being stopped; once more ends it at once")
            with contextlib.suppress(ProcessLookupError):
                os.kill(reports.pid, stopped.number)
        if deadline is not None and time.monotonic() > deadline:
            raise RunStoppedError("stopped; not every client could be told")
        time.sleep(_LOOK_S)
    # The app still has to tell the SuperLink.
    time.sleep(_LOOK_S)


def _is_lost(reports: Reports, began: float) -> bool:
    """Tell whether the server's process, which is not a child of this one, is gone or never came."""
    if reports.pid is None:
        return time.monotonic() - began > _APP_START_S
    try:
        os.kill(reports.pid, 0)
    except ProcessLookupError:
        # It may have said how it ended with its last breath.
        reports.read()
        return not reports.ended
    return False


def connect(
    exchange: Exchange, address: str, *, root_certificates: Path | None, node_key: Path | None = None,
    trainer_wait_s: float, payload_store: str = "auto", max_wait_s: float | None = None, verbose: bool = False,
) -> FinishedRecord:  # fmt: skip
    """Run a SuperNode for a rank until the run is over; the caller holds the client's role for life.

    Parameters
    ----------
    exchange
        The rank's exchange directory.
    address
        Where the SuperLink listens.
    root_certificates
        CA certificates; None goes without TLS.
    node_key
        The SuperNode's private key, where the server asks for one.
    trainer_wait_s
        Seconds to wait for a trainer before a task is reported as failed.
    payload_store
        As ``--payload-store``.
    max_wait_s
        Seconds to wait for the server; None for ever.
    verbose
        Whether debug lines are shown.

    Returns
    -------
    finished
        How the run ended.

    Raises
    ------
    RefusedError
        If the server does not let this node in.
    ConnectionFailedError
        If the server was not there for ``max_wait_s``, or its certificate is not one for it.
    """
    if node_key and root_certificates is None:
        raise UsageError("--supernode-private-key needs TLS: --root-certificates")
    context = None if root_certificates is None else client_context(root_certificates.read_bytes())
    before = _version(exchange.read_finished())
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedsplit-supernode-")))
        reports = Reports(home / "report.jsonl")
        stack.callback(reports.close)
        config: dict[str, str | int | float] = {
            "rank": exchange.rank, "exchange-dir": str(exchange.directory.parent.absolute()), "client-lock": "held",
            "trainer-wait": trainer_wait_s, "report-file": str(reports.path), "verbose": verbose,
            "script-pid": os.getpid(), "payload-store": payload_store,
        }  # fmt: skip
        stack.enter_context(on_signals(interrupt))
        while True:
            wait_for_server(address, max_wait_s, context, grpc=False)
            command = _supernode_command(address, config, root_certificates, node_key)
            node = Command(command, _environment(home))
            try:
                finished = _watch(node, exchange, before, reports, address)
            finally:
                node.stop()
            if finished:
                return finished
            log.warning("lost the server at %s; connecting again", address)


def _watch(node: Command, exchange: Exchange, before: int, reports: Reports, address: str) -> FinishedRecord | None:
    """Wait until the run is over; None if the server went away meanwhile."""
    looked, failures = time.monotonic(), 0
    while True:
        finished = exchange.read_finished()
        if finished and _version(finished) > before:
            # The relay's answer has to get back to the server before the SuperNode may go.
            _wait_for_answer(node, reports)
            return finished
        if reports.error:
            raise reports.error
        if not node.is_running:
            if not _listens(address):
                return None
            if _REFUSAL in (problem := node.problem()):
                raise RefusedError(f"the server at {address} does not let this SuperNode in: {problem}")
            log.warning("flower-supernode ended: %s", problem)
            time.sleep(_CONNECTION_LOOK_S)
            return None
        if time.monotonic() - looked > _CONNECTION_LOOK_S:
            looked = time.monotonic()
            failures = 0 if _listens(address) else failures + 1
            if failures > 1:
                return None
        time.sleep(_LOOK_S)


def _wait_for_answer(node: Command, reports: Reports) -> None:
    """Wait until the SuperNode has passed the last answer on: it looks every half second and says that it has."""
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline and node.is_running:
        if reports.ended and node.tail and "Sent successfully" in node.tail[-1]:
            return
        time.sleep(_LOOK_S)


def _superlink_command(port: int, tls: TlsFiles | None) -> list[str]:
    command = [
        "flower-superlink",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--disable-runtime-dependency-installation",
    ]
    if tls is None:
        return [*command, "--insecure"]
    return [
        *command, "--enable-supernode-auth", "--ssl-ca-certfile", str(tls.ca), "--ssl-certfile", str(tls.certificate),
        "--ssl-keyfile", str(tls.key),
    ]  # fmt: skip


def _supernode_command(
    address: str, config: dict[str, str | int | float], root_certificates: Path | None, key: Path | None
) -> list[str]:
    command = [
        "flower-supernode", "--superlink", address, "--port", str(free_port()),
        "--node-config", " ".join(f"{name}={json.dumps(value)}" for name, value in config.items()),
    ]  # fmt: skip
    command += (
        ["--insecure"] if root_certificates is None else ["--root-certificates", str(root_certificates.absolute())]
    )
    return command if key is None else [*command, "--auth-supernode-private-key", str(key.absolute())]


def _environment(home: Path) -> dict[str, str]:
    paths = (str(Path(fedsplit.__file__).parent.parent), os.environ.get("PYTHONPATH", ""))
    return {
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _TASK_POLL_S, **os.environ, "FLWR_HOME": str(home),
        # Flower starts its other commands by name.
        "PATH": f"{path_of('flower-superexec').parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def _write_connection(home: Path, port: int, tls: TlsFiles | None) -> None:
    trust = "insecure = true" if tls is None else f"root-certificates = {json.dumps(str(tls.ca))}"
    write_chunks(home / "config.toml", [f'[superlink.{_NAME}]\naddress = "127.0.0.1:{port}"\n{trust}\n'.encode()])


def _write_app(home: Path, config: dict[str, str | int | float]) -> None:
    """Write a Flower app that is nothing but the installed package, with the options as its run config."""
    directory = home / "fedsplit-app"
    directory.mkdir(mode=0o700)
    project = _PROJECT.format(version="0.1.0") + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in config.items()
    )
    write_chunks(directory / "pyproject.toml", [project.encode()])
    write_chunks(directory / "fedsplit_app.py", [_APP.encode()])


def _flwr(environment: dict[str, str], *arguments: str) -> None:
    ended = subprocess.run(
        [str(path_of("flwr")), *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True, check=False,
    )  # fmt: skip
    log.debug("flwr %s: %s", " ".join(arguments[:2]), ended.stdout.strip())
    if ended.returncode:
        raise RunFailedError(f"flwr {' '.join(arguments[:2])} failed: {' '.join(ended.stdout.split())[-500:]}")


def _wait_until_up(superlink: Command, port: int) -> None:
    deadline = time.monotonic() + _START_S
    while not _listens(f"127.0.0.1:{port}"):
        if not superlink.is_running:
            raise ConnectionFailedError(f"flower-superlink did not start: {superlink.problem()}")
        if time.monotonic() > deadline:
            raise ConnectionFailedError(f"flower-superlink did not listen within {_START_S:g} s: {superlink.problem()}")
        time.sleep(_LOOK_S)


def make_inner_certificates(home: Path) -> TlsFiles:
    """Make a certificate for between gate and SuperLink, which asks for keys over TLS only; it dies with the run."""
    from fedsplit.engines.certificates import make_certificates

    directory = home / "certificates"
    make_certificates(directory, ["127.0.0.1"])
    return TlsFiles(ca=directory / "ca.pem", certificate=directory / "server.pem", key=directory / "server-key.pem")


def _listens(address: str) -> bool:
    try:
        socket.create_connection(parse_address(address), timeout=2.0).close()
    except OSError:
        return False
    return True


def _version(finished: FinishedRecord | None) -> int:
    return finished.version if finished else 0
