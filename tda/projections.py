"""Projections of gradients, by block.

Entries of random ones are drawn by a counter: which they are depends on the
key, the block's name and their place, and not on the device, the mesh or the
batch.

Notation: K dimensions, blocks [*stack, G, O, I], sides of P and S coordinates.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tda.blocks import Blocks, Trace
from tda.curvature.kronecker import Basis

Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]
"""(key, shape [*stack, G, D, K]) -> directions of a side, as columns."""
KINDS = ("random", "sparse", "principal")


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

  def signs(own, shape):
    return jax.random.rademacher(own, shape, jnp.float32) * shape[-1] ** -0.5

  return _drawn(found, key, dimension, signs)


def sparse(found: Trace, key: jax.Array, dimension: int) -> dict[str, Sides]:
  """Directions that add up the coordinates in K random groups, with signs.

  One entry ±1 for each coordinate of a side, so that projecting takes no
  products (Hu et al. 2025 call it SJLT with s = 1); else as `two_sided`.
  """

  def counted(own, shape):
    group, sign = jax.random.split(own)
    places = jax.random.randint(group, shape[:-1], 0, shape[-1])
    signs = jax.random.rademacher(sign, shape[:-1], jnp.float32)
    return jax.nn.one_hot(places, shape[-1]) * signs[..., None]

  return _drawn(found, key, dimension, counted)


def principal(
  found: Trace, key: jax.Array, dimension: int, basis: Mapping[str, Basis]
) -> dict[str, Sides]:
  """The K leading eigenvectors of the second moments of each side.

  Args:
    found: blocks.
    key: for sides that have no eigenvectors, as of one-hot inputs, whose
      directions are those of `two_sided`.
    dimension: K.
    basis: of a K-FAC or EK-FAC curvature, columns by ascending eigenvalue
      (Choe et al. 2024, §3.2).
  """
  sides = two_sided(found, key, dimension)

  def leading(drawn, vectors):
    if drawn is None or vectors is None:
      return drawn
    return vectors[..., -dimension:]

  return {
    name: Sides(
      leading(given.inputs, basis[name].inputs),
      leading(given.outputs, basis[name].outputs),
    )
    for name, given in sides.items()
  }


def of_kind(
  kind: str,
  found: Trace,
  key: jax.Array,
  dimension: int,
  basis: Callable[[], Mapping[str, Basis]],
) -> dict[str, Sides]:
  """`two_sided`, `sparse` or `principal` directions, by one of `KINDS`.

  `basis` is asked for principal ones alone.
  """
  if kind not in KINDS:
    raise ValueError(f"unknown projection {kind!r}; choose of {list(KINDS)}")
  if kind == "principal":
    return principal(found, key, dimension, basis())
  draw = sparse if kind == "sparse" else two_sided
  return draw(found, key, dimension)


def _drawn(
  found: Trace, key: jax.Array, dimension: int, draw: Draw
) -> dict[str, Sides]:
  """Directions of both sides of every block; None of sides no longer than K."""
  if dimension < 1:
    raise ValueError(f"a projection has 1 dimension or more, not {dimension}")

  def one(own, block, size):
    if size <= dimension:
      return None
    return draw(own, (*block.stack, block.shape[0], size, dimension))

  def both(name, block):
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    right, left = jax.random.split(own)
    _, outputs, inputs = block.shape
    return Sides(one(right, block, inputs), one(left, block, outputs))

  return {name: both(name, block) for name, block in found.blocks.items()}
