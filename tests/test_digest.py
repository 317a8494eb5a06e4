"""What is a digest, and so may be the name of a file in a payload store."""

from __future__ import annotations

import hashlib

import pytest

from fedsplit.disk.digest import checked, is_digest
from fedsplit.errors import RecordError

DIGEST = hashlib.sha256(b"content").hexdigest()


def test_a_sha256_in_lower_case_hex_is_a_digest() -> None:
    assert is_digest(DIGEST)
    assert checked(DIGEST) == DIGEST


@pytest.mark.parametrize(
    "value",
    [
        "", DIGEST[:-1], DIGEST + "0", DIGEST.upper(), DIGEST + "\n", " " + DIGEST[1:], "g" + DIGEST[1:],
        "../" + DIGEST[3:], "/" + DIGEST[1:], "\u0663" * 64, "\uff10" * 64, DIGEST.encode(), int(DIGEST, 16), None,
        [DIGEST],
    ],
)  # fmt: skip
def test_nothing_else_is(value: object) -> None:
    assert not is_digest(value)
    with pytest.raises(RecordError, match="is not a SHA-256 digest"):
        checked(value)  # type: ignore[arg-type]
