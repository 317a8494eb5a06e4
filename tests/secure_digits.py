"""A trainer that dies in the middle of a secure sum, and a rule that keeps what the server's store held."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsplit import AggregationContext, Update
from fedsplit.secure import protocol
from fedsplit.trainer.secure_steps import SecureSteps
from fedsplit.workloads import WorkloadContext, create_workload
from tests.held import is_allowed


class Fixed:
    """Random bytes that are the same each time, for one rank."""

    def __init__(self, rank: int) -> None:
        self._draw = random.Random(rank)

    def token_bytes(self, count: int) -> bytes:
        return self._draw.randbytes(count)


def dying(context: WorkloadContext) -> Any:
    """The digits; with ``die=STAGE`` the process kills itself there in its second round, ``die=after-STAGE`` later.

    It does so once: the file ``died-RANK`` in the working directory tells that it did. With ``hold=STAGE`` it waits
    there, its answer ready, until the test allows it to go on; a file ``held`` tells that it does. With ``seeded=true``
    the secrets are the same each time.
    """
    options, once = dict(context.options), Path(f"died-{context.rank}")
    die, stage, seeded = (options.pop(name, "") for name in ("die", "hold", "seeded"))
    if seeded:
        protocol.random = Fixed(context.rank)  # type: ignore[assignment]
    late = die.startswith("after-")
    answer = SecureSteps.answer

    def planted(self: SecureSteps, record: Any, question: Any) -> Any:
        is_here = die and record.server_round == 2 and record.step == int(die.removeprefix("after-"))
        if is_here and not once.exists():
            if late:
                answer(self, record, question)
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        found = answer(self, record, question)
        if record.server_round == 2 and str(record.step) == stage:
            Path("held").touch()
            hold()
        return found

    SecureSteps.answer = planted  # type: ignore[method-assign]
    return create_workload("digits", WorkloadContext(**{**vars(context), "options": options}))


def hold() -> None:
    """Wait until the test allows round 2."""
    while not is_allowed(2):
        time.sleep(0.01)


def keep_store(updates: Sequence[Update], context: AggregationContext) -> dict[str, Any]:
    """Copy the server's payload store, as it is while the updates are merged; returns the first update."""
    shutil.copytree("checkpoints/server/payloads", "kept", dirs_exist_ok=True)
    return dict(updates[0].state_dict)
