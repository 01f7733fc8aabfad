"""TRAK against its formula on explicit gradients, and its projections."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree

from tda import likelihoods, meshes, projections
from tda.attribution import trak
from tda.streams import Loop

K, KEY = 6, jax.random.key(0)


def rows_of(function, params, data):
  one = lambda ex: ravel_pytree(jax.grad(function)(params, ex))[0]
  return np.asarray(jax.vmap(one)(jax.tree.map(jnp.asarray, data)))


def signs(p, key):
  """The projection in the order of `ravel_pytree`."""
  rows = projections.rademacher(p.found, key, K)
  return oracles.flat(rows)


@pytest.mark.parametrize("loop", [Loop(), Loop(4)])
def test_scores_are_those_of_the_formula(loop):
  with jax.enable_x64(True):
    p = oracles.problem("tanh")
    queries = {k: x[:3] for k, x in p.data.items()}
    models = [p.params, jax.tree.map(lambda x: 1.3 * x, p.params)]
    margin = likelihoods.margin(p.objective)
    products, slopes = 0, 0
    for i, params in enumerate(models):
      project = signs(p, jax.random.fold_in(KEY, i))
      apply = lambda f, data, params=params, project=project: sum(
        x @ project[name].T
        for name, x in oracles.flat(
          oracles.gradients(p._replace(params=params), data, f)
        ).items()
      )
      phi = apply(margin, p.data)
      asked = apply(p.objective.loss, queries)
      kernel = phi.T @ phi
      products += phi @ np.linalg.solve(kernel, asked.T)
      value = jax.vmap(margin, (None, 0))(params, p.data)
      slopes += -np.asarray(jax.nn.sigmoid(-value))
    found = trak.attribute(
      p.objective, models, p.data, queries, key=KEY, dimension=K, loop=loop
    )
    want = products * slopes[:, None] / 4
    scale = np.abs(want).max()
    np.testing.assert_allclose(found.values, want, rtol=1e-5, atol=1e-6 * scale)
    assert found.method == "trak" and found.coverage == 1


def test_the_output_of_a_regression_is_its_prediction():
  """In as many dimensions as a linear model has it is least squares' own."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(12, 3)), rng.normal(size=(12, 1))
  objective = likelihoods.Objective(
    lambda params, ex: ex["x"] @ params["w"],
    likelihoods.gaussian(),
    lambda ex: ex["y"],
  )
  with jax.enable_x64(True):
    params = {"w": jnp.asarray(rng.normal(size=(3, 1)))}
    data = {"x": x, "y": y}
    found = trak.attribute(
      objective, [params], data, data, key=jax.random.key(5), dimension=3
    ).values
    residual = np.asarray(x @ params["w"] - y)[:, 0]
    hat = x @ np.linalg.solve(x.T @ x, x.T)
  want = residual[:, None] * hat * residual[None]
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_a_query_need_not_look_like_a_training_example():
  p = oracles.problem("tanh")
  measurement = lambda params, query: (
    query["z"][0] * p.objective.loss(params, {"x": query["z"][1], "y": 0})
  )
  rows = np.stack([np.ones_like(p.data["x"][:2]), p.data["x"][:2]], axis=1)
  found = trak.attribute(
    p.objective,
    [p.params],
    p.data,
    {"z": rows},
    key=KEY,
    dimension=K,
    measurement=lambda params, query: measurement(params, query).sum(),
  )
  assert found.values.shape == (10, 2) and np.isfinite(found.values).all()


def test_projections_are_unbiased():
  """Over 400 keys the mean product is within five of its standard errors."""
  p = oracles.problem("tanh")
  rng = np.random.default_rng(0)
  name = "in/w"
  block = p.found.blocks[name]
  u, v = rng.normal(size=(2, block.size))
  draws = jax.vmap(lambda key: projections.rademacher(p.found, key, K)[name])
  rows = np.asarray(draws(jax.random.split(KEY, 400))).reshape(400, K, -1)
  found = ((rows @ u) * (rows @ v)).sum(axis=1)
  variance = (u @ u) * (v @ v) + (u @ v) ** 2 - 2 * (u**2 * v**2).sum()
  error = np.sqrt(variance / K / 400)
  assert abs(found.mean() - u @ v) < 5 * error
  # The variance of a variance of 400 nearly normal draws.
  assert abs(found.var() / (variance / K) - 1) < 5 * np.sqrt(2 / 400) * 2


def test_projections_do_not_depend_on_devices():
  p = oracles.problem("tanh")
  plain = projections.rademacher(p.found, KEY, 8)
  over = jax.sharding.NamedSharding(
    meshes.mesh(8), jax.sharding.PartitionSpec("data")
  )
  spread = jax.jit(
    lambda key: projections.rademacher(p.found, key, 8), out_shardings=over
  )(KEY)
  for name, x in plain.items():
    np.testing.assert_array_equal(spread[name], x)
  assert len({np.asarray(x).tobytes() for x in plain.values()}) == len(plain)


def test_bad_arguments():
  p = oracles.problem("tanh")
  call = lambda *models, **options: trak.attribute(
    p.objective, models, p.data, p.data, key=KEY, **options
  )
  with pytest.raises(ValueError, match="one model or more"):
    call()
  with pytest.raises(ValueError, match="dimension=64 of 10 examples"):
    call(p.params, dimension=64)
  with pytest.raises(ValueError, match="come together"):
    call(p.params, dimension=4, output=p.objective.loss)
  with pytest.raises(ValueError, match="1 dimension or more, not 0"):
    call(p.params, dimension=0)
