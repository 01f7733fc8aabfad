"""LDS, ceiling and intervals, against scipy, closed forms and simulation."""

import jax
import numpy as np
import pytest
from scipy import stats

from tda.evaluation.lds import (
  bootstrap,
  choose,
  lds,
  noise_ceiling,
  predictions,
)

KEY_SEEDS = (0, 1, 2)


def ridge():
  """Exact leave-one-out changes [N, Q] of a ridge regression's loss, and masks.

  (XᵀX + λ)⁻¹ with one row less is a rank-one update, solved here outright.
  """
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(20, 3)), rng.normal(size=20)
  x_q, y_q = rng.normal(size=(4, 3)), rng.normal(size=4)

  def losses(weights):
    gram = (x.T * weights) @ x + 0.5 * np.eye(3)
    return (x_q @ np.linalg.solve(gram, (x.T * weights) @ y) - y_q) ** 2

  masks = 1 - np.eye(20)
  measured = np.stack([losses(mask) for mask in masks])
  return measured - losses(np.ones(20)), masks, measured


def test_exact_scores_of_leaving_one_out_reach_one():
  scores, masks, measured = ridge()
  predicted = predictions(scores, masks)
  np.testing.assert_allclose(predicted, scores, rtol=1e-12)
  np.testing.assert_allclose(lds(measured[:, None], predicted), 1, rtol=1e-12)
  np.testing.assert_allclose(lds(measured[:, None], -predicted), -1, rtol=1e-12)


def test_predictions_add_the_excluded():
  scores = np.array([[1.0, 10], [2, 20], [4, 40]])
  weights = np.array([[1, 1, 1], [0, 1, 0], [0.5, 1, 1]])
  expected = np.array([[0, 0], [5, 50], [0.5, 5]])
  np.testing.assert_allclose(predictions(scores, weights), expected)
  with pytest.raises(ValueError, match="examples differ"):
    predictions(scores, weights[:, :2])


@pytest.mark.parametrize("seed", KEY_SEEDS)
def test_lds_is_spearman_with_ties(seed):
  rng = np.random.default_rng(seed)
  measured = rng.integers(0, 5, (30, 2, 6)).astype(float)
  predicted = rng.integers(0, 4, (30, 6)).astype(float)
  expected = np.zeros(6)
  for q in range(6):
    result = stats.spearmanr(measured[..., q].mean(1), predicted[:, q])
    expected[q] = float(result.statistic)
  np.testing.assert_allclose(lds(measured, predicted), expected, rtol=1e-12)


def test_constant_scores_correlate_zero():
  rng = np.random.default_rng(0)
  measured, predicted = rng.normal(size=(9, 2, 2)), rng.normal(size=(9, 2))
  predicted[:, 1] = 3
  result = lds(measured, predicted)
  assert result[0] != 0 and result[1] == 0


@pytest.mark.parametrize("seed", KEY_SEEDS)
@pytest.mark.parametrize("noise, seeds", [(0.5, 2), (1.0, 3), (9.0, 4)])
@pytest.mark.parametrize("shape", [lambda y: y, lambda y: y**3])
def test_ceiling_of_known_variances(seed, noise, seeds, shape):
  """Components A = 1, a large seed effect, E: ρ = 1 / sqrt(1 + E / R)."""
  rng = np.random.default_rng(seed)
  masks, queries = 400, 150
  effect = rng.normal(size=(masks, 1, queries))
  shared = 5 * rng.normal(size=(1, seeds, queries))
  rest = np.sqrt(noise) * rng.normal(size=(masks, seeds, queries))
  # A monotone distortion within each seed must not matter to ranks.
  ceiling = noise_ceiling(shape(effect + rest) + shared)
  rho = 1 / np.sqrt(1 + noise / seeds)
  error = ceiling.std(ddof=1) / np.sqrt(queries)
  # The root and the arcsine bend: bias of the order of the variance.
  bias = ceiling.var() / rho
  expected = 6 / np.pi * np.arcsin(rho / 2)
  assert abs(ceiling.mean() - expected) < 4 * error + bias
  # The formula is what the perfect predictor gets.
  perfect = lds(effect + rest + shared, effect[:, 0])
  error = np.hypot(error, perfect.std(ddof=1) / np.sqrt(queries))
  assert abs(ceiling.mean() - perfect.mean()) < 4 * error + bias


def test_ceiling_without_noise_and_without_signal():
  rng = np.random.default_rng(0)
  effect = rng.normal(size=(50, 1, 3))
  shared = rng.normal(size=(1, 4, 3))
  np.testing.assert_allclose(noise_ceiling(effect + shared), 1)
  # Reliability is 0 in expectation, and never NaN below it.
  nothing = noise_ceiling(rng.normal(size=(200, 3, 400)))
  assert (nothing == 0).mean() > 0.3
  # A share of 1/M of the variance at most, with R = 3.
  assert np.quantile(nothing, 0.95) < 0.5
  np.testing.assert_array_equal(noise_ceiling(np.ones((5, 2, 3))), 0)


def test_ceiling_needs_seeds_and_masks():
  with pytest.raises(ValueError, match="2 seeds or more"):
    noise_ceiling(np.ones((10, 1, 3)))
  with pytest.raises(ValueError, match="3 masks or more, got 2"):
    noise_ceiling(np.ones((2, 3, 3)))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bootstrap_covers_as_often_as_it_says(confidence):
  rng = np.random.default_rng(0)
  trials, queries = 400, 60
  values = rng.normal(size=(queries, trials))  # trials as trailing axis
  interval = bootstrap(values, jax.random.key(0), confidence=confidence)
  assert interval.mean.shape == interval.low.shape == (trials,)
  covered = ((interval.low < 0) & (interval.high > 0)).mean()
  # The percentile interval of n values is that of a normal with variance
  # (n - 1) / n of the true one and n - 1 degrees of freedom.
  z = stats.norm.ppf((1 + confidence) / 2) * np.sqrt((queries - 1) / queries)
  expected = 2 * stats.t.cdf(z, queries - 1) - 1
  error = np.sqrt(expected * (1 - expected) / trials)
  assert abs(covered - expected) < 4 * error


def test_values_that_are_not_finite_are_named():
  scores, weights = np.ones((4, 2)), np.ones((3, 4))
  scores[2, 1] = np.nan
  with pytest.raises(ValueError, match="example 2, query 1"):
    predictions(scores, weights)
  measured = np.ones((3, 2, 2))
  measured[1, 0, 1] = np.inf
  with pytest.raises(ValueError, match="mask 1, seed 0, query 1"):
    lds(measured, np.ones((3, 2)))
  with pytest.raises(ValueError, match="mask 1, seed 0, query 1"):
    noise_ceiling(measured)
  with pytest.raises(ValueError, match="query 1"):
    bootstrap(np.array([0, np.nan]), jax.random.key(0))


def test_bad_shapes():
  with pytest.raises(ValueError, match="2 masks or more"):
    lds(np.ones((3, 2, 2)), np.ones((4, 2)))
  with pytest.raises(ValueError, match=r"measurements must be .* \(3, 2\)"):
    lds(np.ones((3, 2)), np.ones((3, 2)))
  with pytest.raises(ValueError, match="confidence"):
    bootstrap(np.ones(3), jax.random.key(0), confidence=95)


def test_a_damping_is_chosen_on_some_queries_and_judged_on_the_others():
  candidates = {"a": np.array([0.9, 0.1, 0.9]), "b": np.array([0.5, 0.7, 0.5])}
  held_out = np.array([False, True, False])
  choice = choose(candidates, held_out)
  assert (choice.name, choice.per_query.tolist()) == ("a", [0.1])
  assert choice.validation == pytest.approx(0.9)
  assert choose(candidates, ~held_out).name == "b"
  for bad in (np.ones(3, bool), np.zeros(3, bool)):
    with pytest.raises(ValueError, match="queries on both sides"):
      choose(candidates, bad)
