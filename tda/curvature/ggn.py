"""Exact products with the Gauss-Newton Hessian G = mean over examples JᵀHJ.

J is the Jacobian of one example's outputs with respect to the parameters, H
the Hessian of its loss with respect to its outputs. Nothing of size [D, D] or
[B, D] is formed.

Notation: B examples, D parameters.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tda.likelihoods import Objective, PyTree, upcast

Matvec = Callable[[PyTree], PyTree]  # parameter-shaped -> parameter-shaped
Parts = tuple[PyTree, jax.Array]  # rows [steps, M, ...], weights [steps, M]


def ggn_vp(
  objective: Objective,
  params: PyTree,
  batch: PyTree,
  *,
  weights: jax.Array | None = None,
  microbatch: int | None = None,
) -> Matvec:
  """v -> G v, with G the mean over the batch.

  The model is linearised once, here, and every call replays the linear part:
  about one forward and one backward pass, and `jax.vmap(matvec)` over many
  directions repeats neither the model nor its nonlinearities. Build it inside
  the function that is jitted; a matvec passed into jit as a closure would
  carry the linearisation as constants.

  Directions and results are float32 (float64 if the parameters are), whatever
  the parameters' dtype. Inside the model its own dtypes hold: with bfloat16
  parameters the direction is rounded to bfloat16 at each leaf and the sum
  over a microbatch is as precise as the backward pass makes it. H and the
  sums over microbatches are float32.

  Args:
    objective: model, likelihood and target of one example.
    params: parameters, all floating.
    batch: examples, leading axis B on each leaf.
    weights: [B], 0 or 1 (or any importance); the mean divides by their sum, so
      that all zeros give NaN.
    microbatch: examples linearised at a time, in each call anew; memory is
      then that of one microbatch. None: the whole batch at once.

  Raises:
    ValueError: a parameter leaf is not floating, weights are not [B], or the
      microbatch is below 1.
  """
  wide, narrow = widen(params)
  size = jax.tree.leaves(batch)[0].shape[0]
  weights = jnp.ones(size) if weights is None else jnp.asarray(weights, float)
  if weights.shape != (size,):
    raise ValueError(
      f"ggn_vp: weights of shape {weights.shape} for a batch of {size}"
      f" examples; they are [{size}]."
    )
  weights = weights / jnp.sum(weights)

  def part(examples: PyTree, weights_B: jax.Array) -> Matvec:
    model = jax.vmap(objective.outputs, (None, 0))
    outputs, push = jax.linearize(lambda p: model(narrow(p), examples), wide)
    pull = jax.linear_transpose(push, wide)
    target = jax.vmap(objective.target)(examples)

    def matvec(direction: PyTree) -> PyTree:
      hessian = jax.vmap(objective.likelihood.hessian)
      curved = hessian(outputs, target, push(direction))
      scaled = jax.vmap(jnp.multiply)(weights_B, curved)
      return pull(scaled.astype(outputs.dtype))[0]

    return matvec

  if microbatch is None:
    product = part(batch, weights)
  else:
    parts = microbatches(batch, weights, microbatch)

    def product(direction: PyTree) -> PyTree:
      return sum_over(lambda *rows: part(*rows)(direction), parts)

  def matvec(direction: PyTree) -> PyTree:
    return product(jax.tree.map(_like, direction, wide))

  return matvec


def widen(params: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
  """Parameters in float32 or wider, and the cast back to their own dtypes.

  Derivatives with respect to the wide ones are float32, with the model run at
  its own dtypes. A leaf that is not floating raises `ValueError`.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"parameter {jax.tree_util.keystr(path)} has dtype {dtype}, which has"
        " no gradient; keep only floating leaves in params and close over the"
        " others."
      )

  def narrow(wide: PyTree) -> PyTree:
    return jax.tree.map(lambda x, p: x.astype(jnp.result_type(p)), wide, params)

  return jax.tree.map(upcast, params), narrow


def microbatches(rows: PyTree, weights: jax.Array, microbatch: int) -> Parts:
  """Rows [N, ...] and weights [N] as [steps, M, ...] and [steps, M].

  The last microbatch is filled up with copies of the last row at weight 0.
  """
  if microbatch < 1:
    raise ValueError(f"microbatch={microbatch}: it is 1 or more examples.")
  size = weights.shape[0]
  width = min(microbatch, size)
  filler = -size % width
  filled = jnp.minimum(jnp.arange(size + filler), size - 1)

  def split(leaf: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)[filled] if filler else jnp.asarray(leaf)
    # Row r goes to microbatch r % steps, so that a leading axis split over
    # devices is split over them within every microbatch too.
    return leaf.reshape(width, -1, *leaf.shape[1:]).swapaxes(0, 1)

  weights = jnp.where(jnp.arange(size + filler) < size, weights[filled], 0)
  return jax.tree.map(split, rows), weights.reshape(width, -1).T


def sum_over(
  function: Callable[[PyTree, jax.Array], PyTree], parts: Parts
) -> PyTree:
  """Sum of function(rows [M, ...], weights [M]) over the microbatches."""

  def first(parts: Parts) -> PyTree:
    return function(*jax.tree.map(lambda x: x[0], parts))

  def step(total: PyTree, part: Parts) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, total, function(*part)), None

  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(first, parts))
  return jax.lax.scan(step, zeros, parts)[0]


def _like(direction: jax.Array, wide: jax.Array) -> jax.Array:
  if jnp.shape(direction) != wide.shape:
    raise ValueError(
      f"a direction of shape {jnp.shape(direction)} for a parameter of shape"
      f" {wide.shape}; for many directions use jax.vmap(matvec)."
    )
  return jnp.asarray(direction, wide.dtype)
