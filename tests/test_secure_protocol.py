"""Sums of updates without single updates: the protocol by itself, and the numbers that it adds up."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from fedsplit.errors import RecordError
from fedsplit.secure import protocol, shamir
from fedsplit.secure.protocol import BOX_BYTES, Group, Secrets
from fedsplit.secure.vector import STEPS, WORD, add_mask, take_mask, to_fixed, to_mean, weighted

# When a rank is lost: before it sends keys, shares, its masked vector, the shares of masks; or not at all.
BEFORE_KEYS, BEFORE_SHARES, BEFORE_VECTOR, BEFORE_REVEAL, NEVER = range(5)


def seeded(rank: int) -> Secrets:
    """Secrets that are the same each time."""
    draw = random.Random(rank).randbytes
    return Secrets(channel=draw(32), mask=draw(32), own=draw(32))


def changes(rank: int, size: int = 3) -> Any:
    return to_fixed(np.random.default_rng(rank).uniform(-1, 1, size), 1.0)


def examples(rank: int) -> int:
    return 10 * rank + 1


def group_of(ranks: Any, *, threshold: float = 3, neighbours: int = 0) -> Group:
    adverts = {rank: seeded(rank).advert(examples(rank)) for rank in ranks}
    return Group(context="run/1", adverts=adverts, threshold=threshold, neighbours=neighbours)


def run_round(lost: Mapping[int, int], *, threshold: float = 3, neighbours: int = 0) -> tuple[Any, Any]:
    """Do a round; returns the sum that the server finds, and that of the plain vectors."""
    left = {rank for rank, stage in lost.items() if stage > BEFORE_KEYS}
    group = group_of(left, threshold=threshold, neighbours=neighbours)
    group.check()
    left = {rank for rank in left if lost[rank] > BEFORE_SHARES}
    boxes = {rank: protocol.deal(seeded(rank), rank, group) for rank in left}
    inboxes = {rank: {other: boxes[other][rank] for other in group.holders(rank) if other in boxes} for rank in left}
    plain = {rank: weighted(changes(rank), examples(rank), group.weight) for rank in left}
    survivors = {rank for rank in left if lost[rank] > BEFORE_VECTOR}
    total, expected = np.zeros(4, WORD), np.zeros(4, WORD)
    for rank in survivors:
        masked = plain[rank].copy()
        protocol.mask(seeded(rank), rank, group, list(inboxes[rank]), masked)
        assert not (masked == plain[rank]).all()
        total, expected = total + masked, expected + plain[rank]
    revealed = {
        rank: protocol.reveal(seeded(rank), rank, group, inboxes[rank], survivors)
        for rank in survivors if lost[rank] > BEFORE_REVEAL
    }  # fmt: skip
    protocol.unmask(group, left, survivors, revealed, total)
    return total, expected


def test_the_sum_of_five_ranks_is_the_plain_one_under_every_pattern_of_drop_outs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The keys are the same in every pattern.
    monkeypatch.setattr(protocol, "_agree", cache(protocol._agree))
    monkeypatch.setattr(protocol, "public_key", cache(protocol.public_key))
    sums = 0
    for stages in product(range(5), repeat=5):
        lost = dict(enumerate(stages, start=1))
        # As many as the threshold have to be there to the end.
        if stages.count(NEVER) >= 3:
            total, expected = run_round(lost)
            assert total.tobytes() == expected.tobytes(), lost
            sums += 1
        else:
            with pytest.raises(RecordError, match=r"are needed|no rank sent"):
                run_round(lost)
    assert sums == 1 + 5 * 4 + 10 * 16


@pytest.mark.parametrize("neighbours", [4, 6, 0])
def test_the_sum_of_many_ranks_is_the_plain_one_where_each_has_few_neighbours(neighbours: int) -> None:
    lost = dict.fromkeys(range(1, 25), NEVER) | {3: BEFORE_SHARES, 9: BEFORE_VECTOR, 20: BEFORE_REVEAL}
    total, expected = run_round(lost, threshold=0.5, neighbours=neighbours)
    assert total.tobytes() == expected.tobytes()


def test_each_rank_of_a_sparse_graph_deals_to_its_neighbours_and_they_to_it() -> None:
    group = group_of(range(1, 12), neighbours=4)
    for rank in group.adverts:
        assert len(group.holders(rank)) == 5
        assert rank in group.holders(rank)
        assert all(rank in group.holders(other) for other in group.holders(rank))
    assert group.holders(1) != group_of(range(1, 13), neighbours=4).holders(1)


@pytest.mark.parametrize(
    ("threshold", "size", "needed"), [(2, 2, 2), (2, 5, 3), (4, 5, 4), (0.5, 5, 3), (2 / 3, 5, 4), (2 / 3, 6, 5)]
)
def test_a_threshold_is_never_half_of_the_holders_or_less(threshold: float, size: int, needed: int) -> None:
    assert group_of(range(1, size + 1), threshold=threshold).needed(1) == needed


def test_a_server_that_lies_about_who_is_in_the_sum_gets_too_few_shares_of_one_kind() -> None:
    group = group_of(range(1, 6), threshold=0.5)
    boxes = {rank: protocol.deal(seeded(rank), rank, group) for rank in group.adverts}
    found: dict[bool, set[int]] = {True: set(), False: set()}
    for rank in (1, 2, 3, 4):
        inbox = {other: boxes[other][rank] for other in boxes}
        # Half of them are told that rank 5 is in the sum, the others that it is not.
        told = {1, 2, 3, 4} | ({5} if rank % 2 else set())
        protocol.reveal(seeded(rank), rank, group, inbox, told)
        found[5 in told].add(rank)
    assert all(len(givers) < group.needed(5) for givers in found.values())


# -- what a rank refuses -----------------------------------------------------------------------------------------------


def test_a_rank_sends_nothing_masked_to_a_group_that_is_too_small_or_not_its_own() -> None:
    words = np.zeros(4, WORD)
    with pytest.raises(RecordError, match="2 ranks sent keys, at least 3 are needed"):
        protocol.mask(seeded(1), 1, group_of([1, 2]), [1, 2], words)
    with pytest.raises(RecordError, match="are not those that it sent"):
        protocol.mask(seeded(9), 1, group_of([1, 2, 3]), [1, 2, 3], words)
    with pytest.raises(RecordError, match="2 ranks dealt shares, at least 3 are needed"):
        protocol.mask(seeded(1), 1, group_of([1, 2, 3, 4]), [1, 2], words)
    twice = group_of([1, 2, 3])
    copied = {**twice.adverts, 3: twice.adverts[2]}
    with pytest.raises(RecordError, match="the same keys"):
        protocol.mask(seeded(1), 1, Group(context="run/1", adverts=copied, threshold=3), [1, 2, 3], words)
    assert not words.any()


def test_a_rank_gives_no_shares_for_a_sum_of_too_few_or_for_shares_that_were_changed() -> None:
    group = group_of(range(1, 6))
    boxes = {other: protocol.deal(seeded(other), other, group)[1] for other in group.adverts}
    with pytest.raises(RecordError, match="2 ranks are in the sum, at least 3 are needed"):
        protocol.reveal(seeded(1), 1, group, boxes, {1, 2})
    with pytest.raises(RecordError, match="dealt no shares"):
        protocol.reveal(seeded(1), 1, group, {1: boxes[1], 2: boxes[2]}, {1, 2, 3})
    changed = boxes[2][:-1] + bytes([boxes[2][-1] ^ 1])
    with pytest.raises(RecordError, match="the shares of rank 2 were not dealt to this rank, or have changed"):
        protocol.reveal(seeded(1), 1, group, boxes | {2: changed}, {1, 2, 3})
    # Of another round, or meant for another rank.
    other_round = Group(context="run/2", adverts=group.adverts, threshold=3)
    with pytest.raises(RecordError, match="have changed"):
        protocol.reveal(seeded(1), 1, other_round, boxes, {1, 2, 3})
    with pytest.raises(RecordError, match="have changed"):
        protocol.reveal(seeded(2), 2, group, boxes, {1, 2, 3})


@pytest.mark.parametrize("public", [bytes(32), b"\1" + bytes(31)])
def test_a_public_key_that_gives_everybody_the_same_secret_is_refused(public: bytes) -> None:
    group = group_of([1, 2, 3])
    protocol.check_keys(group.adverts[1])
    with pytest.raises(RecordError, match="a public key is none"):
        protocol.check_keys(protocol.Advert(channel=group.adverts[1].channel, mask=public, weight=1))
    adverts = {**group.adverts, 3: protocol.Advert(channel=public, mask=public[:-1] + b"\x80", weight=1)}
    with pytest.raises(RecordError, match="a public key is none"):
        protocol.deal(seeded(1), 1, Group(context="run/1", adverts=adverts, threshold=3))


def test_a_wrong_share_spoils_the_round_and_is_found_out() -> None:
    group = group_of(range(1, 6))
    everyone = set(group.adverts)
    boxes = {rank: protocol.deal(seeded(rank), rank, group) for rank in everyone}
    inboxes = {rank: {other: boxes[other][rank] for other in boxes} for rank in everyone}
    for survivors, said in ((everyone, "the sum of the weights is wrong"), (everyone - {5}, "are not those that it")):
        total = np.zeros(4, WORD)
        for rank in survivors:
            words = weighted(changes(rank), examples(rank), group.weight)
            protocol.mask(seeded(rank), rank, group, everyone, words)
            total += words
        revealed = {rank: protocol.reveal(seeded(rank), rank, group, inboxes[rank], survivors) for rank in survivors}
        revealed[1][5] = bytes(30) + b"abc"
        with pytest.raises(RecordError, match=f"{said}|are not those that it dealt"):
            protocol.unmask(group, everyone, survivors, revealed, total)


# -- shares ------------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.integers(0, 4), st.randoms())
def test_as_many_shares_as_the_threshold_give_the_secret_and_one_less_does_not(
    secret: bytes, threshold: int, more: int, draw: random.Random
) -> None:
    shares = shamir.deal(secret, range(1, threshold + more + 1), threshold)
    chosen = draw.sample(sorted(shares), threshold)
    assert shamir.join({at: shares[at] for at in chosen}) == secret
    if threshold > 1:
        assert shamir.join({at: shares[at] for at in chosen[1:]}) != secret


def test_the_field_is_that_of_the_first_prime_above_all_secrets() -> None:
    def may_be_prime(number: int) -> bool:
        return all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7, 11, 13))

    assert [number for number in range(2**256, shamir.PRIME + 1) if may_be_prime(number)] == [shamir.PRIME]


# -- numbers -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-7.5, 7.5), st.integers(1, 2**40)), min_size=1, max_size=8))
def test_the_mean_is_that_of_real_numbers_up_to_half_a_step_for_each_rank(ranks: list[tuple[float, int]]) -> None:
    all_weights = sum(weight for _, weight in ranks)
    total = np.zeros(2, WORD)
    for value, weight in ranks:
        total += weighted(to_fixed(np.array([value]), 7.5), weight, all_weights)
    mean = to_mean(total[:-1], 7.5, all_weights, all_weights)[0]
    exact = sum(value * (weight / all_weights) for value, weight in ranks)
    assert abs(mean - exact) <= (len(ranks) + 1) * 7.5 / STEPS
    assert int(total[-1]) == all_weights % 2**32


def test_the_sum_of_the_furthest_changes_does_not_run_over() -> None:
    for end in (-2.0, 2.0):
        total = np.zeros(2, WORD)
        for _ in range(1000):
            total += weighted(to_fixed(np.array([end]), 2.0), 3, 3000)
        assert abs(to_mean(total[:-1], 2.0, 3000, 3000)[0] - end) <= 1000 * 2.0 / STEPS


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_a_mask_comes_off_as_it_went_on_whatever_the_length(size: int) -> None:
    words = np.arange(size, dtype=WORD)
    add_mask(words, b"s" * 32)
    stream = words - np.arange(size, dtype=WORD)
    assert size < 2 or len(set(stream[:100].tolist())) == min(size, 100)
    longer = np.zeros(size + 5, WORD)
    add_mask(longer, b"s" * 32)
    assert (longer[:size] == stream).all()
    take_mask(words, b"s" * 32)
    assert (words == np.arange(size, dtype=WORD)).all()


def uniformity(content: bytes) -> float:
    """Return how likely bytes that are drawn at random are at least as uneven as these, in either direction."""
    p = chisquare(np.bincount(np.frombuffer(content, np.uint8), minlength=256)).pvalue
    return min(p, 1 - p)


def test_masked_vectors_and_boxes_are_as_even_as_random_bytes_and_plain_vectors_are_not() -> None:
    group = group_of(range(1, 6))
    fixed = to_fixed(np.random.default_rng(7).normal(0, 0.01, 100_000), 1.0)
    plain = weighted(fixed, examples(1), group.weight)
    assert uniformity(plain.tobytes()) < 1e-12
    masks = [plain.copy() for _ in range(2)]
    for rank, words in enumerate(masks, start=1):
        protocol.mask(seeded(rank), rank, group, list(group.adverts), words)
        assert uniformity(words.tobytes()) > 1e-4
    # Nor does what two ranks send say how far apart they are.
    assert uniformity((masks[0] - masks[1]).tobytes()) > 1e-4
    assert all(len(box) == BOX_BYTES for box in protocol.deal(seeded(1), 1, group).values())
