"""`dp(rule, …)`: what is clipped, how much noise there is, and what is accounted for."""

from __future__ import annotations

import builtins
import json

import dp_accounting
import pytest
import torch
from dp_accounting import pld

from fedsplit.aggregation import Split, Update, parse_rules, privacy_spent
from fedsplit.errors import AggregationError, UsageError


def run(rule, previous, states, memory=None, weights=None):
    split = Split.resolve(parse_rules([rule] if isinstance(rule, str) else rule), previous)
    merger = split.start_round(
        server_round=1,
        total_rounds=1,
        previous=previous,
        seed=0,
        memory={} if memory is None else memory,
    )
    for rank, state in enumerate(states, start=1):
        merger.add(Update(rank=rank, state_dict=state, num_examples=weights[rank - 1] if weights else 1))
    return merger.finish()


def test_an_update_is_clipped_over_all_floating_entries_against_where_it_started():
    previous = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0]), "n": torch.tensor(5)}
    # It moved by (3, 4), a distance of 5; clipped to 1 it moved by (0.6, 0.8).
    sent = {"a": torch.tensor([4.0]), "b": torch.tensor([6.0]), "n": torch.tensor(9)}
    result = run("dp(fedavg, clip=1.0, noise=0)", previous, [sent])
    assert result["a"].item() == pytest.approx(1.6)
    assert result["b"].item() == pytest.approx(2.8)
    assert result["n"].item() == 5  # nothing protects a whole number, so the server's stays


@pytest.mark.parametrize("rule", ["fedavg", "median", "krum(byzantine=0)", "flower.FedAvg"])
def test_a_small_update_without_noise_passes_bit_for_bit(rule):
    previous = {"w": torch.zeros(50), "h": torch.zeros(3, dtype=torch.bfloat16)}
    generator = torch.Generator().manual_seed(0)
    sent = {key: (torch.randn(t.shape, generator=generator) / 100).to(t.dtype) for key, t in previous.items()}
    result = run(f"dp({rule}, clip=1.0, noise=0)", previous, [sent])
    assert all(torch.equal(result[key], sent[key]) and result[key].dtype == sent[key].dtype for key in sent)


def test_clipping_leaves_a_mask_of_infinities_as_it_is():
    previous = {"w": torch.tensor([float("-inf"), 0.0])}
    sent = {"w": torch.tensor([float("-inf"), 10.0])}
    assert run("dp(fedavg, clip=1.0, noise=0)", previous, [sent, sent])["w"].tolist() == [float("-inf"), 1.0]


def test_the_number_of_examples_does_not_count():
    previous = {"w": torch.zeros(1)}
    states = [{"w": torch.tensor([x])} for x in (0.0, 1.0)]
    assert run("dp(fedavg, clip=9.0, noise=0)", previous, states, weights=[1, 999])["w"].item() == 0.5


@pytest.mark.parametrize("count", [1, 4])
def test_the_noise_has_the_deviation_that_is_documented(count):
    previous = {"w": torch.zeros(200_000), "z": torch.zeros(100_000, dtype=torch.complex64)}
    result = run("dp(fedavg, clip=2.0, noise=3.0)", previous, [previous] * count)
    assert result["w"].std().item() == pytest.approx(3.0 * 2.0 / count, rel=0.02)
    assert result["w"].mean().item() == pytest.approx(0, abs=0.1)
    for coordinate in (result["z"].real, result["z"].imag):
        assert coordinate.std().item() == pytest.approx(3.0 * 2.0 / count, rel=0.02)


def test_the_noise_is_not_that_of_the_run_s_seed():
    previous = {"w": torch.zeros(10)}
    results = [run("dp(fedavg, clip=1.0, noise=1.0)", previous, [previous]) for _ in range(2)]
    assert not torch.equal(results[0]["w"], results[1]["w"])


def test_a_rule_that_follows_one_client_is_clipped_once_more(tmp_path, monkeypatch):
    (tmp_path / "rule_that_doubles.py").write_text(
        "def rule(updates, context):\n    return {k: 2 * v for k, v in updates[0].state_dict.items()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    previous = {"w": torch.zeros(2)}
    result = run("dp(rule_that_doubles:rule, clip=1.0, noise=0)", previous, [{"w": torch.tensor([3.0, 4.0])}])
    assert result["w"].tolist() == pytest.approx([0.6, 0.8])


def test_a_rule_inside_that_misbehaves_is_named(tmp_path, monkeypatch):
    (tmp_path / "rule_that_forgets.py").write_text("def rule(updates, context):\n    return {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    previous = {"w": torch.zeros(2)}
    with pytest.raises(AggregationError, match=r"rule_that_forgets:rule.* lacks 'w'"):
        run("dp(rule_that_forgets:rule, clip=1.0, noise=0)", previous, [previous])


def test_the_rule_inside_keeps_its_own_memory():
    previous, memory = {"w": torch.zeros(2)}, {}
    for _ in range(2):
        run("dp(flower.FedAvgM(server_momentum=0.9), clip=1.0, noise=1.0)", previous, [previous], memory)
    assert memory["*=dp(flower.FedAvgM)"]["inner"]["merges"] == 2
    assert memory["*=dp(flower.FedAvgM)"]["privacy"]["steps"] == 2


def gaussian_epsilon(multiplier, rounds, delta):
    """The exact accountant for one mechanism, which ours, by Rényi divergence, must not undercut."""
    accountant = pld.PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(multiplier), rounds)
    return accountant.get_epsilon(delta)


def test_the_epsilon_of_fedavg_is_that_of_the_noise_multiplier():
    previous, memory = {"w": torch.zeros(2)}, {}
    for _ in range(5):
        run("dp(fedavg, clip=0.5, noise=2.0)", previous, [previous] * 3, memory)
    spent = memory["*=dp(fedavg)"]["privacy"]
    exact = gaussian_epsilon(2.0, 5, 1e-5)
    assert exact <= spent["epsilon"] <= 1.15 * exact
    assert (spent["delta"], spent["steps"]) == (1e-5, 5)
    assert privacy_spent(memory) == {"epsilon": spent["epsilon"], "delta": 1e-5, "steps": 5}
    json.dumps(spent)


def test_any_other_rule_is_accounted_for_with_what_it_may_move_by():
    previous, memory = {"w": torch.zeros(2)}, {}
    run("dp(median, clip=0.5, noise=12.0)", previous, [previous] * 3, memory)
    exact = gaussian_epsilon(12.0 / 6, 1, 1e-5)
    assert exact <= memory["*=dp(median)"]["privacy"]["epsilon"] <= 1.15 * exact


def test_parts_are_composed_and_the_smallest_delta_counts():
    previous, memory = {"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}, {}
    rules = ["a=dp(fedavg, clip=1.0, noise=2.0)", "b=dp(fedavg, clip=1.0, noise=2.0, delta=1e-6)", "fedavg"]
    run(rules, previous, [previous], memory)
    both, one = privacy_spent(memory), memory["a=dp(fedavg)"]["privacy"]["epsilon"]
    assert both["steps"] == 2
    assert both["delta"] == 1e-6
    assert both["epsilon"] >= gaussian_epsilon(2.0, 2, 1e-6) > one


def test_without_noise_there_is_no_bound_and_without_dp_nothing_to_say():
    previous, memory = {"w": torch.zeros(2)}, {}
    run("dp(fedavg, clip=1.0, noise=0)", previous, [previous], memory)
    assert privacy_spent(memory) == {"epsilon": None, "delta": 1e-5, "steps": 1}
    assert privacy_spent({"*": {}, "body": {"privacy": "a user's own"}}) is None


def test_without_the_accountant_the_flag_is_refused_with_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'fedsplit\[privacy\]'"):
        Split.resolve(parse_rules(["dp(fedavg, clip=1.0, noise=1.0)"]), {"w": torch.zeros(1)})
    Split.resolve(parse_rules(["dp(fedavg, clip=1.0, noise=0)"]), {"w": torch.zeros(1)})
