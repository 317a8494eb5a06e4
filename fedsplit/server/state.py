"""The global state: what the next round starts from, as a file, as tensors, and as Flower's parameters."""

from collections.abc import Iterable
from typing import Any

from flwr.common import Parameters

from fedsplit.disk.files import Buffer
from fedsplit.disk.payload_store import PayloadStore, StoredPayload
from fedsplit.disk.remote_store import RemoteStore
from fedsplit.states.extra import separate
from fedsplit.states.state_dict import StateDict, decode
from fedsplit.wire.protocol import TENSOR_TYPE


class GlobalState:
    """The state of a run, in the payload store on this machine and in the one at ``--payload-store URL``."""

    def __init__(self, store: PayloadStore, remote: RemoteStore | None) -> None:
        self._store = store
        self._remote = remote
        # Of no file, before the first state is taken.
        self.payload = StoredPayload(digest="", bytes=0, path=store.root)
        # The state's tensors over that file, and the extra ones. And all of it as one safetensors payload, mapped and
        # not copied: what strategies are given.
        self.entries: StateDict = {}
        self.extra: StateDict = {}
        self.parameters = Parameters([], TENSOR_TYPE)

    def set(self, payload: StoredPayload) -> None:
        """Take another state; it must stay in the store until the next one is taken."""
        before, self.payload = self.payload.digest, payload
        if self._remote and before != payload.digest:
            self._remote.give(payload.path, payload.digest)
            if before and before not in self._store.kept:
                self._remote.drop(before)
        content: Any = self._store.map(payload.digest, own=True)
        self.entries, self.extra = separate(decode(content, "the global state"))
        self.parameters = Parameters([content], TENSOR_TYPE)

    def put(self, chunks: Iterable[Buffer]) -> None:
        """Write another state and take it."""
        self.set(self._store.put(chunks))

    def payload_of(self, parameters: Parameters) -> StoredPayload:
        """Return the payload of a client's instructions: the state itself, or one of its own, put where it is found."""
        if parameters is self.parameters:
            return self.payload
        payload = self._store.put(parameters.tensors)
        if self._remote and payload.digest != self.payload.digest:
            self._remote.give(payload.path, payload.digest)
        return payload

    def drop(self, digests: Iterable[str]) -> None:
        """Remove payloads that nobody needs any more; never the state itself."""
        for digest in set(digests) - {self.payload.digest}:
            if digest in self._store.kept:
                continue
            self._store.drop(digest)
            if self._remote:
                self._remote.drop(digest)
