"""Who is connected: Flower's client manager, by rank.

A connection counts once it has said which rank it is. A rank that comes back from the same exchange directory takes its
place again; another live client of the same rank is refused and told why. A rank that is asked nothing for a while,
because others are still training, is pinged. So each side notices a link that died without a word.
"""

import logging
import random
import threading
import time
from collections.abc import Container, Mapping
from typing import Any

from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.criterion import Criterion

from fedsplit.disk.payload_store import PayloadStore
from fedsplit.disk.remote_store import RemoteStore
from fedsplit.errors import RecordError
from fedsplit.exchange.records import printable
from fedsplit.server.observer import Observer
from fedsplit.server.peer import Peer, PeerLostError, RankProxy, TurnedAwayError
from fedsplit.server.turns import in_parallel

log = logging.getLogger("fedsplit")

_PING = {"op": "ping"}
# A client answers every second while its trainer works. One that was silent for longer is pinged: is it still there?
_HEARD_S = 3.0
_REMIND_S = 30.0


class Roster(ClientManager):
    """The connected ranks.

    ``store`` is offered to clients that can see it; without one payloads travel in messages. With a ``join_key`` nobody
    takes part who does not know it. A rank is pinged after ``ping_s`` seconds of silence; None is never.
    """

    def __init__(
        self, run_id: str, store: PayloadStore | RemoteStore | None, *, join_key: bytes | None = None,
        ping_s: float | None = None, observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self._run_id = run_id
        self._store = store
        self._join_key = join_key
        self._ping_s = ping_s
        self._observer = observer or Observer()
        self._random = random.Random()
        # Every connection by Flower's id, those that are here by rank, and every rank that was ever here.
        self._connections: dict[str, Peer] = {}
        self._peers: dict[int, Peer] = {}
        self._rank_proxies: dict[int, RankProxy] = {}
        self._changed = threading.Condition()
        # In asynchronous rounds the ranks that no strategy is offered, as they are at work on an older state. Nobody
        # waits for more than one rank then.
        self.at_work: Container[int] | None = None

    def ranks(self) -> list[int]:
        """Return the connected ranks in order."""
        with self._changed:
            return sorted(self._peers)

    def wait_for_rank(self, rank: int, timeout_s: float) -> Peer | None:
        """Wait until a rank is connected; None if it is not in time."""
        with self._changed:
            self._changed.wait_for(lambda: rank in self._peers, timeout_s)
            return self._peers.get(rank)

    def drop(self, peer: Peer) -> None:
        """Forget a peer whose connection broke."""
        with self._changed:
            if self._peers.get(peer.rank) is peer:
                del self._peers[peer.rank]
                log.warning("rank %d: the client is gone", peer.rank)
                self._changed.notify_all()

    def turn_away(self, peer: Peer, reason: str) -> None:
        """Drop a peer that does not keep to the protocol, and end its connection."""
        self.drop(peer)
        log.warning("rank %d: its client was turned away: %s", peer.rank, reason)
        threading.Thread(target=peer.refuse, args=(reason,), daemon=True).start()

    def connections(self) -> list[ClientProxy]:
        """Return every connection, also those that have not yet said who they are."""
        with self._changed:
            return [peer.proxy for peer in self._connections.values()]

    def finish(self, outcome: str, reason: str, farewell_s: float) -> None:
        """Tell every rank that the run is over, also those that are away and come back in time."""
        told: set[int] = set()
        record = {"op": "finish", "run_id": self._run_id, "outcome": outcome, "reason": printable(reason)}
        deadline = time.monotonic() + farewell_s

        def tell(peer: Peer) -> None:
            if self._reaches(peer, record):
                told.add(peer.rank)

        while True:
            with self._changed:
                present = [peer for rank, peer in self._peers.items() if rank not in told]
            in_parallel(tell, present)
            away = self._rank_proxies.keys() - told
            left = deadline - time.monotonic()
            if not away or left <= 0:
                break
            log.info("waiting %.0f s for rank %s, to say that the run is over", left, ", ".join(map(str, sorted(away))))
            with self._changed:
                self._changed.wait_for(lambda: bool(away & self._peers.keys()), left)  # noqa: B023

    # -- Flower's interface --------------------------------------------------------------------------------------------

    def register(self, client: ClientProxy) -> bool:
        """Take a new connection; it is counted once it has said who it is."""
        peer = Peer(client)
        with self._changed:
            self._connections[client.cid] = peer
        # The stream serves messages only after this returns, so the question is asked from beside.
        threading.Thread(target=self._keep, args=(peer,), name=f"greet-{client.cid[:8]}", daemon=True).start()
        return True

    def unregister(self, client: ClientProxy) -> None:
        """Forget a connection that ended."""
        with self._changed:
            peer = self._connections.pop(client.cid, None)
        if peer:
            self.drop(peer)

    def is_lost(self, client: ClientProxy) -> bool:
        """Tell whether a connection should be registered again.

        For an engine on which a node stays known when a question to it came to nothing.
        """
        with self._changed:
            peer = self._connections[client.cid]
            return self._peers.get(peer.rank) is not peer and time.monotonic() > peer.again_at

    def num_available(self) -> int:
        """Return how many ranks are connected and free."""
        return len(self.all())

    def all(self) -> dict[str, ClientProxy]:
        """Return the connected ranks that are free, under their ids."""
        busy = () if self.at_work is None else self.at_work
        return {str(rank): self._rank_proxies[rank] for rank in self.ranks() if rank not in busy}

    def wait_for(self, num_clients: int, timeout: float = 86400) -> bool:
        """Wait until so many ranks are connected, and say so meanwhile."""
        deadline, reminded = time.monotonic() + timeout, -_REMIND_S
        num_clients = num_clients if self.at_work is None else 1
        while True:
            with self._changed:
                left = max(0.0, min(1.0, deadline - time.monotonic()))
                if self._changed.wait_for(lambda: len(self._peers) >= num_clients, left):
                    return True
            ranks = self.ranks()
            self._observer.clients_awaited(ranks, num_clients)
            if time.monotonic() - reminded > _REMIND_S:
                reminded = time.monotonic()
                log.info("waiting for clients: %d of %d are here (ranks %s)", len(ranks), num_clients, ranks or "none")
            if time.monotonic() >= deadline:
                return False

    def begin_round(self, seed: int, server_round: int) -> None:
        """Let `sample` draw as it does for this round in every run with this seed, resumed or not."""
        self._random = random.Random(f"{seed}/{server_round}")

    def sample(
        self, num_clients: int, min_num_clients: int | None = None, criterion: Criterion | None = None
    ) -> list[ClientProxy]:
        """Draw ranks once enough are connected; none if fewer are left than asked for, as Flower's own manager does."""
        self.wait_for(num_clients if min_num_clients is None else min_num_clients)
        found = [client for client in self.all().values() if criterion is None or criterion.select(client)]
        if num_clients > len(found):
            log.info("the strategy asked for %d clients, %d are available: none is sampled", num_clients, len(found))
            return []
        return self._random.sample(found, num_clients)

    # -- coming and going ----------------------------------------------------------------------------------------------

    def _keep(self, peer: Peer) -> None:
        """Greet a connection, and ping it for as long as it is its rank's; in a thread of its own."""
        self._greet(peer)
        while self._ping_s is not None and self.wait_for_rank(peer.rank, 0.0) is peer:
            if peer.is_silent(self._ping_s):
                self._reaches(peer, _PING)
            time.sleep(self._ping_s / 4)

    def _greet(self, peer: Peer) -> None:
        try:
            peer.greet(self._run_id, self._store, self._join_key)
            self._admit(peer)
            peer.again_at = 0.0
        except TurnedAwayError as exc:
            peer.refuse(str(exc))
        except RecordError as exc:
            log.warning("a client was turned away: %s", exc)
            peer.refuse(f"this server speaks fedsplit: {exc}")
        except PeerLostError as exc:
            log.debug("a connection ended during the greeting: %s", exc)
            peer.again_at = 0.0
        except Exception as exc:  # left without an answer, the client would wait for as long as this server lives
            log.exception("the greeting of a client failed")
            peer.refuse(f"the server failed: {type(exc).__name__}: {exc}")

    def _admit(self, peer: Peer) -> None:
        rank = peer.rank
        with self._changed:
            other = self._peers.get(rank)
        is_taken = other and other.exchange_id != peer.exchange_id
        if other and is_taken and (other.was_heard_within(_HEARD_S) or self._reaches(other, _PING)):
            log.warning("rank %d: a second client was refused; the first is still connected", rank)
            raise TurnedAwayError(
                f"rank {rank} is taken by a live client with another exchange directory; take another --rank"
            )
        with self._changed:
            if self._connections.get(peer.proxy.cid) is not peer:
                return
            came_back = rank in self._rank_proxies
            self._peers[rank] = peer
            self._rank_proxies.setdefault(rank, RankProxy(rank))
            self._changed.notify_all()
        how = "by reference" if peer.sees_store else "in messages"
        log.info("rank %d: client %s (payloads %s)", rank, "is back" if came_back else "connected", how)

    def _reaches(self, peer: Peer, record: Mapping[str, Any]) -> bool:
        """Tell a peer something; one that does not confirm it is gone."""
        try:
            peer.tell(record)
        except PeerLostError:
            self.drop(peer)
            return False
        return True
