"""Per-example gradients kept as factors, and the products taken with them.

A block's gradient of one example is `sum_t dy_t a_tᵀ`. It stays in that form
until a product needs it, and each product below picks its route from the
static shapes: with a single position nothing is materialised; otherwise the
per-example gradient is formed once and contracted, which costs the operations
of a weight gradient whatever the number of queries.

Notation: B examples, G groups, T positions, I inputs, O outputs, Q queries.
Every gradient has coordinates [G, O, I]. A bias is the last of the I inputs;
it is a flag, and a column of ones only where that is the smaller copy.
Accumulation is in float32, or in float64 when the gradients are.
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("a", "dy"),
  meta_fields=("bias",),
)
@dataclasses.dataclass(frozen=True)
class Outer:
  """A sum of outer products over positions."""

  a: Array  # [B, G, T, I], without the bias
  dy: Array  # [B, G, T, O]
  bias: bool = False


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("ids", "dy"),
  meta_fields=("rows",),
)
@dataclasses.dataclass(frozen=True)
class Lookup:
  """One-hot inputs given by their index; indices outside are dropped."""

  ids: Array  # [B, T]
  dy: Array  # [B, T, O]
  rows: int  # I


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("grad",), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Dense:
  """A materialised gradient, for parameters used more than once."""

  grad: Array  # [B, G, O, I]


Factors: TypeAlias = Outer | Lookup | Dense


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype in which sums of `dtype` are kept."""
  return jnp.promote_types(dtype, jnp.float32)


def gradient(factors: Factors) -> Array:
  """Per-example gradients [B, G, O, I]."""
  if isinstance(factors, Dense):
    return factors.grad
  if isinstance(factors, Lookup):
    ids_BxT, dy_BxTxO = factors.ids, factors.dy
    rows = jax.vmap(
      lambda i, d: scattered(factors.rows, i, d, accumulator(d.dtype))
    )
    return rows(ids_BxT, dy_BxTxO).swapaxes(1, 2)[:, None]
  grad_BxGxOxI, *bias_BxGxO = _gradient_parts(factors)
  columns = [bias[..., None] for bias in bias_BxGxO]
  return jnp.concatenate([grad_BxGxOxI, *columns], axis=-1)


def rotate(
  factors: Factors, inputs: Array | None, outputs: Array | None
) -> Factors:
  """Coordinates along the columns of `inputs` [G, I, P], `outputs` [G, O, S].

  These are bases or projections; None leaves that side as it is. The gradient
  of the result is `outputsᵀ gradient inputs`, its bias no longer apart. It is
  rotated instead of its factors where that takes fewer operations.
  """
  if isinstance(factors, Dense):
    grad = factors.grad
    if inputs is not None:
      grad = einsum("bgoi,gij->bgoj", grad, inputs)
    if outputs is not None:
      grad = einsum("bgoi,gop->bgpi", grad, outputs)
    return Dense(grad)
  if isinstance(factors, Lookup):
    if inputs is not None:
      a_Bx1xTxP = _looked_up(inputs[0], factors)[:, None]
      return rotate(Outer(a_Bx1xTxP, factors.dy[:, None]), None, outputs)
    if outputs is None:
      return factors
    dy = _project(factors.dy[:, None], outputs)[:, 0]
    return dataclasses.replace(factors, dy=dy)
  a, dy, bias = factors.a, factors.dy, factors.bias
  if inputs is not None and outputs is not None:
    (i, p), (o, s) = inputs.shape[-2:], outputs.shape[-2:]
    positions = a.shape[2]
    apart = positions * (i * p + o * s + p * s)
    if apart > i * o * (positions + p) + o * p * s:
      return rotate(Dense(gradient(factors)), inputs, outputs)
  if inputs is not None:
    width = a.shape[-1]
    a = _project(a, inputs[:, :width])
    if bias:
      a = a + inputs[:, width][None, :, None]
    bias = False
  if outputs is not None:
    dy = _project(dy, outputs)
  return Outer(a, dy, bias)


def dot(factors: Factors, directions: Array) -> Array:
  """Inner products [B, Q] with directions [Q, G, O, I]."""
  queries = directions.shape[0]
  flat = lambda x: x.reshape(x.shape[0], -1)
  if isinstance(factors, Lookup) and _is_sparse(factors):
    picked_BxTxQxO = _at(directions, factors)
    return einsum("bto,btqo->bq", factors.dy, picked_BxTxQxO)
  if not isinstance(factors, Outer):
    return _products(flat(gradient(factors)), flat(directions))
  batch, _, positions, width = factors.a.shape
  if positions == 1 and queries < width:
    return _dot_single(factors, directions)
  if not factors.bias or batch < queries:
    return _products(flat(gradient(factors)), flat(directions))
  grad, bias = _gradient_parts(factors)
  weights, column = directions[..., :width], directions[..., width]
  return _products(flat(grad), flat(weights)) + _products(
    flat(bias), flat(column)
  )


def squares(factors: Factors) -> Array:
  """Sum over the batch of squared per-example gradients [G, O, I]."""
  if isinstance(factors, Lookup) and _is_sparse(factors):
    once = _merged(factors)
    squared_NxO = jnp.square(once.dy).reshape(-1, once.dy.shape[-1])
    return scattered(once.rows, once.ids.reshape(-1), squared_NxO).T[None]
  if not isinstance(factors, Outer):
    return jnp.sum(jnp.square(gradient(factors)), axis=0)
  if factors.a.shape[2] == 1:
    return gradient_sum(_squared(factors))
  grad, *bias = (jnp.square(x).sum(axis=0) for x in _gradient_parts(factors))
  return jnp.concatenate([grad, *(x[..., None] for x in bias)], axis=-1)


def weighted_norm(factors: Factors, weights: Array) -> Array:
  """sum(weights * gradient²) of each example [B]; weights [G, O, I]."""
  if isinstance(factors, Outer) and factors.a.shape[2] == 1:
    return dot(_squared(factors), weights[None])[:, 0]
  if isinstance(factors, Lookup) and _is_sparse(factors):
    once = _merged(factors)
    return dot(
      dataclasses.replace(once, dy=jnp.square(once.dy)), weights[None]
    )[:, 0]
  squared = jnp.square(gradient(factors))
  return matmul(squared.reshape(squared.shape[0], -1), weights.reshape(-1))


def norm(factors: Factors) -> Array:
  """Squared Euclidean norm of each example's gradient [B]."""
  if isinstance(factors, Lookup) and _is_sparse(factors):
    return jnp.square(_merged(factors).dy).sum(axis=(1, 2))
  if not isinstance(factors, Outer):
    return jnp.sum(jnp.square(gradient(factors)), axis=(1, 2, 3))
  if factors.a.shape[2] == 1:
    a, dy = _upcast(factors.a), _upcast(factors.dy)
    a2_BxG = jnp.sum(jnp.square(a), axis=(2, 3)) + float(factors.bias)
    return jnp.sum(a2_BxG * jnp.sum(jnp.square(dy), axis=(2, 3)), axis=1)
  grad, *bias = _gradient_parts(factors)
  squares_B = jnp.square(grad).sum(axis=(1, 2, 3))
  return squares_B + sum(jnp.square(x).sum(axis=(1, 2)) for x in bias)


def entries(factors: Factors, directions: Any = None) -> int:
  """Entries per example that the products above form beyond the factors.

  They are those of the gradient, or with a single position those of the
  output side for each of the `directions` [Q, G, O, I] of a dot product.
  """
  if isinstance(factors, Dense):
    return 0
  if isinstance(factors, Lookup):
    positions, outputs = factors.dy.shape[1:]
    queries = 1 if directions is None else directions.shape[0]
    sparse = positions * (positions + queries * outputs)
    return sparse if _is_sparse(factors) else factors.rows * outputs
  _, groups, positions, inputs = factors.a.shape
  if positions == 1:
    queries = 0 if directions is None else directions.shape[0]
    return groups * factors.dy.shape[-1] * min(queries, inputs)
  return groups * factors.dy.shape[-1] * (inputs + factors.bias)


def gradient_sum(factors: Outer) -> Array:
  """Sum over the batch of the gradients [G, O, I]."""
  a, dy = factors.a, factors.dy
  grad_GxOxI = einsum("gno,gni->goi", all_positions(dy), all_positions(a))
  if not factors.bias:
    return grad_GxOxI
  return jnp.concatenate([grad_GxOxI, total(dy, (0, 2))[..., None]], axis=-1)


def _dot_single(factors: Outer, directions: Array) -> Array:
  """Contract the inputs, then the outputs: no gradient is formed."""
  a_BxGxI, dy_BxGxO = _upcast(factors.a[:, :, 0]), factors.dy[:, :, 0]
  batch, groups, _ = a_BxGxI.shape
  queries, _, outputs, inputs = directions.shape
  if factors.bias:  # a smaller copy than that of directions without it
    one = jnp.ones((batch, groups, 1), a_BxGxI.dtype)
    a_BxGxI = jnp.concatenate([a_BxGxI, one], axis=-1)
  if groups > 1:
    hidden = einsum("bgi,qgoi->bqgo", a_BxGxI, directions)
    return einsum("bqgo,bgo->bq", hidden, dy_BxGxO)
  hidden = matmul(a_BxGxI[:, 0], directions.reshape(-1, inputs).T)
  hidden_BxQxO = hidden.reshape(batch, queries, outputs)
  return einsum("bqo,bo->bq", hidden_BxQxO, dy_BxGxO[:, 0])


def _gradient_parts(factors: Outer) -> tuple[Array, ...]:
  """Gradients [B, G, O, I] without the bias, and if it has one its [B, G, O].

  Apart because joining them copies the larger one.
  """
  a_BxGxTxI, dy_BxGxTxO = factors.a, factors.dy
  if a_BxGxTxI.shape[2] == 1:
    a, dy = _upcast(a_BxGxTxI[:, :, 0]), _upcast(dy_BxGxTxO[:, :, 0])
    grad_BxGxOxI = dy[..., None] * a[:, :, None]
  else:
    grad_BxGxOxI = einsum("bgto,bgti->bgoi", dy_BxGxTxO, a_BxGxTxI)
  if not factors.bias:
    return (grad_BxGxOxI,)
  return grad_BxGxOxI, total(dy_BxGxTxO, (2,))


def _squared(factors: Outer) -> Outer:
  square = lambda x: jnp.square(_upcast(x))
  return Outer(square(factors.a), square(factors.dy), factors.bias)


def scattered(
  rows: int, ids_N: Array, values_NxO: Array, dtype: jnp.dtype | None = None
) -> Array:
  """Sums of values by index [rows, O]."""
  table = jnp.zeros((rows, values_NxO.shape[-1]), dtype or values_NxO.dtype)
  values_NxO = values_NxO.astype(table.dtype)
  return table.at[ids_N].add(
    values_NxO, mode="drop", wrap_negative_indices=False
  )


def _is_sparse(factors: Lookup) -> bool:
  """Whether most rows of every example's gradient are zero."""
  return factors.dy.shape[1] < factors.rows


def _merged(factors: Lookup) -> Lookup:
  """The same gradients with every row at one position, zeros at the others."""
  ids_BxT = factors.ids
  same_BxTxT = ids_BxT[:, :, None] == ids_BxT[:, None, :]
  own_1xT = jnp.arange(ids_BxT.shape[1])[None]
  first_BxT = jnp.argmax(same_BxTxT, axis=2) == own_1xT
  kept_BxT = first_BxT & (ids_BxT >= 0) & (ids_BxT < factors.rows)
  chosen_BxTxT = (same_BxTxT & kept_BxT[:, :, None]).astype(factors.dy.dtype)
  summed_BxTxO = einsum("bts,bso->bto", chosen_BxTxT, factors.dy)
  return dataclasses.replace(factors, dy=summed_BxTxO)


def _at(directions_Qx1xOxI: Array, factors: Lookup) -> Array:
  """Rows of the directions where the examples look [B, T, Q, O]."""
  return _looked_up(jnp.moveaxis(directions_Qx1xOxI[:, 0], -1, 0), factors)


def _looked_up(table_IxX: Array, factors: Lookup) -> Array:
  """Rows of a table where the examples look, zeros outside it [B, T, X]."""
  return table_IxX.at[factors.ids].get(
    mode="fill", fill_value=0, wrap_negative_indices=False
  )


def all_positions(x_BxGxTxD: Array) -> Array:
  """All positions of all examples in one axis [G, B*T, D]."""
  batch, groups, positions, width = x_BxGxTxD.shape
  if groups == 1:
    return x_BxGxTxD.reshape(1, batch * positions, width)
  return x_BxGxTxD.swapaxes(0, 1).reshape(groups, batch * positions, width)


def _project(x_BxGxTxD: Array, basis_GxDxE: Array) -> Array:
  batch, groups, positions, width = x_BxGxTxD.shape
  if groups == 1:
    flat = matmul(_upcast(x_BxGxTxD).reshape(-1, width), basis_GxDxE[0])
    return flat.reshape(batch, 1, positions, -1)
  return einsum("bgti,gij->bgtj", _upcast(x_BxGxTxD), basis_GxDxE)


def total(x: Array, axes: tuple[int, ...]) -> Array:
  """Sums in the accumulator's dtype."""
  return jnp.sum(x, axis=axes, dtype=accumulator(x.dtype))


def _upcast(x: Array) -> Array:
  return x.astype(accumulator(x.dtype))


def matmul(x: Array, y: Array) -> Array:
  """The product in the accumulator's dtype."""
  dtype = accumulator(jnp.promote_types(x.dtype, y.dtype))
  return jnp.matmul(x, y, preferred_element_type=dtype)


def _products(x_BxF: Array, y_QxF: Array) -> Array:
  """Inner products [B, Q] of long rows.

  A CPU multiplies several times faster where the left matrix has more rows. The
  barrier keeps the compiler from turning the product around again.
  """
  if len(x_BxF) >= len(y_QxF):
    return matmul(x_BxF, y_QxF.T)
  return jax.lax.optimization_barrier(matmul(y_QxF, x_BxF.T)).T


def einsum(spec: str, *operands: Array) -> Array:
  """The same of any contraction."""
  dtype = accumulator(jnp.result_type(*operands))
  return jnp.einsum(spec, *operands, preferred_element_type=dtype)
