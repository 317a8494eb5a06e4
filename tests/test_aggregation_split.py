"""The split of a model into parts, the merging of a round, and what is said of a rule that misbehaves."""

from __future__ import annotations

import math

import pytest
import torch

from fedsplit.aggregation import Split, Update, parse_rules
from fedsplit.aggregation.base import seeded_generator
from fedsplit.aggregation.validation import check_memory
from fedsplit.errors import AggregationError, UsageError


def state(value=0.0):
    return {
        "body.weight": torch.full((2, 2), value),
        "body.count": torch.tensor(int(value)),
        "head.weight": torch.full((3,), value, dtype=torch.bfloat16),
        "head.bias": torch.full((), value),
    }


def update(rank, value, num_examples=1, drop=()):
    kept = {key: tensor for key, tensor in state(value).items() if key not in drop}
    return Update(rank=rank, state_dict=kept, num_examples=num_examples, metrics={"loss": float(rank)})


def split_of(*texts, reference=None):
    return Split.resolve(parse_rules(texts), reference or state())


def rows_of(split):
    return [part.row for part in split.parts]


def begin(split, previous=None, server_round=1, memory=None, seed=0):
    return split.start_round(
        server_round=server_round,
        total_rounds=5,
        previous=previous or state(),
        seed=seed,
        memory={} if memory is None else memory,
    )


def merged(split, *updates, **kwargs):
    merger = begin(split, **kwargs)
    for one in updates:
        merger.add(one)
    return merger.finish()


@pytest.fixture
def user_rules(tmp_path, monkeypatch):
    """Writes a module of the user's own rules; returns the name of a rule in it."""

    def write(body):
        name = f"rules_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(f"import math\nimport torch\n\n{body}\n")
        monkeypatch.syspath_prepend(tmp_path)
        return f"{name}:rule"

    return write


# Resolving


def test_each_key_goes_to_the_first_pattern_that_matches_it():
    split = split_of("head.bias=max", "head.*=median", "fedavg")
    assert [(part.name, part.keys) for part in split.parts] == [
        ("head.bias", ("head.bias",)),
        ("head.*", ("head.weight",)),
        ("*", ("body.weight", "body.count")),
    ]


def test_the_table_has_entries_bytes_and_rule_of_each_part():
    rows = rows_of(split_of("head.*=local", "trimmed-mean(fraction=0.2)"))
    assert [tuple(row) for row in rows] == [
        ("head.*", 2, 3 * 2 + 4, "local"),
        ("*", 2, 4 * 4 + 8, "trimmed-mean(fraction=0.2)"),
    ]
    assert rows[0].bytes == 10


def test_it_can_be_resolved_from_a_manifest_without_data():
    manifest = {key: tensor.to("meta") for key, tensor in state().items()}
    rules = ("body.*=median", "fedavg")
    assert rows_of(split_of(*rules, reference=manifest)) == rows_of(split_of(*rules))


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (
            ["tail.*=median", "fedavg"],
            "the pattern of tail.*=median matches no entry; there are 'body.weight'",
        ),
        (
            ["head.*=median", "head.bias=max", "fedavg"],
            "the pattern of head.bias=max comes too late: earlier patterns take 'head.bias'",
        ),
        (["head.*=median"], "no rule for 'body.weight', 'body.count': no pattern matches"),
        (["local"], "every entry is local"),
        (["tail.*=local", "fedavg"], "the pattern of tail.*=local matches no entry"),
    ],
)
def test_a_split_that_leaves_something_open_is_refused(texts, says):
    with pytest.raises(UsageError) as caught:
        split_of(*texts)
    assert says in str(caught.value)


def test_a_local_pattern_may_match_nothing_once_its_entries_were_withheld():
    shared = {key: tensor for key, tensor in state().items() if not key.startswith("head")}
    specs = parse_rules(["head.*=local", "fedavg"])
    split = Split.resolve(specs, shared, local_withheld=True)
    assert [row.entries for row in rows_of(split)] == [0, 2]
    with pytest.raises(UsageError, match="matches no entry"):
        Split.resolve(parse_rules(["head.*=median", "fedavg"]), shared, local_withheld=True)


def test_the_least_number_of_updates_is_that_of_the_neediest_part():
    assert split_of("body.*=krum(byzantine=1)", "head.*=multi-krum(byzantine=2)").min_updates == 7
    assert split_of("head.*=local", "fedavg").min_updates == 1


# Merging


def test_each_part_is_merged_by_its_rule_in_the_order_of_the_previous_keys():
    split = split_of("head.weight=max", "head.bias=frozen", "body.*=median")
    result = merged(split, update(1, 1.0), update(2, 2.0), update(3, 300.0), previous=state(-1.0))
    assert list(result) == list(state())
    assert result["body.weight"].unique().tolist() == [2.0]
    assert result["body.count"].item() == 300
    assert result["head.weight"].tolist() == [300.0] * 3
    assert result["head.weight"].dtype == torch.bfloat16
    assert result["head.bias"].item() == -1.0


def test_local_parts_are_asked_of_nobody_and_returned_to_nobody():
    split = split_of("head.*=local", "fedavg")
    shared = {key: tensor for key, tensor in state().items() if not key.startswith("head")}
    merger = begin(split, previous=shared)
    merger.add(update(1, 4.0, drop=("head.weight", "head.bias")))
    assert list(merger.finish()) == ["body.weight", "body.count"]
    assert list(begin(split, previous=state()).finish()) == ["body.weight", "body.count"]


def test_without_an_update_the_previous_tensors_themselves_come_back():
    previous = state(3.0)
    merger = begin(split_of("head.*=krum", "flower.FedAdam"), previous=previous)
    result = merger.finish()
    assert (merger.count, list(result)) == (0, list(previous))
    assert all(result[key] is previous[key] for key in previous)


def test_updates_are_retained_only_for_rules_that_must_see_all():
    assert not begin(split_of("head.*=max", "body.count=frozen", "fedavg")).retains
    assert not begin(split_of("dp(fedavg, clip=1.0, noise=0)")).retains
    assert begin(split_of("head.bias=median", "fedavg")).retains
    assert begin(split_of("dp(median, clip=1.0, noise=0)")).retains


def test_a_one_pass_round_really_lets_go_of_each_update():
    import gc
    import weakref

    merger = begin(split_of("head.*=max", "body.count=frozen", "fedavg"))
    watched = []
    for rank in (1, 2):
        one = update(rank, float(rank))
        watched += [weakref.ref(tensor) for tensor in one.state_dict.values()]
        merger.add(one)
        del one
        gc.collect()
        assert not any(ref() is not None for ref in watched)
    assert merger.finish()["body.weight"].unique().tolist() == [1.5]


def test_updates_of_one_mean_are_merged_several_at_once_and_the_bad_among_them_are_named():
    good = [update(rank, rank / 3, num_examples=rank) for rank in range(1, 7)]
    bad = update(7, 1.0)
    bad.state_dict["head.bias"].fill_(math.nan)
    merger = begin(split_of("fedavg"))
    assert merger.at_once > 1
    assert merger.add_all(good[:2]) == {}
    assert merger.add_all([good[2], bad, good[3]]) == {7: "NaN or Inf in 'head.bias'"}
    assert merger.add_all([bad]) == {7: "NaN or Inf in 'head.bias'"}
    assert merger.add_all(good[4:]) == {} and merger.count == 6
    found, expected = merger.finish(), merged(split_of("fedavg"), *good)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_mask_of_the_state_is_no_reason_to_refuse_updates_merged_at_once():
    previous = {"mask": torch.tensor([0.0, -math.inf]), "w": torch.zeros(2)}
    updates = [
        Update(rank=rank, state_dict=previous | {"w": torch.full((2,), float(rank))}, num_examples=1)
        for rank in (1, 2, 3)
    ]
    merger = begin(split_of("fedavg", reference=previous), previous)
    assert merger.add_all(updates) == {}
    assert merger.finish()["mask"].tolist() == [0.0, -math.inf] and merger.count == 3


def test_how_many_updates_wait_to_be_merged_at_once_goes_by_the_size_of_the_state():
    def at_once(*texts, size=4):
        previous = {"a": torch.empty(size // 4, device="meta"), "b": torch.zeros(1)}
        return begin(split_of(*texts, reference=previous), previous).at_once

    assert at_once("fedavg") == at_once("fedavg", size=50_000_000) == 8
    assert at_once("fedavg", size=100_000_000) == 5
    # Of a state that is larger than that no more than one update is in memory.
    assert at_once("fedavg", size=400_000_000) == 1
    for texts in (["median"], ["max"], ["a=frozen", "fedavg"], ["dp(fedavg, clip=1.0, noise=0)"]):
        assert at_once(*texts) == 1


def test_the_first_update_is_not_the_memory_the_mean_is_kept_in():
    first = update(1, 1.0)
    merged(split_of("fedavg"), first, update(2, 5.0))
    assert first.state_dict["body.weight"].unique().tolist() == [1.0]


# The user's own rules


def test_a_users_rule_gets_what_it_was_promised(user_rules):
    name = user_rules(
        """
def rule(updates, context, *, step):
    assert [u.rank for u in updates] == [1, 2] and updates[0].metrics == {"loss": 1.0}
    assert updates[1].num_examples == 7 and set(updates[0].state_dict) == set(context.previous)
    assert (context.server_round, context.total_rounds, context.part) == (2, 5, "body.*")
    context.memory["calls"] = context.memory.get("calls", 0) + 1
    noise = torch.randn(2, 2, generator=context.generator)
    return {k: v + step * noise if k == "body.weight" else v for k, v in context.previous.items()}
"""
    )
    split = split_of(f"body.*={name}(step=0.5)", "fedavg")
    memory = {f"body.*={name}": {"calls": 3}}
    updates = [update(1, 1.0), update(2, 2.0, num_examples=7)]
    result = merged(split, *updates, server_round=2, memory=memory)
    assert memory[f"body.*={name}"] == {"calls": 4}
    again = merged(split, *updates, server_round=2)
    assert torch.equal(result["body.weight"], again["body.weight"])
    other = merged(split, *updates, server_round=2, seed=1)
    assert not torch.equal(result["body.weight"], other["body.weight"])


def test_the_generator_depends_on_seed_round_and_part():
    first = {
        (seed, number, part): torch.rand(1, generator=seeded_generator(seed, number, part)).item()
        for seed in (0, 1)
        for number in (1, 11)
        for part in ("*", "1*")
    }
    assert len(set(first.values())) == len(first)


def test_a_class_of_the_users_can_be_a_rule_that_needs_one_pass(user_rules):
    name = user_rules(
        """
class rule:
    name, one_pass, min_updates = "last", True, 1
    def __init__(self, scale=1.0):
        self.scale = scale
    def accumulator(self, context):
        scale = self.scale
        class Last:
            def add(self, update): self.last = {k: v.clone() for k, v in update.state_dict.items()}
            def result(self): return {k: (v * scale).to(v.dtype) for k, v in self.last.items()}
        return Last()
"""
    )
    merger = begin(split_of(f"{name}(scale=2.0)"))
    assert not merger.retains
    merger.add(update(1, 1.0))
    merger.add(update(2, 3.0))
    assert merger.finish()["head.bias"].item() == 6.0


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "return {}",
            "its result lacks 'body.weight', 'body.count', 'head.weight' and 1 more of the state before",
        ),
        ("return {**out, 'extra': torch.zeros(1)}", "its result has 'extra', which the state before does not have"),
        (
            "return {**out, 'head.bias': torch.zeros(1)}",
            "'head.bias': the state before has shape [], its result has [1]",
        ),
        (
            "return {**out, 'head.weight': torch.zeros(3)}",
            "'head.weight': the state before has torch.bfloat16, its result has torch.float32",
        ),
        ("return {**out, 'head.bias': 1.0}", "it returned a float for 'head.bias', expected a tensor"),
        ("return {**out, 'head.bias': torch.tensor(math.nan)}", "it made a NaN or Inf in 'head.bias'"),
        ("return None", "it returned a NoneType, expected a dict of tensors"),
        ("raise KeyError('lost')", "failed: KeyError: 'lost'"),
        (
            "updates[1].state_dict['body.weight'].add_(1); return out",
            "it changed 'body.weight' in the update of rank 2",
        ),
        (
            "updates[0].state_dict['body.weight'][0].zero_(); return out",
            "it changed 'body.weight' in the update of rank 1",
        ),
        (
            "updates[0].state_dict['body.weight'] = torch.zeros(2, 2); return out",
            "it changed 'body.weight' in the update of rank 1",
        ),
        (
            "del updates[0].state_dict['head.bias']; return out",
            "it removed 'head.bias' from the update of rank 1",
        ),
        ("updates[0].state_dict['x'] = torch.zeros(1); return out", "it added 'x' to the update of rank 1"),
        (
            "context.previous['head.bias'].mul_(2); return out",
            "it changed 'head.bias' in the previous global state",
        ),
        (
            "context.memory['seen'] = {'ranks': [{1, 2}]}; return out",
            "memory['seen']['ranks'][0] holds a set, which no checkpoint can hold",
        ),
        ("context.memory['seen'] = {1: 2}; return out", "memory['seen'] has the key 1"),
    ],
)
def test_a_rule_that_misbehaves_is_named_with_what_it_did(user_rules, body, says):
    name = user_rules(f"def rule(updates, context):\n    out = dict(context.previous)\n    {body}")
    with pytest.raises(AggregationError) as caught:
        merged(split_of(name), update(1, 1.0), update(2, 2.0))
    assert f"the rule {name} of part '*'" in str(caught.value)
    assert says in str(caught.value)


def test_a_failure_of_a_rule_keeps_its_cause(user_rules):
    name = user_rules("def rule(updates, context):\n    return 1 / 0")
    with pytest.raises(AggregationError) as caught:
        merged(split_of(f"head.*={name}", "fedavg"), update(1, 1.0))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "of part 'head.*' failed: ZeroDivisionError" in str(caught.value)


def test_a_built_in_rule_that_cannot_work_names_the_part_and_the_number_that_would():
    with pytest.raises(AggregationError) as caught:
        merged(split_of("head.*=krum(byzantine=1)", "fedavg"), update(1, 1.0), update(2, 2.0))
    assert "the rule krum(byzantine=1) of part 'head.*': byzantine=1 takes at least 5 updates" in str(caught.value)


def test_an_infinite_mask_survives_frozen_and_averaged_and_is_named_when_a_rule_cannot_keep_it(user_rules):
    previous = {"mask": torch.tensor([0.0, -math.inf]), "w": torch.zeros(1)}
    sent = [
        Update(rank=r, state_dict={"mask": previous["mask"].clone(), "w": torch.ones(1)}, num_examples=1)
        for r in (1, 2)
    ]
    for rules in (["mask=frozen", "fedavg"], ["fedavg"]):
        kept = merged(split_of(*rules, reference=previous), *sent, previous=previous)
        assert torch.equal(kept["mask"], previous["mask"])
    name = user_rules("def rule(updates, context):\n    return {k: v - v for k, v in context.previous.items()}")
    with pytest.raises(AggregationError, match="keep it with mask=frozen"):
        merged(split_of(name, reference=previous), *sent, previous=previous)


def test_memory_may_hold_what_a_checkpoint_can():
    check_memory({"a": [None, True, 1, 2.0, "x", {"b": torch.zeros(1)}]})
    with pytest.raises(AggregationError, match="holds a tuple"):
        check_memory({"a": (1, 2)})
