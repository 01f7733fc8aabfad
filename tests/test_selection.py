"""Ranks against dense linear algebra on the mean validation gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from oracles import N

from tda import blocks
from tda.curvature import dense
from tda.evaluation import selection

DAMPINGS = (0.1, 1.0)


@pytest.fixture(autouse=True, scope="module")
def float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def ranked():
  p = oracles.problem("tanh")
  validation = jax.tree.map(lambda x: x[::-1][:4], p.data)
  rank = selection.ranker(
    p.found, p.objective, dampings=DAMPINGS, lissa_steps=4000
  )
  return p, validation, rank(p.params, p.data, validation, jax.random.key(0))


def grads_and_query():
  p, validation, _ = ranked()
  query = {
    k: g.mean(axis=0)
    for k, g in oracles.flat(oracles.gradients(p, validation)).items()
  }
  return oracles.flat(oracles.gradients(p)), query


def test_every_method_ranks_every_example_at_every_damping():
  _, _, (harm, residual) = ranked()
  plain = {
    "random", "loss", "gradient_dot", "gradient_cosine", "self_gradient",
  }  # fmt: skip
  curved = set(selection.METHODS) - plain
  names = plain | {f"{k}@{d:g}" for k in curved for d in DAMPINGS}
  assert set(harm) == names
  assert all(x.shape == (N,) and np.isfinite(x).all() for x in harm.values())
  assert set(residual) == {f"lissa@{d:g}" for d in DAMPINGS}


def test_harm_is_minus_the_product_with_the_mean_validation_gradient():
  p, _, (harm, _) = ranked()
  grads, query = grads_and_query()
  dot = sum(grads[k] @ query[k] for k in grads)
  np.testing.assert_allclose(harm["gradient_dot"], -dot, rtol=1e-5, atol=1e-7)
  norms = np.sqrt(sum(np.square(g).sum(axis=1) for g in grads.values()))
  size = np.sqrt(sum(np.square(q).sum() for q in query.values()))
  want = -dot / norms / size
  np.testing.assert_allclose(
    harm["gradient_cosine"], want, rtol=1e-5, atol=1e-7
  )
  np.testing.assert_allclose(harm["self_gradient"], norms**2, rtol=1e-5)
  rows = jax.tree.map(jnp.asarray, p.data)
  losses = jax.vmap(p.objective.loss, (None, 0))(p.params, rows)
  np.testing.assert_allclose(harm["loss"], losses, rtol=1e-6)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_all_methods_have_the_same_damping(damping):
  """λ is a multiple of the mean squared gradient entry in each of them."""
  p, _, (harm, _) = ranked()
  grads, query = grads_and_query()
  whole = dense.dense_ggn(p.objective, p.params, p.data)
  deltas = {k: damping * np.square(g).mean() for k, g in grads.items()}
  # LiSSA: the Gauss-Newton matrix of all blocks together.
  maps = maps_to_blocks(p)
  order = list(grads)
  basis = np.concatenate([maps[k] for k in order], axis=1)
  matrix = basis.T @ np.asarray(whole) @ basis
  diagonal = np.concatenate(
    [np.full(grads[k].shape[1], deltas[k]) for k in order]
  )
  v = np.concatenate([query[k] for k in order])
  g = np.concatenate([grads[k] for k in order], axis=1)
  want = -g @ np.linalg.solve(matrix + np.diag(diagonal), v)
  np.testing.assert_allclose(harm[f"lissa@{damping:g}"], want, rtol=2e-3)
  # HyperINF and DataInf, by block; their own tests have more.
  hyperinf, datainf = np.zeros(N), np.zeros(N)
  for k, one in grads.items():
    groups, outputs, inputs = p.found.blocks[k].shape
    assert groups == 1 and inputs >= outputs
    rows = one.reshape(N, outputs, inputs)
    fisher = np.einsum("noi,noj->ij", rows, rows) / N / outputs
    inverse = np.linalg.inv(fisher + deltas[k] * np.eye(inputs))
    hyperinf -= one @ (query[k].reshape(outputs, inputs) @ inverse).ravel()
    scale = (one @ query[k]) / (deltas[k] + np.square(one).sum(axis=1))
    datainf -= one @ (query[k] - scale @ one / N) / deltas[k]
  np.testing.assert_allclose(
    harm[f"hyperinf@{damping:g}"], hyperinf, rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    harm[f"datainf@{damping:g}"], datainf, rtol=1e-4, atol=1e-6
  )


def maps_to_blocks(p):
  """For each block the matrix from ravelled parameters to its coordinates."""
  flat, unravel = ravel_pytree(p.params)
  unit = jnp.eye(len(flat))
  tree = jax.vmap(lambda v: blocks.to_blocks(p.found, unravel(v)))(unit)
  return oracles.flat(tree)


def test_self_forms_are_positive_and_shrink_with_damping():
  _, _, (harm, _) = ranked()
  for method in ("self_hyperinf", "self_kfac", "self_ekfac"):
    low, high = (harm[f"{method}@{d:g}"] for d in DAMPINGS)
    assert (high > 0).all() and (low > high).all()


def test_a_second_call_draws_anew_and_else_repeats():
  p, validation, (first, _) = ranked()
  methods = ("random", "gradient_dot")
  rank = selection.ranker(p.found, p.objective, methods=methods)
  again = rank(p.params, p.data, validation, jax.random.key(1)).harm
  assert set(again) == set(methods)
  np.testing.assert_allclose(
    again["gradient_dot"], first["gradient_dot"], rtol=1e-6
  )
  assert not np.array_equal(again["random"], first["random"])


def test_keep_takes_the_least_harmful():
  harm = jnp.array([3.0, -1.0, 2.0, 0.0])
  np.testing.assert_array_equal(selection.keep(harm, 0.5), [0, 1, 0, 1])
  assert selection.count(4, 0.01) == 1
  with pytest.raises(ValueError, match="not 0"):
    selection.keep(harm, 0)


def test_unknown_methods_are_listed():
  p = oracles.problem("tanh")
  with pytest.raises(ValueError, match=r"\['hyperinfo'\]"):
    selection.ranker(p.found, p.objective, methods=("hyperinfo",))
