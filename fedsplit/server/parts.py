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
from fedsplit.server.conversation import HEADER_BYTES, BegunAnewError
from fedsplit.server.peer import Reply
from fedsplit.states.extra import MOST_STATES
from fedsplit.states.header import PREFIX
from fedsplit.states.local_keys import named
from fedsplit.states.state_dict import StateDict

if TYPE_CHECKING:
    from fedsplit.server.round import Task

# How often a trainer may be started again before its update is refused; and how many extra tensors an update may have,
# beside as many states as their bytes may be.
_MOST_ATTEMPTS, _MOST_EXTRA = 10, 1_000


def read_parts(task: Task, read: Callable[[Any, str], StateDict], may_read: Callable[[], None]) -> StateDict:
    """Return the update whose first part is the reply of a task; its last one becomes the reply.

    Parts are fetched ahead, into files or as small messages, and read once `may_read` returns. Raises RecordError for
    what is no update.
    """
    for _ in range(_MOST_ATTEMPTS):
        state, extra_bytes, parts, is_bad = StateDict(), 0, SimpleQueue[Any](), threading.Event()
        task.update_bytes = task.plain_bytes = 0
        fetching = threading.Thread(target=_fetch, args=(task, parts, is_bad), daemon=True)
        fetching.start()
        try:
            may_read()
            while (part := parts.get()) is not None:
                if isinstance(part, BaseException):
                    raise part
                extra_bytes += _take(state, read(part, f"the update of rank {task.rank}"), task)
                if extra_bytes > task.extra_bytes + HEADER_BYTES:
                    raise RecordError(f"its update has {extra_bytes:,} bytes beside the model")
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
        task.begin_transfer()
        while task.reply.status != "again" and not is_bad.is_set():
            if len(task.payloads) > _MOST_ATTEMPTS * _most_entries(task):
                raise RecordError(f"its update comes in more than {len(task.payloads):,} parts")
            content = task.fetch(task.reply)
            task.update_bytes += len(content)
            task.check_size(task.update_bytes)
            task.payloads.append(task.reply.payload.digest if task.reply.payload else "")
            parts.put(content)
            if task.reply.status == "ok":
                break
            task.request = replace(task.request, step=(task.request.step or 0) + 1)
            task.reply = task.until_done()
    except BegunAnewError:
        task.reply = Reply(status="again")
    except BaseException as exc:  # noqa: BLE001  (raised by who takes the parts)
        end = exc
    parts.put(end)


def _take(state: StateDict, part: StateDict, task: Task) -> int:
    """Add a part to an update, and return the bytes in it beside the model; raises RecordError for what is no part."""
    if twice := state.keys() & part.keys():
        raise RecordError(f"its update has {named(sorted(twice))} in two parts")
    if foreign := [name for name in part if name not in task.base and not name.startswith(PREFIX)]:
        raise RecordError(f"its update has {named(foreign)}, which the state that it starts from lacks")
    state |= part
    if not part or len(state) > _most_entries(task):
        raise RecordError(f"a part of its update has {len(part):,} entries, all of them so far {len(state):,}")
    return sum(tensor.nbytes for name, tensor in part.items() if name.startswith(PREFIX))


def _most_entries(task: Task) -> int:
    return (1 + MOST_STATES) * len(task.base) + _MOST_EXTRA
