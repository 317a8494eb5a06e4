"""How a connection begins: client and server prove that they know the join token, and agree on how payloads travel."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.disk.payload_store import PayloadStore
from fedsplit.errors import RecordError, RefusedError
from fedsplit.exchange.client_side import ClientSide
from fedsplit.exchange.records import printable
from fedsplit.wire.join import Transcript
from fedsplit.wire.protocol import Message

if TYPE_CHECKING:
    from fedsplit.disk.remote_store import RemoteStore

log = logging.getLogger("fedsplit")


class Greeting:
    """What a client and the server know of each other in one connection; the parameters are those of `Relay`.

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
        self.remote = remote
        self.begin()

    def begin(self) -> None:
        """Forget what was proved: in a new connection the server has proved nothing yet."""
        self._transcript: Transcript | None = None
        self.knows_server = self._join_key is None
        self.store: PayloadStore | RemoteStore | None = None

    def prove(self, message: Message) -> dict[str, Any]:
        """Answer ``join``: give the client's proof, and ask for the server's."""
        if self._join_key is None:
            return {"rank": self._rank}
        if message.nonce is None:
            raise RecordError("the server asked for a proof of the join token without a nonce to prove it with")
        transcript = self._transcript = Transcript(
            run_id=message.run_id, rank=self._rank, exchange_id=self._side.exchange.exchange_id(),
            server_nonce=message.nonce,
        )  # fmt: skip
        return {
            "rank": transcript.rank, "exchange_id": transcript.exchange_id, "nonce": transcript.client_nonce,
            "proof": transcript.proof(self._join_key, "client"),
        }  # fmt: skip

    def greet(self, message: Message) -> dict[str, Any]:
        """Answer ``hello``; raises RefusedError if this is no server to work for."""
        if self._join_key is not None:
            if self._transcript is None:
                raise RefusedError(
                    "the server asks for no join token, this client was given one; start both with --join-token-file"
                )
            if not self._transcript.is_proof(self._join_key, "server", message.proof):
                raise RefusedError("the server did not prove that it knows the join token")
        self.knows_server = True
        # The content of the server's nonce proves to it that both see the same store.
        root = message.store_root
        store = self.remote or (PayloadStore(Path(root)) if self._use_store and root else None)
        nonce = store.read_nonce(message.nonce_name) if store else None
        self.store = store if nonce else None
        how = "the payload store" if self.store else "messages"
        log.info("rank %d: joined run %s; payloads travel by %s", self._rank, printable(message.run_id), how)
        return {
            "rank": self._rank, "exchange_id": self._side.exchange.exchange_id(), "held": self._side.held_digest(),
            "nonce": nonce,
        }  # fmt: skip
