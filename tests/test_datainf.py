"""DataInf against the mean of explicit inverses."""

import functools

import jax
import numpy as np
import oracles
import pytest
from oracles import N

from tda.attribution import influence
from tda.inverse import datainf, spectral
from tda.streams import Loop

Q = 3


@pytest.fixture(autouse=True, scope="module")
def float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def problem(name):
  p = oracles.problem(name)
  rng = np.random.default_rng(2)
  v = {
    k: rng.normal(size=(Q, *b.stack, *b.shape))
    for k, b in p.found.blocks.items()
  }
  return p, datainf.fitter(p.found, p.objective), v


def mean_of_inverses(p, v, damping, data=None):
  """By np.linalg.inv of every example's (g gᵀ + λ) in every layer."""
  grads, found = oracles.gradients(p, data), {}
  for name, block in p.found.blocks.items():
    layers = int(np.prod(block.stack))
    size = block.size // layers
    g = np.asarray(grads[name]).reshape(-1, layers, size)
    x = np.asarray(v[name]).reshape(Q, layers, size)
    columns = []
    for layer in range(layers):
      delta = damping.value
      if damping.kind == "relative":
        delta = damping.value * np.square(g[:, layer]).mean()
      inverses = [
        np.linalg.inv(np.outer(one, one) + delta * np.eye(size))
        for one in g[:, layer]
      ]
      columns.append(x[:, layer] @ np.mean(inverses, axis=0))
    found[name] = np.stack(columns, axis=1).reshape(v[name].shape)
  return found


@pytest.mark.parametrize(
  ("name", "damping"),
  [
    ("pooled", spectral.relative(0.1)),
    ("pooled", spectral.absolute(0.03)),
    ("tied", spectral.relative(0.1)),
    ("mixed", spectral.relative(0.1)),
  ],
)
def test_the_closed_form_is_the_mean_of_the_inverses(name, damping):
  p, fit, v = problem(name)
  # Batches of 4 of 10: the last is padded.
  response = fit(p.params, p.data, damping, loop=Loop(batch_size=4))
  got, want = response(v), mean_of_inverses(p, v, damping)
  assert got.keys() == want.keys()
  for k, x in want.items():
    np.testing.assert_allclose(got[k], x, rtol=1e-8, atol=1e-10)


def test_one_example_is_inverted_exactly():
  p, fit, v = problem("tanh")
  one = jax.tree.map(lambda x: x[:1], p.data)
  got = fit(p.params, one, spectral.relative(0.1))(v)
  grads = oracles.flat(oracles.gradients(p, one))
  for k, g in grads.items():
    fisher = g.T @ g
    damped = fisher + 0.1 * np.mean(np.diag(fisher)) * np.eye(len(fisher))
    want = np.linalg.solve(damped, v[k].reshape(Q, -1).T).T
    np.testing.assert_allclose(got[k].reshape(Q, -1), want, rtol=1e-8)


def test_large_damping_approaches_the_damped_fisher():
  """Both are v/λ − F v/λ² + O(λ⁻³): their difference falls with λ⁻³."""
  p, fit, v = problem("tanh")
  grads = oracles.flat(oracles.gradients(p))
  errors = []
  for value in (1e3, 1e4):
    got = fit(p.params, p.data, spectral.absolute(value))(v)
    g, x = grads["in/w"], v["in/w"].reshape(Q, -1)
    damped = g.T @ g / N + value * np.eye(g.shape[1])
    want = np.linalg.solve(damped, x.T).T
    errors.append(np.abs(got["in/w"].reshape(Q, -1) - want).max())
  assert 500 < errors[0] / errors[1] < 2000


def test_scores_go_through_the_engine_with_any_query_batch():
  p, fit, _ = problem("pooled")
  response = fit(p.params, p.data, spectral.relative(0.1))
  grads = oracles.gradients(p)
  joined = lambda x: np.concatenate(
    [part for _, part in sorted(oracles.flat(x).items())], axis=1
  )
  want = joined(grads) @ joined(response(grads)).T / N
  for size in (3, 64):
    score = influence.scorer(p.found, p.objective, query_batch=size)
    scores = score(p.params, p.data, p.data, {"datainf": response})["datainf"]
    np.testing.assert_allclose(scores.values, want, rtol=1e-8, atol=1e-12)
  assert scores.damping == spectral.relative(0.1)
  assert scores.labels.kind == "empirical"


def test_a_layer_without_gradient_responds_with_zero():
  p, fit, v = problem("tanh")
  still = p.params | {"out": jax.tree.map(np.zeros_like, p.params["out"])}
  got = fit(still, p.data, spectral.relative(0.1))(v)
  assert not got["in/w"].any() and np.isfinite(got["out/w"]).all()


def test_no_damping_is_refused():
  p, fit, _ = problem("tanh")
  with pytest.raises(ValueError, match="divides by its damping"):
    fit(p.params, p.data, spectral.absolute(0.0))
