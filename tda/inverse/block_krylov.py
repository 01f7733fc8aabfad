"""Block conjugate gradients: all right-hand sides search one space.

Every iteration multiplies the operator with as many directions as there are
right-hand sides, and each solution is the best one in the space of all of them
together. Gradients of different queries share most of their space, so that a
block takes several times fewer products than as many separate solves, and it
is less sensitive to rounding, since new directions are made orthonormal.

The block recurrence is O'Leary's (1980); the orthonormal directions are after
Dubrulle (2001). With R residuals, P the preconditioner and D directions, rows:

    α = (R Dᵀ)(D A Dᵀ)⁻¹,   X += α D,   R −= α A D
    D ← orthonormal rows of  Z − (Z A Dᵀ)(D A Dᵀ)⁻¹ D,   Z = R P

Notation as in `tda.inverse.iterative`: Q right-hand sides.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tda.inverse import iterative
from tda.inverse.iterative import Matvec, Method, PyTree, Status

Array = jax.Array
HIGHEST = jax.lax.Precision.HIGHEST


class State(NamedTuple):
  """Where a block solve stands."""

  b: PyTree  # its largest entry is 1
  scale: Array  # and was this [Q]
  x: PyTree
  residual: PyTree
  directions: PyTree  # orthonormal rows, or zeros
  size: Array  # ‖b‖ [Q]
  iterations: Array
  status: Array


def block_conjugate_gradients(
  matvec: Matvec,
  *,
  precondition: Matvec | None = None,
  tolerance: float = 1e-3,
  check: bool = True,
) -> Method:
  """Conjugate gradients for symmetric positive definite A, in one space.

  Recurrences are in the dtype of b, float32 at least. Directions that are
  dependent to rounding are dropped, so that equal or zero right-hand sides do
  no harm. For one right-hand side this is `krylov.conjugate_gradients`.

  Args:
    matvec: A.
    precondition: P ≈ A⁻¹, symmetric positive definite; None for none.
    tolerance: of ‖r‖ / ‖b‖, at which a query has converged.
    check: two further products at the start find an operator that is not
      symmetric.

  `iterations` counts the products until a query met the tolerance; its x goes
  on improving while others have not. A block that meets a direction of negative
  curvature ends with status INDEFINITE, and keeps the x it had; a right-hand
  side that is not finite is DIVERGED from the start and leaves the others
  alone.
  """
  apply = precondition or (lambda r: r)

  def init(b):
    b, scale = iterative.unit(b)
    finite = jnp.isfinite(iterative.norm(b))
    b = iterative.where(finite, b, jax.tree.map(jnp.zeros_like, b))
    size = iterative.norm(b)
    z = apply(b)
    status = jnp.where(finite, int(Status.RUNNING), int(Status.DIVERGED))
    if check:
      skew = iterative.asymmetry(matvec, z, jax.random.key(0))
      asymmetric = finite & (skew > iterative.ASYMMETRY)
      status = jnp.where(asymmetric, int(Status.ASYMMETRIC), status)
    status = _ended(status, size == 0, Status.CONVERGED)
    zero = jnp.zeros(size.shape, jnp.int32)
    still = jax.tree.map(jnp.zeros_like, b)
    return State(b, scale, still, b, _orthonormal(z), size, zero, status)

  def active(state):
    return state.status == Status.RUNNING

  def step(state):
    going = active(state)
    d, image = state.directions, matvec(state.directions)
    inverse, bent = _inverse(_products(d, image))
    length = _precise(_products(state.residual, d), inverse)
    x = jax.tree.map(jnp.add, state.x, _combined(length, d))
    residual = iterative.minus(state.residual, _combined(length, image))
    z = _unit(apply(residual))
    turn = _precise(_products(z, image), inverse)
    norm = iterative.norm(residual)
    sound = jnp.isfinite(norm).all() & ~bent
    failed = jnp.where(bent, Status.INDEFINITE, Status.DIVERGED)
    status = _ended(state.status, norm <= tolerance * state.size)
    following = State(
      state.b,
      state.scale,
      x,
      residual,
      _orthonormal(iterative.minus(z, _combined(turn, d))),
      state.size,
      state.iterations + going,
      status,
    )
    stopped = state._replace(status=jnp.where(going, failed, state.status))
    return jax.tree.map(
      lambda new, old: jnp.where(sound, new, old), following, stopped
    )

  def result(state):
    info = iterative.verdict(
      state.x, matvec, state.b, state.iterations, state.status
    )
    residual = jnp.where(jnp.isfinite(state.scale), info.residual, jnp.nan)
    x = iterative.scaled(state.scale, state.x)
    return x, info._replace(residual=residual)

  return Method(init, step, active, result)


def _ended(status: Array, met: Array, verdict: Status = Status.CONVERGED):
  running = status == Status.RUNNING
  return jnp.where(running & met, int(verdict), status).astype(jnp.int32)


def _orthonormal(x: PyTree) -> PyTree:
  """Orthonormal rows of the same span; rows it has no need of are zero."""
  x = _unit(x)
  values, vectors = jnp.linalg.eigh(_products(x, x))
  kept = values > _rounding(values) * values[-1]
  weights = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)
  return _combined((vectors * weights[None]).T, x)


def _inverse(products: Array) -> tuple[Array, Array]:
  """(D A Dᵀ)⁻¹ where it can be told from rounding, and if A is indefinite."""
  values, vectors = jnp.linalg.eigh((products + products.T) / 2)
  least = _rounding(values) * jnp.abs(values).max()
  kept = values > least
  weights = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
  return _precise(vectors * weights[None], vectors.T), values[0] < -least


def _rounding(values: Array) -> float:
  return float(values.size * jnp.finfo(values.dtype).eps)


def _unit(x: PyTree) -> PyTree:
  norm = iterative.norm(x)
  return iterative.scaled(1 / jnp.where(norm > 0, norm, 1), x)


def _products(x: PyTree, y: PyTree) -> Array:
  """X Yᵀ [Q, Q]."""
  flat = lambda v: v.reshape(v.shape[0], -1)
  one = lambda u, v: _precise(flat(u), flat(v).T)
  return sum(jax.tree.leaves(jax.tree.map(one, x, y)), jnp.zeros(()))


def _combined(weights: Array, x: PyTree) -> PyTree:
  """Rows [Q, ...] of weights [Q, Q] times x."""
  one = lambda v: jnp.tensordot(
    weights.astype(v.dtype), v, 1, precision=HIGHEST
  )
  return jax.tree.map(one, x)


def _precise(x: Array, y: Array) -> Array:
  return jnp.matmul(x, y, precision=HIGHEST)
