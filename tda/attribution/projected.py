"""Projected gradients of every example, as numbers to keep.

With directions P_I and P_O of the two sides of a block (`tda.projections`) its
gradient Σ_t dy_t a_tᵀ becomes Σ_t (P_O dy_t) (P_I a_t)ᵀ, inside the backward
pass: no gradient of the block's size is formed (Choe et al. 2024, §3.1).

Notation: B examples, P parts of a row, blocks [*stack, G, O, I], sides of P and
S coordinates.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from tda import factors, gradients, segments, taps
from tda.blocks import Blocks, Trace
from tda.factors import Dense
from tda.likelihoods import Loss
from tda.projections import Sides

HIGHEST = jax.lax.Precision.HIGHEST


def _project(block, parts, lanes, sides):
  del block, lanes
  return factors.gradient(factors.rotate(parts, *sides))


def _formed(parts, sides) -> int:
  rotated = jax.eval_shape(factors.rotate, parts, *sides)
  return factors.entries(parts) if isinstance(rotated, Dense) else 0


PROJECTED = taps.Statistic(
  _project, per_example=True, linear=lambda block: True, footprint=_formed
)
"""Per-example gradients [G, S, P] along the directions of each side."""


def of_shares(shares: str, count: int) -> taps.Statistic:
  """`PROJECTED`, of rows or [B, P, ...] of their `count` segments."""
  if shares == "rows":
    return PROJECTED

  def compute(block, parts, lanes, sides):
    del block
    rotated = factors.rotate(parts, *sides)
    if not isinstance(rotated, Dense):
      return segments.each(factors.gradient, rotated, lanes, count)
    one = lambda share: factors.gradient(factors.rotate(share, *sides))
    return segments.each(one, parts, lanes, count)

  return PROJECTED._replace(compute=compute)


def along(grads: Blocks, sides: Mapping[str, Sides]) -> Blocks:
  """Gradients [B, *stack, G, O, I] that were formed, along the directions."""

  def one(x, given):
    if given.inputs is not None:
      x = jnp.einsum("b...oi,...ip->b...op", x, given.inputs, precision=HIGHEST)
    if given.outputs is not None:
      x = jnp.einsum(
        "b...oi,...ou->b...ui", x, given.outputs, precision=HIGHEST
      )
    return x

  return {name: one(x, sides[name]) for name, x in grads.items()}


def back(projected: Blocks, sides: Mapping[str, Sides]) -> Blocks:
  """The transpose of `along`: [B, *stack, G, O, I] of projected blocks."""
  turned = lambda x: x.swapaxes(-1, -2)
  return along(projected, jax.tree.map(turned, dict(sides)))


def of_measurement(
  found: Trace, measurement: Loss
) -> Callable[..., tuple[Blocks, jax.Array]]:
  """(params, batch, sides) -> the same of any function of (params, query)."""
  run = gradients.of_measurement(found, measurement)

  def projected(params, batch, sides):
    grads, finite = run(params, batch)
    return along(grads, sides), finite

  return projected
