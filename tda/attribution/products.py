"""Products of per-example gradients with directions, and with themselves.

What influence keeps of a training example's gradient: the statistics, of whole
rows or of their parts, and the pass that sums them over blocks.

Notation: B examples, Q directions, P parts of a row; else as in `tda.factors`.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from tda import factors, segments, taps
from tda.attribution.responses import Identity
from tda.blocks import Trace
from tda.inverse.spectral import Response
from tda.likelihoods import Objective
from tda.tracing.uses import Use

Array = jax.Array
PyTree: TypeAlias = Any
SHARES = ("rows", "segments", "tokens")


DOT = taps.Statistic(
  lambda block, parts, lanes, directions: segments.dot(parts, directions),
  per_example=True,
  linear=lambda block: True,
  footprint=factors.entries,
)
"""Inner products with directions [*stack, Q, G, O, I]."""


def _dot_and_square(block, parts, lanes, directions):
  del block, lanes
  squares = factors.norm(parts)[:, None]
  return jnp.concatenate([segments.dot(parts, directions), squares], axis=1)


DOT_AND_SQUARE = taps.Statistic(
  _dot_and_square,
  per_example=True,
  linear=lambda block: False,
  footprint=factors.entries,
)
"""The same, then the squared norm of each example's gradient."""


def _quadratic(block, parts, lanes, pair):
  del block, lanes
  if pair is None:
    return factors.norm(parts)
  basis, weights = pair
  return factors.weighted_norm(factors.rotate(parts, *basis), weights)


SELF = taps.Statistic(
  _quadratic,
  per_example=True,
  linear=lambda block: False,
  footprint=lambda parts, pair: factors.entries(parts),
)
"""Quadratic form of each example's gradient in (basis, weights) or in I."""


def of_shares(shares: str, squares: bool, count: int) -> taps.Statistic:
  """`DOT`, or `DOT_AND_SQUARE`, of rows or [B, P, ...] of their parts.

  Args:
    shares: of `SHARES`.
    squares: whether the squared norm of each share is wanted too.
    count: P, of segments.
  """
  if shares == "rows":
    return DOT_AND_SQUARE if squares else DOT
  parts_counted = count if shares == "segments" else None

  def compute(block, parts, lanes, directions):
    del block
    products = segments.dots(parts, directions, lanes, parts_counted)
    if not squares:
      return products
    norms = segments.each(factors.norm, parts, lanes, count)
    return jnp.concatenate([products, norms[..., None]], axis=-1)

  return taps.Statistic(
    compute,
    per_example=True,
    linear=lambda block: not squares,
    footprint=factors.entries,
  )


def of_themselves(shares: str, count: int) -> taps.Statistic:
  """`SELF`, of rows or [B, P] of their segments."""
  if shares == "rows":
    return SELF

  def compute(block, parts, lanes, pair):
    form = lambda share: _quadratic(block, share, None, pair)
    return segments.each(form, parts, lanes, count)

  return SELF._replace(compute=compute)


def check_shares(found: Trace, objective: Objective, shares: str) -> None:
  """Refuses shares that this model's gradients do not have."""
  if shares not in SHARES:
    raise ValueError(f"unknown shares {shares!r}; choose of {list(SHARES)}")
  if shares == "rows":
    return
  if objective.segments is None:
    raise ValueError(
      f"shares={shares!r} of an objective that does not say which part of a row"
      " each position is of: give it `segments`"
    )
  (length,) = jax.eval_shape(objective.segments, found.example).shape
  lost = [
    name
    for name, block in found.blocks.items()
    if not block.aligned or any(_positions(use) != length for use in block.uses)
  ]
  if lost:
    raise ValueError(
      f"the gradients of {lost} are not sums over the {length} positions of a"
      " row, as those of scales, of biases by themselves and of embeddings that"
      f" are tied to the head: they have no {shares}. Leave them out with"
      " `select`, or give every document a row"
    )


def _positions(use: Use) -> int:
  """Over how many the gradient of one example is summed."""
  if use.reason:
    return 0
  parts = jax.eval_shape(use.form.factors, use.activation, use.output)
  return parts.dy.shape[-2]


def parts_of(shares: str, objective: Objective, train: PyTree) -> int:
  """P, the most segments that a row of the data has; 0 for other shares."""
  if shares != "segments":
    return 0
  assert objective.segments is not None
  return int(jnp.max(jax.vmap(objective.segments)(train)))


def pairs(found: Trace, response: Response | Identity) -> PyTree:
  """The operands of `SELF` for a response, by block."""
  if isinstance(response, Identity):
    return {}
  return {k: (response.basis[k], response.weights[k]) for k in found.blocks}
