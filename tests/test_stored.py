"""Methods of an experiment that are from stores."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from tda import runs
from tda.attribution import less, logra
from tda.evaluation import stored
from tda.report.names import display


def test_methods_of_stores_are_known_by_their_names():
  methods = ("ekfac", "logra random 8", "trak", "logra principal 16")
  assert stored.named(methods) == ["logra random 8", "logra principal 16"]
  assert display("logra random 8") == "LoGra random 8"
  assert display("gradient_dot") == "gradient dot product"
  for name in ("logra", "logra dense 8", "logra random x", "logra random 8 9"):
    with pytest.raises(ValueError, match="write 'logra KIND K'"):
      stored.named([name])


def test_scores_along_a_run_are_those_of_explicit_gradients(tmp_path):
  p, rates = oracles.problem("tanh"), [0.05, 0.02]
  stage = runs.Stage(p.objective.loss, p.data, optax.adam(0.05), 2, 4)
  key, ones = jax.random.key(0), jnp.ones(oracles.N)
  points = runs.checkpoints(lambda _: p.params, [stage], [ones], key, [2, 5])
  queries = {k: x[:4] for k, x in p.data.items()}
  means = np.array([[0.5, 0, 0.5, 0], [0, 1, 0, 0]])
  log = logra.logger(p.objective, p.params, p.data, key=key, dimension=999)
  found = stored.along(
    tmp_path, log, p.found, points, p.data, queries, means, rates=rates
  )

  pairs = {"x": queries["x"][[[0, 2], [1, 1]]]}
  pairs["y"] = queries["y"][[[0, 2], [1, 1]]]
  mean = lambda params, query: jax.vmap(p.objective.loss, (None, 0))(
    params, query
  ).mean()
  want = less.attribute(
    p.objective,
    points,
    p.data,
    pairs,
    rates=rates,
    dimension=None,
    measurement=mean,
  )
  np.testing.assert_allclose(found["less"], want.values, rtol=1e-3, atol=1e-6)
  dot, cosine = 0.0, 0.0
  for point, rate in zip(points, rates, strict=True):
    grads = oracles.flat(oracles.gradients(p._replace(params=point.params)))
    g = np.concatenate([*grads.values()], axis=1)
    q = means @ g[:4]
    length = np.linalg.norm(g, axis=1)[:, None] * np.linalg.norm(q, axis=1)
    dot += rate * g @ q.T / oracles.N
    cosine += rate * g @ q.T / length
  options = {"rtol": 1e-3, "atol": 1e-6}
  np.testing.assert_allclose(found["gradient_dot"], dot, **options)
  np.testing.assert_allclose(found["gradient_cosine"], cosine, **options)
