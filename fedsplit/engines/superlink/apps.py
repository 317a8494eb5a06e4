"""The same server and the same relay under Flower's deployment engine: what ``flwr run`` runs.

``server_app`` runs `fedsplit.server.server.Server` beside the SuperLink, ``client_app`` runs
`fedsplit.client.relay.Relay` beside each SuperNode, in a new process for each message; the trainers are the unchanged
``model_main.py``. The run config holds the server's flags (`fedsplit.server.settings`), a SuperNode's ``--node-config``
those of a client: ``rank=1 exchange-dir="…"``, and if wanted ``trainer-wait=300``, ``payload-store="none"``,
``verify="always"`` and ``mask-here=true``. The client's role lock is held for the length of a message, or, with
`script-pid`, for life by the script of that process.

Where Flower waits in fixed steps and its public interface lets another do the waiting, this does it sooner: nodes are
looked for every half second, not every five, and replies at first every 50 ms, not every three seconds.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from flwr.app import ConfigRecord, Context, Message
from flwr.client import Client
from flwr.clientapp import ClientApp
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.serverapp import Grid, ServerApp

from fedsplit.cli import set_up_logging
from fedsplit.client.relay import Relay
from fedsplit.disk.files import write_chunks
from fedsplit.disk.remote_store import open_remote
from fedsplit.engines.assembly import open_server
from fedsplit.engines.superlink.node import REFUSAL, RELAY_LOG
from fedsplit.errors import RoleTakenError, UsageError
from fedsplit.exchange.directory import Exchange
from fedsplit.server.roster import Roster
from fedsplit.server.server import Server
from fedsplit.server.settings import ServerSettings
from fedsplit.wire.protocol import SUPERLINK

log = logging.getLogger("fedsplit")

_NODES_S = 0.5
_FIRST_POLL_S, _LAST_POLL_S = 0.05, 1.0
# What a message may take beyond the time that the client holds it: a SuperNode polls, starts a process and replies.
_DELIVERY_S = 90.0
_LOST_PAUSE_S = 5.0
# The process of the message before may still be on its way out.
_LOCK_WAIT_S = 10.0
_SCRIPT_S = 0.5
_STATE = "fedsplit"

server_app = ServerApp()


@server_app.main()
def run_server(grid: Grid, context: Context) -> None:
    """Run the federation; raises what made it end early, which gives the run its status."""
    _begin("server", context.run_config)
    settings = ServerSettings.from_run_config(context.run_config)
    with open_server(settings, SUPERLINK) as server:
        run_on(grid, server)
    if server.failure:
        raise server.failure


def run_on(grid: Grid, server: Server) -> None:
    """Run a server's rounds with the SuperNodes that a grid knows."""
    roster = server.client_manager()
    assert isinstance(roster, Roster)  # for the type checker: it makes no other
    stop = threading.Event()
    thread = threading.Thread(target=_Nodes(grid, roster).watch, args=(stop,), name="nodes", daemon=True)
    thread.start()
    try:
        # It knows its number of rounds.
        server.fit(num_rounds=1, timeout=None)
    finally:
        stop.set()
        thread.join()


class _PromptGrid:
    """A grid that looks for replies sooner and lets a message live long enough; what `GridClientProxy` uses of one."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send one message and wait for its reply; if nobody answers in time, Flower's own error is the reply."""
        (message,) = messages
        message.metadata.ttl += _DELIVERY_S
        message_ids = list(self._grid.push_messages([message]))
        # The SuperLink has it now: no copy of a large state waits here for as long as a training takes.
        message.content.clear()
        began = time.monotonic()
        while True:
            if replies := list(self._grid.pull_messages(message_ids)):
                return replies
            time.sleep(min(_LAST_POLL_S, max(_FIRST_POLL_S, (time.monotonic() - began) / 20)))


class _Nodes:
    """Keeps the roster up to date with the SuperNodes that are connected."""

    def __init__(self, grid: Grid, roster: Roster) -> None:
        self._grid, self._roster = grid, roster
        self._proxies: dict[int, GridClientProxy] = {}
        self._tried: dict[int, float] = {}

    def watch(self, stop: threading.Event) -> None:
        """Look until it is time to stop."""
        complained = False
        while True:
            try:
                self._update(set(self._grid.get_node_ids()))
                complained = False
            except Exception as exc:  # noqa: BLE001  (the SuperLink's HTTP client has its own; it may come back)
                if not complained and not stop.is_set():
                    log.warning("cannot ask the SuperLink for its nodes: %s", exc)
                complained = True
            if stop.wait(_NODES_S):
                return

    def _update(self, here: set[int]) -> None:
        for gone in self._proxies.keys() - here:
            self._roster.unregister(self._proxies.pop(gone))
        now = time.monotonic()
        for node in sorted(here):
            if node not in self._proxies:
                grid: Any = _PromptGrid(self._grid)
                self._proxies[node] = GridClientProxy(node_id=node, grid=grid, run_id=self._grid.run.run_id)
            elif not self._roster.is_lost(self._proxies[node]) or now - self._tried[node] < _LOST_PAUSE_S:
                continue
            # A node whose question came to nothing is still the same node: it is greeted again.
            self._tried[node] = now
            self._roster.register(self._proxies[node])


class _NodeRelay(Relay):
    """A relay for one message: takes up what the message before left in the context, and the role lock."""

    def __init__(self, context: Context) -> None:
        config = context.node_config
        rank, directory = config.get("rank"), config.get("exchange-dir")
        if not isinstance(rank, int) or not isinstance(directory, str):
            raise UsageError(
                "the SuperNode says neither whose relay it is nor where: give it "
                f"--node-config 'rank=1 exchange-dir=\"/path/exchange\"' (it has {dict(config)})"
            )
        self._context = context
        store = str(config.get("payload-store", "auto"))
        super().__init__(
            Exchange(directory, rank, "always" if config.get("verify") == "always" else "auto"),
            trainer_wait_s=float(config.get("trainer-wait", 300.0)),
            use_store=store == "auto", remote=open_remote(store), engine=SUPERLINK,
            mask_here=bool(config.get("mask-here")),
        )  # fmt: skip

    @contextmanager
    def _question(self, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        state, node_config = self._context.state.config_records, self._context.node_config
        with ExitStack() as stack:
            if "script-pid" not in node_config:
                self._take_role(stack)
            self.take_up(state[_STATE] if _STATE in state else {})  # noqa: SIM401  (its get wants a record)
            yield stack.enter_context(super()._question(config))
        state[_STATE] = ConfigRecord({**self.leave()})
        if self.refused and (home := node_config.get("script-dir")):
            write_chunks(Path(str(home), REFUSAL), [str(self.refused).encode()])

    def _take_role(self, stack: ExitStack) -> None:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                stack.enter_context(self._exchange.hold("client"))
                return
            except RoleTakenError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def make_client(context: Context) -> Client:
    """Make the relay of the SuperNode that a message came to."""
    _begin("client", context.node_config)
    if "script-pid" in context.node_config:
        script = int(context.node_config["script-pid"])
        threading.Thread(target=_end_with, args=(script,), name="script", daemon=True).start()
    return _NodeRelay(context)


client_app = ClientApp(client_fn=make_client)


def _begin(program: str, config: Mapping[str, Any]) -> None:
    set_up_logging(program, verbose=bool(config.get("verbose")), log_format=str(config.get("log-format", "text")))
    if home := config.get("script-dir"):
        to_file = logging.FileHandler(Path(str(home), RELAY_LOG))
        to_file.setFormatter(log.handlers[0].formatter)
        log.handlers[:] = [to_file]
    # Rules of one's own are looked for where the SuperLink was started, as server_main.py does.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


def _end_with(script: int) -> None:
    """End as soon as the script that started the engine was killed, as if it had been this process.

    Flower's own parts take seconds to notice each other's end. Meanwhile the script may have been started again, and
    would find the run's directory in use.
    """
    while True:
        try:
            os.kill(script, 0)
        except ProcessLookupError:
            os._exit(1)
        except PermissionError:
            return
        time.sleep(_SCRIPT_S)
