"""Products of per-example gradients, part by part of a sequence.

The gradient of a sequence is a sum over its positions. The parts that share one
row, documents or single tokens, each have a share of it, and products that are
linear in the gradient add up to those of the row.

A position's part is its number in `lanes` [B, T], from 1 on; 0 is no part. What
a later position's loss sends back through attention counts where it arrives:
a token's share is what it contributes as an input of each layer, not as a
target (Grosse et al. 2023, §2.6).

Notation: B rows, T positions, P parts, r rank; else as in `tda.factors`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tda import factors
from tda.blocks import Blocks
from tda.factors import Dense, Factors, Lookup, Outer

Array = jax.Array


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("outputs", "inputs"),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class LowRank:
  """Directions outputs inputsᵀ, a bias among the inputs."""

  outputs: Array  # [*lead, G, O, r]
  inputs: Array  # [*lead, G, I, r]

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the directions [*lead, G, O, I]."""
    return (*self.outputs.shape[:-1], self.inputs.shape[-2])

  def full(self) -> Array:
    """The directions [*lead, G, O, I]."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(
      "...or,...ir->...oi", self.outputs, self.inputs, precision=highest
    )


Directions = Array | LowRank


def compress(blocks: Blocks, rank: int, *, steps: int = 2) -> dict:
  """The nearest matrices of a rank, where that takes less memory.

  By subspace iteration (Halko et al. 2011): `steps` times each matrix and its
  transpose are applied to `rank` and 8 more random directions.

  Args:
    blocks: [..., G, O, I] by name.
    rank: r, 1 or more.
    steps: more of them come nearer where the spectrum falls slowly.

  Returns:
    `LowRank` by name; blocks where r (O + I) is not below O I stay arrays.
  """
  if rank < 1:
    raise ValueError(f"rank={rank} must be 1 or more")
  found: dict[str, Directions] = {}
  for name, x in blocks.items():
    outputs, inputs = x.shape[-2:]
    small = rank * (outputs + inputs) < outputs * inputs
    # One at a time: see `kronecker._eigh`.
    found[name] = x
    if small:
      found[name] = jax.block_until_ready(_low_rank(x, rank, steps))
  return found


def dot(parts: Factors, directions: Directions) -> Array:
  """Inner products [B, Q] with directions [Q, G, O, I] of any rank."""
  if isinstance(directions, LowRank) and _directly(parts, directions, 1):
    return by_position(parts, directions).sum(axis=1)
  return _formed(parts, directions)


def dots(
  parts: Factors, directions: Directions, lanes: Array, count: int | None
) -> Array:
  """Inner products of each part's share of the gradient [B, P, Q].

  Args:
    parts: of the batch.
    directions: [Q, G, O, I].
    lanes: [B, T] the part of every position.
    count: P; None makes every position that has a part one of its own, P = T.
  """
  _check(parts, lanes)
  if count is None:
    return by_position(parts, directions) * (lanes > 0)[..., None]
  if _directly(parts, directions, count):
    each_BxTxQ = by_position(parts, directions)
    own_BxTxP = jax.nn.one_hot(lanes - 1, count, dtype=each_BxTxQ.dtype)
    return factors.einsum("btp,btq->bpq", own_BxTxP, each_BxTxQ)
  return each(lambda share: _formed(share, directions), parts, lanes, count)


def each(
  compute: Callable[[Factors], Array], parts: Factors, lanes: Array, count: int
) -> Array:
  """A statistic [B, ...] of each part's share of the gradient, [B, P, ...]."""
  _check(parts, lanes)
  one = lambda part: compute(_only(parts, lanes == part))
  return jnp.moveaxis(jax.lax.map(one, jnp.arange(1, count + 1)), 0, 1)


def by_position(parts: Factors, directions: Directions) -> Array:
  """Inner products of every position's share [B, T, Q]; none is formed."""
  if isinstance(parts, Dense):
    raise _lost()
  share = parts

  def one(direction):
    if isinstance(share, Lookup):
      return _looked_up(share, direction)
    return _multiplied(share, direction)

  return _mapped(one, directions)


def _formed(parts: Factors, directions: Directions) -> Array:
  """Inner products [B, Q] of whole gradients, few low ranks written out."""
  if not isinstance(directions, LowRank):
    return factors.dot(parts, directions)
  whole = Dense(factors.gradient(parts))
  one = lambda direction: factors.dot(whole, direction.full()[None])[:, 0]
  return _mapped(one, directions)


def _mapped(one: Callable[[Any], Array], directions: Directions) -> Array:
  """Of each direction [..., Q], some at a time where they are small."""
  few = 8 if isinstance(directions, LowRank) else None
  return jnp.moveaxis(jax.lax.map(one, directions, batch_size=few), 0, -1)


def _multiplied(parts: Outer, direction: Directions) -> Array:
  """dyᵀ D a by position [B, T], for one direction [G, O, I]."""
  if isinstance(direction, LowRank):
    a = _times(parts.a, direction.inputs[:, : parts.a.shape[-1]])
    if parts.bias:
      a = a + direction.inputs[None, :, None, -1]
    return (a * _times(parts.dy, direction.outputs)).sum(axis=(1, 3))
  a = _times(parts.a, direction.swapaxes(1, 2)[:, : parts.a.shape[-1]])
  if parts.bias:
    a = a + direction[None, :, None, :, -1]
  return (a * parts.dy).sum(axis=(1, 3))


def _looked_up(parts: Lookup, direction: Directions) -> Array:
  """The same where the inputs are one-hot."""
  if isinstance(direction, LowRank):
    table, dy = direction.inputs[0], parts.dy @ direction.outputs[0]
  else:
    table, dy = direction[0].T, parts.dy
  rows = table.at[parts.ids].get(
    mode="fill", fill_value=0, wrap_negative_indices=False
  )
  return (rows * dy).sum(axis=2)


def _times(x: Array, matrix: Array) -> Array:
  return factors.einsum("bgti,gij->bgtj", x, matrix)


def _directly(parts: Factors, directions: Directions, count: int) -> bool:
  """Whether going by position takes fewer operations than forming shares."""
  if not isinstance(parts, Outer):
    return isinstance(parts, Lookup)
  queries, _, outputs, inputs = directions.shape
  size, positions = parts.dy.shape[0], parts.dy.shape[-2]
  whole = outputs * inputs
  direct, formed = queries * positions * whole, count * whole
  formed = formed * (positions + queries)
  if isinstance(directions, LowRank):
    rank = directions.outputs.shape[-1]
    direct = queries * positions * rank * (outputs + inputs)
    formed += queries * whole * rank // size
  return direct < formed


def _only(parts: Factors, kept: Array) -> Factors:
  """The share of the positions that are kept [B, T]."""
  if isinstance(parts, Dense):
    raise _lost()
  lead = (slice(None),) + (None,) * (parts.dy.ndim - 3)
  dy = jnp.where(kept[(*lead, slice(None), None)], parts.dy, 0)
  return dataclasses.replace(parts, dy=dy)


def _check(parts: Factors, lanes: Array) -> None:
  if isinstance(parts, Dense):
    raise _lost()
  positions = parts.dy.shape[-2]
  if lanes.ndim != 2 or lanes.shape[1] != positions:
    raise ValueError(
      f"a block with {positions} positions in sequences of"
      f" {lanes.shape[1:]}: its shares of the gradient are not theirs. Leave it"
      " out with `select`"
    )


def _lost() -> ValueError:
  return ValueError(
    "a block that is used in several places, as an embedding that is tied to"
    " the head, has one gradient for the whole row: it cannot be told apart by"
    " token or document. Leave it out with `select`"
  )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _low_rank(x: Array, rank: int, steps: int) -> LowRank:
  highest = jax.lax.Precision.HIGHEST
  product = functools.partial(jnp.matmul, precision=highest)
  x = x.astype(factors.accumulator(x.dtype))
  largest = jnp.abs(x).max(axis=(-2, -1), keepdims=True)
  scale = jnp.where(largest > 0, largest, 1)  # squares of x would underflow
  x = x / scale
  width = min(rank + 8, *x.shape[-2:])
  across = x.swapaxes(-1, -2)
  key = jax.random.key(0)
  drawn = jax.random.normal(key, (x.shape[-1], width), x.dtype)
  basis = jnp.linalg.qr(jnp.einsum("...oi,ir->...or", x, drawn))[0]
  for _ in range(steps):
    basis = jnp.linalg.qr(product(across, basis))[0]
    basis = jnp.linalg.qr(product(x, basis))[0]
  small = product(across, basis)  # [..., I, width], the transpose of basisᵀ x
  triangle = jnp.linalg.qr(small, mode="r")
  vectors = jnp.linalg.svd(triangle)[2].swapaxes(-1, -2)[..., :rank]
  return LowRank(product(basis, vectors), scale * product(small, vectors))
