"""What the stages of a secure sum send, as arrays: bytes for each of some ranks.

The parts of an update that are not summed travel beside the masked vector, under their own names.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from fedsplit.errors import RecordError, UsageError
from fedsplit.exchange.records import Request, SecureTerms
from fedsplit.secure.protocol import BOX_BYTES, KEY_BYTES, Advert, Group
from fedsplit.secure.shamir import SHARE_BYTES
from fedsplit.states.arrays import Array
from fedsplit.states.local_keys import IsOfType, first_match, named

# What each stage is answered with, but for the vector.
LENGTHS = {0: 2 * KEY_BYTES + 8, 1: BOX_BYTES, 3: SHARE_BYTES}
# The name of the masked vector among the extra tensors of an answer.
MASKED = "masked"
_RANKS, _BYTES = "ranks", "bytes"


def ranges_of(names: Iterable[str], split: tuple[tuple[str, bool], ...], terms: SecureTerms,
              is_of_type: IsOfType = lambda name, glob: False) -> dict[str, float]:  # fmt: skip
    """Return which entries are summed securely, in the order of the vector, and how far each may move."""
    choices = [(pattern, pattern) for pattern, _ in split]
    patterns = {name: first_match(name, choices, is_of_type) for name in sorted(names)}
    return {name: terms.ranges[at] for name, at in patterns.items() if at is not None and at in terms.ranges}


def check_nothing_is_open(
    names: Iterable[str], request: Request, who: str, is_of_type: IsOfType = lambda name, glob: False
) -> None:
    """Raise UsageError if any of these entries of an update would reach the server openly."""
    hidden = ranges_of(names, request.split, request.secure, is_of_type) if request.secure else {}
    if openly := [name for name in names if name not in hidden]:
        raise UsageError(
            f"the server asks for {named(openly)} openly, and {who} was started to send updates into secure sums only; "
            "the server's rules must be secure(…), or local, for every entry"
        )


def rows(found: Mapping[int, bytes]) -> dict[str, Array]:
    """Return bytes by rank, all of one length, as arrays."""
    ranks = sorted(found)
    content = np.frombuffer(b"".join(found[rank] for rank in ranks), np.uint8)
    return {_RANKS: np.array(ranks, np.int64), _BYTES: content.reshape(len(ranks), -1 if ranks else 0)}


def read_rows(arrays: Mapping[str, Array], length: int) -> dict[int, bytes]:
    """Read bytes by rank; raises RecordError if that is not what it is."""
    ranks, content = arrays.get(_RANKS), arrays.get(_BYTES)
    if (
        ranks is None or content is None or ranks.dtype != np.int64 or ranks.ndim != 1
        or content.dtype != np.uint8 or content.shape != (ranks.size, length)
    ):  # fmt: skip
        raise RecordError(f"expected {length} bytes for each of some ranks")
    found = dict(zip(ranks.tolist(), map(bytes, content), strict=True))
    if len(found) < ranks.size or not all(0 < rank < 2**31 for rank in found):
        raise RecordError("a rank is named twice, or is none")
    return found


def to_row(advert: Advert) -> bytes:
    """Return a rank's keys and weight as bytes."""
    return advert.channel + advert.mask + advert.weight.to_bytes(8, "big")


def of_row(row: bytes) -> Advert:
    """Read what `to_row` made."""
    weight = int.from_bytes(row[2 * KEY_BYTES :], "big")
    return Advert(channel=row[:KEY_BYTES], mask=row[KEY_BYTES : 2 * KEY_BYTES], weight=weight)


def group_of(run_id: str, server_round: int, terms: SecureTerms, keys: Mapping[int, bytes]) -> Group:
    """Return the ranks of a round that have sent keys."""
    return Group(
        context=f"{run_id}/{server_round}", adverts={rank: of_row(row) for rank, row in keys.items()},
        threshold=terms.threshold, neighbours=terms.neighbours,
    )  # fmt: skip
