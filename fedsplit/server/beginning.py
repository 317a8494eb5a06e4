"""The beginning of a run: the newest checkpoint is taken up, or a state to start from is found.

Importing this module imports torch.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedsplit.errors import RecordError, RunFailedError, UsageError
from fedsplit.exchange.records import Request, printable
from fedsplit.run.directory import Run
from fedsplit.run.events import event
from fedsplit.server.conversation import Conversation, RoundContext
from fedsplit.server.observer import Observer
from fedsplit.server.roster import Roster
from fedsplit.server.settings import ServerSettings
from fedsplit.server.state import GlobalState
from fedsplit.server.strategy import StreamingStrategy
from fedsplit.states.local_keys import is_local, named
from fedsplit.states.state_dict import decode, describe_state, described_state, encode
from fedsplit.states.ties import check_shared

log = logging.getLogger("fedsplit")


@dataclass(kw_only=True)
class Beginning:
    """Gives a run its first state, and the strategy the state's entries."""

    run: Run
    settings: ServerSettings
    strategy: StreamingStrategy
    roster: Roster
    observer: Observer
    state: GlobalState
    # Returns the initial state of a trainer.
    ask: Callable[[], Any]

    def take_up(self) -> None:
        """Take up the newest checkpoint, or find a state to start from."""
        run, strategy, resumed = self.run, self.strategy, self.run.resumed
        if resumed:
            self.state.set(run.payload_of(resumed))
            log.info("run %s goes on after round %d of %d", run.run_id, resumed.server_round, self.settings.rounds)
            if travels := _travelling(run.local_entries(), self.settings.local_patterns):
                raise UsageError(
                    f"{travels} stayed with the trainers so far, and the rules keep them there no more; resume with "
                    "the rules that the run began with, or begin a new run"
                )
        else:
            self._find_initial_state()
        # With a state that is there already, before anybody is waited for: what is wrong with the rules shows now.
        rows = strategy.begin_run(self.state.entries, run.local_entries())
        run.note_split(rows)
        self.observer.split_resolved(rows)
        for part, entries, size, rule in rows:
            fields = event("split", part=part, entries=entries, bytes=size, rule=rule)
            log.info("split: %s: %d entries, %s bytes, rule %s", part, entries, f"{size:,}", rule, extra=fields)
        if resumed:
            if strategy.memory_file in resumed.files:
                strategy.load_memory(resumed.path(strategy.memory_file))
            return
        self.roster.wait_for(self.settings.min_clients)
        if (given := strategy.initialize_parameters(self.roster)) is not None:
            log.info("the strategy gave the initial values")
            self.state.put(given.tensors)

    def _find_initial_state(self) -> None:
        """Take the state that the run was given, or a trainer's; note what stays with the trainers."""
        initial = self.run.initial
        # Only a trainer knows the types of modules: its answer names what stays at home because of them.
        if not initial or any(spec.by_type for spec in self.settings.rules):
            self.roster.wait_for(self.settings.min_clients)
            self.state.put([self.ask()])
        if initial:
            asked = self.state.payload
            self.state.put(self._without_local(initial()))
            self.state.drop([asked.digest] if asked.bytes else [])
            return
        # A trainer may give its whole state, and nothing of it be what the rules keep local.
        names, patterns = self.state.entries, self.settings.local_patterns
        local = [spec.part for spec in self.settings.rules if spec.name == "local" and not spec.by_type]
        if local and not self.run.local_entries() and not any(is_local(name, patterns) for name in names):
            raise UsageError(f"no entry matches the local patterns {named(local)}; there are {named(names)}")

    def _without_local(self, chunks: Sequence[Any]) -> list[Any]:
        """Take what stays with the trainers out of a state, and note what that was."""
        state, at_home = decode(b"".join(chunks), "the initial state"), self.run.local_entries()

        def stays(name: str) -> bool:
            return is_local(name, self.settings.local_patterns, lambda name, _: name in at_home)

        check_shared(state, stays)
        local = {name for name in state if stays(name)}
        self.run.note_local_entries(describe_state({name: state[name] for name in local}))
        return encode({name: tensor for name, tensor in state.items() if name not in local})


def ask_for_initial_state(context: RoundContext, request: Request, run: Run) -> Any:
    """Return the initial state of the first rank that has one; note which entries it keeps at home."""
    failures = []
    for rank in context.roster.ranks():
        conversation = Conversation(context=context, rank=rank, request=request)
        reply = conversation.until_done()
        try:
            content = conversation.fetch(reply)
            # Another rank is asked if this one's cannot be read.
            decode(content, "the initial state")
            described_state(reply.local_entries)
            if travels := _travelling(reply.local_entries, request.split):
                raise RecordError(f"it keeps {travels} at home, which the rules do not")
        except RecordError as exc:
            failures.append(f"rank {rank}: {exc}")
            log.warning("no initial state from %s", failures[-1])
            continue
        run.note_local_entries(reply.local_entries)
        log.info("rank %d: gave the initial state (%s bytes)", rank, f"{len(content):,}")
        return content
    raise RunFailedError(f"no trainer gave an initial state ({'; '.join(failures)}); see --initial-checkpoint")


def _travelling(local_entries: Iterable[str], patterns: Sequence[tuple[str, bool]]) -> str:
    """Name those of the entries that stayed at home which the rules let travel; empty if there are none."""
    return printable(named(name for name in local_entries if not is_local(name, patterns, lambda *_: True)))
