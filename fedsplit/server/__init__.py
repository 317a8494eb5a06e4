"""Asks, waits, merges."""

import fedsplit.wire.flower_env  # noqa: F401  (before any module here imports Flower: it keeps it from calling home)
