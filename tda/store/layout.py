"""Projected gradients of all blocks as one row of numbers.

A row has the blocks in their order, of each its modules (a group of a layer is
one) and of each module its projected gradient [S, P] row by row. Rows are kept
as float32, as bfloat16, or as int8 with a scale for each module, so that a
module of small gradients keeps its digits beside one of large ones.

Notation: B examples, F columns of a row, M modules of all blocks, m of one,
each of D = S P coordinates; sides of S and P coordinates as in
`tda.projections`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from tda.blocks import Trace
from tda.projections import Sides

Array: TypeAlias = Any
"""Of NumPy or JAX."""

DTYPES = ("bfloat16", "float32", "int8")


class Span(NamedTuple):
  """The columns of one block."""

  name: str
  start: int
  stack: tuple[int, ...]  # its layers
  groups: int
  outputs: int  # S
  inputs: int  # P

  @property
  def modules(self) -> int:
    """m, its layers times its groups."""
    return math.prod(self.stack) * self.groups

  @property
  def size(self) -> int:
    """D, coordinates of a module."""
    return self.outputs * self.inputs

  @property
  def stop(self) -> int:
    """The first column after it."""
    return self.start + self.modules * self.size


class Encoded(NamedTuple):
  """Rows as they are kept."""

  values: Array  # [..., F]
  scales: Array | None  # [..., M] of int8


def spans(found: Trace, sides: Mapping[str, Sides]) -> tuple[Span, ...]:
  """Where each block's projected gradient lies in a row."""
  result, start = [], 0
  for name, block in found.blocks.items():
    groups, outputs, inputs = block.shape
    given = sides[name]
    if given.outputs is not None:
      outputs = given.outputs.shape[-1]
    if given.inputs is not None:
      inputs = given.inputs.shape[-1]
    span = Span(name, start, tuple(block.stack), groups, outputs, inputs)
    result.append(span)
    start = span.stop
  return tuple(result)


def width(layout: Sequence[Span]) -> int:
  """F."""
  return layout[-1].stop


def row_bytes(layout: Sequence[Span], dtype: str) -> int:
  """What a row takes, its scales included."""
  modules = sum(span.modules for span in layout) if dtype == "int8" else 0
  return width(layout) * jnp.dtype(dtype).itemsize + 4 * modules


def joined(values: Mapping[str, Array], layout: Sequence[Span]) -> Array:
  """Rows [B, ..., F] of projected gradients [B, *stack, ..., G, S, P]."""

  def flat(span):
    x = values[span.name]
    lead, stack = x.ndim - 3, len(span.stack)
    parts = tuple(range(1 + stack, lead))  # between the stack and the groups
    x = jnp.transpose(
      x, (0, *parts, *range(1, 1 + stack), lead, lead + 1, lead + 2)
    )
    return x.reshape(*x.shape[: 1 + len(parts)], span.stop - span.start)

  return jnp.concatenate([flat(span) for span in layout], axis=-1)


def split(rows: Array, layout: Sequence[Span]) -> dict[str, Array]:
  """Blocks [N, *stack, G, S, P] of rows [N, F]: `joined` the other way."""

  def one(span):
    shape = (*span.stack, span.groups, span.outputs, span.inputs)
    return rows[:, span.start : span.stop].reshape(len(rows), *shape)

  return {span.name: one(span) for span in layout}


def by_module(rows: Array, span: Span) -> Array:
  """A block's part of rows [..., F] as [..., m, D]."""
  own = rows[..., span.start : span.stop]
  return own.reshape(*rows.shape[:-1], span.modules, span.size)


def encode(rows: Array, layout: Sequence[Span], dtype: str) -> Encoded:
  """Rows [..., F] in the type that they are kept in."""
  if dtype != "int8":
    return Encoded(rows.astype(dtype), None)
  values, scales = [], []
  for span in layout:
    own = by_module(rows, span)
    top = jnp.abs(own).max(axis=-1, keepdims=True)
    scale = jnp.where(top > 0, top, 1) / 127
    values.append(jnp.round(own / scale).astype(jnp.int8))
    scales.append(scale[..., 0])
  lead = rows.shape[:-1]
  flat = [x.reshape(*lead, -1) for x in values]
  return Encoded(
    jnp.concatenate(flat, axis=-1), jnp.concatenate(scales, axis=-1)
  )


def decode(encoded: Encoded, layout: Sequence[Span]) -> Array:
  """Rows [..., F] in float32."""
  values, scales = encoded
  if scales is None:
    return values.astype(jnp.float32)
  parts, first = [], 0
  for span in layout:
    own = by_module(values, span).astype(jnp.float32)
    last = first + span.modules
    own = own * scales[..., first:last, None]
    parts.append(own.reshape(*own.shape[:-2], -1))
    first = last
  return jnp.concatenate(parts, axis=-1)
