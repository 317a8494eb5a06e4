"""How long a test waits before it calls something hung. No test expects anything to be this slow, or any faster."""

from __future__ import annotations

# One step: a program that starts, a round, an answer. A busy machine makes each of them many times slower.
BOUND_S = 600.0
