"""The digits whose updates come in many small parts: a part is usually many times as large as this whole model."""

from __future__ import annotations

from fedsplit.trainer import channel
from tests import held

channel.PART_BYTES = 1_000
digits = held.digits
