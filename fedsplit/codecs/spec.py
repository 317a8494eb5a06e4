"""Reads the values of `--wire`: ``[PATTERN=]CODEC[+CODEC]``. Free of torch, and of what packs.

The first pattern that matches an entry decides, and a value without one takes the rest; what nothing takes travels as
it is. Server and trainers both read the same texts, so that they can never disagree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from fedsplit.errors import MissingPackageError, UsageError
from fedsplit.states.header import PREFIX
from fedsplit.states.local_keys import first_match

VALUES = ("bfloat16", "float16", "int8")
# How many numbers share a scale.
BLOCK = 256
_TOP_K = re.compile(r"top-k\(\s*fraction\s*=\s*([0-9.]+(?:e-?[0-9]+)?)\s*\)")
_KNOWN = f"delta, top-k(fraction=…), {', '.join(VALUES)}, zstd"
_LOSSES = {
    "bfloat16": "rounded to bfloat16", "float16": "rounded to float16",
    "int8": f"rounded to 8 bits, with a scale for each {BLOCK} numbers",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How the entries of a part travel: all that is set, one after the other, in the order of the fields."""

    delta: bool = False
    # Of `top-k`: the share of the numbers that are sent, the largest ones.
    fraction: float | None = None
    # One of `VALUES`.
    value: str | None = None
    zstd: bool = False

    @property
    def loses(self) -> str:
        """What is lost, in words; empty if nothing is."""
        kept = f"all but the largest {self.fraction:.3g} of the numbers wait" if self.fraction else ""
        return " and ".join(filter(None, (kept, _LOSSES.get(self.value or "", ""))))

    @property
    def down(self) -> Codec:
        """What the server's states travel by: where few numbers were sent, few have changed, and zstd packs those."""
        return replace(self, fraction=None, zstd=True) if self.fraction else self

    @property
    def lossless(self) -> Codec:
        """The same without what loses anything."""
        return replace(self, fraction=None, value=None)

    def __str__(self) -> str:
        top_k = f"top-k(fraction={self.fraction:g})" if self.fraction else ""
        return "+".join(filter(None, ("delta" * self.delta, top_k, self.value, "zstd" * self.zstd)))


@lru_cache(maxsize=256)
def parse_codec(text: str) -> Codec:
    """Read ``CODEC[+CODEC]``; the empty text is that of what travels as it is. Raises UsageError."""
    found: dict[str, Any] = {}
    for word in map(str.strip, text.split("+") if text else ()):
        match = _TOP_K.fullmatch(word)
        if not match and word not in (*VALUES, "delta", "zstd"):
            raise UsageError(f"unknown codec {word!r}: known are {_KNOWN}")
        name = "fraction" if match else "value" if word in VALUES else word
        if name in found:
            raise UsageError(f"{text!r} has {word} beside another codec of its kind; give one")
        found[name] = _fraction(word, match[1]) if match else word if word in VALUES else True
    codec = Codec(**found)
    if codec.fraction and not codec.delta:
        raise UsageError(f"{text!r}: top-k alone would set most of the model to 0; write delta+{text}")
    return codec


@lru_cache(maxsize=16)
def parse_wire(texts: tuple[str, ...]) -> tuple[tuple[str, Codec], ...]:
    """Read the values of the flag, as ``(pattern, codec)``, the bare one last; raises UsageError naming the value."""
    found: list[tuple[str, Codec]] = []
    for text in texts:
        head, equals, tail = text.partition("=")
        pattern, codecs = (head.strip(), tail) if equals and "(" not in head else ("*", text)
        try:
            if not pattern or pattern.startswith("<"):
                raise UsageError(f"{pattern!r} is no glob over state_dict keys such as 'body.*'")
            if not codecs.strip():
                raise UsageError(f"expected [PATTERN=]CODEC[+CODEC], of {_KNOWN}")
            codec = parse_codec(codecs.strip())
            if pattern.startswith(PREFIX) and codec.delta:
                raise UsageError("extra tensors have no state before them to differ from; leave out delta")
            if any(pattern == known for known, _ in found):
                raise UsageError("there are two values for this pattern" if pattern != "*" else "two without a pattern")
        except UsageError as exc:
            raise UsageError(f"--wire {text}: {exc}") from exc
        found.append((pattern, codec))
    return tuple(sorted(found, key=lambda each: each[0] == "*"))


def codec_of(name: str, wire: Sequence[tuple[str, Codec]]) -> Codec:
    """Return how an entry travels. Extra tensors are taken by patterns that begin with ``extra:`` only."""
    if name.startswith(PREFIX):
        wire = [(pattern, codec) for pattern, codec in wire if pattern.startswith(PREFIX)]
    return first_match(name, wire) or Codec()


def check_installed(texts: tuple[str, ...]) -> None:
    """Raise MissingPackageError if what packs the bytes is asked for and not installed."""
    if any(codec.down.zstd for _, codec in parse_wire(texts)) and find_spec("zstandard") is None:
        raise MissingPackageError("--wire zstd", "zstandard", "wire")


def _fraction(word: str, text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction < 1:
        raise UsageError(f"{word}: the fraction must be above 0 and below 1")
    return fraction
