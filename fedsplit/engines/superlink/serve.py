"""``server_main.py --engine superlink``: Flower's SuperLink in this process, and this server as a run on it.

A SuperLink is a web application of three interfaces. SuperNodes need ``/v1/fleet/``, a run needs ``/v1/runtime/``, and
``/v1/control/`` starts runs, that is, runs code on the server and on every node, and asks nobody for a password.
Flower's own command, ``flower-superlink``, serves all three on one port. So the application is served from here, on two
ports: the user's address answers ``/v1/fleet/`` and nothing else, and a port of loopback answers ``/v1/runtime/`` to
whoever holds the token of the run, which is this process. The third is served nowhere.

Flower has no public function for this. What is taken from within it is taken in this module alone, and was read in
flwr 1.41 and 1.42.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.engines.embedded import parse_address
from fedsplit.engines.superlink.apps import run_on
from fedsplit.errors import ConnectionFailedError, UsageError
from fedsplit.server.server import Server

if TYPE_CHECKING:
    from fastapi import FastAPI
    from flwr.superlink.grid import HttpGrid

log = logging.getLogger("fedsplit")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

_STOP_S = 5.0
# What every SuperNode gets of the run: an app that is nothing but the package installed there.
_APP = {
    "fedsplit_app.py": b"from fedsplit.engines.superlink.apps import client_app, server_app\n",
    "pyproject.toml": b"""\
[project]
name = "fedsplit-app"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsplit"

[tool.flwr.app.components]
serverapp = "fedsplit_app:server_app"
clientapp = "fedsplit_app:client_app"
""",
}


def serve(server: Server, address: str, *, tls: tuple[Path, Path] | None, node_keys: Sequence[Path] = ()) -> None:
    """Run a server on a SuperLink at an address until its rounds are over.

    `tls` are the files of the server's certificate and key. Only SuperNodes with one of the public `node_keys` may
    join; without any, each one may. Raises UsageError if a key is none, or there are keys but no TLS, and
    ConnectionFailedError if nothing can listen at the address.
    """
    if node_keys and tls is None:
        raise UsageError("--supernode-public-key needs TLS: --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile")
    from flwr.superlink.main import create_app

    # The run's state dies with this process: no database of the user's is for it.
    os.environ.pop("FLWR_DATABASE", None)
    app = create_app()
    # Nobody but this process takes up tasks: with a secret that is told to nobody, no other can.
    app.state.superexec_auth_secret = secrets.token_bytes(32)
    app.state.enable_supernode_auth = bool(node_keys)
    for path in node_keys:
        let_in(app, path)
    # The run is there before the first SuperNode can ask for it.
    with (
        _listening(only(app, "runtime"), "127.0.0.1", 0) as port,
        _started_run(app, port) as grid,
        _listening(only(app, "fleet"), *parse_address(address), tls),
    ):
        run_on(grid, server)


def only(app: FastAPI, interface: Literal["fleet", "runtime"]) -> Application:
    """Return an application that answers one interface of the SuperLink as `app` does, and all else with 404."""
    from starlette.responses import PlainTextResponse

    allowed = re.compile(rf"/v1/{interface}/[a-z][a-z-]*".encode())

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        # The path as it came, before anything in it is decoded.
        path = scope.get("raw_path") or b""
        if scope["type"] == "http" and scope["method"] == "POST" and allowed.fullmatch(path):
            await app(scope, receive, send)
        else:
            log.debug("superlink: %s %r was turned away", scope.get("method"), path)
            await PlainTextResponse("not found", 404)(scope, receive, send)

    return answer


@contextmanager
def _listening(app: Application, host: str, port: int, tls: tuple[Path, Path] | None = None) -> Iterator[int]:
    """Serve an application in a thread for the length of a block; yields the port, which is a free one for 0."""
    import uvicorn

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as exc:
        raise ConnectionFailedError(f"cannot listen at {host}:{port}: {exc.strerror}") from exc
    certificate, key = tls or (None, None)
    config = uvicorn.Config(
        app, lifespan="off", ws="none", interface="asgi3", log_config=None, log_level="critical", access_log=False,
        proxy_headers=False, server_header=False, date_header=False, timeout_graceful_shutdown=2,
        ssl_certfile=certificate, ssl_keyfile=key,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name=f"port {port}", daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(_STOP_S)
        listener.close()


def let_in(app: FastAPI, path: Path) -> None:
    """Register the public key of a SuperNode that may join; raises UsageError if the file holds none."""
    try:
        key = load_ssh_public_key(path.read_bytes())
    except OSError as exc:
        raise UsageError(f"--supernode-public-key {path}: {exc.strerror}") from exc
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise UsageError(f"--supernode-public-key {path} holds no public key in OpenSSH's format") from exc
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UsageError(f"--supernode-public-key {path}: expected an ECDSA key, from ssh-keygen -t ecdsa -b 384")
    try:
        app.state.linkstate_factory.state().create_node(
            NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key_to_bytes(key), HEARTBEAT_DEFAULT_INTERVAL
        )
    except ValueError as exc:
        raise UsageError(f"--supernode-public-key {path} is given twice") from exc


@contextmanager
def _started_run(app: FastAPI, port: int) -> Iterator[HttpGrid]:
    """Start a run of which this process is the ServerApp; yields what it speaks to the SuperNodes with."""
    from flwr.cli.build import build_fab_from_files
    from flwr.supercore.heartbeat import HeartbeatSender
    from flwr.superlink.grid import HttpGrid

    state = app.state.linkstate_factory.state()
    content, _ = build_fab_from_files(_APP)
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
    state.store_fab(fab)
    run_id = state.create_run(
        "fedsplit/fedsplit-app", "0.1.0", fab.hash_str, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
    )
    (run,) = state.get_run_info(run_ids=[run_id])
    task = run.primary_task_id
    token = state.claim_task(task)
    state.activate_task(task)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task, run_id, SUPERLINK_NODE_ID
    # A task that is not heard of is taken for dead, and its run for failed.
    heartbeat = HeartbeatSender(lambda: bool(state.acknowledge_task_heartbeat(task)))
    heartbeat.start()
    grid = HttpGrid(f"127.0.0.1:{port}", insecure=True, token=token)
    grid.set_run(run)
    try:
        yield grid
    finally:
        grid.close()
        heartbeat.stop()
