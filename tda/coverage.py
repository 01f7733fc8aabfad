"""What capture covers: by block, by parameters and by gradient norm.

The share of a block is its part of all parameters, tracked or not. Its share
of gradient is its part of the squared norm of the tracked gradient, averaged
over examples.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from tda import factors, taps
from tda.blocks import Block, Trace

Array = jax.Array
PyTree: TypeAlias = Any

NORMS = taps.Statistic(
  lambda block, parts, lanes, operand: factors.norm(parts),
  per_example=True,
  linear=lambda block: False,
)
"""Squared norm of each example's gradient [B]."""


class Row(NamedTuple):
  """One block."""

  name: str
  kind: str
  shape: tuple[int, ...]  # [*stack, G, O, I]
  parameters: int
  share: float  # of all parameters
  gradient: float | None  # share of the tracked squared gradient norm
  reason: str  # why it is generic; empty for a site


class Coverage(NamedTuple):
  """What is tracked and what is not.

  Attributes:
    rows: the tracked blocks.
    omitted: the blocks that `select` left out.
    unused: leaf -> how many of its entries the function has no gradient by.
    parameters: number of all parameters.
  """

  rows: tuple[Row, ...]
  omitted: tuple[Row, ...]
  unused: Mapping[str, int]
  parameters: int

  def __str__(self) -> str:
    return format_coverage(self)


def coverage(
  found: Trace, norms: Mapping[str, Array] | None = None
) -> Coverage:
  """The report of a trace; `norms` [B] by block are from `gradient_norms`."""
  total = sum(math.prod(leaf.shape) for leaf in found.leaves)
  means = {name: float(np.mean(n)) for name, n in (norms or {}).items()}
  scale = sum(means.values()) or 1.0

  def row(block: Block) -> Row:
    return Row(
      block.name,
      block.kind,
      (*block.stack, *block.shape),
      block.size,
      block.size / total,
      means[block.name] / scale if block.name in means else None,
      block.reason,
    )

  tracked, omitted = (
    tuple(map(row, part.values())) for part in (found.blocks, found.omitted)
  )
  return Coverage(tracked, omitted, _unused(found), total)


def gradient_norms(
  found: Trace,
) -> Callable[[PyTree, PyTree], dict[str, Array]]:
  """(params, batch) -> squared norms [B] of the loss's gradient by block.

  Raises:
    ValueError: the traced function does not return one number.
  """
  shapes = [x.shape for x in jax.tree.leaves(found.program.outputs)]
  if shapes != [()]:
    raise ValueError(
      f"gradient norms are of a loss, a single number per example; the traced "
      f"function returns shapes {shapes}"
    )
  run = taps.linearize(found, NORMS)

  def norms(params, batch):
    outputs, backward = run(params, batch)
    values = backward(jax.tree.map(jnp.ones_like, outputs))
    return jax.tree.map(lambda n: n.reshape(n.shape[0], -1).sum(axis=1), values)

  return norms


def cells(report: Coverage) -> list[tuple[str, ...]]:
  """A header and a row for each block, largest first."""
  part = lambda size: f"{size / report.parameters:.1%}"
  head = "block kind shape parameters share gradient reason"
  found: list[tuple[str, ...]] = [tuple(head.split())]
  for rows, note in ((report.rows, ""), (report.omitted, "not selected")):
    for row in sorted(rows, key=lambda row: -row.parameters):
      shape = "x".join(map(str, row.shape))
      gradient = "" if row.gradient is None else f"{row.gradient:.1%}"
      count, share = f"{row.parameters:,}", part(row.parameters)
      reason = note or row.reason
      found.append((row.name, row.kind, shape, count, share, gradient, reason))
  for name, size in report.unused.items():
    found.append((name, "", "", f"{size:,}", part(size), "", "no gradient"))
  return found


def summary(report: Coverage) -> str:
  """How much is tracked, and how much of that is generic."""
  part = lambda size: f"{size / report.parameters:.1%}"
  tracked = sum(row.parameters for row in report.rows)
  generic = sum(row.parameters for row in report.rows if row.reason)
  return (
    f"{tracked:,} ({part(tracked)}) of {report.parameters:,} parameters "
    f"tracked, {generic:,} ({part(generic)}) of them generic"
  )


def format_coverage(report: Coverage) -> str:
  """An aligned table and its summary."""
  rows = cells(report)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["  ".join(map(_padded, range(7), line, widths)) for line in rows]
  return "\n".join([*map(str.rstrip, lines), summary(report)])


def _padded(column: int, text: str, width: int) -> str:
  numbers = (3, 4, 5)
  return text.rjust(width) if column in numbers else text.ljust(width)


def _unused(found: Trace) -> dict[str, int]:
  left = {
    name: math.prod(leaf.shape)
    for name, leaf in zip(found.names, found.leaves, strict=True)
  }
  for block in (*found.blocks.values(), *found.omitted.values()):
    biases = block.size // block.shape[-1] if block.bias else 0
    left[block.leaves[0]] -= block.size - biases
    left[block.leaves[-1]] -= biases
  return {name: size for name, size in left.items() if size > 0}
