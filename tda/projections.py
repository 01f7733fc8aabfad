"""Random projections of gradients, by block.

Entries are drawn by a counter: which they are depends on the key, the block's
name and their place, and not on the device, the mesh or the batch.

Notation: K dimensions, blocks [*stack, G, O, I].
"""

import zlib

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
