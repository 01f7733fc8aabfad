"""Pareto fits against scipy and known samples; shares and single tokens."""

import numpy as np
import pytest
from scipy import stats

from tda.evaluation.tails import p_value, pareto, sparsity, spurious

SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("exponent", [1.5, 4.0])
def test_recovers_the_exponent(seed, exponent):
  rng = np.random.default_rng(seed)
  values = 3 * (1 + rng.pareto(exponent, 40_000))
  tail = pareto(np.concatenate([-values, values]), share=0.125)
  assert tail.size == 10_000
  assert tail.minimum == np.sort(values)[-10_000]
  assert abs(tail.exponent - exponent) < 4 * exponent / np.sqrt(tail.size)
  same = pareto(rng.permutation(values), count=10_000)
  np.testing.assert_allclose(same, tail, rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_distance_is_that_of_scipy(seed):
  values = np.random.default_rng(seed).exponential(size=50)
  tail = pareto(values, count=20)
  largest = np.sort(values)[-20:]
  law = stats.pareto(tail.exponent, scale=tail.minimum)
  expected = stats.kstest(largest, law.cdf).statistic
  np.testing.assert_allclose(tail.distance, expected, rtol=1e-10)


def test_by_hand():
  """Logarithms 0, 1 and 2 of x / x_min have mean 1: a CDF of 1 - x_min / x."""
  tail = pareto([5 * np.e**2, -4, 5, 0, 5 * np.e])
  np.testing.assert_allclose(tail, (1, 5, 1 / 3, 3), rtol=1e-12)


def test_p_values_of_pareto_tails_are_uniform():
  """Mean and share below 0.1 of 200, within 4 standard errors."""
  rng = np.random.default_rng(0)
  values = 1 + rng.pareto(2, (200, 60))
  tails = [pareto(x, count=30) for x in values]
  found = np.array([p_value(tail, rng, draws=100) for tail in tails])
  assert abs(found.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 200)
  assert abs((found < 0.1).mean() - 0.1) < 4 * np.sqrt(0.09 / 200)


@pytest.mark.parametrize("seed", SEEDS)
def test_p_value_tells_exponential_from_pareto(seed):
  """A shifted exponential is far from its fit; three Pareto samples are not.

  True tails too are below 0.1 one time in ten: these seeds are of the others,
  and the test before this one is of the rule.
  """
  rng = np.random.default_rng(seed)
  exponential = pareto(1 + rng.exponential(size=2000))
  assert p_value(exponential, seed, draws=200) == 0
  power_law = pareto(1 + rng.pareto(2, 2000))
  assert p_value(power_law, seed, draws=200) > 0.1
  assert p_value(power_law, 5, draws=9) == p_value(power_law, 5, draws=9)


def test_sparsity():
  values = np.array([2.0, -50, 6, 1, 0, 1, -3, 0, 0, 0])
  assert [sparsity(values, x) for x in (0.1, 0.2, 1)] == [0.6, 0.8, 1]
  assert sparsity(np.ones(300)) == 0.01


def test_spurious():
  """(x, 1, 1) is from x = (16 + √216) / 10 = 3.0697; two tokens always are."""
  rows = np.array([[[0, 5, 0], [3.06, 1, -1]], [[0, 0, 0], [-3.08, 1, 1]]])
  assert spurious(rows).tolist() == [[True, False], [False, True]]
  assert spurious([1e-6, 1e-6, 0])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: pareto([-1, 0]), r"up to 0.0 must be .* the other sign"),
    (lambda: pareto(np.ones((2, 2))), r"\(2, 2\) .* one query"),
    (lambda: pareto([1, np.inf]), "1 values are not finite.*example 1"),
    (lambda: pareto([1, 2, -3], count=3), "of 3 values, where 2 of 3"),
    (lambda: pareto(np.arange(99), share=0.01), "of 1 values, where 98"),
    (lambda: pareto([1, 2], count=2, share=1), "give one of the two"),
    (lambda: pareto([1, 2], share=2), "share=2 must be .* at most 1"),
    (lambda: pareto([1, 3, 3], count=2), "largest 2 values are all 3.0"),
    (lambda: p_value(pareto([1, 2]), 0, draws=0), "draws=0"),
    (lambda: sparsity([1, 2]), "share=0.01 of 2 values is less than one"),
    (lambda: sparsity([-1, 0]), "some positive"),
    (lambda: spurious([[1, np.nan]]), "sequence 0, position 1"),
    (lambda: spurious(1.0), "must be"),
  ],
)
def test_refuses(call, message):
  with pytest.raises(ValueError, match=message):
    call()
