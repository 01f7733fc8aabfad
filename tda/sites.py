"""Normal forms: what an equation that uses a parameter contributes.

Every supported use of a parameter is bilinear in the parameter and one
activation, so the gradient of one example is, in *block coordinates*
[G, O, I], a sum of outer products

    gradient[g, o, i] = sum_t  dy[g, t, o] * a[g, t, i]

of inputs a and output gradients dy. A `Form` holds the static maps from the
equation's own layout into these coordinates.

Notation: G groups (batched experts, grouped convolutions), T positions that
share the weight, I inputs, O outputs.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tda.factors import Factors, Lookup, Outer

Array = jax.Array


class Form(NamedTuple):
  """Static maps between an equation and block coordinates, one example.

  Attributes:
    kind: "matrix", "lookup" or "vector".
    shape: (G, O, I) of the block, without a bias column.
    factors: (activation, cotangent of the output) -> Factors.
    matrix: parameter operand -> [G, O, I]; linear, every entry used once.
    output: array in the layout of the output -> [G, T, O]; None where a bias
      cannot be merged.
  """

  kind: str
  shape: tuple[int, int, int]
  factors: Callable[[Any, Array], Factors]
  matrix: Callable[[Array], Array]
  output: Callable[[Any], Any] | None


def dot_general(
  dimension_numbers: Any,
  parameter: int,
  shapes: Sequence[tuple[int, ...]],
) -> Form:
  """Any `dot_general`: batch axes are groups, contracted axes inputs."""
  contract, batch = dimension_numbers
  x_shape, w_shape = shapes[1 - parameter], shapes[parameter]
  x_in, w_in = contract[1 - parameter], contract[parameter]
  x_group, w_group = batch[1 - parameter], batch[parameter]
  x_free = _free(len(x_shape), x_in, x_group)
  w_free = _free(len(w_shape), w_in, w_group)
  groups, inputs = _size(w_shape, w_group), _size(w_shape, w_in)
  outputs, positions = _size(w_shape, w_free), _size(x_shape, x_free)
  x_order = (*x_group, *x_free, *x_in)
  w_order = (*w_group, *w_free, *w_in)
  lead = len(x_group)
  first, second = (
    (len(x_free), len(w_free)) if parameter == 1 else (len(w_free), len(x_free))
  )
  heads = tuple(range(lead, lead + first))
  tails = tuple(range(lead + first, lead + first + second))
  y_order = (*range(lead), *heads, *tails)
  if parameter == 0:
    y_order = (*range(lead), *tails, *heads)

  def output(y):
    return y.transpose(y_order).reshape(groups, positions, outputs)

  def factors(x, dy):
    a_GxTxI = x.transpose(x_order).reshape(groups, positions, inputs)
    return Outer(a_GxTxI, output(dy))

  def matrix(w):
    return w.transpose(w_order).reshape(groups, outputs, inputs)

  return Form("matrix", (groups, outputs, inputs), factors, matrix, output)


def convolution(
  params: dict[str, Any], shapes: Sequence[tuple[int, ...]]
) -> Form | None:
  """`conv_general_dilated` with the parameter as kernel, by patches.

  Any stride, padding, dilation of input or kernel, and feature groups; None
  for groups over the batch.
  """
  if params["batch_group_count"] != 1:
    return None
  numbers = params["dimension_numbers"]
  groups = params["feature_group_count"]
  x_spec, w_spec, y_spec = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
  x_shape = tuple(shapes[0][d] for d in x_spec)
  w_shape = tuple(shapes[1][d] for d in w_spec)
  window = w_shape[2:]
  outputs = w_shape[0] // groups
  inputs = w_shape[1] * math.prod(window)
  y_order = (y_spec[0], *y_spec[2:], y_spec[1])
  w_order = (w_spec[0], *w_spec[2:], w_spec[1])

  def output(y):
    y = y.transpose(y_order).reshape(-1, groups, outputs)
    return y.transpose(1, 0, 2)

  def factors(x, dy):
    x = x.transpose(x_spec[0], *x_spec[2:], x_spec[1])
    patches = _patches(x, window, params)
    patches = patches.reshape(
      -1, math.prod(window), groups, x_shape[1] // groups
    )
    a_GxTxI = patches.transpose(2, 0, 1, 3).reshape(groups, -1, inputs)
    return Outer(a_GxTxI, output(dy))

  def matrix(w):
    return w.transpose(w_order).reshape(groups, outputs, inputs)

  return Form("matrix", (groups, outputs, inputs), factors, matrix, output)


def row_axis(sizes: Sequence[int], table: Sequence[int]) -> int | None:
  """The axis along which a slice of a table is one row; None if not a row.

  A row has entries along one axis at most: slices that are matrices, such as
  the weights of one expert, have no outputs to keep second moments of.
  """
  partial = [d for d, size in enumerate(sizes) if size != table[d]]
  if len(partial) != 1 or sizes[partial[0]] != 1:
    return None
  return partial[0] if sum(size > 1 for size in sizes) <= 1 else None


def gather(
  params: dict[str, Any], shapes: Sequence[tuple[int, ...]]
) -> Form | None:
  """Rows of a table by index: the inputs are one-hot and never formed.

  None when the gather is not a lookup of whole rows.
  """
  numbers, mode = params["dimension_numbers"], str(params["mode"]).lower()
  table, indices = shapes[0], shapes[1]
  axis = row_axis(params["slice_sizes"], table)
  starts = numbers.start_index_map
  if axis is None or axis not in starts or numbers.operand_batching_dims:
    return None
  if len(starts) > 1 and "fill" in mode:
    return None
  rank = len(indices) - 1 + len(numbers.offset_dims)
  y_order = (*_free(rank, numbers.offset_dims, ()), *numbers.offset_dims)
  column = starts.index(axis)
  ids = lambda indices: indices[..., column].reshape(-1)
  return _lookup(table, axis, ids, y_order, clip="clip" in mode)


def dynamic_slice(
  params: dict[str, Any], shapes: Sequence[tuple[int, ...]]
) -> Form | None:
  """One row of a table; None when the slice is anything else."""
  axis = row_axis(params["slice_sizes"], shapes[0])
  if axis is None:
    return None
  ids = lambda start: start.reshape(1)
  return _lookup(shapes[0], axis, ids, range(len(shapes[0])), clip=True)


def _lookup(
  table: Sequence[int],
  axis: int,
  ids: Callable[[Array], Array],
  y_order: Sequence[int],
  *,
  clip: bool,
) -> Form:
  rows = table[axis]
  outputs = math.prod(table) // rows

  def factors(indices, dy):
    ids_T = ids(indices)
    ids_T = jnp.clip(ids_T, 0, rows - 1) if clip else ids_T
    return Lookup(ids_T, dy.transpose(y_order).reshape(-1, outputs), rows)

  def matrix(w):
    return jnp.moveaxis(w, axis, -1).reshape(1, outputs, rows)

  return Form("lookup", (1, outputs, rows), factors, matrix, None)


def vector(size: int, transpose: Callable[[Any, Array], Array]) -> Form:
  """A scale, a lone bias or a generic leaf: the gradient is one column.

  Args:
    size: entries of the parameter.
    transpose: (activation, cotangent of the output) -> gradient of the
      parameter for this example, any shape with `size` entries.
  """

  def factors(x, dy):
    p_1x1xO = transpose(x, dy).reshape(1, 1, size)
    return Outer(jnp.ones((1, 1, 1), p_1x1xO.dtype), p_1x1xO)

  def matrix(w):
    return w.reshape(1, size, 1)

  return Form("vector", (1, size, 1), factors, matrix, None)


def _free(rank: int, *taken: Sequence[int]) -> tuple[int, ...]:
  used = set(itertools.chain(*taken))
  return tuple(d for d in range(rank) if d not in used)


def _size(shape: Sequence[int], dims: Sequence[int]) -> int:
  return math.prod(shape[d] for d in dims)


def _patches(x: Array, window: Sequence[int], params: dict[str, Any]) -> Array:
  """Windows of x [N, *spatial, C] -> [N, *output spatial, K, C], by slices."""
  dilation = params["rhs_dilation"]
  strides = params["window_strides"]
  pads = [
    (low, high, step - 1)
    for (low, high), step in zip(
      params["padding"], params["lhs_dilation"], strict=True
    )
  ]
  zero = jnp.zeros((), x.dtype)
  x = lax.pad(x, zero, [(0, 0, 0), *pads, (0, 0, 0)])
  spans = [
    (size - 1) * step + 1 for size, step in zip(window, dilation, strict=True)
  ]
  limits = [
    (size - span) // stride * stride + 1
    for size, span, stride in zip(x.shape[1:-1], spans, strides, strict=True)
  ]
  pieces = []
  for offset in itertools.product(*map(range, window)):
    start = [o * d for o, d in zip(offset, dilation, strict=True)]
    stop = [s + limit for s, limit in zip(start, limits, strict=True)]
    pieces.append(
      lax.slice(
        x,
        (0, *start, 0),
        (x.shape[0], *stop, x.shape[-1]),
        (1, *strides, 1),
      )
    )
  return jnp.stack(pieces, axis=-2)
