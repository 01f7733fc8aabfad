"""HyperINF: a generalised Fisher per block, inverted by matrix products.

The gradient of one example in a block is a matrix g of R rows and D columns,
D the larger side. Were its rows independent draws of mean zero, the Fisher
E[vec g vec gᵀ] would be I_R ⊗ M with M = E[gᵀg] / R, so that (F + λ)⁻¹ v is
v (M + λ)⁻¹, one D × D inverse instead of one of R D × R D (Zhou et al. 2024,
§3.2). The matrix

    GFIM = (1/n) Σ_i g_iᵀ g_i       and       M = GFIM / R

is a sum over the data and its inverse comes from `tda.inverse.hyperpower`.

The 1/R. The paper has it and its published code does not. It is what makes M
an approximation of the Fisher, with whose mean eigenvalue (the mean squared
entry of the gradient) the damping of every other method here is measured:
λ = 0.1 of that mean, the paper's choice, is 0.1 of M's mean eigenvalue but
0.1 / R of GFIM's. Without the factor the answer is (GFIM + λ)⁻¹ =
(1/R) (M + λ/R)⁻¹: that of M, damped R times less. `rows="sum"` does so.

Sides. D is the inputs I, bias included, if these are as many as the outputs O
or more, else O: of LoRA's A the inputs and of its B the outputs. A lookup keeps
its outputs, whatever the vocabulary, and a block of kind "diagonal" the squares
of its entries.

Notation: B examples, G groups, T positions; R, D as above.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda import factors, gradients, streams, taps
from tda.blocks import Block, Blocks, Trace
from tda.curvature import labels as labels_lib
from tda.curvature.labels import Labels
from tda.factors import Dense, Factors, Lookup, Outer
from tda.inverse import hyperpower
from tda.inverse.iterative import Info
from tda.inverse.spectral import Damping
from tda.likelihoods import Objective
from tda.streams import Loop

Array = jax.Array

ROWS = ("mean", "sum")
HIGHEST = jax.lax.Precision.HIGHEST


class Fisher(NamedTuple):
  """A fitted GFIM, raw.

  Attributes:
    matrices: by block, M or GFIM [*stack, G, D, D]; the mean squared gradient
      [*stack, G, O, I] where `sides` says "entries".
    squares: by block, mean squared entry of the gradient, of each layer
      [*stack]: what relative damping multiplies.
    sides: by block, "inputs", "outputs" or "entries".
    rows: "mean" for M, "sum" for GFIM.
    labels: of which gradients it is made.
    examples: on how many it was fitted.
  """

  matrices: dict[str, Array]
  squares: dict[str, Array]
  sides: dict[str, str]
  rows: str
  labels: Labels
  examples: int

  def damping(self, damping: Damping) -> dict[str, Array]:
    """λ of each layer [*stack], by block."""
    relative = damping.kind == "relative"
    return {
      name: damping.value * (x if relative else jnp.ones_like(x))
      for name, x in self.squares.items()
    }


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("inverses",),
  meta_fields=("sides", "damping", "labels"),
)
@dataclasses.dataclass(frozen=True)
class Response:
  """v ↦ v X, with X on the side of each block that has it."""

  inverses: dict[str, Array]  # [*stack, G, D, D], or [*stack, G, O, I]
  sides: tuple[tuple[str, str], ...]  # (block, side)
  damping: Damping | None = None
  labels: Labels | None = None

  def __call__(self, blocks: Blocks) -> Blocks:
    """Applies the operator to blocks [Q, *stack, G, O, I]."""
    sides = dict(self.sides)
    return {
      name: _apply(sides[name], self.inverses[name], v)
      for name, v in blocks.items()
    }


def fitter(
  found: Trace,
  objective: Objective,
  *,
  rows: str = "mean",
  labels: str | Labels = "empirical",
) -> Callable[..., Fisher]:
  """Fits of the GFIM in one pass over the data.

  Args:
    found: trace of `objective.outputs`.
    objective: model and likelihood.
    rows: "mean" divides by R, as the paper has it; "sum" does not, as its code.
    labels: "empirical" as in the paper, "exact", "sampled" or "sampled:K".

  Returns:
    fit(params, data, *, key=None, loop=Loop()) -> Fisher. Data is a pytree of
    arrays with leading axis N; the key is for sampled labels. A second call
    compiles nothing again.
  """
  if rows not in ROWS:
    raise ValueError(f"unknown rows={rows!r}; choose of {list(ROWS)}")
  labels = labels_lib.parse(labels)
  run = gradients.backward_pass(found, objective, GFIM, labels)
  total = gradients.total(found, run)
  sides = {name: side(block) for name, block in found.blocks.items()}

  def fit(params, data, *, key=None, loop=Loop()):
    if labels.kind == "sampled" and key is None:
      raise ValueError("sampled labels are drawn at random: give a key")
    sums, count = streams.fold(total, (params, None, key), data, loop)
    matrices, squares = {}, {}
    for name, block in found.blocks.items():
      mean = sums[name] / count
      matrices[name], squares[name] = _normalised(block, mean, rows)
    return Fisher(matrices, squares, sides, rows, labels, int(count))

  return fit


def inverse(
  fisher: Fisher, damping: Damping, **options: Any
) -> tuple[Response, dict[str, Info]]:
  """(M + λ)⁻¹ by hyperpower, and how its iterations ended.

  Args:
    fisher: from `fitter`.
    damping: λ; a relative one is in units of the mean squared entry of the
      layer's gradient, with or without the 1/R.
    **options: of `hyperpower.inverse`: order, tolerance, limit, dtype.

  Returns:
    The response, and by block an `Info` of [*stack, G]; blocks that keep
    entries have none. A layer whose gradient and damping are zero responds
    with zero.
  """
  deltas = fisher.damping(damping)
  damped, floors, empty, found = {}, {}, {}, {}
  for name, matrix in fisher.matrices.items():
    delta = deltas[name]
    if fisher.sides[name] == "entries":
      total = matrix + _spread(delta, matrix)
      found[name] = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
      continue
    lead = matrix.shape[:-2]
    delta = jnp.broadcast_to(delta[..., None], lead)
    unit = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    trace = jnp.trace(matrix, axis1=-2, axis2=-1)
    empty[name] = trace + delta == 0
    floors[name] = jnp.where(empty[name], 1, delta)
    damped[name] = matrix + _spread(floors[name], matrix) * jnp.broadcast_to(
      unit, matrix.shape
    )
  # Zero damping says nothing of the smallest eigenvalue: its guess stands in.
  known = floors if damping.value > 0 else None
  infos: dict[str, Info] = {}
  if damped:
    static = ("order", "tolerance", "limit", "dtype")
    invert = jax.jit(hyperpower.inverses, static_argnames=static)
    inverses, infos = invert(damped, floor=known, **options)
    for name, x in inverses.items():
      found[name] = jnp.where(_spread(empty[name], x), 0, x)
  sides = tuple(fisher.sides.items())
  return Response(found, sides, damping, fisher.labels), infos


def self_influence(
  found: Trace, objective: Objective
) -> Callable[..., np.ndarray]:
  """⟨R ∇ℓ, ∇ℓ⟩ of every training example.

  Returns:
    score(params, train, response, *, loop=Loop()) -> [N], not divided by N.
    A second call compiles nothing again.
  """
  run = gradients.summed_over_blocks(found, objective, QUADRATIC)

  def score(params, train, response, *, loop=Loop()):
    return run(params, train, response.inverses, loop=loop)

  return score


def side(block: Block) -> str:
  """The side of a block that its GFIM is a matrix over."""
  if block.kind == "diagonal":
    return "entries"
  _, outputs, inputs = block.shape
  wide = inputs >= outputs and block.kind != "lookup"
  return "inputs" if wide else "outputs"


def _sum(block, parts, lanes, operand):
  """Sum over the batch of gᵀg [G, D, D]; examples that count not are zero."""
  del lanes, operand
  if side(block) == "entries":
    return factors.squares(parts)
  x, weighted = _sided(block, parts)
  groups, width = x.shape[1], x.shape[-1]
  flat = lambda v: v.swapaxes(0, 1).reshape(groups, -1, width)
  return _product(flat(x).mT, flat(weighted))


def _quadratic(block, parts, lanes, inverse):
  """Σ g X gᵀ of each example [B], as a trace."""
  del lanes
  if side(block) == "entries":
    return factors.weighted_norm(parts, inverse)
  x, weighted = _sided(block, parts)
  product = jnp.einsum("bgtd,gde->bgte", x, inverse, precision=HIGHEST)
  return jnp.sum(product * weighted, axis=(1, 2, 3))


def _footprint(parts: Factors, operand: Any) -> int:
  """Entries per example beyond the factors: the rows, twice, and a kernel."""
  del operand
  if isinstance(parts, Dense):
    return 0
  if isinstance(parts, Lookup):
    positions, outputs = parts.dy.shape[1:]
    return positions * (positions + outputs)
  _, groups, positions, inputs = parts.a.shape
  outputs = parts.dy.shape[-1]
  wide = max(inputs + parts.bias, outputs)
  held = min(positions, inputs, outputs)
  return groups * held * 2 * wide


GFIM = taps.Statistic(
  _sum,
  per_example=False,
  linear=lambda block: False,
  footprint=_footprint,
)
"""Sums of gᵀg, [*stack, G, D, D]."""

QUADRATIC = taps.Statistic(
  _quadratic,
  per_example=True,
  linear=lambda block: False,
  footprint=_footprint,
)
"""⟨g X, g⟩ of each example, with X as the operand."""


def _sided(block: Block, parts: Factors) -> tuple[Array, Array]:
  """x and y [B, G, *, D] with xᵀy = gᵀg in every example.

  With no more positions than rows, g = dyᵀ a is not formed: over the inputs
  gᵀg = aᵀ (dy dyᵀ) a, over the outputs dyᵀ (a aᵀ) dy.
  """
  inputs = side(block) == "inputs"
  if isinstance(parts, Lookup):
    ids_BxT = parts.ids
    inside_BxT = (ids_BxT >= 0) & (ids_BxT < parts.rows)
    same = ids_BxT[:, :, None] == ids_BxT[:, None, :]
    kernel = (same & inside_BxT[:, :, None])[:, None]
    x = _wide(parts.dy)[:, None]
    return x, _product(kernel.astype(x.dtype), x)
  _, outputs, width = block.shape
  few = outputs if inputs else width
  if isinstance(parts, Outer) and parts.a.shape[2] <= few:
    a, dy = _wide(parts.a), _wide(parts.dy)
    if parts.bias:
      ones = jnp.ones((*a.shape[:3], 1), a.dtype)
      a = jnp.concatenate([a, ones], axis=-1)
    x, other = (a, dy) if inputs else (dy, a)
    return x, _product(_product(other, other.mT), x)
  grad = factors.gradient(parts)
  x = grad if inputs else grad.mT
  return x, x


def _normalised(block: Block, mean: Array, rows: str) -> tuple[Array, Array]:
  """The matrix of a block, and its mean squared entry [*stack]."""
  depth = len(block.stack)
  _, outputs, inputs = block.shape
  if side(block) == "entries":
    return mean, mean.mean(axis=(depth, depth + 1, depth + 2))
  few = outputs if side(block) == "inputs" else inputs
  trace = jnp.trace(mean, axis1=-2, axis2=-1).mean(axis=depth)
  matrix = (mean + mean.mT) / (2 * few if rows == "mean" else 2)
  return matrix, trace / (outputs * inputs)


def _apply(on: str, x: Array, v: Array) -> Array:
  if on == "entries":
    return v * x[None]
  spec = "q...oi,...ij->q...oj" if on == "inputs" else "q...oi,...op->q...pi"
  return jnp.einsum(spec, v, x, precision=HIGHEST)


def _product(x: Array, y: Array) -> Array:
  return jnp.matmul(x, y, precision=HIGHEST)


def _wide(x: Array) -> Array:
  return x.astype(factors.accumulator(x.dtype))


def _spread(x: Array, like: Array) -> Array:
  """x with trailing axes of one, to the rank of another."""
  shape = (*x.shape, *[1] * (like.ndim - x.ndim))
  return jnp.broadcast_to(x.reshape(shape), like.shape)
