"""Secrets in shares: any `threshold` of the shares give the secret, fewer say nothing about it.

Shamir, "How to share a secret", Communications of the ACM 22(11), 1979: a random polynomial whose value at 0 is the
secret, over the field of the first prime above 2^256, so that any 32 bytes are a secret.
"""

import secrets
from collections.abc import Iterable, Mapping
from functools import reduce

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def deal(secret: bytes, holders: Iterable[int], threshold: int) -> dict[int, bytes]:
    """Return a share of 32 bytes for each holder, a number above 0; `threshold` of them give the secret back."""
    # From the highest power down, as they are evaluated by Horner's rule.
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)] + [int.from_bytes(secret, "big")]
    values = {at: reduce(lambda value, each: (value * at + each) % PRIME, coefficients) for at in holders}
    return {at: value.to_bytes(SHARE_BYTES, "big") for at, value in values.items()}


def join(shares: Mapping[int, bytes]) -> bytes | None:
    """Return the secret that shares by holder belong to, as many as the threshold; None if no 32 bytes have them."""
    total = 0
    for at, share in shares.items():
        others = [other for other in shares if other != at]
        # The polynomial's value at 0, by Lagrange.
        above = reduce(lambda product, other: product * other % PRIME, others, 1)
        below = reduce(lambda product, other: product * (other - at) % PRIME, others, 1)
        total = (total + int.from_bytes(share, "big") * above * pow(below, -1, PRIME)) % PRIME
    return total.to_bytes(SECRET_BYTES, "big") if total < 1 << (8 * SECRET_BYTES) else None
