"""Inverses of symmetric positive definite matrices by products alone.

The hyperpower iteration of order p improves X ≈ A⁻¹ by a polynomial in its
residual R = I − A X:

    X ← X (I + R + … + Rᵖ⁻¹),    which makes the residual Rᵖ

(p = 2: Schulz 1933, as in HyperINF, Zhou et al. 2024; p = 3: Chebyshev). From a
start X = x I an eigenvalue μ of A has residual 1 − x μ: it converges if and
only if 0 < x < 2 / μ, in about log_p(1 / (x μ)) iterations. HyperINF starts at
x = 5e-5 whatever A is, which diverges where λ_max > 4e4, and otherwise spends
log_p(1 / (5e-5 u)) iterations, 9 to 12 of 20 to 25 in its own simulation, on
getting to where the start at x = 1 / u of a norm u >= λ_max begins. Here the
start is from norms, and the first polynomials are the best for what is known.

Bounds. λ_max <= u, the smaller of ‖A‖_∞ and

    tr A / D + √(D − 1) √(‖A‖_F² / D − (tr A / D)²)    (Wolkowicz, Styan 1980),

which no bound by trace and Frobenius norm betters and ‖A‖_F never does. (The
scale tr A / ‖A‖_F², which minimises ‖I − x A‖_F, is not safe: it exceeds
2 / λ_max where one eigenvalue stands above many of less than half of it.)

Polynomials. While A X is only known to have its spectrum within 1 ± r, a step
uses Chebyshev's polynomial instead of the power (`tda.inverse.polynomials`; for
p = 2 Pan and Schreiber 1991). Small eigenvalues of A X grow by p² in a step
instead of p, which halves the iterations until order p sets in. r follows from
u and `floor`, a guess of λ_min such as the damping in A. Any guess converges,
since eigenvalues below it keep residuals in (0, 1), and one that is wrong by a
factor f costs ½ log_p f iterations.

Cost of an iteration: p products of D×D matrices for p up to 8, one of them for
the residual, and 5 for p = 9; the rest is O(D²). Efficiency index
p^(1 / products): 1.41, 1.44, 1.41, … for p = 2, 3, 4, … and 1.55 for p = 9.

Precision. Products are in float32 at its highest precision, or with `dtype` in
that type (bfloat16) with float32 sums and a float32 residual, until that gains
nothing; then float32 finishes. The iteration corrects its own errors, down to
‖I − A X‖_F of about ε λ_max ‖X‖_F, and does not drift from there. X is
symmetric up to these errors; averaging it with its transpose would take a
quarter of the error from X, and multiply that of A X by up to κ.

Notation: D size of the matrices; batch axes lead, of matrices stacked, each of
which stops on its own. Only `matmul` is used, so that matrices may be sharded
over the batch or over their rows or columns.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda.inverse import iterative, polynomials
from tda.inverse.iterative import Info, Method, Status
from tda.inverse.polynomials import Product

Array = jax.Array

ASYMMETRY = 1e-3  # ‖A − Aᵀ‖ / ‖A‖ of matrices that count as symmetric
GUESS = 1e-3  # λ_min / u where no floor is given
BLOWN_UP = 4.0  # ‖I − A X‖ / √D; convergence never takes it above 1
SOUND = 0.5  # ‖I − A X‖ below which A and X are certainly invertible
NOISE = 2.0  # ‖I − A X‖ that counts as rounding / ε λ_max ‖X‖_F


class State(NamedTuple):
  """Where the iterations stand."""

  a: Array  # [..., D, D]
  scale: Array  # nearly λ_max(A) [...]
  x: Array  # [..., D, D]
  y: Array  # A X [..., D, D]
  width: Array  # r: known bound of |1 − eigenvalue of A X|; 0: none [...]
  residual: Array  # ‖I − A X‖_F [...]
  iterations: Array  # [...] int32
  status: Array  # [...] int32


def inverse(
  a: Array,
  *,
  order: int = 3,
  tolerance: float | None = None,
  limit: int = 60,
  start: Array | float | None = None,
  floor: Array | float | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Array, Info]:
  """A⁻¹, in the dtype of A but float32 at least.

  Args:
    a: [..., D, D], symmetric positive definite.
    order: p, 2 to 9.
    tolerance: of ‖I − A X‖_F / √D, at which a matrix is finished; None goes on
      to what rounding allows.
    limit: of iterations.
    start: scale of the identity, [...], or a matrix [..., D, D], to begin at
      instead of the safe start; iterations are then plain powers.
    floor: guess of λ_min, [...]: the damping in A, if there is some.
    dtype: of the operands of products, such as bfloat16; None: float32's.

  Returns:
    X, and Info with the batch axes of A: residual ‖I − A X‖_F / √D, hyperpower
    iterations, and status. INDEFINITE: not positive, or singular to working
    precision. DIVERGED: not finite, or the start given is too large.
    ASYMMETRIC. X is always finite: what it was before it blew up.
  """
  options = functools.partial(
    method, order, tolerance=tolerance, start=start, floor=floor
  )
  fine = options()
  if dtype is None:
    return iterative.run(fine, a, limit)
  rough = options(dtype=dtype)
  state = iterative.advance(rough, rough.init(a), limit)
  fresh = fine.init(a)._replace(iterations=state.iterations)
  met, good = state.status == Status.CONVERGED, state.residual < SOUND
  status = jnp.where(met, state.status, int(Status.RUNNING))
  state = state._replace(status=status)
  state = _chosen(good, state, fresh)
  return fine.result(iterative.advance(fine, state, limit))


def inverses(
  matrices: Mapping[str, Array],
  *,
  floor: Mapping[str, Array] | None = None,
  **options,
) -> tuple[dict[str, Array], dict[str, Info]]:
  """Inverses of many, those of equal size in one batch.

  Args:
    matrices: name -> [*stack, D, D].
    floor: name -> guess of λ_min [*stack].
    **options: of `inverse`, but no start.
  """
  sizes: dict[int, list[str]] = {}
  for name, a in matrices.items():
    _check_square(a)
    sizes.setdefault(a.shape[-1], []).append(name)
  found: dict[str, Array] = {}
  infos: dict[str, Info] = {}
  for size, names in sizes.items():
    stacks = {k: matrices[k].shape[:-2] for k in names}
    lows = None
    if floor is not None:
      parts = [jnp.broadcast_to(floor[k], stacks[k]).reshape(-1) for k in names]
      lows = jnp.concatenate(parts)
    flat = [matrices[k].reshape(-1, size, size) for k in names]
    ends = np.cumsum([len(part) for part in flat])[:-1]
    solved = inverse(jnp.concatenate(flat), floor=lows, **options)
    x, info = jax.tree.map(lambda v, e=ends: tuple(jnp.split(v, e)), solved)
    for k, part, *rows in zip(names, x, *info, strict=True):
      found[k] = part.reshape(matrices[k].shape)
      infos[k] = Info(*(row.reshape(stacks[k]) for row in rows))
  return found, infos


def method(
  order: int = 3,
  *,
  tolerance: float | None = None,
  start: Array | float | None = None,
  floor: Array | float | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> Method:
  """The iteration step by step; arguments as in `inverse`.

  `init` takes A. With `dtype` all products but the residual's are in that type,
  and a matrix stops when they gain nothing.
  """
  polynomials.check(order)
  eps = None if dtype is None else float(jnp.finfo(dtype).eps)
  times = _times if dtype is None else _narrow(dtype)

  def init(a):
    _check_square(a)
    a = a.astype(jnp.promote_types(a.dtype, jnp.float32))
    status = _admitted(a)
    a = _where(status == Status.RUNNING, 0.5 * (a + a.mT), jnp.zeros_like(a))
    x, y, width = _begin(a, start, floor, eps or float(jnp.finfo(a.dtype).eps))
    residual, zero = _norm(_complement(y)), jnp.zeros_like(status)
    state = State(a, _curvature(a, a), x, y, width, residual, zero, status)
    met = active(state) & _met(state, tolerance)
    status = jnp.where(met, int(Status.CONVERGED), status)
    return state._replace(status=status)

  def active(state):
    return state.status == Status.RUNNING

  def step(state):
    width = jnp.minimum(state.width, state.residual)
    width = jnp.where(state.residual < SOUND, 0, width)
    r = _complement(state.y)
    constant, rest, width = polynomials.factor(order, r, width, times)
    x = polynomials.scaled(constant, state.x) + times(state.x, rest)
    y = _times(state.a, x)
    new = state._replace(
      x=x,
      y=y,
      width=width,
      residual=_norm(_complement(y)),
      iterations=state.iterations + 1,
    )
    status = _judged(state, new, tolerance, rough=dtype is not None)
    new = new._replace(status=status)
    better = active(new) | (new.residual < state.residual)
    ended = state._replace(iterations=new.iterations, status=status)
    return _chosen(active(state), _chosen(better, new, ended), state)

  def result(state):
    ended = jnp.where(_bent(state), int(Status.INDEFINITE), int(Status.LIMIT))
    status = jnp.where(active(state), ended, state.status).astype(jnp.int32)
    residual = state.residual / np.sqrt(state.a.shape[-1])
    return state.x, Info(residual, state.iterations, status)

  return Method(init, step, active, result)


def largest(a: Array) -> Array:
  """A bound u >= λ_max of symmetric A [...] in O(D²): see the module."""
  mean, spread = _moments(a)
  return jnp.minimum(mean + spread, jnp.abs(a).sum(-1).max(-1))


def _moments(a: Array) -> tuple[Array, Array]:
  """Centre and half width of an interval that holds the spectrum."""
  size = a.shape[-1]
  mean = jnp.trace(a, axis1=-2, axis2=-1) / size
  deviation = _norm(a - polynomials.scaled(mean, _identity(a)))
  return mean, deviation * np.sqrt((size - 1) / size)


def _begin(
  a: Array, start: Array | float | None, floor: Array | float | None, eps: float
) -> tuple[Array, Array, Array]:
  """X, A X and r."""
  batch = a.shape[:-2]
  if start is not None:
    start = jnp.asarray(start, a.dtype)
    if start.shape == a.shape:
      return start, _times(a, start), jnp.zeros(batch, a.dtype)
    if start.shape not in ((), batch):
      raise ValueError(
        f"start must be a scale or have shape {batch} or {a.shape}, got"
        f" {start.shape}"
      )
    scale, width = jnp.broadcast_to(start, batch), jnp.zeros(batch, a.dtype)
  else:
    top = largest(a)
    mean, spread = _moments(a)
    guess = GUESS * top if floor is None else jnp.asarray(floor, a.dtype)
    low = jnp.maximum(jnp.broadcast_to(guess, batch), mean - spread)
    # Rounding must not take eigenvalues out of 1 ± r by more than 1 − r.
    width = jnp.clip((top - low) / (top + low), 0, 1 - 64 * eps)
    scale = jnp.where(top > 0, (1 + width) / jnp.where(top > 0, top, 1), 0)
  return (
    polynomials.scaled(scale, _identity(a)),
    polynomials.scaled(scale, a),
    width,
  )


def _admitted(a: Array) -> Array:
  """The status before the first step: what a glance at A refuses."""
  size = _norm(a)
  diagonal = jnp.diagonal(a, axis1=-2, axis2=-1)
  checks = [
    (~jnp.isfinite(size), Status.DIVERGED),
    (_norm(a - a.mT) > ASYMMETRY * size, Status.ASYMMETRIC),
    (diagonal.min(-1) <= 0, Status.INDEFINITE),
  ]
  return _first(checks, jnp.full(size.shape, int(Status.RUNNING), jnp.int32))


def _judged(
  old: State, new: State, tolerance: float | None, *, rough: bool
) -> Array:
  """The status after a step from an old state to a new one."""
  bounded = new.residual <= BLOWN_UP * np.sqrt(new.y.shape[-1])
  stalled = (old.residual < SOUND) & (new.residual > 0.5 * old.residual)
  if rough:  # powers of R cannot be larger than R but for rounding
    stalled |= (old.width < 0.5) & (new.residual >= old.residual)
  checks = [
    (~bounded & _bent(new), Status.INDEFINITE),
    (~bounded, Status.DIVERGED),
    (_met(new, tolerance), Status.CONVERGED),
    (stalled & (rough or tolerance is not None), Status.LIMIT),
    (stalled, Status.CONVERGED),
    (_noise(new) > SOUND, Status.INDEFINITE),
  ]
  return _first(checks, jnp.full_like(new.status, int(Status.RUNNING)))


def _first(checks: list[tuple[Array, Status]], status: Array) -> Array:
  """The first of the statuses whose condition is met."""
  for met, verdict in reversed(checks):
    status = jnp.where(met, int(verdict), status)
  return status


def _met(state: State, tolerance: float | None) -> Array:
  limit = NOISE * _noise(state)
  if tolerance is not None:
    limit = tolerance * np.sqrt(state.a.shape[-1])
  return (state.residual <= limit) & (state.residual < SOUND)


def _noise(state: State) -> Array:
  """About ‖I − A X‖_F of the X that rounding allows."""
  eps = float(jnp.finfo(state.a.dtype).eps)
  return eps * state.scale * _norm(state.x)


def _bent(state: State) -> Array:
  """Whether the worst direction of R has no curvature, up to rounding.

  Such a direction proves that A is not positive definite.
  """
  eps = float(jnp.finfo(state.a.dtype).eps)
  return _curvature(state.a, _complement(state.y)) <= 4 * eps * state.scale


def _curvature(a: Array, r: Array) -> Array:
  """wᵀ A w / wᵀ w for w close to the leading eigenvector of R [...]."""

  def unit(w):
    top = jnp.abs(w).max((-2, -1), keepdims=True)
    return w / jnp.where(top > 0, top, 1)

  r = unit(r)
  longest = jnp.argmax(jnp.square(r).sum(-2), -1)
  w = jax.nn.one_hot(longest, r.shape[-1], dtype=r.dtype)[..., None]
  for _ in range(7):
    w = unit(_times(r, w))
  return (w * _times(a, w)).sum((-2, -1)) / jnp.square(w).sum((-2, -1))


def _times(x: Array, y: Array) -> Array:
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _narrow(dtype: jax.typing.DTypeLike) -> Product:
  """Products of narrow operands with sums in float32."""
  return lambda x, y: jnp.matmul(
    x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
  )


def _identity(like: Array) -> Array:
  eye = jnp.eye(like.shape[-1], dtype=like.dtype)
  return jnp.broadcast_to(eye, like.shape)


def _complement(y: Array) -> Array:
  return _identity(y) - y


def _norm(a: Array) -> Array:
  """‖A‖_F [...], whatever the units of A."""
  top = jnp.abs(a).max((-2, -1))
  unit = polynomials.scaled(1 / jnp.where(top > 0, top, 1), a)
  return top * jnp.sqrt(jnp.square(unit).sum((-2, -1)))


def _chosen(chosen: Array, x: State, y: State) -> State:
  return jax.tree.map(lambda u, v: _where(chosen, u, v), x, y)


def _where(chosen: Array, x: Array, y: Array) -> Array:
  return jnp.where(chosen[(...,) + (None,) * (x.ndim - chosen.ndim)], x, y)


def _check_square(a: Array) -> None:
  if a.ndim < 2 or a.shape[-1] != a.shape[-2] or not a.size:
    raise ValueError(f"a must be [..., D, D], not empty; got {a.shape}")
