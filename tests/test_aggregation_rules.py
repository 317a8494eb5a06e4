"""Each rule against numbers worked out by hand, other implementations, and what must hold for any input."""

from __future__ import annotations

import functools
import logging
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedsplit.aggregation import (
    AggregationContext,
    Update,
    fedavg,
    frozen,
    geometric_median,
    krum,
    median,
    multi_krum,
    numeric,
    trimmed_mean,
)
from fedsplit.aggregation.base import seeded_generator
from fedsplit.aggregation.rules import BUILTIN, MeanAccumulator, maximum_of_all, merge
from fedsplit.errors import AggregationError
from tests.depth import scaled

FLOATING = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
]
WHOLE = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
ROBUST = {
    "median": median,
    "trimmed-mean": functools.partial(trimmed_mean, fraction=0.2),
    "krum": functools.partial(krum, byzantine=0),
    "multi-krum": functools.partial(multi_krum, byzantine=0),
    "geometric-median": geometric_median,
}
RULES = {"fedavg": fedavg, "max": maximum_of_all, **ROBUST}


def context(previous=None, server_round=1):
    return AggregationContext(
        server_round=server_round,
        total_rounds=3,
        part="*",
        previous=previous or {},
        generator=seeded_generator(0, server_round, "*"),
        memory={},
    )


def updates_of(*states, weights=None):
    return [
        Update(rank=rank, state_dict=state, num_examples=weights[rank - 1] if weights else 1)
        for rank, state in enumerate(states, start=1)
    ]


def columns(*rows, dtype=torch.float32, weights=None):
    return updates_of(*({"w": torch.tensor(row, dtype=dtype)} for row in rows), weights=weights)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def same_bits(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


# By hand


def test_fedavg_weighs_by_examples():
    result = fedavg(columns([0.0, 10.0], [4.0, 20.0], weights=[3, 1]), context())
    assert result["w"].tolist() == [1.0, 12.5]


def test_fedavg_is_the_running_lerp_to_the_last_bit():
    tensors = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = torch.lerp(tensors[1], tensors[0], 1 - 2 / 7)
    expected = torch.lerp(tensors[2], expected, 1 - 4 / 11)
    result = fedavg(updates_of(*({"w": t} for t in tensors), weights=[5, 2, 4]), context())
    assert same_bits(result["w"], expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", FLOATING)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), weights=st.lists(st.integers(1, 50), min_size=1, max_size=6), cut=st.integers(0, 5))
def test_several_at_once_are_the_same_bits_as_one_after_the_other(monkeypatch, threads, dtype, seed, weights, cut):
    monkeypatch.setattr(numeric, "_STRETCH", 16)
    monkeypatch.setattr(numeric, "_WORTH_THREADS", 1 if threads > 1 else 1 << 40)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex64 if dtype.is_complex else torch.float32
    states = [
        {"w": torch.randn(7, 11, generator=generator, dtype=wide).to(dtype).t(),
         "b": torch.randn((), generator=generator, dtype=wide).to(dtype),
         "n": torch.tensor(count), "e": torch.empty(0, dtype=dtype)}
        for count in range(len(weights))
    ]  # fmt: skip
    updates = updates_of(*states, weights=weights)
    accumulator = MeanAccumulator(context())
    assert all(accumulator.add_all(part) for part in (updates[:cut], updates[cut:]) if part)
    found, expected = accumulator.result(), fedavg(updates, context())
    assert found.keys() == expected.keys() and all(same_bits(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("place", [0, 40, -1])
def test_what_is_not_finite_anywhere_leaves_the_mean_as_it_was(monkeypatch, bad, dtype, place):
    monkeypatch.setattr(numeric, "_STRETCH", 16)
    good = [{"v": torch.randn(20), "w": torch.randn(100, dtype=torch.float32).to(dtype)} for _ in range(5)]
    for heavy in (1, 10**9):  # so heavy that the mean is the last update, to the last bit
        accumulator = MeanAccumulator(context())
        assert accumulator.add_all(updates_of(*good[:2]))
        for position in range(3):
            batch = [{key: tensor.clone() for key, tensor in each.items()} for each in good[2:]]
            batch[position]["w"][place] = bad
            assert not accumulator.add_all(updates_of(*batch, weights=[1, 1, heavy]))
        assert accumulator.add_all(updates_of(*good[2:]))
        found, expected = accumulator.result(), fedavg(updates_of(*good), context())
        assert all(same_bits(found[key], expected[key]) for key in expected)


def test_fedavg_adds_halves_up_in_float32():
    # In bfloat16 itself, 256 + 1 is 256: a thousand small updates would be lost one by one.
    updates = columns(*[[1.0 + i % 2 / 128] for i in range(1000)], dtype=torch.bfloat16)
    assert fedavg(updates, context())["w"].dtype == torch.bfloat16
    wide = fedavg(columns(*[[1.0 + i % 2 / 128] for i in range(1000)]), context())["w"]
    assert fedavg(updates, context())["w"].float().sub(wide).abs() <= 1 / 256


MASK = torch.tensor([float("-inf"), float("inf"), float("nan"), float("-inf")])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), count=st.integers(1, 6), are_identical=st.booleans())
def test_what_is_not_finite_in_the_same_place_of_all_stays(name, dtype, seed, count, are_identical):
    if name == "max" and dtype.is_complex:
        return
    generator = torch.Generator().manual_seed(seed)
    states = []
    for _ in range(count):
        state = {"w": torch.randn(4, 5, generator=generator).to(dtype), "v": torch.randn(3, generator=generator)}
        real = torch.view_as_real(state["w"])[..., 0] if dtype.is_complex else state["w"]
        real[:, 2] = MASK.to(dtype) if not dtype.is_complex else MASK
        states.append(states[0] if are_identical and states else state)
    result = RULES[name](updates_of(*states), context())["w"]
    found = torch.view_as_real(result)[..., 0] if dtype.is_complex else result
    assert torch.equal(found[:, 2].float().nan_to_num(nan=7), MASK.nan_to_num(nan=7))
    finite = torch.view_as_real(result)[..., 1] if dtype.is_complex else result[:, [0, 1, 3, 4]]
    assert finite.isfinite().all()
    if are_identical and name not in ("max", "median", "trimmed-mean"):  # there, NaN may change its bits
        assert same_bits(result, states[0]["w"])


def test_a_mask_is_no_distance():
    """Else every client would be infinitely far from every other one, and Krum would take the first."""
    states = [{"w": torch.tensor([float("-inf"), x])} for x in [0.0, 1.0, 2.0, 10.0, 11.0]]
    assert krum(updates_of(*states), context(), byzantine=1)["w"].tolist() == [float("-inf"), 1.0]


def test_median_takes_the_middle_or_the_mean_of_the_two():
    assert median(columns([1, 9, 5], [2, 8, 5], [300, 7, 5]), context())["w"].tolist() == [2, 8, 5]
    assert median(columns([1.0], [2.0], [3.0], [1e9]), context())["w"].tolist() == [2.5]


def test_median_neither_overflows_nor_loses_the_smallest():
    large, tiny = torch.finfo(torch.float32).max, 2.0**-149
    assert median(columns([large, tiny], [large, tiny]), context())["w"].tolist() == [large, tiny]


def test_trimmed_mean_drops_both_ends():
    rows = [[-100.0], [1.0], [2.0], [6.0], [1000.0]]
    assert trimmed_mean(columns(*rows), context(), fraction=0.2)["w"].item() == pytest.approx(3.0)


def test_krum_takes_the_client_among_its_neighbours_whole():
    # With f = 1 and n = 5, scores are sums over the 2 nearest. Squared distances on the line 0 1 2 10 11:
    # 0: 1+4, 1: 1+1, 2: 1+4, 10: 1+64, 11: 1+81. The client at 1 wins, and its own counter comes along.
    states = [{"w": torch.tensor([x]), "n": torch.tensor(i)} for i, x in enumerate([0.0, 1.0, 2.0, 10.0, 11.0])]
    result = krum(updates_of(*states), context(), byzantine=1)
    assert (result["w"].item(), result["n"].item()) == (1.0, 1)


def test_krum_takes_the_lowest_rank_of_equals():
    states = [{"w": torch.tensor([0.0]), "n": torch.tensor(i)} for i in range(5)]
    assert krum(list(reversed(updates_of(*states))), context())["n"].item() == 0


def test_multi_krum_averages_the_best_without_their_weights():
    rows = [[0.0], [1.0], [2.0], [10.0], [11.0]]
    updates = columns(*rows, weights=[1, 50, 1, 1, 1000])
    # Scores as above: 1, then 0 and 2.
    assert multi_krum(updates, context(), selected=1)["w"].item() == 1.0
    assert multi_krum(updates, context(), selected=2)["w"].item() == pytest.approx(0.5)
    assert multi_krum(updates, context())["w"].item() == pytest.approx(0.5)
    states = [{"w": u.state_dict["w"], "n": torch.tensor(100 * i)} for i, u in enumerate(updates)]
    assert multi_krum(updates_of(*states), context())["n"].item() == 100


def test_geometric_median_of_a_triangle_is_its_fermat_point():
    # For an equilateral triangle it is the centre; far away in one corner it stays bounded.
    triangle = [[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]]
    centre = geometric_median(columns(*triangle, dtype=torch.float64), context(), iterations=200)["w"]
    assert centre.tolist() == pytest.approx([0.5, math.sqrt(3) / 6], abs=1e-5)


def test_geometric_median_of_numbers_is_their_median():
    result = geometric_median(columns([0.0], [1.0], [5.0]), context(), iterations=100)["w"].item()
    assert result == pytest.approx(1.0, abs=1e-3)


def test_max_and_frozen():
    updates = columns([1.0, -5.0], [0.0, 7.0])
    assert maximum_of_all(updates, context())["w"].tolist() == [1.0, 7.0]
    previous = {"w": torch.tensor([3.0, 3.0])}
    assert frozen(updates, context(previous))["w"] is previous["w"]


def test_max_refuses_complex_numbers():
    with pytest.raises(AggregationError, match="'w' is torch"):
        maximum_of_all(columns([1j], dtype=torch.complex64), context())


@pytest.mark.parametrize("rule", [fedavg, median, geometric_median])
def test_integers_take_the_maximum_exactly(rule):
    low, high = 2**53, 2**53 + 1
    states = [{"n": torch.tensor(n), "b": torch.tensor(b)} for n, b in [(low, False), (high, True), (low, False)]]
    result = rule(updates_of(*states), context())
    assert (result["n"].item(), result["b"].item()) == (high, True)
    assert float(low) == float(high)  # what a merge by floating point would have lost


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_every_whole_number_type_takes_the_maximum(dtype):
    info = (False, True) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    low, high = (torch.tensor([value], dtype=dtype) for value in info)
    result = fedavg(updates_of({"n": low}, {"n": high}, {"n": low}), context())["n"]
    assert result.dtype == dtype
    assert result.tolist() == [info[1]]


# What cannot work


@pytest.mark.parametrize(
    ("rule", "count", "params", "says"),
    [
        (
            krum,
            4,
            {"byzantine": 1},
            "takes at least 5 updates (2 * byzantine + 3), found 4; with 4, at most byzantine=0",
        ),
        (
            krum,
            6,
            {"byzantine": 2},
            "at least 7 updates (2 * byzantine + 3), found 6; with 6, at most byzantine=1",
        ),
        (multi_krum, 4, {"byzantine": 1}, "at least 5 updates"),
        (multi_krum, 5, {"byzantine": 1, "selected": 3}, "with 5 updates: at most 2"),
        (multi_krum, 2, {"byzantine": 0, "selected": 3}, "with 2 updates: at most 2"),
        (trimmed_mean, 5, {"fraction": 0.5}, "trims everything"),
    ],
)
def test_parameters_that_cannot_work_are_refused_with_the_number_that_would(rule, count, params, says):
    with pytest.raises(AggregationError) as caught:
        rule(columns(*[[float(i)] for i in range(count)]), context(), **params)
    assert says in str(caught.value)


def test_the_least_number_of_updates_is_the_one_at_which_the_rule_works():
    for name, params in [
        ("krum", {}),
        ("krum", {"byzantine": 0}),
        ("krum", {"byzantine": 3}),
        ("multi-krum", {"byzantine": 1}),
        ("multi-krum", {"byzantine": 2, "selected": 5}),
        ("multi-krum", {"byzantine": 0, "selected": 4}),
        ("median", {}),
    ]:
        bound = BUILTIN[name].bind(name, **params)
        rows = [[float(i)] for i in range(bound.min_updates)]
        merge(bound.accumulator(context()), columns(*rows))
        if bound.min_updates > 1:
            with pytest.raises(AggregationError):
                merge(bound.accumulator(context()), columns(*rows[:-1]))


def test_a_trimmed_mean_that_trims_nothing_says_what_would(caplog):
    with caplog.at_level(logging.WARNING):
        trimmed_mean(columns(*[[1.0]] * 5), context(), fraction=0.1)
    assert "trims nothing from 5 updates" in caplog.text
    assert "that takes 10 updates, or fraction=0.2" in caplog.text
    caplog.clear()
    trimmed_mean(columns(*[[1.0]] * 5), context(), fraction=0.2)
    trimmed_mean(columns([1.0]), context())
    assert not caplog.text


# What they tolerate


@pytest.mark.parametrize("poison", [1e4, -1e30, 3e38])
@pytest.mark.parametrize(
    "rule",
    [
        median,
        functools.partial(trimmed_mean, fraction=0.4),
        geometric_median,
        functools.partial(krum, byzantine=2),
        functools.partial(multi_krum, byzantine=2),
    ],
    ids=["median", "trimmed-mean", "geometric-median", "krum", "multi-krum"],
)
def test_bad_clients_within_the_bound_do_not_move_the_result_away_from_the_honest(rule, poison):
    generator = torch.Generator().manual_seed(1)
    honest = [{"w": torch.randn(30, generator=generator)} for _ in range(5)]
    bad = [{"w": torch.full((30,), poison)} for _ in range(2)]
    result = rule(updates_of(bad[0], *honest, bad[1]), context())["w"]
    assert result.abs().max() < 4
    assert fedavg(updates_of(bad[0], *honest, bad[1]), context())["w"].abs().max() > 1000


@pytest.mark.parametrize("rule", [median, geometric_median], ids=["median", "geometric-median"])
def test_fewer_than_half_is_the_bound_of_the_medians(rule):
    good, bad = {"w": torch.zeros(3)}, {"w": torch.full((3,), 1e6)}
    assert rule(updates_of(good, good, bad), context())["w"].abs().max() < 1e-3
    assert rule(updates_of(good, bad, bad), context())["w"].abs().max() > 1e5


def test_opposite_extremes_do_not_make_the_geometric_median_infinite():
    far = torch.finfo(torch.float32).max
    result = geometric_median(columns([far], [-far], [0.0], [1.0], [2.0]), context())["w"]
    assert 0 <= result.item() <= 2


# Against independent implementations, on random states


@st.composite
def stacks(draw, dtype=np.float32, min_clients=1, max_clients=7):
    clients = draw(st.integers(min_clients, max_clients))
    shape = draw(st.sampled_from([(), (0,), (1,), (5,), (3, 4), (2, 0, 3)]))
    width = 32 if dtype == np.float32 else 64
    size = clients * math.prod(shape)
    # With many equal values, as ties are where orders differ.
    numbers = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-1e6, 1e6, width=width))
    flat = draw(st.lists(numbers, min_size=size, max_size=size))
    return np.array(flat, dtype=dtype).reshape(clients, *shape)


def as_updates(stack, weights=None):
    return updates_of(*({"w": torch.from_numpy(np.array(row))} for row in stack), weights=weights)


@settings(max_examples=scaled(12, 60))
@given(stack=stacks())
def test_median_is_that_of_numpy(stack):
    result = median(as_updates(stack), context())["w"].numpy()
    np.testing.assert_array_equal(result, np.median(stack, axis=0))


@settings(max_examples=scaled(12, 60))
@given(stack=stacks(dtype=np.float64), fraction=st.floats(0, 0.49))
def test_trimmed_mean_is_that_of_scipy(stack, fraction):
    result = trimmed_mean(as_updates(stack), context(), fraction=fraction)["w"].numpy()
    assume(stack[0].size)  # scipy warns of the mean of nothing
    expected = scipy.stats.trim_mean(stack, fraction, axis=0)
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-6)


@settings(max_examples=scaled(12, 60))
@given(stack=stacks(dtype=np.float64), data=st.data())
def test_fedavg_is_that_of_numpy(stack, data):
    weights = data.draw(st.lists(st.integers(1, 10**6), min_size=len(stack), max_size=len(stack)))
    result = fedavg(as_updates(stack, weights), context())["w"].numpy()
    np.testing.assert_allclose(result, np.average(stack, axis=0, weights=weights), rtol=1e-9, atol=1e-6)


@settings(max_examples=scaled(8, 40))
@given(stack=stacks(dtype=np.float64, min_clients=5), byzantine=st.integers(0, 1))
def test_krum_and_multi_krum_are_those_of_flower(stack, byzantine):
    from flwr.server.strategy.aggregate import _compute_distances, aggregate_krum

    assume(stack[0].size)
    count, results = len(stack), [([row], 1) for row in stack]
    # Flower breaks ties by the order of its sort, so only where there are none is there one right answer.
    squared = np.sort(_compute_distances([[row] for row in stack]), axis=1)
    scores = np.sort(squared[:, 1 : count - byzantine - 1].sum(axis=1))
    assume(np.all(np.diff(scores) > 1e-6 * (1 + scores[-1])))
    expected = aggregate_krum(results, byzantine, 0)[0]
    np.testing.assert_array_equal(krum(as_updates(stack), context(), byzantine=byzantine)["w"], expected)
    several = count - byzantine - 2
    expected = aggregate_krum(results, byzantine, several)[0]
    result = multi_krum(as_updates(stack), context(), byzantine=byzantine, selected=several)["w"]
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(("steps", "within"), [(32, 2e-3), (500, 5e-4)])
@settings(max_examples=scaled(5, 25))
@given(seed=st.integers(0, 10**6), count=st.integers(3, 7))
def test_the_geometric_median_has_the_smallest_sum_of_distances(steps, within, seed, count):
    points = np.random.default_rng(seed).normal(size=(count, 3))
    found = geometric_median(as_updates(points), context(), iterations=steps)["w"].numpy()

    def cost(point):
        return np.linalg.norm(points - point, axis=1).sum()

    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 5000}
    best = scipy.optimize.minimize(cost, points.mean(axis=0), method="Nelder-Mead", options=options)
    assert cost(found) <= best.fun * (1 + within)


# What must hold for any state


@st.composite
def states(draw, clients):
    """State_dicts of one form for so many clients: all types, 0-d, empty and non-contiguous entries."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    forms = draw(
        st.lists(
            st.tuples(
                st.sampled_from(FLOATING + WHOLE),
                st.sampled_from([(), (0,), (3,), (2, 3), (4, 0)]),
                st.booleans(),
            ),
            min_size=1,
            max_size=5,
        )
    )
    return [
        {f"layer.{i}": entry(dtype, shape, turned, generator) for i, (dtype, shape, turned) in enumerate(forms)}
        for _ in range(clients)
    ]


def entry(dtype, shape, turned, generator):
    if dtype.is_floating_point or dtype.is_complex:
        base = torch.complex64 if dtype.is_complex else torch.float32
        tensor = (torch.randn(shape, generator=generator, dtype=base) * 3).to(dtype)
        if tensor.numel() and torch.rand((), generator=generator) < 0.5:
            tensor.view(-1)[0] = -0.0  # whose sign is easily lost in a sum
    else:
        tensor = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
    return tensor.t().contiguous().t() if turned and tensor.dim() == 2 else tensor


def no_complex(state):
    return {key: tensor for key, tensor in state.items() if not tensor.is_complex()}


def fit_for(name, many):
    many = [no_complex(state) for state in many] if name == "max" else many
    assume(many[0])
    return many


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=scaled(8, 40))
@given(data=st.data())
def test_one_client_gives_the_state_of_that_client(name, data):
    (state,) = fit_for(name, data.draw(states(1)))
    result = RULES[name](updates_of(state, weights=[7]), context(state))
    assert list(result) == list(state) or set(result) == set(state)
    for key, tensor in state.items():
        assert same_bits(result[key], tensor), key


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=scaled(6, 30))
@given(data=st.data(), count=st.integers(2, 7))
def test_identical_clients_give_identical_bits(name, data, count):
    (state,) = fit_for(name, data.draw(states(1)))
    weights = data.draw(st.lists(st.integers(1, 999), min_size=count, max_size=count))
    result = RULES[name](updates_of(*[state] * count, weights=weights), context(state))
    for key, tensor in state.items():
        assert same_bits(result[key], tensor), key


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=scaled(6, 30))
@given(data=st.data(), count=st.integers(2, 6))
def test_the_order_of_the_clients_changes_nothing(name, data, count):
    many = fit_for(name, data.draw(states(count)))
    weights = data.draw(st.lists(st.integers(1, 99), min_size=count, max_size=count))
    updates = updates_of(*many, weights=weights)
    shuffled = data.draw(st.permutations(updates))
    one, other = RULES[name](updates, context()), RULES[name](shuffled, context())
    exact = name not in ("fedavg", "geometric-median")  # these two add up in the order they are given
    for key, tensor in one.items():
        if exact or not (tensor.is_floating_point() or tensor.is_complex()):
            assert torch.equal(widest(tensor), widest(other[key]))
        else:
            near = {"rtol": 2 * eps(tensor.dtype), "atol": 1e-3 if name == "geometric-median" else 1e-5}
            torch.testing.assert_close(widest(tensor), widest(other[key]), **near)


@settings(max_examples=scaled(6, 30))
@given(data=st.data(), count=st.integers(2, 4))
def test_a_weight_of_n_is_n_copies(data, count):
    many = data.draw(states(count))
    weights = data.draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    weighed = fedavg(updates_of(*many, weights=weights), context())
    copies = [state for state, weight in zip(many, weights, strict=True) for _ in range(weight)]
    copied = fedavg(updates_of(*copies), context())
    for key, tensor in weighed.items():
        torch.testing.assert_close(widest(tensor), widest(copied[key]), rtol=2 * eps(tensor.dtype), atol=1e-5)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=scaled(5, 20))
@given(data=st.data(), count=st.integers(1, 5))
def test_no_rule_changes_what_it_is_given(name, data, count):
    many = fit_for(name, data.draw(states(count)))
    before = [{key: tensor.clone() for key, tensor in state.items()} for state in many]
    result = RULES[name](updates_of(*many), context())
    for state, kept in zip(many, before, strict=True):
        assert list(state) == list(kept)
        assert all(same_bits(state[key], kept[key]) for key in kept)
    for key, tensor in many[0].items():
        assert (result[key].dtype, result[key].shape) == (tensor.dtype, tensor.shape)


def widest(tensor):
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64)


def eps(dtype):
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0


def test_a_nan_is_never_hidden_by_a_rule_that_looks_at_its_coordinate():
    rows = [[math.nan, 1.0], [1.0, 2.0], [2.0, 3.0]]
    assert np.isnan(np.median(np.array(rows), axis=0)).tolist() == [True, False]
    for rule in (median, functools.partial(trimmed_mean, fraction=0.34), fedavg, maximum_of_all):
        assert rule(columns(*rows), context())["w"].isnan().tolist() == [True, False]


def test_large_entries_are_merged_in_pieces_and_come_out_whole():
    stack = np.random.default_rng(0).normal(size=(4, 100_003)).astype(np.float32)
    np.testing.assert_array_equal(median(as_updates(stack), context())["w"], np.median(stack, axis=0))
    distances = [np.sum((stack[0].astype(np.float64) - row) ** 2) for row in stack]
    from fedsplit.aggregation.numeric import squared_distance

    for update, expected in zip(as_updates(stack), distances, strict=True):
        found = squared_distance({"w": torch.from_numpy(stack[0])}, update.state_dict, ["w"])
        assert found == pytest.approx(expected, rel=1e-5)


def test_tied_entries_are_merged_each_for_itself():
    shared = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    updates = updates_of(*({"in": t, "out": t} for t in shared))
    for rule in RULES.values():
        result = rule(updates, context())
        assert torch.equal(result["in"], result["out"])
