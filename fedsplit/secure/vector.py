"""Updates as whole numbers modulo 2^32, and the masks that are added to them.

What an entry has changed by is a number of steps of ``range / 2^30``. A rank multiplies it by its share of the weight
of all ranks, so the sum over any of them is that of a weighted mean and fits into 32 bits. One more number, the last,
is the rank's own weight: the sum of these tells whether all masks are off.
"""

from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

# The same bytes on every machine.
WORD = np.dtype("<u4")
Words = NDArray[np.uint32]
STEPS = 1 << 30
# Short enough for the processor's cache.
_CHUNK = 1 << 16
_ZEROS = bytes(_CHUNK * WORD.itemsize)


def to_fixed(change: NDArray[np.float64], most: float) -> NDArray[np.int32]:
    """Return a change as steps; None of its elements may be NaN or beyond ``most``."""
    return np.rint(change * (STEPS / most)).astype(np.int32)


def weighted(fixed: NDArray[np.int32], weight: int, all_weights: int) -> Words:
    """Return what a rank puts into the sum, before it is masked."""
    words = np.empty(fixed.size + 1, WORD)
    for begin in range(0, fixed.size, _CHUNK):
        part = fixed[begin : begin + _CHUNK] * (weight / all_weights)
        words[begin : begin + part.size] = np.rint(part).astype(np.int32).view(np.uint32)
    words[-1] = weight % 2**32
    return words


def to_mean(words: Words, most: float, weight: int, all_weights: int) -> NDArray[np.float64]:
    """Return the mean change of ranks that have a weight of all, from their sum."""
    return words.astype(WORD).view(np.int32).astype(np.float64) * (most / STEPS * (all_weights / weight))


def add_mask(words: Words, seed: bytes) -> None:
    """Add the stream of random words that a seed of 32 bytes stands for (AES-256 in counter mode), in place."""
    _apply(words, seed, np.add)


def take_mask(words: Words, seed: bytes) -> None:
    """Take away what `add_mask` adds."""
    _apply(words, seed, np.subtract)


def _apply(words: Words, seed: bytes, change: Callable[..., object]) -> None:
    # A seed is used for one stream only, so the counter may begin at 0.
    encryptor = Cipher(AES(seed), CTR(bytes(16))).encryptor()
    buffer = bytearray(len(_ZEROS) + 15)
    for begin in range(0, words.size, _CHUNK):
        part = words[begin : begin + _CHUNK]
        encryptor.update_into(_ZEROS[: part.nbytes] if part.size < _CHUNK else _ZEROS, buffer)
        change(part, np.frombuffer(buffer, WORD, part.size), out=part)
