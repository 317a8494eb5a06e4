"""What a secure sum costs: against a plain round of the real programs, and against Flower's SecAgg+.

The programs train nothing, on loopback and the RAM disk. Flower's side is its `SecAggPlusWorkflow` and `secaggplus_mod`
with all clients in this process, called one after the other: there is no network and no process in it. So ours is
measured in the same way beside that, one process that does the work of all ranks and of the server; processor time on
both sides. The bytes are what each rank sends up.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Federation, Figure, Options, interleaved
from fedsplit.run.history import read_history

TOPIC = "secure"
RANKS, LAYERS = 4, 10
# A counter cannot be summed securely, and no rank needs that of another one.
_RULES = ("num_batches_tracked=local", "secure(fedavg, range=4, threshold=2)")


def run(options: Options) -> list[Figure]:
    """Measure."""
    figures = []
    largest = () if options.quick else (100_000_000,)
    for size in (100_000,) if options.tiny else (1_000_000, 10_000_000, *largest):
        label = f"{size / 1e6:g} MB"
        figures += _rounds(size, options.pick(6, 4, 3), options.pick(3, 1, 1), label)
        # Flower needs minutes for the largest.
        figures += _protocols(size, 1 if size > 10_000_000 else options.pick(3, 1, 1), label)
    return figures


def _rounds(size: int, rounds: int, repeats: int, label: str) -> list[Figure]:
    sides = {
        "masked by the trainer": _programs(size, rounds, rules=_RULES),
        "masked by the client": _programs(size, rounds, rules=_RULES, client_flags=("--mask-here",)),
        "plain": _programs(size, rounds),
    }
    samples = interleaved(repeats, sides)
    plain = samples.pop("plain")
    return [
        Figure(topic=TOPIC, name=f"round, {label}, {side}", unit="s", samples=found,
               peer="without secure(…)", peer_samples=plain, judged_by="ratio")
        for side, found in samples.items()
    ]  # fmt: skip


def _programs(size: int, rounds: int, **settings: Any) -> Callable[[Path], Sequence[float]]:
    def measure(directory: Path) -> Sequence[float]:
        periods, _ = Federation(directory=directory, rounds=rounds, model_bytes=size, **settings).run()
        # Else nothing would have been measured: a round whose updates are refused is a quick one.
        for line in read_history(directory / "checkpoints" / "server" / "history.jsonl"):
            assert line["accepted"] == 2, line["refused"]
        return periods

    return measure


def _protocols(size: int, repeats: int, label: str) -> list[Figure]:
    seconds: dict[str, list[float]] = {"ours": [], "flower": []}
    sent: dict[str, list[float]] = {"ours": [], "flower": []}
    for measure in (ours, flowers):
        # What it imports is no part of it.
        measure([_update(4_000, rank) for rank in range(1, RANKS + 1)])
    updates = [_update(size, rank) for rank in range(1, RANKS + 1)]
    for _ in range(repeats):
        for side, measure in (("ours", ours), ("flower", flowers)):
            began = time.process_time()
            mean, up = measure(updates)
            seconds[side].append(time.process_time() - began)
            sent[side].append(up / RANKS / 1e6)
            wanted = np.mean([layers[0] for layers in updates], axis=0)
            # Of those that were given less than 8 to Flower, which clips at that.
            assert np.abs(mean[0] - wanted).max() < 1e-3, side
    return [
        Figure(topic=TOPIC, name=f"sum of {RANKS} ranks, {label}, processor time of all", unit="s",
               samples=seconds["ours"], peer="Flower SecAgg+", peer_samples=seconds["flower"], judged_by="speedup"),
        Figure(topic=TOPIC, name=f"sum of {RANKS} ranks, {label}, up from each", unit="MB", samples=sent["ours"],
               peer="Flower SecAgg+", peer_samples=sent["flower"], judged_by="ratio"),
    ]  # fmt: skip


def _update(size: int, rank: int) -> list[Any]:
    draw = np.random.default_rng(rank)
    return [draw.uniform(-1, 1, size // 4 // LAYERS).astype(np.float32) for _ in range(LAYERS)]


def ours(updates: Sequence[list[Any]]) -> tuple[list[Any], int]:
    """Do a round of `fedsplit.secure`; returns the mean, and the bytes that all ranks sent."""
    from fedsplit.secure import protocol
    from fedsplit.secure.vector import WORD, to_fixed, to_mean, weighted

    ranks = range(1, len(updates) + 1)
    secrets = {rank: protocol.Secrets.new() for rank in ranks}
    adverts = {rank: secrets[rank].advert(1) for rank in ranks}
    group = protocol.Group(context="benchmark/1", adverts=adverts, threshold=3)
    boxes = {rank: protocol.deal(secrets[rank], rank, group) for rank in ranks}
    total, sent = np.zeros(sum(layer.size for layer in updates[0]) + 1, WORD), 0
    for rank in ranks:
        fixed = np.concatenate([to_fixed(layer.astype(np.float64), 4.0) for layer in updates[rank - 1]])
        words = weighted(fixed, 1, len(ranks))
        protocol.mask(secrets[rank], rank, group, list(ranks), words)
        total += words
        sent += words.nbytes + len(ranks) * protocol.BOX_BYTES
    revealed = {
        rank: protocol.reveal(secrets[rank], rank, group, {other: boxes[other][rank] for other in ranks}, list(ranks))
        for rank in ranks
    }
    protocol.unmask(group, list(ranks), list(ranks), revealed, total)
    size = updates[0][0].size
    return [to_mean(total[at * size : (at + 1) * size], 4.0, 1, 1) for at in range(LAYERS)], sent


def flowers(updates: Sequence[list[Any]]) -> tuple[list[Any], int]:
    """Do a round of Flower's SecAgg+ with the same updates."""
    from flwr.app import ConfigRecord, Context, RecordDict
    from flwr.client.mod import secaggplus_mod
    from flwr.common import Code, FitRes, Message, Status, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.compat.common import recorddict_compat as compat
    from flwr.server import LegacyContext, SimpleClientManager
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import SecAggPlusWorkflow
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
    from flwr.supercore.task_identity import TaskIdentity

    # In a run of Flower's own its processes set these.
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    logging.getLogger("flwr").setLevel(logging.ERROR)
    contexts = {
        node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
        for node in range(1, len(updates) + 1)
    }
    sent = 0

    class Grid:
        """Hands each message to the client's function, in this process."""

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
            return [self._answer(message) for message in messages]

        def _answer(self, message: Any) -> Any:
            nonlocal sent
            node = message.metadata.dst_node_id

            def train(asked: Any, _: Any) -> Any:
                parameters = ndarrays_to_parameters(updates[node - 1])
                found = FitRes(Status(Code.OK, ""), parameters, 1, {})
                return Message(compat.fitres_to_recorddict(found, False), reply_to=asked)

            # The function takes the stage out of what it is given, and all were given one and the same.
            message.content = copy.deepcopy(message.content)
            answer = secaggplus_mod(message, contexts[node], train)
            for record in answer.content.config_records.values():
                sent += sum(_length(value) for value in record.values())
            return answer

    manager = SimpleClientManager()
    strategy = _strategy(FedAvg, sorted(contexts), ndarrays_to_parameters([np.zeros(1, np.float32)]))
    context = LegacyContext(
        Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}), strategy=strategy,
        client_manager=manager,
    )  # fmt: skip
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    empty = ndarrays_to_parameters([np.zeros(1, np.float32)])
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(empty, True)
    # The number of steps of a value, and weights of 1: the finest that fits into its modulus.
    workflow = SecAggPlusWorkflow(1.0, 3, max_weight=1.0, clipping_range=4.0)
    workflow(Grid(), context)
    found = compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True)
    return parameters_to_ndarrays(found), sent


def _strategy(kind: Any, nodes: Sequence[int], parameters: Any) -> Any:
    from flwr.common import FitIns
    from flwr.server.client_proxy import ClientProxy

    class Proxy(ClientProxy):
        get_properties = get_parameters = fit = evaluate = reconnect = None  # type: ignore[assignment]

    class Chosen(kind):  # type: ignore[misc]
        def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
            found = []
            for node in nodes:
                proxy = Proxy(str(node))
                proxy.node_id = node
                found.append((proxy, FitIns(parameters, {})))
            return found

    return Chosen(initial_parameters=parameters)


def _length(value: Any) -> int:
    if isinstance(value, list):
        return sum(_length(each) for each in value)
    return len(value) if isinstance(value, bytes | str) else 8
