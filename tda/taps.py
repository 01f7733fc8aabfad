"""Statistics of per-example gradients, computed inside the backward pass.

At every use of a block the equation is replaced by one with an extra, unused
input: the *tap*. Its backward rule sees the activation and the output
gradients of the whole batch and returns a statistic of them as the cotangent
of the tap. Activations and gradients are consumed where they arise, the
gradient of the weight is never formed unless the statistic needs it, and
inside a scan the statistics come out stacked by layer.

    outputs, backward = linearize(found, statistic)(params, batch)
    values = backward(cotangents)

Notation: B examples; see `tda.factors` for G, T, I, O.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from tda import blocks, chunks, factors
from tda.blocks import Block, Trace
from tda.factors import Factors
from tda.tracing import evaluating
from tda.tracing.uses import Use

Array = jax.Array
PyTree: TypeAlias = Any


class Statistic(NamedTuple):
  """What is kept of one block's per-example gradients.

  Attributes:
    compute: (block, factors of the batch, lanes, operand) -> pytree, for one
      layer of a stacked block. Each leaf is [B, ...] if `per_example`, else
      summed over the batch. Lanes are None, [B] of 0/1, the examples that
      count, or [B, T], the part that each position is of, 0 for none.
    per_example: see `compute`.
    linear: whether, for this block, the statistic of a parameter used several
      times is the sum of its uses' statistics. If not, the example's gradient
      is summed over the uses first.
    footprint: (shapes of the factors of a batch, shapes of the operand) ->
      entries per example that `compute` holds beyond them and its result. If
      that is much, a batch is computed in chunks.
  """

  compute: Callable[[Block, Factors, Array | None, Any], PyTree]
  per_example: bool
  linear: Callable[[Block], bool]
  footprint: Callable[[Factors, Any], int] = lambda parts, operand: 0


GRADIENT = Statistic(
  lambda block, parts, lanes, operand: factors.gradient(parts),
  per_example=True,
  linear=lambda block: True,
)
"""Per-example gradients in block coordinates."""


def linearize(
  found: Trace, statistic: Statistic
) -> Callable[..., tuple[PyTree, Callable[[PyTree], dict[str, PyTree]]]]:
  """The traced function over a batch, and its backward pass to statistics.

  Returns:
    run(params, batch, operands=None, lanes=None, segments=None) -> (outputs,
      backward).
    Outputs have a leading batch axis; backward(cotangents of the outputs)
    gives {block name: statistic}. A stacked block's statistic has the stack
    axes first, or right after the batch axis where it is per example.

    operands: {block name: pytree with leading stack axes}, what
      `statistic.compute` receives; None where there is none.
    lanes: [B] of 0/1, the examples that count; None counts all. Cotangents of
      the others are ignored.
    segments: [B, T] of numbers from 1 on, the part of a sequence that each
      position is of; 0 for those that are of none.

  Cost: a forward pass, the activations' half of a backward pass and the
  statistic.
  """
  taps = _taps(found, statistic)
  by_path: dict[Any, list[Use]] = {}
  keys: dict[Any, Any] = {}
  riders: dict[Any, set] = {}
  for key, tap in taps.items():
    for use in tap.uses:
      by_path.setdefault(use.path, []).append(use)
      keys[use.path, use.operand] = key
      for scan in use.origin.scans:
        riders.setdefault(scan, set()).add(key)

  def visit(use, equation, w, x, values, lane):
    key = keys[use.path, use.operand]
    return _tapped(taps[key], use, equation)(*values[key], lane, w, x)

  def run(params, batch, operands=None, lanes=None, segments=None):
    check_structure(found, params, batch)
    operands = operands or {}
    leaves = jax.tree.leaves(params)
    size = jax.tree.leaves(batch)[0].shape[0]
    token = jnp.zeros(size) if lanes is None else lanes.astype(jnp.float32)
    counted = _counted(lanes, segments)
    shapes = {
      key: _tap_shape(tap, operands.get(tap.block.name), size, counted)
      for key, tap in taps.items()
    }
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    axes = {
      key: (0 if tap.statistic.per_example else None, None)
      for key, tap in taps.items()
    }

    def one(values, example, lane):
      inputs = jax.tree.leaves(example)
      return evaluating.evaluate(
        found.program, by_path, leaves, inputs, values, riders, lane, visit
      )

    def every(zeros):
      values = {
        key: (zeros[key], operands.get(tap.block.name) if tap.direct else None)
        for key, tap in taps.items()
      }
      batched = jax.vmap(one, (axes, 0, 0), axis_size=size)
      return batched(values, batch, evaluating.Lane(token, lanes, segments))

    outputs, pull = jax.vjp(every, zeros)

    def backward(cotangents):
      flat = jax.tree.leaves(cotangents)
      if lanes is not None:
        flat = [_scaled(ct, lanes) for ct in flat]
      (values,) = pull(flat)
      return _finish(found, statistic, taps, values, operands, counted)

    treedef = jax.tree.structure(found.program.outputs)
    return jax.tree.unflatten(treedef, outputs), backward

  return run


def check_structure(found: Trace, params: PyTree, batch: PyTree) -> None:
  """Raises ValueError if params or batch are not those that were traced."""
  check_params(found, params)
  check_rows(found, batch)


def check_params(found: Trace, params: PyTree) -> None:
  """Raises ValueError if the parameters are not those that were traced."""
  if found.treedef != jax.tree.structure(params):
    raise ValueError(
      f"params have structure {jax.tree.structure(params)}, but the traced "
      f"function takes {found.treedef}"
    )
  for name, leaf, one in zip(
    found.names, jax.tree.leaves(params), found.leaves, strict=True
  ):
    given = (jnp.shape(leaf), jnp.result_type(leaf))
    if given != (one.shape, one.dtype):
      raise ValueError(
        f"parameter {name!r} has shape and dtype {given}, but was traced as "
        f"{(one.shape, one.dtype)}"
      )


def check_rows(found: Trace, batch: PyTree) -> None:
  """Raises ValueError if rows of the data are not the traced example."""
  traced: Any = jax.tree.structure(found.example)
  if traced != jax.tree.structure(batch):
    raise ValueError(
      f"the batch has structure {jax.tree.structure(batch)}, but one example "
      f"of the traced function is {traced}"
    )
  paths, _ = jax.tree_util.tree_flatten_with_path(found.example)
  for (path, one), rows in zip(paths, jax.tree.leaves(batch), strict=True):
    if tuple(rows.shape[1:]) != one.shape:
      raise ValueError(
        f"batch{jax.tree_util.keystr(path)} has shape {rows.shape}: its rows "
        f"differ in shape from the traced example's {one.shape}"
      )


class _Tap(NamedTuple):
  block: Block
  uses: tuple[Use, ...]
  stack: tuple[int, ...]
  statistic: Statistic
  direct: bool  # the caller's statistic, not the gradient it is taken from


def _taps(found: Trace, statistic: Statistic) -> dict[tuple[str, int], _Tap]:
  """One tap for each block, or for each use where uses differ in layout."""
  taps = {}
  for name, block in found.blocks.items():
    if block.aligned:
      direct = not block.shared or statistic.linear(block)
      chosen = statistic if direct else GRADIENT
      taps[name, 0] = _Tap(block, block.uses, block.stack, chosen, direct)
    else:
      for i, use in enumerate(block.uses):
        stack = blocks.tap_stack(found, use)
        taps[name, i] = _Tap(block, (use,), stack, GRADIENT, False)
  return taps


def _tap_shape(
  tap: _Tap, operand: PyTree, size: int, lanes: Array | None
) -> PyTree:
  """Shapes of a tap: its statistic's, stacked over the scans it rides."""
  use = tap.uses[0]
  batched = lambda s: jax.ShapeDtypeStruct((size, *s.shape), s.dtype)
  x, dy = jax.tree.map(batched, (use.activation, use.output))
  if not tap.direct:
    operand = None
  depth = len(tap.stack)
  layer = jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(v.shape[depth:], v.dtype), operand
  )
  shapes = jax.eval_shape(
    lambda *args: _collect(tap, use, *args), layer, lanes, x, dy
  )
  lead = 1 if tap.statistic.per_example else 0

  def stacked(s):
    shape = (*s.shape[:lead], *tap.stack, *s.shape[lead:])
    return jax.ShapeDtypeStruct(shape, s.dtype)

  return jax.tree.map(stacked, shapes)


def _collect(tap: _Tap, use: Use, operand, lanes, x, dy) -> PyTree:
  """The statistic of one use, from batched activation and gradient."""

  def normal(x, dy):
    parts = jax.vmap(use.form.factors)(x, dy)
    if use.bias is not None and isinstance(parts, factors.Outer):
      parts = dataclasses.replace(parts, bias=True)
    return parts

  def compute(rows):
    lanes, x, dy = rows
    return tap.statistic.compute(tap.block, normal(x, dy), lanes, operand)

  return chunks.apply(
    compute,
    (lanes, x, dy),
    _chunks(tap.statistic, jax.eval_shape(normal, x, dy), operand, x, dy),
    per_example=tap.statistic.per_example,
  )


def _chunks(statistic: Statistic, parts: Factors, operand, x, dy) -> int:
  """So many that a chunk holds no more than what it is computed from."""
  size, held, formed = dy.shape[0], _entries((x, dy)), _entries(parts)
  # Patches are cut out and put together: two copies, where they are copies.
  need = 2 * formed - held if formed > held else 0
  need += size * statistic.footprint(parts, operand)
  return chunks.count(size, need / max(held, _entries(operand), 1))


def _entries(tree: PyTree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _tapped(tap: _Tap, use: Use, equation: Callable) -> Callable:
  """The equation with the statistic as the cotangent of an unused input."""
  generic = bool(use.reason)

  @custom_vmap
  def collect(zero, operand, counts, segments, x, dy):
    return zero  # one example alone; the batch rule below is what runs

  @collect.def_vmap
  def collect_batch(size, batched, zero, operand, *rows):
    counts, segments, x, dy = _batch(rows, tuple(batched[2:]), size)
    if counts is not None:
      # Not a product: what does not count may be infinite or NaN.
      x, dy = jax.tree.map(lambda v: evaluating.kept(counts, v), (x, dy))
    lanes = _counted(counts, segments)
    value = _collect(tap, use, operand, lanes, x, dy)
    return value, jax.tree.map(lambda _: tap.statistic.per_example, value)

  def primal(zero, operand, lane, w, x):
    if generic:
      return spread(w, lane.token)
    return equation(w, spread(x, lane.token))

  def forward(*args):
    # The equation itself, in sight of the policy of a surrounding remat.
    return primal(*args), args

  def backward(residuals, dy):
    zero, operand, lane, w, x = residuals
    value = collect(zero, operand, lane.counts, lane.segments, x, dy)
    dx = None
    if not generic and jnp.issubdtype(jnp.result_type(x), jnp.floating):
      (dx,) = jax.vjp(lambda x: equation(w, x), x)[1](dy)
    return value, None, None, None, dx

  site = jax.custom_vjp(primal)
  site.defvjp(forward, backward)
  return site


@custom_vmap
def spread(x: Array, token: Array) -> Array:
  """x, known to differ from example to example because the token does."""
  return x


@spread.def_vmap
def _spread_batch(size, batched, x, token):
  return _batch(x, batched[0], size), True


def _batch(tree: PyTree, batched: PyTree, size: int) -> PyTree:
  repeat = lambda v: jnp.broadcast_to(v, (size, *jnp.shape(v)))
  return jax.tree.map(lambda v, b: v if b else repeat(v), tree, batched)


def _counted(counts: Array | None, segments: Array | None) -> Array | None:
  """What a statistic is told of the examples: `lanes`."""
  if counts is None or segments is None:
    return counts if segments is None else segments
  return jnp.where(counts[:, None] != 0, segments, 0)


def _scaled(ct: Array, lanes: Array) -> Array:
  return ct * lanes.reshape(-1, *[1] * (ct.ndim - 1)).astype(ct.dtype)


def _finish(
  found: Trace, statistic: Statistic, taps, values, operands, lanes
) -> dict[str, PyTree]:
  """Statistics by block; the nonlinear ones of shared blocks are due here."""
  grouped: dict[str, list] = {}
  for (name, _), tap in taps.items():
    grouped.setdefault(name, []).append(tap)
  results = {}
  for name, members in grouped.items():
    if members[0].direct:
      results[name] = values[name, 0]
      continue
    block = found.blocks[name]
    if block.aligned:
      grads = values[name, 0]
    else:
      grads = sum(
        jax.vmap(
          functools.partial(blocks.leaf_gradient, found, block, tap.uses[0])
        )(values[name, i])
        for i, tap in enumerate(members)
      )
    results[name] = _of_gradients(
      block, statistic, grads, operands.get(name), lanes
    )
  return results


def _of_gradients(block, statistic, grads, operand, lanes) -> PyTree:
  """The statistic of materialised gradients [B, *stack, G, O, I]."""
  compute = lambda grad, operand: statistic.compute(
    block, factors.Dense(grad), lanes, operand
  )
  depth = len(block.stack)
  if depth == 0:
    return compute(grads, operand)
  layers = math.prod(block.stack)
  flat = grads.reshape(grads.shape[0], layers, *block.shape)
  operand = jax.tree.map(lambda v: v.reshape(layers, *v.shape[depth:]), operand)
  axis = 1 if statistic.per_example else 0
  values = jax.vmap(compute, (1, 0), axis)(flat, operand)
  return jax.tree.map(
    lambda v: v.reshape(*v.shape[:axis], *block.stack, *v.shape[axis + 1 :]),
    values,
  )
