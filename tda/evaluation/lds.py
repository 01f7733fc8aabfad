"""Linear datamodelling score: do scores predict what retraining measures?

A score [N, Q] says how much leaving an example out changes a query's
measurement (positive = raises it), so the scores of the examples that a subset
excludes add up to its predicted measurement, up to a constant. The LDS of a
query is the Spearman correlation, over random subsets, of that prediction with
the measurement averaged over seeds (Park et al. 2023; Bae et al. 2024).

Noise ceiling. Retraining is random: a predictor that knew the expectation of
every measurement would still fall short of 1. Model one query's bank, masks m
crossed with seeds r, as

    y_mr = μ + a_m + b_r + e_mr

a: what the mask does, variance A; b: what the seed does to all masks alike,
which does not change their order; e: what is left, variance E. The expectations
of the mean squares of the two-way analysis of variance are R·A + E between
masks and E for the rest, so they give the correlation of two seeds

    r₁ = A / (A + E) = (MS_mask - MS_rest) / (MS_mask + (R - 1) MS_rest)

and from it the correlation of a with the mean over R seeds,
√(A / (A + E/R)) = √(R r₁ / (1 + (R - 1) r₁)).

The analysis is done on ranks within each seed, because losses have heavy tails:
from 2, 3 or 6 seeds of a digits MLP, ranks foretold the rank correlation with
the mean of 18 or more other seeds within .04 (mostly above), values 5 to 15
hundredths too low. Rank correlations s turn into those of Gaussian variables by
r = 2 sin(π s / 6), and back at the end.

Notation: M masks, R seeds, Q queries, N examples.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


class Interval(NamedTuple):
  """A mean and the ends of its interval."""

  mean: np.ndarray  # [...]
  low: np.ndarray  # [...]
  high: np.ndarray  # [...]


def predictions(scores: Array, weights: Array) -> np.ndarray:
  """Predicted measurements [M, Q], up to a constant: summed excluded scores.

  `scores` [N, Q]; `weights` [M, N], of which 1 - weights is what is left out.
  """
  scores_NxQ = finite(scores, "score", ("example", "query"))
  weights_MxN = finite(weights, "weight", ("mask", "example"))
  if weights_MxN.shape[1] != scores_NxQ.shape[0]:
    raise ValueError(
      f"scores {scores_NxQ.shape} are [examples, queries] and weights "
      f"{weights_MxN.shape} [masks, examples]: their examples differ"
    )
  return (1 - weights_MxN) @ scores_NxQ


def lds(measured: Array, predicted: Array) -> np.ndarray:
  """Spearman correlation over masks for each query [Q], ties averaged.

  `measured` [M, R, Q], averaged over seeds; `predicted` [M, Q]. A query whose
  predictions, or measurements, are all equal gets 0: they rank nothing.
  """
  measured_MxRxQ = finite(measured, "measurement", ("mask", "seed", "query"))
  predicted_MxQ = finite(predicted, "prediction", ("mask", "query"))
  measured_MxQ = measured_MxRxQ.mean(1)
  if measured_MxQ.shape != predicted_MxQ.shape or len(predicted_MxQ) < 2:
    raise ValueError(
      f"measured {measured_MxRxQ.shape} must be [masks, seeds, queries] and "
      f"predicted {predicted_MxQ.shape} [masks, queries], of 2 masks or more"
    )
  return _correlation(_ranks(measured_MxQ), _ranks(predicted_MxQ))


def noise_ceiling(measured: Array) -> np.ndarray:
  """LDS expected of a perfect prediction of the expected measurement [Q].

  `measured` [M, R, Q]; see the module. A reliability estimated below 0 is 0.
  """
  measured_MxRxQ = finite(measured, "measurement", ("mask", "seed", "query"))
  masks, seeds, _ = measured_MxRxQ.shape
  if seeds < 2:
    raise ValueError(
      "a noise ceiling needs 2 seeds or more: with 1 the effect of a mask "
      "cannot be told from noise"
    )
  if masks < 3:
    raise ValueError(f"a noise ceiling needs 3 masks or more, got {masks}")
  # Ranks have the same mean under every seed, so b_r is 0.
  ranks_MxRxQ = _ranks(measured_MxRxQ)
  mean_MxQ = ranks_MxRxQ.mean(1)
  between_Q = seeds * mean_MxQ.var(0, ddof=1)
  rest_MxRxQ = ranks_MxRxQ - mean_MxQ[:, None]
  rest_Q = (rest_MxRxQ**2).sum((0, 1)) / ((masks - 1) * (seeds - 1))
  total_Q = between_Q + (seeds - 1) * rest_Q
  one_Q = np.maximum(between_Q - rest_Q, 0) / np.where(total_Q > 0, total_Q, 1)
  one_Q = 2 * np.sin(np.pi / 6 * one_Q)
  mean_Q = np.sqrt(seeds * one_Q / (1 + (seeds - 1) * one_Q))
  return 6 / np.pi * np.arcsin(mean_Q / 2)


def bootstrap(
  per_query: Array,
  key: jax.Array,
  *,
  confidence: float = 0.95,
  samples: int = 2000,
) -> Interval:
  """Mean over queries, axis 0 of [Q, ...], and its percentile interval [...].

  Queries are resampled, all else is fixed: the interval says how far the mean
  may move with other queries, not with other masks or seeds.
  """
  values = finite(per_query, "value", ("query",))
  if not 0 < confidence < 1:
    raise ValueError(f"confidence must be in (0, 1), got {confidence}")
  queries = len(values)
  drawn = np.asarray(jax.random.randint(key, (samples, queries), 0, queries))
  counts = np.zeros((samples, queries))
  np.add.at(counts, (np.arange(samples)[:, None], drawn), 1)
  means = np.tensordot(counts / queries, values, 1)
  tail = (1 - confidence) / 2
  low, high = np.quantile(means, [tail, 1 - tail], axis=0)
  return Interval(values.mean(0), low, high)


class Choice(NamedTuple):
  """A setting chosen on some queries and judged on the others."""

  name: str
  validation: float  # mean LDS where it was chosen
  per_query: np.ndarray  # LDS of the other queries


def choose(candidates: Mapping[str, np.ndarray], held_out: Array) -> Choice:
  """The candidate of best mean LDS on the queries that are not held out.

  Args:
    candidates: {name: LDS by query [Q]}, as of several dampings.
    held_out: bool [Q], the queries the choice is judged on.
  """
  held_Q = np.asarray(held_out, bool)
  if not candidates or held_Q.all() or not held_Q.any():
    raise ValueError(
      f"choosing of {len(candidates)} candidates needs queries on both sides; "
      f"{int(held_Q.sum())} of {held_Q.size} are held out"
    )
  means = {k: float(np.mean(v[~held_Q])) for k, v in candidates.items()}
  best = max(means, key=lambda name: means[name])
  return Choice(best, means[best], np.asarray(candidates[best])[held_Q])


def finite(array: Array, noun: str, axes: tuple[str, ...]) -> np.ndarray:
  """`array` in float64, with at least the named axes and nothing NaN in it."""
  values = np.asarray(array, np.float64)
  if values.ndim < len(axes) or 0 in values.shape:
    raise ValueError(f"{noun}s must be {list(axes)}, got shape {values.shape}")
  wrong = np.argwhere(~np.isfinite(values))
  if len(wrong):
    where = ", ".join(
      f"{axis} {i}" for axis, i in zip(axes, wrong[0], strict=False)
    )
    raise ValueError(
      f"{len(wrong)} {noun}s are not finite, the first that of {where}"
    )
  return values


def _ranks(values: np.ndarray) -> np.ndarray:
  """Ranks along axis 0, ties averaged."""

  def column(x):
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

  return np.apply_along_axis(column, 0, values)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Pearson correlation along axis 0; 0 where either is constant."""
  x, y = x - x.mean(0), y - y.mean(0)
  norm = np.sqrt((x**2).sum(0) * (y**2).sum(0))
  return (x * y).sum(0) / np.where(norm > 0, norm, 1)
