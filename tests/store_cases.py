"""A store of a small model's gradients, for the tests of stores."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tda import blocks, gradients, likelihoods, projections, runs, streams
from tda.attribution import logra
from tda.store import layout, reading


def key():
  return jax.random.key(5)


def outputs(params, example):
  hidden = jnp.tanh(example["x"] @ params["w"] + params["b"])
  return hidden @ params["v"]


OBJECTIVE = likelihoods.Objective(
  outputs, likelihoods.categorical(), lambda example: example["y"]
)


def model(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {"w": (6, 8), "b": (8,), "v": (8, 4)}
  draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {name: draw(shape) for name, shape in shapes.items()}


def data(n=23, seed=1):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, 6)).astype(np.float32)
  return {"x": x, "y": rng.integers(0, 4, n).astype(np.int32)}


def logger(**options):
  options = {"key": key(), "dimension": 5} | options
  return logra.logger(OBJECTIVE, model(), data(), **options)


def build(folder, train=None, *, log=None, **options):
  log = log or logger()
  options = {"dtype": "float32", "per_shard": 4} | options
  options = {"loop": streams.Loop(8)} | options
  return log.build(
    folder, model(), data() if train is None else train, **options
  )


def rows(store):
  """All of a store [N, F], float32."""
  found = [
    np.array(layout.decode(block.rows, store.layout))[: block.held]
    for block in reading.blocks(store)
  ]
  return np.concatenate(found)


def ask(queries=None, *, log=None, **options):
  log = log or logger()
  return log.ask(model(), data(3, 9) if queries is None else queries, **options)


def traced():
  return blocks.trace(OBJECTIVE.outputs, model(), streams.example(data()))


def sides():
  """The directions that `build` draws."""
  return projections.two_sided(traced(), key(), 5)


def trained():
  """A checkpoint of two steps with Adam."""
  stage = runs.Stage(OBJECTIVE.loss, data(), optax.adam(0.01), 1, 12)
  init = lambda key: model()
  return runs.checkpoints(init, [stage], [jnp.ones(23)], key(), [1])[0]


def dense(rows):
  """Whole gradients of a data set by block [N, G, O, I]."""
  found = traced()
  batch = streams.Batch(rows, jnp.arange(len(rows["y"])), None)
  run = jax.jit(gradients.per_example(found, OBJECTIVE))
  return run(model(), batch)[0]
