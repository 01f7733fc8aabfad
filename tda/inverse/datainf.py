"""DataInf: the mean of inverses in place of the inverse of the mean.

    ((1/n) Σ_i g_i g_iᵀ + λ)⁻¹ v ≈ (1/n) Σ_i (g_i g_iᵀ + λ)⁻¹ v
                                 = (1/(nλ)) Σ_i [v − (v·g_i) / (λ + ‖g_i‖²) g_i]

in each layer of each block, with g_i the gradient of the loss of one example
(Kwon et al. 2024, eq. 5). No matrix and no iteration: a response is one pass
over the data for each batch of queries, in which the gradients stay factored
or live for a batch. The exchange is exact for one example and in the limit of
large λ, and its error grows with the number of parameters of a block, as the
authors say; they meant it for LoRA.

Notation: B examples, Q queries; G, T, O, I as in `tda.factors`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tda import factors, gradients, streams, taps
from tda.blocks import Blocks, Trace
from tda.curvature.labels import Labels
from tda.factors import Factors, Outer
from tda.inverse.spectral import Damping
from tda.likelihoods import Objective
from tda.streams import Fold, Loop

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Response:
  """Passes over the data whenever it is applied; not to be traced."""

  fold: Fold
  params: PyTree
  data: PyTree
  deltas: dict[str, Array]  # λ of each layer [*stack]
  damping: Damping
  labels: Labels
  loop: Loop

  def __call__(self, blocks: Blocks) -> Blocks:
    """Applies the operator to blocks [Q, *stack, G, O, I]."""
    operands = {
      name: (jnp.moveaxis(v, 0, self.deltas[name].ndim), self.deltas[name])
      for name, v in blocks.items()
    }
    args = (self.params, operands, None)
    sums, count = streams.fold(self.fold, args, self.data, self.loop)
    return jax.jit(_combined)(blocks, sums, self.deltas, count)


def fitter(found: Trace, objective: Objective) -> Callable[..., Response]:
  """DataInf with the gradients of the loss at the data's labels.

  Args:
    found: trace of `objective.outputs`.
    objective: model and likelihood.

  Returns:
    fit(params, data, damping, *, squares=None, loop=Loop()) -> Response. A
    relative damping is in units of the mean squared entry of a layer's gradient
    (the paper's is 0.1 of it), which takes a pass over the data unless given as
    `squares`, by block [*stack]. A layer without any gradient
    responds with zero. A response, and a second call, compile nothing again.

  `fit` raises ValueError for no damping: λ is divided by.
  """
  norms = gradients.backward_pass(found, objective, NORMS)
  totals = gradients.total(found, norms)
  corrections = gradients.backward_pass(found, objective, CORRECTIONS)
  fold = gradients.total(found, corrections)

  def fit(params, data, damping, *, squares=None, loop=Loop()):
    if damping.value == 0:
      raise ValueError(
        f"DataInf divides by its damping, and {damping} is none: give one "
        "above zero"
      )
    deltas = {
      name: jnp.full(block.stack, float(damping.value))
      for name, block in found.blocks.items()
    }
    if damping.kind == "relative" and squares is not None:
      deltas = {name: damping.value * squares[name] for name in deltas}
    elif damping.kind == "relative":
      stage = loop.stage("squared gradients")
      sums, count = streams.fold(totals, (params, None, None), data, stage)
      for name, block in found.blocks.items():
        mean = sums[name] / (count * (block.size / max(deltas[name].size, 1)))
        deltas[name] = damping.value * mean
    return Response(
      fold,
      params,
      data,
      deltas,
      damping,
      gradients.EMPIRICAL,
      loop.stage("DataInf")._replace(directory=None),
    )

  return fit


def _corrections(block, parts, lanes, operand):
  """Σ_b (v·g_b) / (λ + ‖g_b‖²) g_b [Q, G, O, I]; what counts not is zero."""
  del block, lanes
  directions_QxGxOxI, delta = operand
  if isinstance(parts, Outer) and parts.a.shape[2] == 1:
    weights_BxQ = _weights(parts, directions_QxGxOxI, delta)
    scaled = lambda w_B: dataclasses.replace(
      parts, dy=parts.dy * w_B[:, None, None, None]
    )
    one = lambda w_B: factors.gradient_sum(scaled(w_B))
    return jax.vmap(one, in_axes=1)(weights_BxQ)
  dense = factors.Dense(factors.gradient(parts))
  weights_BxQ = _weights(dense, directions_QxGxOxI, delta)
  return jnp.einsum("bq,bgoi->qgoi", weights_BxQ, dense.grad)


def _weights(parts: Factors, directions: Array, delta: Array) -> Array:
  """(v·g) / (λ + ‖g‖²) [B, Q], and 0 where both are."""
  total_Bx1 = (delta + factors.norm(parts))[:, None]
  dots_BxQ = factors.dot(parts, directions)
  safe_Bx1 = jnp.where(total_Bx1 > 0, total_Bx1, 1)
  return dots_BxQ / safe_Bx1


def _footprint(parts: Factors, operand: Any) -> int:
  """Entries per example: of the gradient, or of the scaled output sides."""
  directions, _ = operand
  queries, groups, outputs, inputs = directions.shape
  if isinstance(parts, Outer) and parts.a.shape[2] == 1:
    return 2 * queries * groups * outputs
  return groups * outputs * inputs


def _combined(
  blocks: Blocks, sums: Blocks, deltas: dict[str, Array], count: Array
) -> Blocks:
  found = {}
  for name, v in blocks.items():
    delta = deltas[name]
    lead = jnp.moveaxis(sums[name], delta.ndim, 0)
    inverse = jnp.where(delta > 0, 1 / jnp.where(delta > 0, delta, 1), 0)
    inverse = inverse.reshape(1, *delta.shape, 1, 1, 1)
    found[name] = (v - lead / count) * inverse
  return found


NORMS = taps.Statistic(
  lambda block, parts, lanes, operand: factors.norm(parts).sum(),
  per_example=False,
  linear=lambda block: False,
  footprint=lambda parts, operand: factors.entries(parts),
)
"""Sum of the squared norms of the gradients [*stack]."""

CORRECTIONS = taps.Statistic(
  _corrections,
  per_example=False,
  linear=lambda block: False,
  footprint=_footprint,
)
"""What DataInf takes from the queries in (directions [*stack, Q, G, O, I], λ
[*stack]), times n λ; [*stack, Q, G, O, I]."""
