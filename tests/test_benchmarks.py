"""The benchmarks run and say what they should; what they measure is nobody's test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import algorithms, split, stragglers
from benchmarks.common import Figure, periods, spread, stamp
from tests.bounds import BOUND_S

ROOT = Path(__file__).parents[1]


def test_a_ratio_is_ours_by_theirs_and_a_speedup_theirs_by_ours():
    figure = {"topic": "t", "name": "n", "unit": "s", "samples": [1.0, 2.0, 3.0], "peer_samples": [8.0]}
    assert Figure(**figure, judged_by="ratio", target=0.25).judged == 0.25
    assert Figure(**figure, judged_by="speedup", target=4.0).judged == 4.0
    assert Figure(**figure, judged_by="difference", target=5.0).judged == -6.0


def test_at_most_is_reached_below_and_at_least_above():
    figure = {"topic": "t", "name": "n", "unit": "s", "samples": [2.0], "peer_samples": [8.0]}
    assert Figure(**figure, judged_by="ratio", at_least=True, target=0.2).reached is True
    assert Figure(**figure, judged_by="ratio", target=0.3).reached is True
    assert Figure(**figure, judged_by="ratio", target=0.2).reached is False
    assert Figure(**figure, judged_by="speedup", target=5.0).reached is False
    assert Figure(**figure).reached is None


def test_what_was_not_measured_has_no_figure():
    figure = Figure(topic="t", name="n", unit="s", target=1.0, missing="why")
    assert (figure.median, figure.judged, figure.reached) == (None, None, None)
    assert figure.to_json()["missing"] == "why"


def test_the_spread_of_few_samples_is_their_range_and_of_many_their_quartiles():
    assert spread([]) is None
    assert spread([3.0, 1.0]) == (1.0, 3.0)
    assert spread([float(number) for number in range(9)]) == (1.5, 6.5)


def test_the_first_round_warms_up_and_is_not_counted(tmp_path):
    (tmp_path / "stamps-1").write_text("1.0\n9.0\n9.5\n11.5\n")
    assert periods(tmp_path / "stamps-1") == [0.5, 2.0]
    stamp(tmp_path, 2)
    assert periods(tmp_path / "stamps-2") == []


def test_the_table_of_algorithms_has_mean_and_deviation_and_bytes():
    runs = [algorithms.Outcome(accuracy, accuracy + 1, 56_000.0, 112_000.0) for accuracy in (80.0, 82.0, 84.0)]
    table = algorithms.markdown({("FedAvg", 0.1): runs, ("Ditto", 0.1): runs[:1]}).splitlines()
    assert table[0] == "| algorithm | accuracy, alpha 0.1 | own accuracy, alpha 0.1 | up | down |"
    assert table[2] == "| FedAvg | 82.0 ± 2.0 | 83.0 ± 2.0 | 56.0 kB | 112.0 kB |"
    assert table[3] == "| Ditto | 80.0 | 81.0 | 56.0 kB | 112.0 kB |"


def test_the_table_of_slow_ranks_has_all_seeds_and_says_never_and_compares_only_what_was_always_reached():
    def outcome(reached, accuracy=0.5):
        curve = [(reached or 5.0, 0.96 if reached else 0.9, 0.1), (99.0, accuracy, 0.25)]
        return stragglers.Outcome(curve=curve, thrown=1, trained=3, most_s=100.0)

    found = {
        ("IID", "synchronous"): [outcome(60.0), outcome(40.0)], ("IID", "--buffer 3"): [outcome(10.0), outcome(10.0)],
        ("IID", "--balance"): [outcome(10.0), outcome(None)],
    }  # fmt: skip
    rows = stragglers.markdown(found).splitlines()[2:]
    assert rows[0] == "| IID | synchronous | 60, 40 | 1.0 | 50.0 % | 25.0 % | 3 | 1 |"
    assert rows[1] == "| IID | `--buffer 3` | 10, 10 | 5.0 | 50.0 % | 25.0 % | 3 | 1 |"
    assert rows[2] == "| IID | `--balance` | 10, never |  | 50.0 % | 25.0 % | 3 | 1 |"
    buffered = stragglers._figures("IID", "--buffer 3", found)
    assert [figure.judged for figure in buffered] == [5.0, 0.0]
    assert [figure.median for figure in stragglers._figures("IID", "--balance", found)] == [None, 50.0]


@pytest.mark.parametrize("mode", [{"buffer": 3}, {"balance": True}, {"round_timeout": 2.0}], ids=str)
def test_a_simulated_run_comes_out_the_same_again(mode):
    first, second = (stragglers.simulate(mode, "IID", most_s=3.0, seed=1) for _ in range(2))
    assert first == second
    assert len(first.curve) >= 1 and first.trained >= 8


def test_more_or_fewer_bytes_than_the_formula_are_an_error():
    split._check("activations", 1_000 + 3 * 200, 1_000, 3)
    for found in (999, 1_001 + 3 * 1_000):
        with pytest.raises(AssertionError, match=f"activations: {found:,} bytes, by the formula 1,000 in 3 payloads"):
            split._check("activations", found, 1_000, 3)


def test_a_rank_at_the_cut_has_the_formulas_numbers():
    """The digits' 1,438 training images of 64 pixels, after a convolution with 16 channels and a pooling by 2."""
    examples, batches, numbers, state = split._shapes(split.DIGITS, "features.2")
    assert (examples, numbers, state) == (1_438, 16 * 4 * 4, 4 * (9 * 16 + 16))
    assert batches == 23 + 23


@pytest.mark.slow
def test_a_tiny_run_prints_a_table_and_writes_every_sample(tmp_path):
    output = tmp_path / "figures.json"
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--tiny", "--output", str(output), "hand-off", "merge", "secure"],
        cwd=ROOT, capture_output=True, text=True, timeout=BOUND_S,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads(output.read_text())
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["packages"]["flwr"]
    by_topic = {figure["topic"] for figure in record["figures"]}
    assert by_topic == {"hand-off", "merge", "secure"}
    for figure in record["figures"]:
        assert figure["samples"] and figure["median"] > 0, figure
        assert figure["name"] in ended.stdout
