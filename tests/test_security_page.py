"""SECURITY.md's table of what a malicious client can do, line by line: each is done by a test that is named here."""

from __future__ import annotations

import ast
from functools import cache

import pytest
import torch

from fedsplit.aggregation import fedavg
from tests.programs import ROOT
from tests.test_aggregation_rules import ROBUST, columns, context

# The beginning of each line, and the tests that do what it says; none where there is nothing to be shown.
TESTS = {
    "send a poisoned update of the right form": [
        "test_attack.py::test_one_attacker_ruins_the_mean",
        "test_attack.py::test_a_robust_rule_stays_within_two_points_of_the_clean_run",
        "test_aggregation_rules.py::test_bad_clients_within_the_bound_do_not_move_the_result_away_from_the_honest",
    ],
    "send an enormous update": [
        "test_aggregation_privacy.py::test_an_update_is_clipped_over_all_floating_entries_against_where_it_started",
        "test_aggregation_rules.py::test_fewer_than_half_is_the_bound_of_the_medians",
    ],
    "claim any number of examples": [
        "test_security_page.py::test_a_rule_that_does_not_weigh_is_not_moved_by_a_number_of_examples",
        "test_aggregation_privacy.py::test_the_number_of_examples_does_not_count",
    ],
    "plant a backdoor": [],
    "learn of other ranks' data": [
        "test_aggregation_privacy.py::test_the_noise_has_the_deviation_that_is_documented",
        "test_aggregation_privacy.py::test_the_epsilon_of_fedavg_is_that_of_the_noise_multiplier",
    ],
    "never answer, or answer slowly": [
        "test_hostile_client.py::test_what_is_late_is_over_whatever_the_client_says",
        "test_recovery.py::test_a_round_that_takes_too_long_is_cancelled_and_the_trainer_told",
    ],
    "take another rank's number": [
        "test_recovery.py::test_a_second_live_client_of_a_rank_is_refused_and_told_why",
        "test_security_join.py::test_a_proof_lets_only_its_own_rank_in",
    ],
    "claim false metrics": ["test_five_programs.py::test_metrics_may_be_called_as_the_entries_of_a_rounds_line"],
    "send what is no answer": [
        "test_hostile_client.py::test_the_honest_finish_every_round_with_the_same_bits",
        "test_hostile_client.py::test_nothing_passes_the_gate_but_what_has_the_form_of_an_answer",
        "test_hostile_nodes.py::test_the_honest_nodes_of_a_server_app_finish_every_round_with_the_same_bits",
    ],
    "where the model is cut, hand over activations that are no payload": [
        "test_split_hostile.py::test_wrong_numbers_leave_no_trace_in_the_part_that_all_share",
        "test_split_hostile.py::test_a_client_that_lies_about_a_step_costs_its_rank_the_round",
        "test_split_hostile.py::test_steps_are_bounded_in_number_and_all_together",
    ],
    "where the model is cut, hand over finite activations": [],
    "say for ever that it is working": [
        "test_hostile_client.py::test_what_is_late_is_over_whatever_the_client_says",
    ],
}


def rows() -> list[str]:
    """Return the first cell of each line of the table."""
    _, _, page = (ROOT / "SECURITY.md").read_text().partition("| it can | what answers that |\n")
    table, _, _ = page.partition("\n\n")
    return [line.split("|")[1].strip() for line in table.splitlines()[1:]]


def test_every_line_of_the_table_has_its_tests() -> None:
    found = rows()
    assert len(found) == len(TESTS)
    assert [next((begin for begin in TESTS if row.startswith(begin)), row) for row in found] == [*TESTS]


@cache
def names_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("test", sorted({test for tests in TESTS.values() for test in tests}))
def test_a_test_that_is_named_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert name in names_of(file)


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "krum"])
def test_a_rule_that_does_not_weigh_is_not_moved_by_a_number_of_examples(name: str) -> None:
    """The same updates, one of them with as many examples as can be claimed."""
    rows = [[float(value), -float(value)] for value in (1, 2, 3, 4, 50)]
    honest, claimed = ([3] * 5, [3, 3, 3, 3, 2**53])
    merged = [ROBUST[name](columns(*rows, weights=weights), context())["w"] for weights in (honest, claimed)]
    assert torch.equal(*merged)
    weighed = [fedavg(columns(*rows, weights=weights), context())["w"] for weights in (honest, claimed)]
    assert not torch.equal(*weighed)
