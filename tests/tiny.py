"""A regression of sixteen parameters, for runs that are differentiated."""

import jax
import jax.numpy as jnp
import numpy as np


def loss(params, example):
  hidden = jnp.tanh(example["x"] @ params["w"])
  return (hidden @ params["v"] - example["y"]) ** 2


def init(key):
  return {"w": jax.random.normal(key, (3, 4)), "v": jnp.ones(4) / 2}


def dataset(n, seed=0):
  rng = np.random.default_rng(seed)
  return {"x": rng.normal(size=(n, 3)), "y": rng.normal(size=n)}
