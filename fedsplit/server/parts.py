"""An update that comes in parts: while one is on its way, the one before is read, and its trainer packs the next.

With ``--wire`` a training is asked for as step 0. A trainer with a large update answers with a part of it and the
status ``step``; the next part is the answer to the next step, and the last one has the status ``ok``. The update counts
once all of it is here, so the merge is as ever. A trainer that was killed meanwhile answers ``again``, and trains once
more.

Importing this module imports torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from fedsplit.errors import RecordError
from fedsplit.server.conversation import HEADER_BYTES
from fedsplit.states.header import PREFIX
from fedsplit.states.local_keys import named
from fedsplit.states.state_dict import StateDict

if TYPE_CHECKING:
    from fedsplit.server.round import Task

# How often a trainer may be started again before its update is refused.
_MOST_ATTEMPTS = 10


def read_parts(task: Task, read: Callable[[Any, str], StateDict], may_read: Callable[[], None]) -> StateDict:
    """Return the update whose first part is the reply of a task; its last one becomes the reply.

    Parts are fetched ahead, into files or as small messages, and read once `may_read` returns. Raises RecordError for
    what is no update.
    """
    for _ in range(_MOST_ATTEMPTS):
        state, parts, is_bad = StateDict(), SimpleQueue[Any](), threading.Event()
        task.update_bytes = task.plain_bytes = 0
        fetching = threading.Thread(target=_fetch, args=(task, parts, is_bad), daemon=True)
        fetching.start()
        try:
            may_read()
            while (part := parts.get()) is not None:
                if isinstance(part, BaseException):
                    raise part
                _take(state, read(part, f"the update of rank {task.rank}"), task)
        finally:
            is_bad.set()
            fetching.join()
        if task.reply.status == "ok":
            return state
        # The trainer does not know the steps before: it begins anew, and so does its update.
        task.request = replace(task.request, step=0)
        task.reply = task.until_done()
    raise RecordError(f"its trainer began anew {_MOST_ATTEMPTS} times")


def _fetch(task: Task, parts: SimpleQueue[Any], is_bad: threading.Event) -> None:
    """Fetch the parts of an update one after the other; the last thing that is put is None, or what went wrong."""
    end: BaseException | None = None
    try:
        while task.reply.status != "again" and not is_bad.is_set():
            content = task.fetch(task.reply)
            task.update_bytes += len(content)
            task.check_size(task.update_bytes)
            task.payloads.append(task.reply.payload.digest if task.reply.payload else "")
            parts.put(content)
            if task.reply.status == "ok":
                break
            task.request = replace(task.request, step=(task.request.step or 0) + 1)
            task.reply = task.until_done()
    except BaseException as exc:  # noqa: BLE001  (raised by who takes the parts)
        end = exc
    parts.put(end)


def _take(state: StateDict, part: StateDict, task: Task) -> None:
    """Add a part to an update; raises RecordError for what is there already, and for too much beside the model."""
    if twice := state.keys() & part.keys():
        raise RecordError(f"its update has {named(sorted(twice))} in two parts")
    if not part:
        raise RecordError("a part of its update is empty")
    state |= part
    extra_bytes = sum(tensor.nbytes for name, tensor in state.items() if name.startswith(PREFIX))
    if extra_bytes > task.extra_bytes + HEADER_BYTES:
        raise RecordError(f"its update has {extra_bytes:,} bytes beside the model")
