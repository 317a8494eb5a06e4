"""Who is connected: Flower's client manager, by rank.

Flower gives every connection a fresh id; here a connection becomes a `Peer` once it has said which rank it is. A rank
that comes back from the same exchange directory takes its place again; another live client of the same rank is
refused and told why. With a join token a connection is told nothing but a challenge before it has proved that it knows
the token.

A rank that is asked nothing for a while, because others are still training, is pinged. So each side notices a link that
died without a word, the client by the silence.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import fedsplit.wire.flower_env  # noqa: F401  (first: it keeps Flower from calling home)

# isort: split
from flwr.common import GetPropertiesIns, ReconnectIns
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.criterion import Criterion

from fedsplit.disk.payload_store import PayloadStore
from fedsplit.errors import RecordError
from fedsplit.server.observer import Observer
from fedsplit.server.peer import GREETING_S, Peer, PeerLostError, RankProxy
from fedsplit.wire.join import Transcript, is_nonce, new_nonce
from fedsplit.wire.protocol import pack, unpack

if TYPE_CHECKING:
    from fedsplit.disk.remote_store import RemoteStore

log = logging.getLogger("fedsplit")

# A client answers every second while its trainer works. One that was silent for longer is pinged: is it still there?
_HEARD_S = 3.0
_REMIND_S = 30.0
# One that was refused may ask again after this long, on an engine where a node outlives its questions.
_REFUSED_S = 60.0


class _TurnedAwayError(Exception):
    """A client may not take part; the message is what it is told. Internal."""


class Roster(ClientManager):
    """The connected ranks.

    Parameters
    ----------
    run_id
        The run that clients are greeted with.
    store
        Offered to clients that can see it; None keeps payloads in messages.
    join_key
        What a client must prove to know; None lets everybody in.
    ping_s
        Seconds of silence after which a rank is pinged; None for never.
    observer
        Is told while clients are waited for.
    """

    def __init__(
        self,
        run_id: str,
        store: PayloadStore | RemoteStore | None,
        *,
        join_key: bytes | None = None,
        ping_s: float | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._run_id = run_id
        self._store = store
        self._join_key = join_key
        self._ping_s = ping_s
        self._observer = observer or Observer()
        self._random = random.Random()
        self._pinging: threading.Thread | None = None
        self._greeting: set[str] = set()
        self._refused: dict[str, float] = {}
        self._proxies: dict[str, ClientProxy] = {}
        self._peers: dict[int, Peer] = {}
        self._rank_proxies: dict[int, RankProxy] = {}
        self._changed = threading.Condition()
        self.known_ranks: set[int] = set()

    # -- by rank -----------------------------------------------------------------------------------------------------

    def ranks(self) -> list[int]:
        """Return the connected ranks in order."""
        with self._changed:
            return sorted(self._peers)

    def wait_for_ranks(self, number: int, timeout_s: float) -> bool:
        """Wait until so many ranks are connected; False if they are not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._peers) >= number, timeout_s)

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

    def connections(self) -> list[ClientProxy]:
        """Return every connection, also those that have not yet said who they are."""
        with self._changed:
            return list(self._proxies.values())

    def finish(self, outcome: str, reason: str, farewell_s: float) -> None:
        """Tell every rank that the run is over, also those that are away and come back in time."""
        told: set[int] = set()
        record = {"op": "finish", "run_id": self._run_id, "outcome": outcome, "reason": reason}
        deadline = time.monotonic() + farewell_s
        while True:
            with self._changed:
                present = [peer for rank, peer in self._peers.items() if rank not in told]
            told |= self._tell(present, record)
            away = self.known_ranks - told
            left = deadline - time.monotonic()
            if not away or left <= 0:
                break
            log.info("waiting %.0f s for rank %s, to say that the run is over", left, ", ".join(map(str, sorted(away))))
            with self._changed:
                self._changed.wait_for(lambda: bool(away & self._peers.keys()), left)  # noqa: B023

    # -- Flower's interface --------------------------------------------------------------------------------------------

    def register(self, client: ClientProxy) -> bool:
        """Take a new connection; it is counted once it has said who it is."""
        with self._changed:
            self._proxies[client.cid] = client
            self._greeting.add(client.cid)
            if self._ping_s is not None and self._pinging is None:
                self._pinging = threading.Thread(target=self._keep_pinging, name="pings", daemon=True)
                self._pinging.start()
        # The stream serves messages only after this returns, so the question is asked from beside.
        threading.Thread(target=self._greet, args=(client,), name=f"greet-{client.cid[:8]}", daemon=True).start()
        return True

    def unregister(self, client: ClientProxy) -> None:
        """Forget a connection that ended."""
        with self._changed:
            self._proxies.pop(client.cid, None)
            self._refused.pop(client.cid, None)
            gone = [peer for peer in self._peers.values() if peer.proxy is client]
        for peer in gone:
            self.drop(peer)

    def is_lost(self, client: ClientProxy) -> bool:
        """Tell whether a registered connection is of no use now and should be registered again.

        For an engine on which a node stays known when a question to it came to nothing.
        """
        with self._changed:
            if client.cid in self._greeting or any(peer.proxy is client for peer in self._peers.values()):
                return False
            refused = self._refused.get(client.cid)
            return refused is None or time.monotonic() - refused > _REFUSED_S

    def num_available(self) -> int:
        """Return how many ranks are connected."""
        return len(self.ranks())

    def all(self) -> dict[str, ClientProxy]:
        """Return the connected ranks under their ids."""
        with self._changed:
            return {str(rank): self._rank_proxies[rank] for rank in sorted(self._peers)}

    def wait_for(self, num_clients: int, timeout: float = 86400) -> bool:
        """Wait until so many ranks are connected, and say so meanwhile."""
        deadline, reminded = time.monotonic() + timeout, -_REMIND_S
        while not self.wait_for_ranks(num_clients, max(0.0, min(1.0, deadline - time.monotonic()))):
            ranks = self.ranks()
            self._observer.clients_awaited(ranks, num_clients)
            if time.monotonic() - reminded > _REMIND_S:
                reminded = time.monotonic()
                log.info("waiting for clients: %d of %d are here (ranks %s)", len(ranks), num_clients, ranks or "none")
            if time.monotonic() >= deadline:
                return False
        return True

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

    def _greet(self, proxy: ClientProxy) -> None:
        try:
            peer = self._get_to_know(proxy)
        except _TurnedAwayError as exc:
            self._refuse(proxy, str(exc))
        except (RecordError, KeyError, TypeError, ValueError) as exc:
            log.warning("a client was turned away: %s", exc)
            self._refuse(proxy, f"this server speaks fedsplit: {exc}")
        except Exception as exc:  # noqa: BLE001  (the connection ended before it said who it is)
            log.debug("a connection ended during the greeting: %s", exc)
        else:
            self._admit(peer)
        finally:
            with self._changed:
                self._greeting.discard(proxy.cid)

    def _get_to_know(self, proxy: ClientProxy) -> Peer:
        """Ask a connection who it is, once it has proved that it may know who asks."""
        transcript = None if self._join_key is None else self._challenge(proxy, self._join_key)
        nonce_name, nonce = self._store.put_nonce() if self._store else ("", "")
        record = {
            "op": "hello", "run_id": self._run_id, "nonce_name": nonce_name,
            "store_root": self._store.announced_root if self._store else None,
        }  # fmt: skip
        if transcript is not None and self._join_key is not None:
            record["proof"] = transcript.proof(self._join_key, "server")
        try:
            hello = self._question(proxy, record)
        finally:
            if self._store and nonce_name:
                self._store.drop(nonce_name)
        if hello.get("leaving"):
            log.warning("rank %s: the client turned this server down: %s", hello.get("rank"), hello["leaving"])
            raise _TurnedAwayError(str(hello["leaving"]))
        sees_store = bool(nonce) and hello.get("nonce") == nonce
        peer = Peer(proxy, hello, sees_store=sees_store)
        if transcript is not None and (peer.rank, peer.exchange_id) != (transcript.rank, transcript.exchange_id):
            raise RecordError("it greets as another than the one that proved to know the join token")
        return peer

    def _challenge(self, proxy: ClientProxy, key: bytes) -> Transcript:
        """Let a client prove that it knows the join token."""
        server_nonce = new_nonce()
        reply = self._question(proxy, {"op": "join", "run_id": self._run_id, "nonce": server_nonce})
        if not reply.get("proof"):
            log.warning("rank %s: turned away: its client has no join token", reply.get("rank"))
            raise _TurnedAwayError("this server asks for a join token; start the client with its --join-token-file")
        if not is_nonce(reply.get("nonce")):
            raise RecordError("its answer has no challenge: expected 64 hexadecimal digits as nonce")
        transcript = Transcript(
            run_id=self._run_id, rank=int(reply["rank"]), exchange_id=str(reply["exchange_id"]),
            server_nonce=server_nonce, client_nonce=reply["nonce"],
        )  # fmt: skip
        if not transcript.is_proof(key, "client", reply["proof"]):
            log.warning("rank %d: turned away: its client has another join token", transcript.rank)
            raise _TurnedAwayError("wrong join token: the --join-token-file of server and client hold different tokens")
        return transcript

    @staticmethod
    def _question(proxy: ClientProxy, record: dict[str, Any]) -> dict[str, Any]:
        reply = proxy.get_properties(GetPropertiesIns(pack(record)), GREETING_S, None)
        return unpack(reply.properties, "a client")

    def _admit(self, peer: Peer) -> None:
        with self._changed:
            other = self._peers.get(peer.rank)
        if other and other.exchange_id != peer.exchange_id and self._is_alive(other):
            log.warning("rank %d: a second client was refused; the first is still connected", peer.rank)
            self._refuse(
                peer.proxy,
                f"rank {peer.rank} is taken by a live client with another exchange directory; take another --rank",
            )
            return
        with self._changed:
            if peer.proxy.cid not in self._proxies:
                return
            self._peers[peer.rank] = peer
            self._rank_proxies.setdefault(peer.rank, RankProxy(peer.rank))
            came_back = peer.rank in self.known_ranks
            self.known_ranks.add(peer.rank)
            self._changed.notify_all()
        how = "by reference" if peer.sees_store else "in messages"
        log.info("rank %d: client %s (payloads %s)", peer.rank, "is back" if came_back else "connected", how)

    def _is_alive(self, peer: Peer) -> bool:
        if peer.was_heard_within(_HEARD_S):
            return True
        try:
            peer.control({"op": "ping"})
        except (PeerLostError, RecordError):
            self.drop(peer)
            return False
        return True

    def _tell(self, peers: list[Peer], record: dict[str, Any]) -> set[int]:
        """Send a record to peers at the same time; returns the ranks that confirmed it."""
        told: set[int] = set()

        def tell(peer: Peer) -> None:
            try:
                peer.control(record)
                told.add(peer.rank)
            except (PeerLostError, RecordError):
                self.drop(peer)

        threads = [threading.Thread(target=tell, args=(peer,), daemon=True) for peer in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return told

    def _keep_pinging(self) -> None:
        period = self._ping_s or 1.0
        while True:
            time.sleep(period / 4)
            with self._changed:
                peers = list(self._peers.values())
            for peer in peers:
                # Beside each other: one that is silent must not keep the others without a sign for half a minute.
                if time.monotonic() - peer.last_heard >= period:
                    threading.Thread(target=self._ping, args=(peer, period), daemon=True).start()

    def _ping(self, peer: Peer, for_s: float) -> None:
        try:
            peer.ping_if_silent(for_s)
        except (PeerLostError, RecordError):
            self.drop(peer)

    def _refuse(self, proxy: ClientProxy, reason: str) -> None:
        with self._changed:
            self._refused[proxy.cid] = time.monotonic()
        try:
            proxy.get_properties(GetPropertiesIns(pack({"op": "refuse", "reason": reason})), GREETING_S, None)
            proxy.reconnect(ReconnectIns(seconds=None), GREETING_S, None)
        except Exception as exc:  # noqa: BLE001  (it is being sent away; whether it hears why is not ours to ensure)
            log.debug("the refused client did not listen: %s", exc)
