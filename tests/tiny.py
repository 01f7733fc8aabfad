"""A regression of sixteen parameters, for runs that are differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tda.attribution import unrolled
from tda.runs import Stage


def loss(params, example):
  hidden = jnp.tanh(example["x"] @ params["w"])
  return (hidden @ params["v"] - example["y"]) ** 2


def init(key):
  return {"w": jax.random.normal(key, (3, 4)), "v": jnp.ones(4) / 2}


def dataset(n, seed=0):
  rng = np.random.default_rng(seed)
  return {"x": rng.normal(size=(n, 3)), "y": rng.normal(size=n)}


def measure(params):
  queries = dataset(3, seed=7)
  return jax.vmap(loss, (None, 0))(params, queries)


def replayed(mesh=None, microbatch=None):
  """The derivatives of two stages in batches that eight devices can share."""
  stages = [
    Stage(loss, dataset(10), optax.sgd(0.05, 0.9), 2, 8, microbatch=microbatch),
    Stage(loss, dataset(8), optax.adam(0.02, eps_root=1e-8), 1, 8),
  ]
  weights = [jnp.linspace(0.5, 1.5, 10), jnp.ones(8)]
  return unrolled.differentiate(
    init, stages, weights, jax.random.key(3), measure, mesh=mesh
  )
