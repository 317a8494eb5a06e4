"""What the page and the example tell people to write works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fedsplit.aggregation import Split, Update, parse_rules
from fedsplit.aggregation.spec import BUILTIN_RULES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "aggregation.md").read_text(encoding="utf-8")


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def merged(split, previous, states, memory, server_round=1):
    merger = split.start_round(server_round=server_round, total_rounds=2, previous=previous, seed=0, memory=memory)
    for rank, (state, loss) in enumerate(states, start=1):
        merger.add(Update(rank=rank, state_dict=state, num_examples=1, metrics={"loss": loss}))
    return merger.finish()


def test_the_rule_on_the_page_does_what_it_says(tmp_path, monkeypatch):
    source = code_blocks("python")[0]
    (tmp_path / "my_rules.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    previous = {"body.w": torch.tensor([0.0]), "n": torch.tensor(1)}
    states = [({"body.w": torch.tensor([x]), "n": torch.tensor(2)}, loss) for x, loss in [(8.0, 0.9), (2.0, 0.1)]]
    split = Split.resolve(parse_rules(["body.*=my_rules:best_client(metric=loss)", "fedavg"]), previous)
    result = merged(split, previous, states, memory := {})
    assert result["body.w"].tolist() == [1.0]
    (remembered,) = [found for key, found in memory.items() if key.startswith("body.*=")]
    assert remembered == {"chosen": [2]}


def test_every_flag_and_file_on_the_page_can_be_read(tmp_path):
    flags = re.findall(r'--aggregate (?:"([^"]+)"|([a-z][\w-]*))', PAGE)
    assert len(flags) >= 8
    for quoted, bare in flags:
        parse_rules([quoted or bare])
    (content,) = code_blocks("toml")
    (tmp_path / "rules.toml").write_text(content)
    expected = parse_rules(["head.*=local", "body.*=trimmed-mean(fraction=0.2)", "fedavg"])
    assert parse_rules([f"@{tmp_path / 'rules.toml'}"]) == expected


def test_the_table_of_rules_has_them_all():
    assert set(re.findall(r"^\| `([a-z-]+)[`(]", PAGE, flags=re.MULTILINE)) - {"flower"} >= set(BUILTIN_RULES)


@pytest.fixture
def bounded(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return "examples.custom_aggregation:bounded"


def test_the_example_shortens_what_is_longer_than_the_median(bounded):
    previous = {"w": torch.tensor([0.0, 0.0]), "n": torch.tensor(0)}
    sent = [[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [-60.0, 80.0], [2.0, 0.0]]
    states = [({"w": torch.tensor(row), "n": torch.tensor(i)}, 0.0) for i, row in enumerate(sent)]
    result = merged(Split.resolve(parse_rules([bounded]), previous), previous, states, {})
    # Lengths 5, 1, 0, 100, 2: the median is 2, so 5 and 100 become 2.
    expected = torch.tensor([[1.2, 1.6], [0.0, 1.0], [0.0, 0.0], [-1.2, 1.6], [2.0, 0.0]]).mean(dim=0)
    torch.testing.assert_close(result["w"], expected)
    assert result["n"].item() == 4


def test_the_example_remembers_its_momentum(bounded):
    split = Split.resolve(parse_rules([f"{bounded}(momentum=0.5)"]), {"w": torch.zeros(1)})
    state, memory = {"w": torch.zeros(1)}, {}
    for server_round, expected in [(1, 1.0), (2, 2.5)]:
        state = merged(split, state, [({"w": state["w"] + 1}, 0.0)], memory, server_round)
        assert state["w"].item() == expected
