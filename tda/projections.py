"""Random projections of gradients, by block.

Entries are drawn by a counter: which they are depends on the key, the block's
name and their place, and not on the device, the mesh or the batch.

Notation: K dimensions, blocks [*stack, G, O, I], sides of P and S coordinates.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tda.blocks import Blocks, Trace


def rademacher(found: Trace, key: jax.Array, dimension: int) -> Blocks:
  """Rows of signs [K, *stack, G, O, I], each entry ±1/√K.

  The inner product of two projected vectors is that of the vectors on average,
  with variance (‖u‖² ‖v‖² + ⟨u, v⟩² − 2 Σ u² v²) / K.
  """
  if dimension < 1:
    raise ValueError(f"a projection has 1 dimension or more, not {dimension}")

  def draw(name, block):
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    shape = (dimension, *block.stack, *block.shape)
    return jax.random.rademacher(own, shape, jnp.float32) * dimension**-0.5

  return {name: draw(name, block) for name, block in found.blocks.items()}


class Sides(NamedTuple):
  """Directions for each side of a block; None keeps the side as it is."""

  inputs: jax.Array | None  # [*stack, G, I, P]
  outputs: jax.Array | None  # [*stack, G, O, S]


def two_sided(found: Trace, key: jax.Array, dimension: int) -> dict[str, Sides]:
  """Directions of signs ±1/√K for the inputs and outputs of every block.

  A block's gradient [O, I] becomes one of [min(K, O), min(K, I)]. A side no
  longer than K is kept, so that inner products of projected gradients are
  those of the gradients on average, whatever the shape of the block. Every
  layer of a stack and every group has directions of its own.
  """
  if dimension < 1:
    raise ValueError(f"a projection has 1 dimension or more, not {dimension}")

  def draw(own, block, size):
    if size <= dimension:
      return None
    shape = (*block.stack, block.shape[0], size, dimension)
    return jax.random.rademacher(own, shape, jnp.float32) * dimension**-0.5

  def both(name, block):
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    right, left = jax.random.split(own)
    _, outputs, inputs = block.shape
    return Sides(draw(right, block, inputs), draw(left, block, outputs))

  return {name: both(name, block) for name, block in found.blocks.items()}
