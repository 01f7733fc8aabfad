"""Every method on one small problem: what the conformance tests compare."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tda import blocks, likelihoods, streams
from tda.attribution import influence, inverses, methods
from tda.inverse import spectral
from tda.likelihoods import Objective
from tda.streams import Loop

N, Q, T = 13, 5, 3
# Solvers amplify rounding by the condition of what they solve, and are compared
# in float64 by their own tests.
PAIRWISE = tuple(m for m in methods.METHODS if m not in inverses.EXACT)
METHODS = (*PAIRWISE, "self_influence")
ORDER = tuple(np.random.default_rng(0).permutation(n) for n in (N, Q))


class Variation(NamedTuple):
  """What must not change the scores."""

  methods: tuple[str, ...] = METHODS
  labels: str = "empirical"
  loop: Loop = Loop(N)
  query_batch: int = Q
  shuffled: bool = False  # training data and queries, by `ORDER`
  noise: float = 0.0  # relative, of parameters and inputs
  seed: int = 0
  dtype: Any = jnp.float32


def forward(params, example):
  """A layer at every position and one on their mean, in params' dtype."""
  x = example["x"].astype(params["in"]["w"].dtype)
  h = jnp.tanh(oracles.affine(params["in"], x)).mean(axis=0)
  return oracles.affine(params["out"], h)


OBJECTIVE = Objective(
  forward, likelihoods.categorical(), lambda example: example["y"]
)


def problem(variation: Variation):
  """Parameters, training data and queries."""
  rng = np.random.default_rng(0)
  shapes = {
    "in": {"w": (5, 6), "b": (6,)},
    "out": {"w": (6, 4), "b": (4,)},
  }
  params = jax.tree.map(
    lambda s: rng.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple)
  )
  train, queries = (
    {"x": rng.normal(size=(n, T, 5)), "y": rng.integers(4, size=n)}
    for n in (N, Q)
  )
  noise = np.random.default_rng(variation.seed + 1)
  moved = lambda x: np.float32(
    x * (1 + variation.noise * noise.uniform(-1, 1, x.shape))
  )
  params = jax.tree.map(
    lambda x: jnp.asarray(moved(x), variation.dtype), params
  )
  train, queries = ({**d, "x": moved(d["x"])} for d in (train, queries))
  return params, train, queries


def placed(params, mesh: Mesh | None):
  """Parameters with their outputs split over the model axis."""
  if mesh is None:
    return params
  split = lambda x: P(*[None] * (x.ndim - 1), "model")
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      x.shape, NamedSharding(mesh, split(x)), np.asarray(x).__getitem__
    ),
    params,
  )


def run(variation: Variation) -> dict[str, np.ndarray]:
  """Scores [N, Q] by method, and self-influence [N]."""
  params, train, queries = problem(variation)
  params = placed(params, variation.loop.mesh)
  if variation.shuffled:
    train, queries = (
      jax.tree.map(lambda x, i=i: x[i], d)
      for d, i in zip((train, queries), ORDER, strict=True)
    )
  pairwise = [name for name in variation.methods if name in PAIRWISE]
  scores = methods.attribute(
    OBJECTIVE,
    params,
    train,
    queries,
    methods=pairwise,
    labels=variation.labels,
    key=jax.random.key(0),
    query_batch=variation.query_batch,
    loop=variation.loop,
  )
  if "self_influence" in variation.methods:
    found = blocks.trace(forward, params, streams.example(train))
    shapes = {k: (*b.stack, *b.shape) for k, b in found.blocks.items()}
    curvature = jax.tree.map(np.float32, oracles.drawn_curvature(shapes)[:2])
    response = spectral.Response(*curvature)
    scores["self_influence"] = influence.self_influence(
      found,
      OBJECTIVE,
      params,
      train,
      response,
      loop=variation.loop.stage("self"),
    )
  return {name: found.values for name, found in scores.items()}
