"""How concentrated influence is: tails, shares and single tokens.

Grosse et al. (2023) fit a Pareto distribution to the largest influences on a
query: above x_min

  CDF(x) = 1 - (x / x_min)^-α,  α̂ = n / Σ_i log(x_i / x_min)

with x_min the smallest of the n. The density falls with the power α + 1, which
others give as the exponent. The smaller α, the heavier the tail: below 1 its
mean is infinite, below 2 its variance.

The Kolmogorov-Smirnov distance is the largest gap between that CDF and the
empirical one. Logarithms of Pareto values over x_min are exponential, and the
distance after the fit does not depend on their scale: how it spreads depends on
n alone, and simulating with one α is simulating with all.

Notation: N examples, n of the tail, T positions.
"""

from typing import NamedTuple

import jax
import numpy as np

from tda.evaluation.lds import finite

Array = jax.Array | np.ndarray


class Tail(NamedTuple):
  """A Pareto distribution fitted to the largest values."""

  exponent: float  # α̂ of the CDF
  minimum: float  # x_min, the smallest of the tail
  distance: float  # Kolmogorov-Smirnov, 0 to 1
  size: int  # n


def pareto(
  values: Array, *, share: float | None = None, count: int | None = None
) -> Tail:
  """Maximum-likelihood Pareto fit to the largest of the values [N].

  The standard error of α̂ is about α / √n, and its bias 2 α / n: x_min is one of
  the n, as in the paper.

  Args:
    values: influences of N examples; those at or below 0 are no tail.
    share: n as a share of N, rounded (the paper's: 1e-4 of 5 million).
    count: n itself; neither of the two: all that are positive.

  Raises:
    ValueError: values not finite, fewer than n positive, n < 2, or n equal
      values, which have no exponent.
  """
  ascending_N = _ascending(values)
  positive = int((ascending_N > 0).sum())
  if share is not None and count is not None:
    raise ValueError(f"share={share} and count={count}: give one of the two")
  n = positive if count is None else count
  if share is not None:
    n = _number(share, len(ascending_N))
  if not 2 <= n <= positive:
    raise ValueError(
      f"a tail of {n} values, where {positive} of {len(ascending_N)} are"
      " positive: give a `share` or a `count` of 2 or more and at most those"
    )
  tail_n = ascending_N[-n:]
  # A difference of logarithms, since a quotient may overflow.
  logs_n = np.log(tail_n) - np.log(tail_n[0])
  if not logs_n[-1]:
    raise ValueError(
      f"the largest {n} values are all {tail_n[0]}: no exponent fits them, take"
      " more"
    )
  return Tail(float(1 / logs_n.mean()), float(tail_n[0]), _distance(logs_n), n)


def p_value(
  tail: Tail, seed: int | np.random.Generator, *, draws: int = 2500
) -> float:
  """Share of Pareto samples that lie as far from their own fit as the tail.

  Clauset, Shalizi and Newman (2009, section 4.1), who reject a power law at 0.1
  or less. Samples are of the tail's size with its x_min as the smallest, as
  `pareto` sees them, so that the p-value of a true Pareto tail is uniform.

  Args:
    tail: from `pareto`.
    seed: of the samples.
    draws: samples; the standard error is at most 1 / (2 √draws), 0.01 at 2500.
  """
  if draws < 1:
    raise ValueError(f"draws={draws} must be 1 or more")
  rng = np.random.default_rng(seed)
  logs_n = np.zeros(tail.size)
  further = 0
  for _ in range(draws):
    logs_n[1:] = np.sort(rng.exponential(size=tail.size - 1))
    further += _distance(logs_n) >= tail.distance
  return further / draws


def sparsity(values: Array, share: float = 0.01) -> float:
  """Share of the total positive influence that the largest values carry.

  `values` [N], of which the largest round(share · N) are taken. Grosse et al.
  (2023) find 12 to 52 % in the top 1 % of the sequences.
  """
  ascending_N = np.maximum(_ascending(values), 0)
  n = _number(share, len(ascending_N))
  if n < 1:
    raise ValueError(
      f"share={share} of {len(ascending_N)} values is less than one of them:"
      " take a larger share"
    )
  return float(ascending_N[-n:].sum() / ascending_N.sum())


def spurious(token_scores: Array) -> np.ndarray:
  """Whether one token dominates a sequence's influence: bool [...].

  ‖a‖₂ / ‖a‖₁ > 2/3, by which Grosse et al. (2023) leave out likely artefacts.

  `token_scores` [..., T] are additive influences of each position; those of
  padding are 0 and change nothing, and a sequence of zeros is not spurious.
  """
  axes = ("sequence",) * (np.ndim(token_scores) - 1) + ("position",)
  scores = finite(token_scores, "token score", axes)
  return np.linalg.norm(scores, axis=-1) > 2 / 3 * np.abs(scores).sum(-1)


def _ascending(values: Array) -> np.ndarray:
  """Sorted values float64 [N], of which some are positive."""
  values_N = finite(values, "value", ("example",))
  if values_N.ndim != 1 or values_N.max() <= 0:
    raise ValueError(
      f"values {values_N.shape} up to {values_N.max()} must be [examples] of"
      " one query, some positive: take the other sign, or another query"
    )
  return np.sort(values_N)


def _number(share: float, size: int) -> int:
  if not 0 < share <= 1:
    raise ValueError(f"share={share} must be above 0 and at most 1")
  return round(share * size)


def _distance(logs_n: np.ndarray) -> float:
  """Kolmogorov-Smirnov distance of ascending log(x / x_min) to their fit."""
  cdf_n = -np.expm1(-logs_n / logs_n.mean())
  # The empirical CDF jumps at each value: both ends of the jump count.
  steps = np.arange(len(logs_n) + 1) / len(logs_n)
  return float(max((steps[1:] - cdf_n).max(), (cdf_n - steps[:-1]).max()))
