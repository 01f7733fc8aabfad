"""Second moments of what a block's gradients are made of.

Notation: as in `tda.factors`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tda import factors
from tda.factors import Dense, Factors, Lookup, Outer

Array = jax.Array


class Moments(NamedTuple):
  """Sums over examples and positions; a side is a matrix or its diagonal."""

  inputs: Array  # [G, I, I], or [G, I] for lookups
  outputs: Array  # [G, O, O], or [G, O] for diagonal blocks
  positions: Array  # [] how many terms `inputs` sums


def moments(parts: Factors, lanes: Array | None, diagonal: bool) -> Moments:
  """Second moments of inputs and output gradients, summed over the batch.

  Args:
    parts: factors of the batch.
    lanes: [B], the examples that count, or [B, T], the positions of those; not
      0 for these, None for all. What does not count must already have zero
      output gradients.
    diagonal: keep only the diagonal of the output side.
  """
  if isinstance(parts, Dense):
    return moments(_column(parts), lanes, diagonal)
  dtype = factors.accumulator(parts.dy.dtype)
  if isinstance(parts, Lookup):
    ones_BxT = _counting(parts.ids.shape, lanes, dtype)
    counts_I = factors.scattered(
      parts.rows, parts.ids.reshape(-1), ones_BxT.reshape(-1, 1)
    )
    outputs = _gram(parts.dy[:, None])
    return Moments(counts_I[:, 0][None], outputs, ones_BxT.sum())
  a_BxGxTxI, dy_BxGxTxO = parts.a, parts.dy
  batch, groups, positions, _ = a_BxGxTxI.shape
  ones_BxT = _counting((batch, positions), lanes, dtype)
  masked = a_BxGxTxI
  if lanes is not None:
    masked = a_BxGxTxI * ones_BxT[:, None, :, None].astype(a_BxGxTxI.dtype)
  inputs = _gram(a_BxGxTxI, masked)
  count = ones_BxT.sum()
  if parts.bias:
    ones_GxI = factors.total(masked, (0, 2))
    corner = jnp.broadcast_to(count, (groups, 1))
    edge_GxI = jnp.concatenate([ones_GxI, corner], axis=-1)
    inputs = jnp.concatenate([inputs, ones_GxI[:, None]], axis=1)
    inputs = jnp.concatenate([inputs, edge_GxI[..., None]], axis=2)
  if diagonal:
    outputs = factors.total(jnp.square(dy_BxGxTxO.astype(dtype)), (0, 2))
  else:
    outputs = _gram(dy_BxGxTxO)
  return Moments(inputs, outputs, count)


def _counting(
  shape: tuple[int, ...], lanes: Array | None, dtype: jnp.dtype
) -> Array:
  """1 at the positions [B, T] that count, else 0."""
  if lanes is None:
    return jnp.ones(shape, dtype)
  if lanes.ndim == 2 and lanes.shape != shape:  # those of another axis
    lanes = lanes.any(axis=1)
  if lanes.ndim == 1:
    lanes = jnp.broadcast_to(lanes[:, None], shape)
  return (lanes != 0).astype(dtype)


def _column(parts: Dense) -> Outer:
  """A gradient that is one column, as an outer product with the scalar 1."""
  grad_BxGxOxI = parts.grad
  if grad_BxGxOxI.shape[-1] != 1:
    raise ValueError(
      "second moments per position are lost once a gradient is materialised; "
      f"got gradients of shape {grad_BxGxOxI.shape}"
    )
  dy = grad_BxGxOxI.swapaxes(2, 3)
  return Outer(jnp.ones((*dy.shape[:3], 1), dy.dtype), dy)


def _gram(x_BxGxTxD: Array, y_BxGxTxD: Array | None = None) -> Array:
  """Sums over positions of x yᵀ [G, D, D]; y = x unless given."""
  x_GxNxD = factors.all_positions(x_BxGxTxD)
  y_GxNxD = x_GxNxD if y_BxGxTxD is None else factors.all_positions(y_BxGxTxD)
  if x_GxNxD.shape[0] == 1:
    return factors.matmul(x_GxNxD[0].T, y_GxNxD[0])[None]
  return factors.einsum("gni,gnj->gij", x_GxNxD, y_GxNxD)
