"""The protocol between the ranks of one round, over a server that passes everything on and sees sums only.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
https://eprint.iacr.org/2017/281, with the sparse graph of Bell et al., "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead", CCS 2020, https://eprint.iacr.org/2020/704. The stages, with the function of each:

=  =============================================  =====================================================================
0  `Secrets.new`, `Secrets.advert`                each rank makes keys for this round and sends the public ones
1  `deal`                                         each rank cuts two secrets into shares, encrypted for its neighbours:
                                                  the seed of its own mask, and the key of the masks that it has with
                                                  others
2  `mask`                                         each rank sends its vector, plus its own mask, plus or minus the mask
                                                  that it has with each neighbour that dealt shares
3  `reveal`, and at the server `unmask`           each rank gives, for each neighbour, one of the two shares: of the own
                                                  mask if that neighbour's vector is in the sum, of the key if it is not
=  =============================================  =====================================================================

Between two ranks in the sum the masks cancel out; the shares of at least a threshold of ranks give the rest. A rank
never gives both shares of one rank, and the threshold is always more than half of those who have shares. So a server
that tells ranks different things about who is in the sum finds too few of one kind.

Differences from the papers: own shares go through the server too, encrypted; the order on the ring of the graph comes
from a hash of all public keys; no signatures, so a server that makes up ranks is not found out (SECURITY.md).
"""

import secrets as random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import floor
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsplit.errors import RecordError
from fedsplit.secure import shamir
from fedsplit.secure.vector import Words, add_mask, take_mask

KEY_BYTES = 32
_NONCE = 12
BOX_BYTES = _NONCE + 2 * shamir.SHARE_BYTES + 16


@dataclass(frozen=True, kw_only=True)
class Advert:
    """What all may know of a rank in a round: its public keys, and the weight of its update."""

    channel: bytes
    mask: bytes
    weight: int


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What a rank has in a round and tells nobody: two private keys (X25519), and the seed of its own mask."""

    channel: bytes
    mask: bytes
    own: bytes

    @classmethod
    def new(cls) -> Self:
        """Draw new ones: for each attempt at a round, as a mask must never hide two vectors."""
        return cls(channel=random.token_bytes(32), mask=random.token_bytes(32), own=random.token_bytes(32))

    def advert(self, weight: int) -> Advert:
        """Return what is to be sent of them."""
        return Advert(channel=public_key(self.channel), mask=public_key(self.mask), weight=weight)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks of a round that have sent keys, and how they deal; all of them, and the server, have the same.

    `threshold` is a number of ranks, or below 1 a share of those who get shares of one secret. With `neighbours` each
    rank deals to so many others, an even number; with 0 to all. `context` names run and round.
    """

    context: str
    adverts: Mapping[int, Advert]
    threshold: float
    neighbours: int = 0

    @property
    def weight(self) -> int:
        """The weight of all."""
        return sum(advert.weight for advert in self.adverts.values())

    @cached_property
    def _identity(self) -> bytes:
        """A hash of all of it: shares that were dealt in another group cannot be opened in this one."""
        rows = (f"{rank}:{a.weight}:".encode() + a.channel + a.mask for rank, a in sorted(self.adverts.items()))
        terms = f"{self.context}|{float(self.threshold)!r}|{self.neighbours}|".encode()
        return sha256(terms + b"".join(rows)).digest()

    @cached_property
    def _ring(self) -> list[int]:
        return sorted(self.adverts, key=lambda rank: sha256(self._identity + rank.to_bytes(8, "big")).digest())

    def holders(self, rank: int) -> list[int]:
        """Return who gets shares of a rank's secrets: itself and its neighbours."""
        ring, reach = self._ring, self.neighbours // 2
        if not self.neighbours or self.neighbours >= len(ring) - 1:
            return sorted(ring)
        at = ring.index(rank)
        return sorted(ring[(at + step) % len(ring)] for step in range(-reach, reach + 1))

    def needed(self, rank: int) -> int:
        """Return how many shares give a secret of a rank: more than half of them, whatever the threshold says."""
        size, wanted = len(self.holders(rank)), self.threshold
        return max(floor(wanted * size) + 1 if wanted < 1 else int(wanted), size // 2 + 1, 2)

    def check(self) -> None:
        """Raise RecordError if this is no group to send anything masked to."""
        if not self.adverts:
            raise RecordError("no rank sent keys")
        if too_few := [rank for rank in self.adverts if self.needed(rank) > len(self.holders(rank))]:
            raise RecordError(f"{len(self.adverts)} ranks sent keys, at least {self.needed(too_few[0])} are needed")
        keys = {key for advert in self.adverts.values() for key in (advert.channel, advert.mask)}
        if len(keys) < 2 * len(self.adverts) or not all(advert.weight > 0 for advert in self.adverts.values()):
            raise RecordError("two ranks have the same keys, or a rank has no weight")

    def check_enough(self, rank: int, present: Collection[int], what: str) -> None:
        """Raise RecordError if too few of a rank's holders are left."""
        found = len(set(self.holders(rank)).intersection(present))
        if found < self.needed(rank):
            raise RecordError(f"{found} ranks {what}, at least {self.needed(rank)} are needed")


# -- the ranks ---------------------------------------------------------------------------------------------------------


def deal(secrets: Secrets, rank: int, group: Group) -> dict[int, bytes]:
    """Stage 1: return a box with shares for each holder, which only that one can open."""
    check_own(secrets, rank, group)
    holders, needed = group.holders(rank), group.needed(rank)
    own, mask = (shamir.deal(secret, holders, needed) for secret in (secrets.own, secrets.mask))
    boxes = {}
    for other in holders:
        nonce = random.token_bytes(_NONCE)
        box = ChaCha20Poly1305(_channel(secrets, group, sender=rank, receiver=other, own=rank))
        boxes[other] = nonce + box.encrypt(nonce, own[other] + mask[other], group._identity)
    return boxes


def mask(secrets: Secrets, rank: int, group: Group, dealt: Collection[int], words: Words) -> None:
    """Stage 2: mask a rank's vector in place. `dealt` are those of its holders that dealt shares."""
    check_own(secrets, rank, group)
    group.check_enough(rank, dealt, "dealt shares")
    if rank not in dealt or not set(dealt) <= set(group.holders(rank)):
        raise RecordError("those who dealt shares are not the ranks that were to deal them")
    add_mask(words, secrets.own)
    for other in sorted(set(dealt) - {rank}):
        apply = add_mask if rank < other else take_mask
        apply(words, _pair_seed(secrets.mask, group.adverts[rank].mask, group.adverts[other].mask))


def reveal(
    secrets: Secrets, rank: int, group: Group, boxes: Mapping[int, bytes], survivors: Collection[int]
) -> dict[int, bytes]:
    """Stage 3: return one share for each rank that dealt some: of its own mask if it is in the sum, else of its key."""
    if rank not in survivors or not set(survivors) <= set(group.adverts):
        raise RecordError("those whose vectors are in the sum are not ranks that sent some")
    if unknown := set(survivors).intersection(group.holders(rank)) - set(boxes):
        raise RecordError(f"rank {min(unknown)} is said to be in the sum, and dealt no shares")
    group.check_enough(rank, survivors, "are in the sum")
    found = {}
    for other, box in boxes.items():
        opened = _open(secrets, rank, group, other, box)
        half = shamir.SHARE_BYTES
        found[other] = opened[:half] if other in survivors else opened[half:]
    return found


def check_own(secrets: Secrets, rank: int, group: Group) -> None:
    """Raise RecordError if the group does not have this rank's own keys, or is none to send anything masked to."""
    own = group.adverts.get(rank)
    if own is None or own != secrets.advert(own.weight):
        raise RecordError("the keys of this rank are not those that it sent")
    group.check()


# -- the server --------------------------------------------------------------------------------------------------------


def check_keys(advert: Advert) -> None:
    """Raise RecordError for public keys with which every other rank would refuse the whole group."""
    for key in (advert.channel, advert.mask):
        _agree(Secrets.new().channel, key, b"")


def unmask(
    group: Group, dealt: Collection[int], survivors: Collection[int], revealed: Mapping[int, Mapping[int, bytes]],
    total: Words,
) -> None:  # fmt: skip
    """Take the masks off the sum of the survivors' vectors, in place; `revealed` is what each rank gave, by giver.

    Raises RecordError if too few ranks gave shares, or some gave others than they were dealt.
    """
    if not survivors:
        raise RecordError("no rank sent its masked update")
    # All secrets first: nothing is taken off a sum that will not be whole.
    in_sum = sorted(survivors)
    own = {rank: _recover(group, rank, revealed) for rank in in_sum}
    lost = {
        rank: _recover(group, rank, revealed)
        for rank in sorted(set(dealt) - set(survivors)) if set(group.holders(rank)).intersection(survivors)
    }  # fmt: skip
    for rank, key in lost.items():
        if public_key(key) != group.adverts[rank].mask:
            raise RecordError(f"the shares of the key of rank {rank} are not those that it dealt")
    for seed in own.values():
        take_mask(total, seed)
    for rank, key in lost.items():
        for other in set(group.holders(rank)).intersection(survivors):
            apply = take_mask if other < rank else add_mask
            apply(total, _pair_seed(key, group.adverts[rank].mask, group.adverts[other].mask))
    # A wrong share of an own mask shows here.
    if int(total[-1]) != sum(group.adverts[rank].weight for rank in survivors) % 2**32:
        raise RecordError("the sum of the weights is wrong: a rank gave a wrong share, or a vector that is none")


def _recover(group: Group, rank: int, revealed: Mapping[int, Mapping[int, bytes]]) -> bytes:
    group.check_enough(rank, [giver for giver, shares in revealed.items() if rank in shares], "gave shares")
    givers = [giver for giver in group.holders(rank) if rank in revealed.get(giver, {})]
    secret = shamir.join({giver: revealed[giver][rank] for giver in givers[: group.needed(rank)]})
    if secret is None:
        raise RecordError(f"the shares of rank {rank} are not those that it dealt")
    return secret


# -- keys --------------------------------------------------------------------------------------------------------------


def public_key(private: bytes) -> bytes:
    """Return the public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _agree(private: bytes, public: bytes, info: bytes) -> bytes:
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as exc:
        raise RecordError(f"a public key is none: {exc}") from exc
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"fedsplit/secure/1/" + info).derive(shared)


def _pair_seed(private: bytes, own: bytes, other: bytes) -> bytes:
    """Return the seed of the mask that two ranks have in common, from the private key of either."""
    return _agree(private, other, b"mask/" + b"".join(sorted((own, other))))


def _channel(secrets: Secrets, group: Group, *, sender: int, receiver: int, own: int) -> bytes:
    """Return the key of what one rank sends another, one for each direction; `own` is whose secrets these are."""
    ends = group.adverts[sender].channel, group.adverts[receiver].channel
    return _agree(secrets.channel, ends[own == sender], b"channel/" + b"".join(ends))


def _open(secrets: Secrets, rank: int, group: Group, sender: int, box: bytes) -> bytes:
    if sender not in group.adverts or len(box) != BOX_BYTES:
        raise RecordError("there are shares of a rank that sent no keys, or no whole ones")
    key = _channel(secrets, group, sender=sender, receiver=rank, own=rank)
    try:
        return ChaCha20Poly1305(key).decrypt(box[:_NONCE], box[_NONCE:], group._identity)
    except InvalidTag as exc:
        raise RecordError(f"the shares of rank {sender} were not dealt to this rank, or have changed") from exc
