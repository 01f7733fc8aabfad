"""Neumann series: solving A x = b by repeated correction, on minibatches too.

    v ← m v + P (b − A_k (x + s m v)),    x ← x + s v

LiSSA (Agarwal et al. 2017; Koh and Liang 2017; Grosse et al. 2023, §2.1) is the
recurrence without P and momentum m; ASTRA (Wang et al. 2025) preconditions it
with a fitted curvature, starts from that curvature's own answer and has
momentum. The paper's is heavy-ball, which lets the directions that P
underrates, where s P A is near 1, swing for 2 / (1 − m) steps and more;
Nesterov's, with the product taken ahead, settles them at once.
Stopping after J steps acts as further damping of about 1 / (s J), in the units
of A without a preconditioner.

Notation as in `tda.inverse.iterative`.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from tda.inverse import iterative, krylov
from tda.inverse.iterative import Matvec, Method, PyTree, Status

Array = jax.Array
Stochastic: TypeAlias = Callable[[PyTree, Array], PyTree]
"""(x, k) -> A_k x, the operator of the k-th minibatch."""

BLOWN_UP = 1e3  # residual, relative to the first, that is called divergence


class State(NamedTuple):
  """Where the recurrences stand."""

  b: PyTree  # its largest entry is 1
  scale: Array  # and was this [Q]
  x: PyTree
  velocity: PyTree
  first: Array  # ‖b − A_0 x_0‖ [Q]
  iterations: Array
  status: Array


def neumann(
  matvec: Stochastic,
  *,
  step: Callable[[Array], Array] | float | Array,
  precondition: Matvec | None = None,
  momentum: float = 0.0,
  tolerance: float | None = None,
  exact: Matvec | None = None,
) -> Method:
  """The recurrence above.

  Args:
    matvec: (x, k) -> A_k x; symmetric positive definite, A on average.
    step: s, or a function of k. Without noise it must stay below 2 / λ_max of
      P A for the recurrence to converge, and with momentum below
      2 (1 + m) / (1 + 2 m) / λ_max; see `safe_step`.
    precondition: P; None for the identity, and then x starts at s b, which is
      the first term of the series. With P it starts at P b.
    momentum: m.
    tolerance: of ‖b − A_k (x + s m v)‖ / ‖b‖, at which a query stops; None goes
      on to the limit, as with minibatches one should.
    exact: A, for the residual that is reported; the first minibatch's unless
      given.

  A query whose residual is a thousand times the first, or not finite, stops
  with status DIVERGED at the x it had then.
  """
  apply = precondition or (lambda r: r)
  schedule = step if callable(step) else lambda k: jnp.asarray(step)

  def init(b):
    b, scale = iterative.unit(b)
    size = iterative.norm(b)
    x = apply(b)
    if precondition is None:
      x = iterative.scaled(
        jnp.broadcast_to(schedule(jnp.int32(0)), size.shape), b
      )
    zero = jnp.zeros(size.shape, jnp.int32)
    status = jnp.where(size > 0, int(Status.RUNNING), int(Status.CONVERGED))
    still = jax.tree.map(jnp.zeros_like, b)
    return State(b, scale, x, still, size, zero, status.astype(jnp.int32))

  def active(state):
    return state.status == Status.RUNNING

  def advance(state):
    going, k = active(state), state.iterations.max()
    length = jnp.where(going, schedule(k), 0)
    ahead = iterative.plus(state.x, momentum * length, state.velocity)
    residual = iterative.minus(state.b, matvec(ahead, k))
    norm, size = iterative.norm(residual), iterative.norm(state.b)
    first = jnp.where(
      state.iterations == 0, jnp.maximum(norm, size), state.first
    )
    lost = ~jnp.isfinite(norm) | (norm > BLOWN_UP * first)
    status = jnp.where(going & lost, int(Status.DIVERGED), state.status)
    if tolerance is not None:
      met = going & (norm <= tolerance * size)
      status = jnp.where(met, int(Status.CONVERGED), status)
    going &= status == Status.RUNNING
    turned = iterative.plus(
      apply(residual), jnp.full(norm.shape, momentum), state.velocity
    )
    velocity = iterative.where(going, turned, state.velocity)
    length = jnp.where(going, length, 0)
    return State(
      state.b,
      state.scale,
      iterative.plus(state.x, length, velocity),
      velocity,
      first,
      state.iterations + going,
      status.astype(jnp.int32),
    )

  def result(state):
    whole = exact or (lambda x: matvec(x, jnp.int32(0)))
    info = iterative.verdict(
      state.x, whole, state.b, state.iterations, state.status
    )
    return iterative.scaled(state.scale, state.x), info

  return Method(init, advance, active, result)


def lissa(
  matvec: Stochastic,
  *,
  step: Callable[[Array], Array] | float | Array,
  tolerance: float | None = None,
  exact: Matvec | None = None,
) -> Method:
  """LiSSA: no preconditioner, no momentum. Damping belongs to `matvec`."""
  return neumann(matvec, step=step, tolerance=tolerance, exact=exact)


def astra(
  matvec: Stochastic,
  precondition: Matvec,
  *,
  step: float | Array,
  momentum: float = 0.9,
  halve_every: int = 50,
  tolerance: float | None = None,
  exact: Matvec | None = None,
) -> Method:
  """ASTRA: the EK-FAC answer, corrected by products with the exact curvature.

  Steps are halved every `halve_every` iterations, which averages out the
  minibatches' noise. The paper ties the step to the damping; here it is a
  number for P A, whose eigenvalues are near 1 where the fit is good.
  """
  return neumann(
    matvec,
    step=lambda k: jnp.asarray(step) * 0.5 ** (k // halve_every),
    precondition=precondition,
    momentum=momentum,
    tolerance=tolerance,
    exact=exact,
  )


def safe_step(
  matvec: Stochastic,
  like: PyTree,
  *,
  precondition: Matvec | None = None,
  batches: int = 1,
) -> Array:
  """1 / λ_max of P A_k, the largest over a few minibatches.

  Args:
    matvec: as in `neumann`.
    like: pytree with the shapes of b.
    precondition: P.
    batches: how many minibatches are looked at.
  """
  apply = precondition or (lambda r: r)

  def one(k):
    product = lambda v: apply(matvec(v, k))
    return krylov.largest_eigenvalue(product, like)

  return 1 / jax.lax.map(one, jnp.arange(batches)).max()
