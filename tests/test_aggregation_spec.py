"""What `--aggregate` accepts, and what it says about the rest."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.aggregation.grammar import parse_call
from fedsplit.aggregation.privacy import private_rule
from fedsplit.aggregation.rules import BUILTIN
from fedsplit.aggregation.spec import BUILTIN_RULES, RuleSpec, first_match, parse_rule, parse_rules
from fedsplit.aggregation.split import check_rules
from fedsplit.errors import UsageError
from tests.depth import scaled


def test_nothing_asked_for_is_fedavg():
    assert parse_rules([]) == (RuleSpec(name="fedavg"),)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("median", RuleSpec(name="median")),
        (" trimmed-mean( fraction = 0.2 ) ", RuleSpec(name="trimmed-mean", params={"fraction": 0.2})),
        ("body.*=median", RuleSpec(pattern="body.*", name="median")),
        (
            "body.* = krum(byzantine=2)",
            RuleSpec(pattern="body.*", name="krum", params={"byzantine": 2}),
        ),
        (
            "multi-krum(byzantine=1, selected=2,)",
            RuleSpec(name="multi-krum", params={"byzantine": 1, "selected": 2}),
        ),
        (
            "flower.FedAdam(eta=1e-2, inplace=false)",
            RuleSpec(name="flower.FedAdam", params={"eta": 0.01, "inplace": False}),
        ),
        (
            "my.rules:mine(mode=fast, text='a, \\'b\\'', shift=-2)",
            RuleSpec(name="my.rules:mine", params={"mode": "fast", "text": "a, 'b'", "shift": -2}),
        ),
        (
            "h.*=dp(trimmed-mean(fraction=0.2), clip=1.0, noise=0.5)",
            RuleSpec(
                pattern="h.*",
                name="dp",
                inner=RuleSpec(name="trimmed-mean", params={"fraction": 0.2}),
                params={"clip": 1.0, "noise": 0.5},
            ),
        ),
        (
            "dp(my.rules:mean(text='a-b: c', kind=per-layer), clip=1, noise=0)",
            RuleSpec(
                name="dp",
                inner=RuleSpec(name="my.rules:mean", params={"text": "a-b: c", "kind": "per-layer"}),
                params={"clip": 1, "noise": 0},
            ),
        ),
        ("layer[0-9].*=max", RuleSpec(pattern="layer[0-9].*", name="max")),
    ],
)
def test_a_rule_is_read_and_its_text_reads_back_as_the_same(text, spec):
    assert parse_rule(text) == spec
    assert parse_rule(str(spec)) == spec


literals = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
identifiers = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(lambda name: name != "rule")


@settings(max_examples=scaled(20, 100))
@given(params=st.dictionaries(identifiers, literals, max_size=4))
def test_any_parameters_of_a_users_rule_survive_the_way_through_text(params):
    spec = RuleSpec(pattern="a.*", name="pkg.mod:fn", params=params)
    back = parse_rule(str(spec))
    assert back == spec
    assert [type(v) for v in back.params.values()] == [type(v) for v in params.values()]


@settings(max_examples=scaled(60, 300))
@given(text=st.text(alphabet="abmedian.*:-=(),'\"0123456789 @e+", max_size=30))
def test_malformed_text_is_a_usage_error_of_one_line_and_nothing_else(text):
    if text.strip().startswith("@"):
        return
    try:
        parse_rules([text])
    except UsageError as exc:
        assert "\n" not in str(exc)


def test_the_bare_rule_comes_last_whatever_the_order_of_the_flags():
    specs = parse_rules(["fedavg", "head.*=local", "body.*=median"])
    assert [str(spec) for spec in specs] == ["head.*=local", "body.*=median", "fedavg"]
    assert first_match(specs, "head.0.weight").name == "local"
    assert first_match(specs, "other").name == "fedavg"


def test_the_first_pattern_that_matches_wins_and_a_star_crosses_dots():
    specs = parse_rules(["head.bias=max", "head*=median"])
    assert first_match(specs, "head.bias").name == "max"
    assert first_match(specs, "head.0.deep.weight").name == "median"
    assert first_match(specs, "body") is None


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["median", "fedavg"], "two rules without a pattern, median and fedavg"),
        (
            ["avg"],
            "unknown rule 'avg' (did you mean 'fedavg'?): known are fedavg, median, trimmed-mean, krum, multi-krum",
        ),
        (["body.*=avg"], "--aggregate body.*=avg: unknown rule 'avg' (did you mean"),
        ([""], "cannot read '': found nothing; expected name or name(key=value, …)"),
        (["=median"], "'' is not a pattern"),
        (["body.*="], "found nothing; expected name or name(key=value, …)"),
        (["median("], "was never closed at '('; expected name or name(key=value, …)"),
        (["median)"], "unmatched ')' at ')'"),
        (["krum(byzantine=1"], "was never closed at '(byzantine=1'"),
        (["krum(byzantine=)"], "; expected name or name(key=value, …)"),
        (["krum(byzantine 1)"], "at 'byzantine 1)'; expected name or name(key=value, …)"),
        (["krum(1)"], "expected key=value, found '1'"),
        (["krum(**krum)"], "expected key=value, found 'krum'"),
        (["krum(byzantine=[1])"], "expected a number, true, false, a word or quoted text for byzantine, found '[1]'"),
        (["a:b(x=None)"], "found 'None'"),
        (["a:b(x=a-b(1))"], "found 'a-b(1)'"),
        (
            ["krum(byzantine=1)(selected=2)"],
            "expected name or name(key=value, …), found 'krum(byzantine=1)(selected=2)'",
        ),
        (
            ["multi-krum(byzantin=1)"],
            "no parameter 'byzantin' (did you mean 'byzantine'?): it takes byzantine, selected",
        ),
        (["trimed-mean"], "did you mean 'trimmed-mean'?"),
        (["(" * 300], "too many nested parentheses"),
        (["a" + ".b" * 5000], "cannot read"),
        (["-" * 10_000 + "a"], "cannot read"),
        (["krum(byzantine=1, byzantine=2)"], "'byzantine' is given twice"),
        (["krum(byzantine=1) x"], "at 'x'; expected name or name(key=value, …)"),
        (["krum(byzantine=1.5)"], "byzantine is a whole number, 0 or more"),
        (["krum(byzantine=-1)"], "byzantine is a whole number, 0 or more"),
        (["krum(byzantine=true)"], "byzantine is a whole number, 0 or more"),
        (["trimmed-mean(fraction=0.5)"], "fraction is a number from 0 to below 0.5"),
        (["trimmed-mean(fraction=some)"], "fraction is a number from 0 to below 0.5"),
        (["trimmed-mean(part=0.1)"], "no parameter 'part': it takes fraction"),
        (["median(fraction=0.1)"], "no parameter 'fraction': it takes none"),
        (["median(krum)"], "median takes no rule inside; only dp does"),
        (["dp(clip=1.0, noise=1.0)"], "dp needs a rule as its first argument"),
        (["dp(fedavg)"], "dp needs clip and noise"),
        (["dp(fedavg, clip=0, noise=1)"], "clip is a number above 0"),
        (["dp(local, clip=1, noise=1)"], "dp cannot wrap local"),
        (["dp(dp(fedavg, clip=1, noise=1), clip=1, noise=1)"], "dp cannot wrap dp"),
        (["dp(fedavg, clip=1e999, noise=1)"], "expected a finite number"),
        (["no.such.file"], "unknown rule"),
        (["@no-such-file.toml"], "cannot read no-such-file.toml: No such file"),
    ],
)
def test_what_cannot_be_is_refused_with_what_was_expected(texts, says):
    with pytest.raises(UsageError) as caught:
        parse_rules(texts)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_toml_file_is_the_same_as_flags(tmp_path: Path):
    file = tmp_path / "rules.toml"
    file.write_text(
        '[[part]]\npattern = "head.*"\nrule = "local"\n\n[[part]]\nrule = "dp(fedavg, clip=1.0, noise=0.5)"\n'
    )
    assert parse_rules([f"@{file}"]) == parse_rules(["head.*=local", "dp(fedavg, clip=1.0, noise=0.5)"])
    assert [s.part for s in parse_rules(["a=max", f"@{file}"])] == ["a", "head.*", "*"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("part = [", "is not a TOML file"),
        ("", "expected [[part]] tables and nothing else, found none"),
        ("[[part]]\nrule='max'\n[[other]]\n", "found part, other"),
        ("[part]\nrule='max'", "expected [[part]] tables"),
        ("[[part]]\npattern='a'", "part 1: expected rule"),
        ("[[part]]\nrule='max'\nfraction=1", "part 1: expected rule"),
        ("[[part]]\nrule='mix'", "part 1: unknown rule 'mix'"),
        ("[[part]]\nrule='max'\n[[part]]\nrule='median'", "two rules without a pattern"),
    ],
)
def test_a_toml_file_that_cannot_be_is_refused(tmp_path: Path, content, says):
    file = tmp_path / "rules.toml"
    file.write_text(content)
    with pytest.raises(UsageError) as caught:
        parse_rules([f"@{file}"])
    assert says in str(caught.value)


def test_the_table_of_parameters_is_that_of_the_functions():
    known = {name: set(params) for name, params in BUILTIN_RULES.items()}
    assert known.pop("local") == set()
    assert known.pop("secure") == {"range", "threshold", "neighbours"}
    assert known.pop("dp") == set(inspect.signature(private_rule).parameters) - {"name", "inner", "averages"}
    actual = {
        name: {p.name for p in inspect.signature(r.function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        for name, r in BUILTIN.items()
    }
    assert known == actual


def test_reading_the_flags_imports_neither_torch_nor_flower():
    code = (
        "import sys; from fedsplit.aggregation import parse_rules;"
        "parse_rules(['a=flower.FedAdam(eta=1)', 'b.c:d']);"
        "sys.exit(bool({'torch', 'flwr', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_name_the_package_offers_can_be_had():
    import fedsplit.aggregation as package

    assert package.__all__ == sorted(package.__all__)
    assert set(package._HOMES) == set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no_such_module_here:rule", "cannot import 'no_such_module_here'"),
        ("json:no_such_rule", "'json' has no function 'no_such_rule'"),
        ("json:decoder", "'json' has no function 'decoder'"),
        ("broken_rules:rule", "RuntimeError: broken on purpose"),
        ("good_rules:rule(beta=1)", "cannot be called as rule(updates, context, beta)"),
        ("good_rules:needy", "missing a required argument: 'alpha'"),
        ("flower.FedNothing", "Flower has no strategy 'FedNothing'"),
        ("flower.FedXgbBagging", "as bytes, not arrays"),
        ("flower.FedAdam(gamma=1)", "no parameter 'gamma': it takes eta, eta_l, beta_1, beta_2, tau"),
        ("flower.FedAdam(fraction_fit=0.5)", "'fraction_fit' does not shape the merge"),
        ("flower.FedTrimmedAvg(beta=0.5)", "refuses its parameters"),
        ("flower.FedProx", "refuses its parameters"),
    ],
)
def test_a_rule_that_cannot_be_loaded_is_refused_before_any_round(tmp_path, monkeypatch, text, says):
    (tmp_path / "broken_rules.py").write_text("raise RuntimeError('broken on purpose')")
    (tmp_path / "good_rules.py").write_text(
        "def rule(updates, context): ...\ndef needy(updates, context, *, alpha): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError) as caught:
        check_rules(parse_rules([text]))
    assert says in str(caught.value)


def test_rules_that_can_be_loaded_pass():
    check_rules(parse_rules(["a=local", "b=dp(krum, clip=1, noise=0)", "c=flower.FedAvgM", "fedavg"]))


def test_a_class_of_the_users_is_read_like_a_rule():
    call = parse_call("package.module:Class(eta=0.1, note='x-y:z')")
    assert call == ("package.module:Class", {"eta": 0.1, "note": "x-y:z"}, None)
