"""Baselines without curvature, on the same engine of passes.

Gradient dot products and cosines are responses of `influence.scorer`
(`Identity()` and `Cosine(Identity())`), so that they share its pass over the
training data. What needs no gradient is here. All are similarities: larger is
more alike, and only the order of a query's scores means anything.

Notation: N training examples, Q queries, F features.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tda import factors, gradients, streams, taps
from tda.blocks import PyTree, Trace
from tda.likelihoods import Objective
from tda.scores import SIMILARITY, Scores
from tda.streams import Loop


def representation(
  found: Trace,
  objective: Objective,
  params: PyTree,
  train: PyTree,
  queries: PyTree,
  *,
  loop: Loop = Loop(),
) -> Scores:
  """Cosine similarity of representations, [N, Q].

  An example's representation is what enters the last matrix block, in the
  order of use, averaged over positions, of sequences those of part 1 and more
  (`Objective.segments`); for a classifier these are its penultimate
  activations. Zero where a representation is. One forward pass over each data
  set.

  Raises:
    ValueError: no tracked block is a matrix, or queries that do not look like
      training examples.
  """
  matrices = {k: b for k, b in found.blocks.items() if b.kind == "matrix"}
  if not matrices:
    raise ValueError(
      "representation similarity compares what enters the last matrix, and "
      f"none is tracked among {sorted(found.blocks)}"
    )
  name = list(matrices)[-1]
  only = found._replace(blocks={name: matrices[name]})
  run = gradients.backward_pass(only, objective, INPUTS)

  def features(params, batch):
    values, finite = run(params, batch)
    rows = values[name].reshape(values[name].shape[0], -1)
    return _unit(rows), finite & jnp.isfinite(rows).all(axis=1)

  sides = {}
  for side, data in (("train", train), ("queries", queries)):
    try:
      taps.check_rows(found, data)
    except ValueError as error:
      raise ValueError(f"representation similarity, {side}: {error}") from error
    sides[side] = streams.each(features, params, data, loop.stage(side))
  return Scores(
    sides["train"] @ sides["queries"].T,
    method="representation",
    unit=SIMILARITY,
    normaliser=1,
    sign="positive: alike",
  )


def random(key: jax.Array, train: PyTree, queries: PyTree) -> Scores:
  """Standard normal scores [N, Q]: what any method must beat."""
  shape = (streams.rows(train), streams.rows(queries))
  return Scores(
    np.asarray(jax.random.normal(key, shape, jnp.float32)),
    method="random",
    unit=SIMILARITY,
    normaliser=1,
    sign="none: drawn at random",
  )


def _mean_inputs(block, parts, lanes, operand):
  del block, operand
  if not isinstance(parts, factors.Outer):
    raise ValueError(f"a matrix has inputs, and {type(parts).__name__} none")
  a_BxGxTxI = parts.a.astype(factors.accumulator(parts.a.dtype))
  if lanes is None or lanes.shape != a_BxGxTxI.shape[::2]:
    return a_BxGxTxI.mean(axis=2)
  counted_BxT = (lanes > 0).astype(a_BxGxTxI.dtype)
  total_BxGxI = jnp.einsum("bgti,bt->bgi", a_BxGxTxI, counted_BxT)
  size_B = jnp.maximum(counted_BxT.sum(axis=1), 1)
  return total_BxGxI / size_B[:, None, None]


INPUTS = taps.Statistic(
  _mean_inputs, per_example=True, linear=lambda block: True
)
"""Inputs of a matrix [B, G, I], averaged over positions, summed over uses."""


def _unit(rows: jax.Array) -> jax.Array:
  """Rows [B, F] at unit length; zero stays zero."""
  squares = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
  return rows * jnp.where(squares > 0, jax.lax.rsqrt(squares), 0)
