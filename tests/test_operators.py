"""Products of exact curvatures in block coordinates against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tda import blocks, meshes, streams
from tda.curvature import dense, operators

Q = 3


@pytest.fixture(autouse=True, scope="module")
def exactly():
  with jax.enable_x64(True):
    yield


def directions(p, found, seed=0):
  """Random directions as rows [Q, D] and in blocks."""
  flat, unravel = jax.flatten_util.ravel_pytree(p.params)
  rows = np.random.default_rng(seed).normal(size=(Q, flat.size))
  trees = jax.vmap(unravel)(jnp.asarray(rows))
  return rows, jax.vmap(lambda t: blocks.to_blocks(found, t))(trees)


def flat(found, many):
  one = lambda b: jax.flatten_util.ravel_pytree(blocks.to_tree(found, b))[0]
  return np.asarray(jax.vmap(one)(many))


@pytest.mark.parametrize("name", ["tanh", "pooled", "tied", "mixed"])
@pytest.mark.parametrize(
  ("kind", "labels"), [("gauss_newton", "exact"), ("empirical", "empirical")]
)
def test_products_are_those_of_the_matrix(name, kind, labels):
  p = oracles.problem(name)
  matrix = dense.dense_ggn(p.objective, p.params, p.data, labels)
  rows, many = directions(p, p.found)
  matvec = operators.curvature(
    p.found, p.objective, p.params, p.data, kind=kind, microbatch=4
  )
  found = flat(p.found, jax.jit(matvec)(many))
  np.testing.assert_allclose(found, rows @ matrix, rtol=1e-9, atol=1e-12)


def test_untracked_parameters_do_not_move():
  p = oracles.problem("tanh")
  found = blocks.trace(
    p.objective.outputs, p.params, streams.example(p.data), select="out*"
  )
  whole = jax.flatten_util.ravel_pytree(
    {"in": jax.tree.map(jnp.zeros_like, p.params["in"]), "out": p.params["out"]}
  )[0]
  tracked = np.flatnonzero(np.asarray(whole) != 0)
  matrix = dense.dense_ggn(p.objective, p.params, p.data, "exact")
  part = np.zeros_like(matrix)
  part[np.ix_(tracked, tracked)] = matrix[np.ix_(tracked, tracked)]
  rows, many = directions(p, found)
  matvec = operators.curvature(found, p.objective, p.params, p.data)
  np.testing.assert_allclose(
    flat(found, matvec(many)), rows @ part, rtol=1e-9, atol=1e-12
  )


def test_minibatches_average_to_the_whole():
  """The mean over draws is off by its standard error, summed over entries."""
  p = oracles.problem("tanh")
  _, many = directions(p, p.found)
  product = operators.minibatches(
    p.found, p.objective, p.params, p.data, size=4, key=jax.random.key(0)
  )
  draws = jax.jit(
    lambda v: jax.lax.map(lambda k: product(v, k), jnp.arange(99))
  )
  drawn = np.asarray(jax.vmap(lambda b: blocks_flat(p.found, b))(draws(many)))
  whole = operators.curvature(p.found, p.objective, p.params, p.data)(many)
  error = drawn.std(axis=0, ddof=1) / np.sqrt(len(drawn))
  off = np.abs(drawn.mean(axis=0) - flat(p.found, whole))
  assert 0 < np.sum(off**2) <= 4 * np.sum(error**2)


def blocks_flat(found, many):
  one = lambda b: jax.flatten_util.ravel_pytree(blocks.to_tree(found, b))[0]
  return jax.vmap(one)(many)


def test_data_spread_over_devices():
  p = oracles.problem("tanh", n=16)
  mesh = meshes.mesh(8)
  split = NamedSharding(mesh, P("data"))
  spread = jax.tree.map(lambda x: jax.device_put(x, split), p.data)
  _, many = directions(p, p.found)

  def product(data, v):
    return operators.curvature(
      p.found, p.objective, p.params, data, microbatch=8
    )(v)

  found = jax.jit(product)(spread, many)
  expected = jax.jit(product)(p.data, many)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12)


def test_bad_arguments():
  p = oracles.problem("linear")
  with pytest.raises(ValueError, match="unknown curvature 'hessian'"):
    operators.curvature(p.found, p.objective, p.params, p.data, kind="hessian")
  with pytest.raises(ValueError, match="minibatches of 11 of 10"):
    operators.minibatches(
      p.found, p.objective, p.params, p.data, size=11, key=jax.random.key(0)
    )
