"""The rule `secure(...)`: what it goes with, and what is refused before anything runs."""

from __future__ import annotations

import pytest
import torch
from flwr.server import SimpleClientManager

from fedsplit.aggregation.spec import BUILTIN_RULES, OF_THE_MEAN
from fedsplit.errors import UsageError
from fedsplit.server.secure_rounds import check_sums
from fedsplit.server.settings import ServerSettings
from fedsplit.server.strategy import Strategy, to_payload
from tests.in_process import Scripts


@pytest.mark.parametrize("rule", [name for name in BUILTIN_RULES if name not in (*OF_THE_MEAN, "dp", "secure")])
def test_a_rule_that_needs_single_updates_is_refused_with_the_reason(scripts: Scripts, rule: str) -> None:
    ended = scripts.run("server_main.py", "--aggregate", f"secure({rule}, range=1)")
    assert ended.code == 2
    assert f"secure cannot wrap {rule}: {rule} needs single updates" in ended.errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["secure(krum(byzantine=1), range=1)"], "krum needs single updates, and the server sees only their mean"),
        (["secure(dp(fedavg, clip=1, noise=1), range=1)"], "dp clips single updates and adds noise on the server"),
        (["dp(secure(fedavg, range=1), clip=1, noise=1)"], "dp cannot wrap secure"),
        (["secure(my.module:rule, range=1)"], "my.module:rule needs single updates"),
        (["secure(fedavg)"], "secure needs range"),
        (["secure(fedavg, range=0)"], "range is a number above 0"),
        (["secure(fedavg, range=1, threshold=0.3)"], "threshold is a whole number of ranks, 2 or more, or a share"),
        (["secure(fedavg, range=1, neighbours=5)"], "neighbours is an even whole number"),
        (["<Linear>=secure(fedavg, range=1)"], "goes with local only"),
        (["a*=secure(fedavg, range=1, threshold=2)", "--aggregate", "secure(fedavg, range=1)"], "differ in threshold"),
        (["secure(fedavg, range=1)", "--buffer", "2"], "cannot go with --buffer or --merge-after: the masks"),
        (["a*=secure(fedavg, range=1)", "--merge-after", "2"], "a*=secure(fedavg, range=1) cannot go with --buffer"),
        (["secure(fedavg, range=1)", "--split-learning", "sfl-v1"], "cannot go with --split-learning"),
    ],
)  # fmt: skip
def test_what_cannot_be_summed_securely_is_a_mistake_in_the_flags(
    scripts: Scripts, flags: list[str], said: str
) -> None:
    ended = scripts.run("server_main.py", "--aggregate", *flags)
    assert ended.code == 2
    assert said in ended.errors


def test_ranges_may_differ_between_parts_and_a_bare_rule_takes_the_rest() -> None:
    rules = ("body.*=secure(fedavg, range=2, threshold=3)", "head.*=max", "secure(fedavg, range=5, threshold=3)")
    terms = ServerSettings(aggregate=rules).secure_terms
    assert terms is not None
    assert (terms.ranges, terms.threshold, terms.neighbours) == ({"body.*": 2.0, "*": 5.0}, 3.0, 0)
    assert ServerSettings(aggregate=("fedavg",)).secure_terms is None


def test_a_threshold_above_the_ranks_that_are_waited_for_is_refused() -> None:
    strategy = Strategy("secure(fedavg, range=1, threshold=5)", min_clients=4)
    with pytest.raises(UsageError, match="the rules need at least 5 updates a round, --min-clients is 4"):
        strategy.begin_run({"w": torch.zeros(2)}, {})


def test_entries_that_are_not_floating_point_are_named_with_what_to_do() -> None:
    state = {"w": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(0)}
    check_sums(state, {"w": 1.0})
    with pytest.raises(UsageError, match=r"'bn.num_batches_tracked': give them a rule of their own before it"):
        check_sums(state, dict.fromkeys(state, 1.0))


def test_flowers_own_server_is_told_that_it_cannot_sum_securely() -> None:
    strategy = Strategy("secure(fedavg, range=1)")
    with pytest.raises(UsageError, match="only fedsplit's own server and trainers"):
        strategy.configure_fit(1, to_payload({"w": torch.zeros(2)}), SimpleClientManager())
