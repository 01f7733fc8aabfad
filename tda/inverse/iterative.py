"""What iterative solvers of A x = b share: a state, a step, a verdict.

A solver is a `Method` of pure functions, so that one can run it inside jit
(`run`), look at it after every step, or stop it anywhere. All right-hand sides
are solved at once and each stops on its own: one that has converged, or cannot,
is left as it is while the others go on.

Notation: Q right-hand sides. b and x are pytrees whose leaves have a leading
axis Q, and an operator maps such a pytree to another.
"""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree: TypeAlias = Any
Matvec: TypeAlias = Callable[[PyTree], PyTree]

ASYMMETRY = 1e-3  # of operators that count as symmetric, in float32


class Status(enum.IntEnum):
  """How a solve ended."""

  RUNNING = -1
  CONVERGED = 0
  LIMIT = 1  # the iterations allowed were not enough
  INDEFINITE = 2  # a direction of no or negative curvature was met
  DIVERGED = 3  # not finite, or far above where it started
  ASYMMETRIC = 4  # ⟨u, A v⟩ and ⟨A u, v⟩ differ


class Info(NamedTuple):
  """What is known of each solution.

  Attributes:
    residual: ‖b − A x‖ / ‖b‖, [Q]; 0 where b is zero.
    iterations: products with A that led to x, [Q] int32.
    status: of `Status`, [Q] int32.
  """

  residual: Array
  iterations: Array
  status: Array


class Method(NamedTuple):
  """A solver as pure functions of a state.

  Attributes:
    init: b -> state.
    step: state -> state, one iteration of every query that is active.
    active: state -> bool [Q].
    result: state -> (x, Info); costs a product with A for the residual.
  """

  init: Callable[[PyTree], Any]
  step: Callable[[Any], Any]
  active: Callable[[Any], Array]
  result: Callable[[Any], tuple[PyTree, Info]]


def run(method: Method, b: PyTree, limit: int) -> tuple[PyTree, Info]:
  """At most `limit` iterations; inside jit a loop that ends when all have."""
  return method.result(advance(method, method.init(b), limit))


def advance(method: Method, state: Any, steps: int | Array) -> Any:
  """At most `steps` further iterations."""

  def unfinished(carry):
    done, state = carry
    return (done < steps) & method.active(state).any()

  def body(carry):
    done, state = carry
    return done + 1, method.step(state)

  return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def inner(x: PyTree, y: PyTree) -> Array:
  """⟨x, y⟩ of each query [Q], in float32 or wider."""

  def one(u, v):
    dtype = jnp.promote_types(jnp.result_type(u, v), jnp.float32)
    products = u.astype(dtype) * v.astype(dtype)
    return products.reshape(products.shape[0], -1).sum(axis=1)

  return sum(jax.tree.leaves(jax.tree.map(one, x, y)), jnp.zeros(()))


def norm(x: PyTree) -> Array:
  """‖x‖ of each query [Q]."""
  return jnp.sqrt(inner(x, x))


def unit(b: PyTree) -> tuple[PyTree, Array]:
  """b with its largest entry brought to 1, in float32 or wider, and that [Q].

  Gradients of confident predictions are so small that their squares would
  underflow. Zeros stay.
  """
  b = jax.tree.map(
    lambda v: v.astype(jnp.promote_types(v.dtype, jnp.float32)), b
  )
  tops = [
    jnp.abs(v).reshape(v.shape[0], -1).max(axis=1) for v in jax.tree.leaves(b)
  ]
  size = functools.reduce(jnp.maximum, tops)
  return jax.tree.map(
    lambda v: v / _lead(jnp.where(size > 0, size, 1), v), b
  ), size


def scaled(weights: Array, x: PyTree) -> PyTree:
  """weights [Q] times x, by query."""
  return jax.tree.map(lambda v: _lead(weights, v).astype(v.dtype) * v, x)


def plus(x: PyTree, weights: Array, y: PyTree) -> PyTree:
  """x + weights y, by query; x where the weight is 0, whatever y is."""

  def one(u, v):
    step = _lead(weights, v).astype(u.dtype)
    return u + jnp.where(step == 0, 0, step * v.astype(u.dtype))

  return jax.tree.map(one, x, y)


def minus(x: PyTree, y: PyTree) -> PyTree:
  """x − y."""
  return jax.tree.map(jnp.subtract, x, y)


def where(chosen: Array, x: PyTree, y: PyTree) -> PyTree:
  """x where chosen [Q], else y."""
  pick = lambda u, v: jnp.where(_lead(chosen, u), u, v)
  return jax.tree.map(pick, x, y)


def relative(residual: Array, size: Array) -> Array:
  """A norm relative to another, and 0 where both are zero."""
  return jnp.where(size > 0, residual / jnp.where(size > 0, size, 1), residual)


def verdict(
  x: PyTree, matvec: Matvec, b: PyTree, iterations: Array, status: Array
) -> Info:
  """Info with the residual as it is, not as the recurrence believes it."""
  residual = relative(norm(minus(b, matvec(x))), norm(b))
  ended = jnp.where(status == Status.RUNNING, int(Status.LIMIT), status)
  return Info(residual, iterations, ended.astype(jnp.int32))


def asymmetry(matvec: Matvec, x: PyTree, key: Array) -> Array:
  """|⟨w, A x⟩ − ⟨A w, x⟩| / (‖x‖ ‖A w‖) [Q] for random w.

  Rounding leaves about 1e-6 in float32; an operator that is not symmetric
  shows about ‖(A − Aᵀ) x‖ / (‖x‖ ‖A‖), with ‖A‖ the Frobenius norm.
  """
  leaves, treedef = jax.tree.flatten(x)
  draw = lambda key, v: jax.random.normal(key, v.shape, v.dtype)
  keys = jax.random.split(key, len(leaves))
  w = jax.tree.unflatten(treedef, [*map(draw, keys, leaves)])
  image = matvec(w)
  difference = jnp.abs(inner(w, matvec(x)) - inner(image, x))
  return relative(difference, norm(x) * norm(image))


def _lead(weights: Array, x: Array) -> Array:
  return weights.reshape(-1, *[1] * (x.ndim - 1))
