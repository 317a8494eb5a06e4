"""The distance correlation: by its definition, and as a term of a loss."""

from __future__ import annotations

import math

import pytest
import torch

from fedsplit.split_learning.nopeek import distance_correlation


def by_definition(left: list[list[float]], right: list[list[float]]) -> float:
    """Székely et al. 2007, equations 2.8 to 2.10, in plain loops."""

    def centred(rows: list[list[float]]) -> list[list[float]]:
        count = len(rows)
        apart = [[math.dist(one, other) for other in rows] for one in rows]
        means = [sum(row) / count for row in apart]
        mean = sum(means) / count
        return [[apart[i][j] - means[i] - means[j] + mean for j in range(count)] for i in range(count)]

    def covariance(one: list[list[float]], other: list[list[float]]) -> float:
        return sum(a * b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)) / len(one) ** 2

    one, other = centred(left), centred(right)
    return math.sqrt(covariance(one, other) / math.sqrt(covariance(one, one) * covariance(other, other)))


def test_it_is_what_the_paper_defines() -> None:
    draw = torch.Generator().manual_seed(3)
    left, right = (torch.randn(7, width, generator=draw, dtype=torch.float64) for width in (4, 2))
    assert float(distance_correlation(left, right)) == pytest.approx(by_definition(left.tolist(), right.tolist()))


def test_it_is_1_for_what_is_a_multiple_and_0_for_what_tells_nothing() -> None:
    inputs = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(1))
    assert float(distance_correlation(inputs, 3 * inputs + 1)) == pytest.approx(1.0, abs=1e-5)
    assert float(distance_correlation(inputs, torch.ones(9, 5))) == pytest.approx(0.0, abs=1e-6)


def test_as_a_term_of_a_loss_it_makes_activations_tell_less() -> None:
    torch.manual_seed(0)
    inputs, lower = torch.randn(64, 6), torch.nn.Linear(6, 6)
    optimizer = torch.optim.SGD(lower.parameters(), lr=1.0)
    first = distance_correlation(inputs, lower(inputs)).item()
    for _ in range(50):
        optimizer.zero_grad()
        distance_correlation(inputs, lower(inputs)).backward()
        optimizer.step()
    last = distance_correlation(inputs, lower(inputs)).item()
    assert math.isfinite(last) and last < first - 0.1
