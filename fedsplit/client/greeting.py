"""How a connection begins: client and server prove that they know the join token, and agree on how payloads travel."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.disk.payload_store import PayloadStore, read_nonce
from fedsplit.errors import RecordError, RefusedError
from fedsplit.exchange.client_side import ClientSide
from fedsplit.wire.join import Transcript, is_nonce

if TYPE_CHECKING:
    from fedsplit.disk.remote_store import RemoteStore

log = logging.getLogger("fedsplit")


class Greeting:
    """What a client and the server know of each other in one connection.

    Parameters
    ----------
    side
        The exchange directory, whose id and rank the client names.
    join_key
        What both must prove to know; None takes any server.
    use_store
        Whether payloads may travel by reference, where the server's store can be seen.
    remote
        The store at ``--payload-store URL``, or None.

    Attributes
    ----------
    knows_server : bool
        Whether the server has proved that it knows the join token, or need not.
    store : PayloadStore, RemoteStore or None
        Where both sides see the same payloads; None if these travel in messages.
    """

    def __init__(
        self, side: ClientSide, *, join_key: bytes | None, use_store: bool, remote: RemoteStore | None
    ) -> None:
        self._side = side
        self._rank = side.exchange.rank
        self._join_key = join_key
        self._use_store = use_store
        self._remote = remote
        self.begin()

    def begin(self) -> None:
        """Forget what was proved: in a new connection the server has proved nothing yet."""
        self._transcript: Transcript | None = None
        self.knows_server = self._join_key is None
        self.store: PayloadStore | RemoteStore | None = None

    def prove(self, message: dict[str, Any]) -> dict[str, Any]:
        """Answer ``join``: give the client's proof, and ask for the server's."""
        if self._join_key is None:
            return {"rank": self._rank}
        if not is_nonce(message.get("nonce")):
            raise RecordError("the server asked for a proof of the join token without a nonce to prove it with")
        transcript = self._transcript = Transcript(
            run_id=str(message.get("run_id")), rank=self._rank, exchange_id=self._side.exchange_id(),
            server_nonce=message["nonce"],
        )  # fmt: skip
        return {
            "rank": transcript.rank, "exchange_id": transcript.exchange_id, "nonce": transcript.client_nonce,
            "proof": transcript.proof(self._join_key, "client"),
        }  # fmt: skip

    def greet(self, message: dict[str, Any]) -> dict[str, Any]:
        """Answer ``hello``; raises RefusedError if this is no server to work for."""
        self._check_proof(message.get("proof"))
        self.knows_server = True
        nonce = self._find_store(message)
        how = "the payload store" if self.store else "messages"
        log.info("rank %d: joined run %s; payloads travel by %s", self._rank, message.get("run_id"), how)
        return {
            "rank": self._rank, "exchange_id": self._side.exchange_id(), "held": self._side.held_digest(),
            "nonce": nonce,
        }  # fmt: skip

    def leave(self) -> dict[str, str | float | bool]:
        """Return what the next process of this connection must know."""
        if isinstance(self.store, PayloadStore):
            return {"store-root": str(self.store.root)}
        return {"by-url": True} if self.store else {}

    def take_up(self, kept: Mapping[str, Any]) -> None:
        """Use the store that was found when the connection began: that it is the server's was proved then."""
        self.store = self._remote if kept.get("by-url") else None
        if root := kept.get("store-root"):
            self.store = PayloadStore(Path(root))

    def _check_proof(self, proof: object) -> None:
        if self._join_key is None:
            return
        if self._transcript is None:
            raise RefusedError(
                "the server asks for no join token, this client was given one; start both with --join-token-file"
            )
        if not self._transcript.is_proof(self._join_key, "server", proof):
            raise RefusedError("the server did not prove that it knows the join token")

    def _find_store(self, message: dict[str, Any]) -> str | None:
        """Look for the server's nonce in a store; its content proves to the server that both see the same one."""
        root, name = message.get("store_root"), str(message.get("nonce_name"))
        store: PayloadStore | RemoteStore | None = self._remote
        nonce = None
        if self._remote:
            nonce = self._remote.read_nonce(name)
        elif self._use_store and root:
            store = PayloadStore(Path(str(root)))
            nonce = read_nonce(store.root, name)
        self.store = store if nonce else None
        return nonce
