"""The shared training code, on the default workload: what is counted, what is drawn, what is kept."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedsplit.errors import MissingPackageError, UsageError, WorkloadError
from fedsplit.workloads import WorkloadContext, create_workload
from fedsplit.workloads.digits import load_data, read_table
from fedsplit.workloads.image import ImageData, ImageWorkload, proximal_term, rank_indices

State = dict[str, torch.Tensor]


@dataclass
class StubTask:
    """A task that stops after a number of questions."""

    kind: str = "train"
    server_round: int = 1
    total_rounds: int = 5
    config: Mapping[str, Any] = field(default_factory=dict)
    stop_after: int = 10**9
    state_dict: State = field(default_factory=dict)

    def should_stop(self) -> bool:
        self.stop_after -= 1
        return self.stop_after < 0

    def load_into(self, model: torch.nn.Module) -> None:
        model.load_state_dict(self.state_dict)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits(rank: int = 1, num_partitions: int = 2, seed: int = 0, **options: object) -> ImageWorkload:
    texts = {name.replace("_", "-"): str(value) for name, value in options.items()}
    context = WorkloadContext(rank=rank, num_partitions=num_partitions, seed=seed, options=texts)
    workload = create_workload("digits", context)
    assert isinstance(workload, ImageWorkload)
    return workload


def state_of(workload: ImageWorkload) -> State:
    return {name: value.clone() for name, value in workload.model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fedavg_round(workloads: list[ImageWorkload], state: State) -> tuple[State, float]:
    """Train every rank from `state`; return the average and its accuracy over the held-out images."""
    states, counts = [], []
    for workload in workloads:
        workload.model.load_state_dict(state)
        counts.append(workload.train(StubTask()).num_examples)
        states.append(state_of(workload))
    total = sum(counts)
    merged = {
        name: torch.stack([s[name] * (count / total) for s, count in zip(states, counts, strict=True)]).sum(0)
        for name in state
    }
    hits = seen = 0.0
    for workload in workloads:
        workload.model.load_state_dict(merged)
        result = workload.evaluate(StubTask(kind="evaluate"))
        hits, seen = hits + result.metrics["accuracy"] * result.num_examples, seen + result.num_examples
    assert seen == 359
    return merged, hits / seen


# --- digits: the data


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingPackageError, match=r"workload digits needs scikit-learn.*pip install 'fedsplit\[digits\]'"
    ):
        read_table()


def test_the_table_read_without_scikit_learn_is_scikit_learns() -> None:
    table = read_table()
    np.testing.assert_array_equal(table, np.column_stack(load_digits(return_X_y=True)))
    assert table.shape == (1797, 65)


def test_where_the_file_is_elsewhere_scikit_learn_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_table()
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    np.testing.assert_array_equal(table, read_table())


def test_a_fifth_of_each_class_is_held_out_and_every_digit_is_on_one_side() -> None:
    data = load_data()
    assert len(data.train_labels) + len(data.test_labels) == 1797
    for label in range(10):
        held_out, trained = (int((labels == label).sum()) for labels in (data.test_labels, data.train_labels))
        assert held_out == round(0.2 * (held_out + trained))
    rows = torch.cat([data.train_images, data.test_images]).flatten(1).numpy()
    expected = read_table()[:, :-1]
    assert sorted(map(bytes, rows)) == sorted(map(bytes, expected.astype(np.uint8)))


def test_pixels_are_normalised_by_the_training_images_own_mean_and_deviation() -> None:
    data = load_data()
    pixels = (data.train_images.float() / data.maximum - data.mean[0]) / data.std[0]
    assert abs(pixels.mean().item()) < 0.01
    assert abs(pixels.std().item() - 1) < 0.01


# --- shards


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("num_partitions", [1, 3, 7])
def test_partitions_together_are_the_training_split_and_shards_the_test_split(
    alpha: float | None, num_partitions: int
) -> None:
    # Every image carries its own number, so that one on the wrong side would be seen.
    numbers = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = torch.arange(100) % 10
    data = ImageData(
        train_images=numbers[:80],
        train_labels=labels[:80],
        test_images=numbers[80:],
        test_labels=labels[80:],
        mean=(0.0,),
        std=(1.0,),
    )
    contexts = [WorkloadContext(rank=r + 1, num_partitions=num_partitions) for r in range(num_partitions)]
    indices = [rank_indices(data, context, alpha) for context in contexts]
    trained = torch.cat([data.train_images[train].flatten() for train, _ in indices])
    tested = torch.cat([data.test_images[test].flatten() for _, test in indices])
    assert sorted(trained.tolist()) == list(range(80))
    assert sorted(tested.tolist()) == list(range(80, 100))


def test_the_weighted_mean_over_the_shards_is_the_accuracy_over_the_whole_split() -> None:
    whole = digits(num_partitions=1)
    whole.train(StubTask(config={"epochs": 1}))
    expected = whole.evaluate(StubTask(kind="evaluate"))
    hits = loss = 0.0
    for rank in (1, 2, 3):
        shard = digits(rank, num_partitions=3)
        shard.model.load_state_dict(whole.model.state_dict())
        result = shard.evaluate(StubTask(kind="evaluate"))
        hits += result.metrics["accuracy"] * result.num_examples
        loss += result.loss * result.num_examples
    assert round(hits) == round(expected.metrics["accuracy"] * 359)
    assert loss / 359 == pytest.approx(expected.loss, rel=1e-5)


def test_more_partitions_than_test_images_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="359 test images among 400"):
        digits(num_partitions=400)


# --- training


def test_digits_alone_learns_quickly() -> None:
    workload = digits(num_partitions=1)
    workload.train(StubTask())
    assert workload.evaluate(StubTask(kind="evaluate")).metrics["accuracy"] > 0.9


@pytest.mark.parametrize("num_partitions", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_five_averaged_rounds_reach_the_promised_accuracy(num_partitions: int) -> None:
    workloads = [digits(rank, num_partitions) for rank in range(1, num_partitions + 1)]
    state = state_of(workloads[0])
    for _ in range(5):
        state, accuracy = fedavg_round(workloads, state)
    assert accuracy > 0.95


def test_every_rank_of_a_seed_starts_from_the_same_model_and_another_seed_from_another() -> None:
    assert same(state_of(digits(1, seed=3)), state_of(digits(2, seed=3)))
    assert not same(state_of(digits(seed=3)), state_of(digits(seed=4)))


def test_making_a_workload_leaves_the_process_generator_alone() -> None:
    before = torch.get_rng_state()
    digits(seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_training_is_the_same_to_the_bit_whatever_the_process_drew_before() -> None:
    one, other = digits(), digits()
    one.train(StubTask())
    torch.rand(17)
    other.train(StubTask())
    assert same(state_of(one), state_of(other))


def test_ranks_visit_their_examples_in_different_orders() -> None:
    one, other = digits(1, 2).local_state(), digits(2, 2).local_state()
    assert not torch.equal(one["generator"], other["generator"])


def test_what_is_reported_is_what_was_seen() -> None:
    result = digits(epochs=2).train(StubTask())
    assert result.num_examples == 719
    assert result.metrics.keys() == {"loss", "accuracy"}


@pytest.mark.parametrize(("batches", "num_examples"), [(0, 0), (1, 32), (5, 160), (23, 719), (24, 719), (46, 719)])
def test_a_task_that_stops_counts_only_the_different_examples_it_trained_on(batches: int, num_examples: int) -> None:
    workload = digits(epochs=2)
    before = state_of(workload)
    result = workload.train(StubTask(stop_after=batches))
    assert result.num_examples == num_examples
    assert same(before, state_of(workload)) == (batches == 0)
    # Without a batch there is no loss to report, and none is invented.
    assert bool(result.metrics) == (batches > 0)


def test_a_stopped_evaluation_counts_the_images_it_looked_at() -> None:
    assert digits(num_partitions=1).evaluate(StubTask(stop_after=0)).num_examples == 256


def test_the_reported_means_are_those_of_a_loop_written_out() -> None:
    workload = digits(num_partitions=1)
    data = load_data()
    images = (data.test_images.float() / 16 - data.mean[0]) / data.std[0]
    with torch.no_grad():
        logits = workload.model(images)
    result = workload.evaluate(StubTask(kind="evaluate"))
    expected = torch.nn.functional.cross_entropy(logits, data.test_labels).item()
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.metrics["accuracy"] == (logits.argmax(1) == data.test_labels).sum().item() / 359


def test_evaluation_changes_neither_model_nor_local_state() -> None:
    workload = digits()
    workload.train(StubTask(stop_after=3))
    state, local = state_of(workload), workload.local_state()
    workload.evaluate(StubTask(kind="evaluate"))
    assert same(state, state_of(workload))
    assert torch.equal(local["generator"], workload.local_state()["generator"])


def test_every_batch_is_announced() -> None:
    calls: list[tuple[int, int, float]] = []
    workload = digits(epochs=2)
    workload.on_batch = lambda done, total, loss, epochs: calls.append((done, total, loss))
    result = workload.train(StubTask())
    assert [call[:2] for call in calls] == [(n, 46) for n in range(1, 47)]
    sizes = [32] * 22 + [15]
    mean = sum(call[2] * size for call, size in zip(calls, sizes * 2, strict=True)) / (2 * 719)
    assert result.metrics["loss"] == pytest.approx(mean)
    calls.clear()
    workload.evaluate(StubTask(kind="evaluate"))
    assert [call[:2] for call in calls] == [(1, 1)]


# --- what the server may change for a round


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"epochs": 1}, {"epochs": 1}),
        ({"epochs": "1"}, {"epochs": 1}),
        ({"lr": 0.01}, {"lr": 0.01}),
        ({"batch-size": 64.0}, {"batch_size": 64}),
        ({"proximal": "0.5"}, {"proximal": 0.5}),
        ({"something-else": True}, {}),
    ],
)
def test_the_servers_config_does_what_the_option_does(config: dict[str, Any], options: dict[str, object]) -> None:
    by_config, by_option = digits(), digits(**options)
    by_config.train(StubTask(config=config))
    by_option.train(StubTask())
    assert same(state_of(by_config), state_of(by_option))
    if options:
        plain = digits()
        plain.train(StubTask())
        assert not same(state_of(plain), state_of(by_config))


def test_the_servers_config_holds_for_its_round_only() -> None:
    workload = digits()
    workload.train(StubTask(config={"lr": 0.5, "epochs": 1}, stop_after=0))
    other = digits()
    workload.train(StubTask(stop_after=4))
    other.train(StubTask(stop_after=0))
    other.train(StubTask(stop_after=4))
    assert same(state_of(workload), state_of(other))


def test_a_config_value_that_cannot_work_is_named() -> None:
    with pytest.raises(UsageError, match=r"--train-config lr: expected a number of more than 0, found True"):
        digits().train(StubTask(config={"lr": True}))


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 0), ("lr", 0), ("momentum", 1), ("proximal", -1), ("weight_decay", "x")]
)
def test_an_option_that_cannot_work_is_named(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        digits(**{name: value})


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_momentum_and_weight_decay_reach_the_optimizer(name: str) -> None:
    one, other = digits(), digits(**{name: 0.5})
    for workload in (one, other):
        workload.train(StubTask(stop_after=5))
    assert not same(state_of(one), state_of(other))


# --- FedProx


def test_the_proximal_term_is_half_the_squared_distance_with_its_gradient() -> None:
    model = torch.nn.Linear(2, 1)
    anchor = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1), "buffer": torch.zeros(9)}
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        model.bias.fill_(1.0)
    term = proximal_term(model, anchor)
    term.backward()  # type: ignore[no-untyped-call]
    assert term.item() == 13.0
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[3.0, 4.0]]


def test_the_proximal_term_leaves_frozen_parameters_out() -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.requires_grad_(False)
    assert proximal_term(model, {"bias": model.bias.detach() + 2}).item() == pytest.approx(2.0)


def test_a_large_mu_keeps_the_model_near_the_global_one() -> None:
    moved = []
    for mu in (0.0, 10.0):
        workload = digits(proximal=mu, momentum=0)
        before = state_of(workload)
        workload.train(StubTask())
        moved.append(proximal_term(workload.model, before).item())
    assert 0 < moved[1] < moved[0] / 4


# --- local state


def test_a_restarted_trainer_goes_on_to_the_same_bits() -> None:
    steady, killed = digits(), digits()
    for workload in (steady, killed):
        workload.train(StubTask())
    file = io.BytesIO()
    torch.save(killed.local_state(), file)
    file.seek(0)
    restarted = digits()
    restarted.load_local_state(torch.load(file, weights_only=True))
    restarted.model.load_state_dict(killed.model.state_dict())
    for workload in (steady, restarted):
        workload.train(StubTask())
    assert same(state_of(steady), state_of(restarted))


def test_without_its_local_state_a_restarted_trainer_would_not() -> None:
    steady, restarted = digits(), digits()
    steady.train(StubTask())
    restarted.model.load_state_dict(steady.model.state_dict())
    for workload in (steady, restarted):
        workload.train(StubTask())
    assert not same(state_of(steady), state_of(restarted))


def test_a_snapshot_of_the_local_state_does_not_change_with_later_training() -> None:
    workload = digits()
    workload.train(StubTask(stop_after=2))
    snapshot = workload.local_state()
    buffer = snapshot["optimizer"]["state"][0]["momentum_buffer"].clone()
    generator = snapshot["generator"].clone()
    workload.train(StubTask())
    assert torch.equal(buffer, snapshot["optimizer"]["state"][0]["momentum_buffer"])
    assert torch.equal(generator, snapshot["generator"])


def test_the_options_of_today_win_over_the_saved_ones() -> None:
    saved = digits(lr=0.5, momentum=0.0).local_state()
    workload = digits()
    workload.load_local_state(saved)
    workload.train(StubTask(stop_after=0))
    group = workload.local_state()["optimizer"]["param_groups"][0]
    assert (group["lr"], group["momentum"]) == (0.05, 0.9)


def _of_another_model() -> dict[str, Any]:
    workload = digits()
    workload.train(StubTask(stop_after=1))
    state = workload.local_state()
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    return state


@pytest.mark.parametrize("state", [{}, {"optimizer": {}}, {"optimizer": 3}, _of_another_model])
def test_a_local_state_of_something_else_is_refused(state: Any) -> None:
    with pytest.raises(WorkloadError, match=r"not of this workload.*--state reset"):
        digits().load_local_state(state() if callable(state) else state)
