"""Krylov methods: conjugate gradients, and Lanczos for the leading spectrum.

Notation as in `tda.inverse.iterative`: Q right-hand sides, operators on pytrees
with a leading axis Q.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tda.inverse import iterative
from tda.inverse.iterative import Matvec, Method, PyTree, Status

Array = jax.Array


class CGState(NamedTuple):
  """Where the solves stand."""

  b: PyTree  # its largest entry is 1
  scale: Array  # and was this [Q]
  x: PyTree
  residual: PyTree
  direction: PyTree
  gain: Array  # ⟨r, P r⟩ [Q]
  size: Array  # ‖b‖ [Q]
  iterations: Array
  status: Array


def conjugate_gradients(
  matvec: Matvec,
  *,
  precondition: Matvec | None = None,
  tolerance: float = 1e-3,
  check: bool = True,
) -> Method:
  """Conjugate gradients for symmetric positive definite A.

  Recurrences are in the dtype of b, float32 at least; `result` gives the true
  residual, which in float32 stops falling at about 1e-6 times the condition
  number while the recurrence's own goes on.

  Args:
    matvec: A.
    precondition: P ≈ A⁻¹, symmetric positive definite; None for none.
    tolerance: of ‖r‖ / ‖b‖, at which a query stops.
    check: two further products at the start find an operator that is not
      symmetric.

  A query stops with status INDEFINITE when it meets pᵀ A p <= 0 or rᵀ P r < 0,
  and keeps the x it had.
  """
  apply = precondition or (lambda r: r)

  def init(b):
    b, scale = iterative.unit(b)
    x = jax.tree.map(jnp.zeros_like, b)
    z = apply(b)
    size = iterative.norm(b)
    status = jnp.full(size.shape, int(Status.RUNNING), jnp.int32)
    if check:
      skew = iterative.asymmetry(matvec, z, jax.random.key(0))
      status = jnp.where(
        skew > iterative.ASYMMETRY, int(Status.ASYMMETRIC), status
      )
    gain = iterative.inner(b, z)
    status = _settled(status, size, size, gain)
    zero = jnp.zeros(size.shape, jnp.int32)
    return CGState(b, scale, x, b, z, gain, size, zero, status)

  def _settled(status, norm, size, gain):
    ended = [
      (~jnp.isfinite(norm) | ~jnp.isfinite(gain), Status.DIVERGED),
      (norm <= tolerance * size, Status.CONVERGED),
      (gain <= 0, Status.INDEFINITE),
    ]
    for met, verdict in ended:
      running = status == Status.RUNNING
      status = jnp.where(running & met, int(verdict), status)
    return status

  def active(state):
    return state.status == Status.RUNNING

  def step(state):
    going = active(state)
    image = matvec(state.direction)
    curvature = iterative.inner(state.direction, image)
    sound = curvature > 0
    bent = jnp.where(jnp.isnan(curvature), Status.DIVERGED, Status.INDEFINITE)
    status = jnp.where(going & ~sound, bent.astype(jnp.int32), state.status)
    going &= sound
    length = jnp.where(going, state.gain / jnp.where(sound, curvature, 1), 0)
    x = iterative.plus(state.x, length, state.direction)
    residual = iterative.plus(state.residual, -length, image)
    z = apply(residual)
    gain = iterative.inner(residual, z)
    turned = iterative.plus(
      z, jnp.where(going, gain / state.gain, 0), state.direction
    )
    norm = iterative.norm(residual)
    return CGState(
      state.b,
      state.scale,
      x,
      residual,
      iterative.where(going, turned, state.direction),
      jnp.where(going, gain, state.gain),
      state.size,
      state.iterations + going,
      jnp.where(going, _settled(status, norm, state.size, gain), status),
    )

  def result(state):
    info = iterative.verdict(
      state.x, matvec, state.b, state.iterations, state.status
    )
    return iterative.scaled(state.scale, state.x), info

  return Method(init, step, active, result)


class Spectrum(NamedTuple):
  """The leading part of a symmetric operator.

  Attributes:
    values: Ritz values [K], descending.
    vectors: orthonormal Ritz vectors, leaves [K, ...].
    residuals: ‖A v − λ v‖ of each pair [K].
  """

  values: Array
  vectors: PyTree
  residuals: Array


def lanczos(matvec: Matvec, start: PyTree, steps: int, keep: int) -> Spectrum:
  """Leading eigenpairs by Lanczos with full reorthogonalisation.

  Args:
    matvec: a symmetric operator.
    start: where the Krylov space starts, leaves [1, ...]; a random one has a
      part of every eigenvector.
    steps: products with the operator, at most the dimension of the space;
      memory is that many vectors.
    keep: K, the pairs that are kept, of largest value.

  A Krylov space that ends early (an invariant one was found) is filled with
  zeros, whose Ritz values are 0.
  """
  if not 1 <= keep <= steps:
    raise ValueError(f"keep={keep} of steps={steps}: it is 1 to steps")
  first = iterative.scaled(1 / iterative.norm(start), start)
  basis = jax.tree.map(
    lambda v: jnp.zeros((steps, *v.shape[1:]), v.dtype).at[0].set(v[0]), first
  )

  def project(basis, v):
    """Twice, since once leaves what rounding puts back."""
    once = lambda v, parts: jax.tree.map(
      lambda x, u: x - jnp.tensordot(parts, u, 1)[None], v, basis
    )
    v = once(v, _against(basis, v))
    return once(v, _against(basis, v))

  def body(k, carry):
    basis, alphas, betas = carry
    v = jax.tree.map(lambda u: u[k][None], basis)
    image = matvec(v)
    alpha = iterative.inner(v, image)[0]
    rest = project(basis, image)
    length = iterative.norm(rest)[0]
    ended = length <= 1e-6 * jnp.maximum(jnp.abs(alpha), betas.max())
    unit = jnp.where(ended, 0, 1 / jnp.where(length > 0, length, 1))
    following = iterative.scaled(unit[None], rest)
    basis = jax.tree.map(
      lambda u, w: u.at[k + 1].set(w[0], mode="drop"), basis, following
    )
    beta = jnp.where(ended, 0, length)
    return basis, alphas.at[k].set(alpha), betas.at[k].set(beta)

  zeros = jnp.zeros(steps)
  basis, alphas, betas = jax.lax.fori_loop(
    0, steps, body, (basis, zeros, zeros)
  )
  off = jnp.diag(betas[:-1], 1)
  values, turns = jnp.linalg.eigh(jnp.diag(alphas) + off + off.T)
  values, turns = values[::-1][:keep], turns[:, ::-1][:, :keep]
  vectors = jax.tree.map(lambda u: jnp.tensordot(turns.T, u, 1), basis)
  return Spectrum(values, vectors, jnp.abs(betas[-1] * turns[-1]))


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("vectors", "weights", "rest"),
  meta_fields=("damping", "labels"),
)
@dataclasses.dataclass(frozen=True)
class LowRank:
  """V diag(weights) Vᵀ + rest (I − V Vᵀ), for orthonormal V."""

  vectors: PyTree  # leaves [K, ...]
  weights: Array  # [K]
  rest: Array  # what the other directions are multiplied by; 0 drops them
  damping: Any = None  # for the record
  labels: Any = None  # of A, for the record

  def __call__(self, b: PyTree) -> PyTree:
    """Applies the operator to leaves [Q, ...]."""
    parts = jax.vmap(
      lambda row: _against(self.vectors, jax.tree.map(lambda v: v[None], row))
    )(b)
    turned = parts * (self.weights - self.rest)[None]

    def one(v, u):
      return jnp.tensordot(turned, u, 1) + self.rest * v

    return jax.tree.map(one, b, self.vectors)


def low_rank(
  spectrum: Spectrum, damping: float, *, complement: bool = False
) -> LowRank:
  """(A + damping)⁻¹ on the leading eigenvectors (Schioppa et al. 2022).

  The other directions are dropped as in the paper, or with `complement` take
  their inverse to be 1 / damping, as if they had no curvature.
  """
  if not damping > 0:
    raise ValueError(f"damping={damping}: small Ritz values need it positive")
  rest = jnp.asarray(1 / damping if complement else 0.0)
  weights = 1 / (jnp.maximum(spectrum.values, 0) + damping)
  return LowRank(spectrum.vectors, weights, rest)


def largest_eigenvalue(matvec: Matvec, like: PyTree, steps: int = 30) -> Array:
  """Growth of a random vector under an operator: nearly its largest eigenvalue.

  For operators similar to a symmetric positive one, such as P A of two of
  them. A lower bound where the operator itself is symmetric.

  Args:
    matvec: the operator.
    like: pytree whose leaves have the shapes [Q, ...] of its vectors; Q of 1
      is enough.
    steps: products.
  """
  leaves, treedef = jax.tree.flatten(like)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  draw = lambda key, v: jax.random.normal(
    key, (1, *v.shape[1:]), _wide(v.dtype)
  )
  start = jax.tree.unflatten(treedef, [*map(draw, keys, leaves)])

  def body(_, carry):
    v, _ = carry
    image = matvec(iterative.scaled(1 / iterative.norm(v), v))
    return image, iterative.norm(image)[0]

  return jax.lax.fori_loop(0, steps, body, (start, iterative.norm(start)[0]))[1]


def _against(basis: PyTree, v: PyTree) -> Array:
  """Products [K] of one vector, leaves [1, ...], with leaves [K, ...]."""
  parts = jax.tree.map(
    lambda u, x: u.reshape(u.shape[0], -1) @ x.reshape(-1), basis, v
  )
  return sum(jax.tree.leaves(parts), jnp.zeros(()))


def _wide(dtype: Any) -> Any:
  return jnp.promote_types(dtype, jnp.float32)
