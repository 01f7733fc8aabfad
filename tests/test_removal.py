"""Removal curves of a model whose optimum is a formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.evaluation.removal import (
  curve,
  random_ranking,
  same_class_ranking,
  summarise,
)

N, Q, R = 14, 3, 2
KEYS = (0, 1, 2)


def problem():
  """Ridge regression; the seed shifts the parameters by a tenth of its draw."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(N, 3)).astype(np.float32)
  y = rng.normal(size=N).astype(np.float32)
  x_q = rng.normal(size=(Q, 3)).astype(np.float32)
  y_q = rng.normal(size=Q).astype(np.float32)

  def train(weights, key):
    weighted = x.T * weights[None]
    optimum = jnp.linalg.solve(weighted @ x + 0.5 * jnp.eye(3), weighted @ y)
    return optimum + 0.1 * jax.random.normal(key, (3,))

  def measure(params):
    return {"loss": (x_q @ params - y_q) ** 2}

  return train, measure, jax.random.split(jax.random.key(0), R)


def leave_one_out():
  train, measure, keys = problem()

  def mean(weights):
    per_key = jax.vmap(lambda key: measure(train(weights, key))["loss"])
    return per_key(keys).mean(0)

  changes = jax.vmap(mean)(1 - jnp.eye(N)) - mean(jnp.ones(N))[None]
  return np.asarray(changes)


def test_curve_removes_each_querys_own_top():
  train, measure, keys = problem()
  scores = np.asarray(random_ranking(jax.random.key(3), N, Q))
  ks = (0, 2, 5)
  values = curve(train, measure, scores, ks, keys, chunk=4)["loss"]
  assert values.shape == (Q, len(ks), R)
  for q in range(Q):
    for column, k in enumerate(ks):
      weights = np.ones(N, np.float32)
      weights[np.argsort(-scores[:, q])[:k]] = 0
      expected = [measure(train(weights, key))["loss"][q] for key in keys]
      np.testing.assert_allclose(values[q, column], expected, rtol=1e-4)


def test_exact_scores_raise_the_loss_most():
  scores = leave_one_out()
  train, measure, keys = problem()

  def change(scores):
    values = curve(train, measure, scores, (0, 1), keys)["loss"].mean(2)
    return values[:, 1] - values[:, 0]

  best, worst = change(scores), change(-scores)
  np.testing.assert_allclose(best, scores.max(0), rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(worst, scores.min(0), rtol=1e-3, atol=1e-5)
  assert (best > 0).all() and (worst < 0).all()


def test_curve_resumes_and_reports(tmp_path):
  train, measure, keys = problem()
  scores = leave_one_out()
  options = {"directory": tmp_path, "chunk": 3}
  first = curve(train, measure, scores, (0, 1), keys, **options)
  with pytest.raises(ValueError, match="other weights"):
    curve(train, measure, -scores, (0, 1), keys, **options)
  again = curve(train, measure, scores, (0, 1), keys, **options)
  np.testing.assert_array_equal(first["loss"], again["loss"])


def test_ties_go_in_the_order_of_the_examples():
  seen = curve(
    lambda weights, key: weights,
    lambda weights: weights[None],
    np.zeros((N, 1)),
    (3,),
    jax.random.split(jax.random.key(0), 1),
  )
  np.testing.assert_array_equal(seen[0, 0, 0], [0, 0, 0] + [1] * (N - 3))


@pytest.mark.parametrize("seed", KEYS)
def test_rankings(seed):
  key = jax.random.key(seed)
  labels, query_labels = jnp.arange(N) % 3, jnp.array([2, 0])
  scores = np.asarray(same_class_ranking(key, labels, query_labels))
  assert scores.shape == (N, 2)
  for q, label in enumerate((2, 0)):
    order = np.argsort(-scores[:, q])
    count = int((labels == label).sum())
    assert set(order[:count]) == set(np.flatnonzero(labels == label))
    assert list(order[:count]) != sorted(order[:count])
  # Places of example 0 among N, over queries: uniform has variance (N² - 1)/12.
  queries = 500
  places = np.argsort(
    np.argsort(random_ranking(key, N, queries), axis=0), axis=0
  )[0]
  error = np.sqrt((N**2 - 1) / 12 / queries)
  assert abs(places.mean() - (N - 1) / 2) < 4 * error


def test_summary_counts_changes_and_flips():
  values = np.array([[[1.0, 3], [2, 4], [5, 7]], [[0, 0], [2, 2], [1, 1]]])
  correct = np.array(
    [
      [[1, 1], [0, 1], [0, 0]],  # half right has not flipped
      [[1, 1], [0, 0], [1, 1]],  # once flipped, stays counted
      [[1, 0], [0, 0], [0, 0]],  # not right at first: not eligible
    ]
  )
  key = jax.random.key(0)
  summary = summarise(values, (0, 5, 9), key)
  np.testing.assert_allclose(summary.change.mean, [0, 1.5, 2.5])
  np.testing.assert_allclose(summary.change.low, [0, 1, 1])
  np.testing.assert_allclose(summary.change.high, [0, 2, 4])
  assert summary.flipped is None
  more = np.concatenate([values, values[:1]])
  summary = summarise(more, (0, 5, 9), key, correct=correct)
  assert summary.eligible == 2
  assert summary.flipped is not None
  np.testing.assert_allclose(summary.flipped.mean, [0, 0.5, 1])
  with pytest.raises(ValueError, match="no query is predicted right"):
    summarise(values, (0, 5, 9), key, correct=correct[2:])


def test_bad_input():
  train, measure, keys = problem()
  scores = leave_one_out()
  with pytest.raises(ValueError, match="ks must increase"):
    curve(train, measure, scores, (0, 3, 3), keys)
  with pytest.raises(ValueError, match=f"cannot remove {N} of {N}"):
    curve(train, measure, scores, (0, N), keys)
  with pytest.raises(ValueError, match="example 4, query 0"):
    broken = scores.copy()
    broken[4, 0] = np.nan
    curve(train, measure, broken, (0, 1), keys)
  with pytest.raises(ValueError, match="each of 2 queries"):
    curve(train, measure, scores[:, :2], (0, 1), keys)
  with pytest.raises(ValueError, match="from 0 on"):
    summarise(np.ones((2, 2, 2)), (1, 2), jax.random.key(0))
