"""TrackStar: cosines of projected gradients, corrected and whitened.

With V the optimizer's second moments, P a projection of each side of every
block and R the second moment of what it leaves, mixed of training examples and
queries,

    G(z) = R^(−1/2) P (∇ℓ(z) / √V),    τ(z, q) = ⟨G(z), G(q)⟩ / ‖G(z)‖ ‖G(q)‖

over all blocks together, with ∇m(q) in place of ∇ℓ for queries (Chang et al.
2024). R is block-diagonal, and R = λ R_queries + (1 − λ) R_train of means over
examples.

Departures. V of a block is taken as the outer product of its row and column
sums, as Adafactor keeps it; so the correction scales the two sides, and no
gradient need be formed. Entries of P are signs and not normal, so that they are
the same on every device to the bit. A damping is added to R, which is singular
where a module has more coordinates than there are examples.

Signs are those of all scores here: positive where leaving the example out
raises the measurement.

Notation: N examples, Q queries, blocks [*stack, G, O, I] of which each group of
each layer is a module, sides of P and S coordinates.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tda import blocks, gradients, projections, streams
from tda.attribution import adam, projected
from tda.attribution.influence import coverage
from tda.blocks import Trace
from tda.inverse import spectral, whitening
from tda.likelihoods import Loss, Objective
from tda.projections import Sides
from tda.scores import SIMILARITY, Scores
from tda.streams import Loop

PyTree = Any

EPSILON = 1e-8
"""Added to V, relative to its mean over a module."""


def attribute(
  objective: Objective,
  params: PyTree,
  train: PyTree,
  queries: PyTree,
  *,
  key: jax.Array,
  dimension: int = 16,
  second_moments: PyTree | None = None,
  mixing: float | None = None,
  damping: float = 0.1,
  measurement: Loss | None = None,
  select: str | Sequence[str] | None = None,
  loop: Loop = Loop(),
) -> Scores:
  """Scores [N, Q] by TrackStar.

  Two passes: one over the training data, one over the queries. The features
  of the N + Q examples are held on the host, with at most dimension² numbers
  for each module, whose R is decomposed there in float64.

  Args:
    objective: model and likelihood.
    params: trained parameters.
    train: pytree of arrays with leading axis N.
    queries: pytree of arrays with leading axis Q; they look like training
      examples unless a measurement is given.
    key: of the projections.
    dimension: coordinates kept of each side of a block; a shorter side is
      kept as it is.
    second_moments: V, like the parameters, as of `adam.second_moments`; a
      common factor of a module's does not matter. None: no correction.
    mixing: λ in [0, 1]; None takes that of `whitening.crossing`.
    damping: what is added to R, relative to its mean eigenvalue in each module.
    measurement: m(params, query) -> scalar; the loss unless given.
    select: patterns of the blocks to attribute to, as in `blocks.trace`.
    loop: how to run over the data.

  Raises:
    ValueError: options out of range; second moments unlike the parameters;
      data whose gradients are not finite.
  """
  if mixing is not None and not 0 <= mixing <= 1:
    raise ValueError(f"mixing={mixing}: it is between 0 and 1, or None")
  if not 0 < damping < np.inf:
    raise ValueError(
      f"damping={damping}: it is positive, since R may be singular"
    )
  example = streams.example(train)
  found = blocks.trace(objective.outputs, params, example, select=select)
  sides = projections.two_sided(found, key, dimension)
  if second_moments is not None:
    sides = corrected(found, sides, second_moments)
  whole = lambda values, sides: values
  captured = gradients.backward_pass(found, objective, projected.PROJECTED)
  project = ask = gradients.kept(captured, whole)
  if measurement is not None:
    asked_of = projected.of_measurement(found, measurement)
    ask = gradients.kept(asked_of, whole)
  with streams.said_of("train"):
    features = project(params, train, sides, loop=loop.stage("train"))
  with streams.said_of("queries"):
    asked = ask(params, queries, sides, loop=loop.stage("queries"))
  return Scores(
    whitening.cosines(features, asked, mixing, damping),
    method="trackstar",
    unit=SIMILARITY,
    normaliser=1,
    damping=spectral.relative(damping),
    labels=gradients.EMPIRICAL,
    coverage=coverage(found),
  )


def corrected(
  found: Trace, sides: dict[str, Sides], second_moments: PyTree
) -> dict[str, Sides]:
  """Directions that divide a gradient by √V before they project it.

  V is replaced by r cᵀ / Σ V of its row and column sums r and c, in each module
  apart; where all of a module's vanish, nothing is divided.
  """
  adam.check_second(second_moments)
  moments = adam.in_blocks(found, second_moments)
  return {name: _scaled(sides[name], v) for name, v in moments.items()}


def _scaled(sides: Sides, v: jax.Array) -> Sides:
  """Sides times the factors of 1/√V, for V [*stack, G, O, I]."""
  mean = v.mean(axis=(-2, -1), keepdims=True)
  alive, mean = mean > 0, jnp.where(mean > 0, mean, 1)
  v = jnp.where(alive, v / mean + EPSILON, 1)
  scales_O = jax.lax.rsqrt(v.mean(axis=-1) * mean[..., 0])
  scales_I = jax.lax.rsqrt(v.mean(axis=-2))
  outputs = jnp.eye(v.shape[-2]) if sides.outputs is None else sides.outputs
  inputs = jnp.eye(v.shape[-1]) if sides.inputs is None else sides.inputs
  return Sides(
    jnp.einsum("...i,...ip->...ip", scales_I, inputs),
    jnp.einsum("...o,...os->...os", scales_O, outputs),
  )
