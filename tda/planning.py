"""What the passes over the data cost, from shapes alone.

The unit is the multiply-add of a matrix product, for one example. A plain
gradient computes each site's outputs, the gradient of its activation and that
of its weight, T·I·O each; capture leaves out the third and adds a statistic
per site, each function below counting the cheapest way to it:

    limit(found, squares)  =  operations of the pass / of a plain gradient

Notation: G groups, T positions, I inputs, O outputs, Q queries.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from tda.blocks import Trace
from tda.tracing import counting


class Site(NamedTuple):
  """Shapes of one use of a block."""

  kind: str  # as of a Block
  positions: int  # T
  shape: tuple[int, int, int]  # (G, O, I), the bias included in I

  @property
  def size(self) -> int:
    """Entries of the block."""
    groups, outputs, inputs = self.shape
    return groups * outputs * inputs


Cost: TypeAlias = Callable[[Site], int]
"""Multiply-adds of a statistic at one site of one example."""


def limit(found: Trace, cost: Cost) -> float:
  """Operations of a pass relative to those of a plain gradient."""
  return operations(found, cost) / operations(found, None)


def operations(found: Trace, cost: Cost | None) -> int:
  """Multiply-adds of one example's forward and backward pass with a statistic.

  The gradients of all parameters, summed over the batch, if `cost` is None.
  """
  counts = counting.count(found.program, len(found.leaves))
  total = counts.forward + counts.backward
  for block in (*found.blocks.values(), *found.omitted.values()):
    for use in block.uses:
      if use.form.kind == "vector":
        continue
      site = _site(block.kind, use)
      tracked = block.name in found.blocks
      work = 0 if cost is None or not tracked else cost(site)
      if site.kind != "lookup":
        product = site.positions * site.size
        passes = 1 if use.path in counts.leading else 2
        work += product * (passes + (cost is None))
      total += work * counts.times.get(use.path, 1)
  return total


def moments(site: Site) -> int:
  """Second moments of both sides, per position."""
  groups, outputs, inputs = site.shape
  sides = outputs**2 if site.kind == "lookup" else inputs**2 + outputs**2
  return groups * site.positions * sides


def squares(site: Site) -> int:
  """Squared per-example gradients in an eigenbasis.

  Either the factors are rotated or the gradient is.
  """
  groups, outputs, inputs = site.shape
  if site.kind == "lookup":
    return site.positions * outputs**2
  late = groups * outputs * inputs * (outputs + inputs)
  return gradient(site) + min(moments(site), late)


def dots(queries: int) -> Cost:
  """Inner products with Q directions: of gradients, or position by position."""

  def cost(site):
    if site.kind == "lookup":
      return queries * site.positions * site.shape[1]
    formed = gradient(site) + queries * site.size
    return min(formed, queries * site.positions * (site.size + site.shape[1]))

  return cost


def low_rank_dots(queries: int, rank: int, batch: int) -> Cost:
  """Inner products with Q directions of a rank, written out once a batch."""
  whole = dots(queries)

  def cost(site):
    _, outputs, inputs = site.shape
    small = rank * (outputs + inputs) < outputs * inputs
    if not small:
      return whole(site)
    direct = queries * site.positions * rank * (outputs + inputs)
    if site.kind == "lookup":
      return direct
    written = queries * rank * site.size // batch
    return min(direct, gradient(site) + queries * site.size + written)

  return cost


def gradient(site: Site) -> int:
  """The gradient of one example."""
  return 0 if site.kind == "lookup" else site.positions * site.size


def _site(kind: str, use) -> Site:
  groups, outputs, inputs = use.form.shape
  positions = 1
  for d in use.output.shape:
    positions *= d
  positions //= groups * outputs
  return Site(kind, positions, (groups, outputs, inputs + bool(use.bias)))
