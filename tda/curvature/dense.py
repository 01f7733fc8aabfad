"""Dense curvature of a small model: the oracle for every approximation.

Rows and columns follow `jax.flatten_util.ravel_pytree(params)`.

Notation: D parameters, K cotangents per example, M examples per microbatch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from tda.curvature import ggn
from tda.curvature.labels import Labels, cotangents
from tda.likelihoods import Objective, PyTree

Operator = Callable[[PyTree], PyTree]  # parameter-shaped -> parameter-shaped

LIMIT = 20_000  # parameters; [D, D] in float32 is then 1.6 GB


class Eigen(NamedTuple):
  """A = vectors diag(values) vectorsᵀ."""

  values: jax.Array  # [D] ascending, at least 0
  vectors: jax.Array  # [D, D], one eigenvector a column


def dense_ggn(
  objective: Objective,
  params: PyTree,
  data: PyTree,
  labels: str | Labels = "exact",
  *,
  key: jax.Array | None = None,
  microbatch: int = 32,
  limit: int = LIMIT,
) -> jax.Array:
  """C [D, D] = mean over examples of Σ_k g_k g_kᵀ, undamped.

  With labels "exact" this is the Gauss-Newton Hessian, with "sampled:K" an
  unbiased draw of it, with "empirical" the second moment of the data's
  gradients. float32 (float64 if the parameters are). Costs K backward passes
  and K D² multiplications per example, and M K D numbers of memory beside C.

  Args:
    objective: model, likelihood and target of one example.
    params: parameters, all floating.
    data: examples, leading axis N on each leaf.
    labels: as in `tda.curvature.labels`.
    key: for sampled labels.
    microbatch: M.
    limit: the most parameters allowed.

  Raises:
    ValueError: D above the limit, sampled labels without a key, a parameter
      that is not floating, an unknown label kind.
  """
  wide, narrow = ggn.widen(params)
  flat_D, unravel = ravel_pytree(wide)
  if flat_D.size > limit:
    gigabytes = flat_D.size**2 * flat_D.dtype.itemsize / 1e9
    raise ValueError(
      f"dense_ggn: {flat_D.size} parameters need a matrix of {gigabytes:.3g}"
      f" GB, above limit={limit}. Use ggn.ggn_vp with an iterative solver, a"
      " Kronecker or diagonal curvature, or raise the limit."
    )
  size = jax.tree.leaves(data)[0].shape[0]
  keys = None if key is None else jax.random.split(key, size)
  output_cotangents = cotangents(objective, labels)

  def gradients(example: PyTree, key: jax.Array | None) -> jax.Array:
    outputs, pull = jax.vjp(
      lambda flat: objective.outputs(narrow(unravel(flat)), example), flat_D
    )
    cotangents_K = output_cotangents(outputs, example, key)
    return jax.vmap(pull)(cotangents_K.astype(outputs.dtype))[0]

  def part(
    rows: tuple[PyTree, jax.Array | None], weights_M: jax.Array
  ) -> jax.Array:
    grads_MxKxD = jax.vmap(gradients)(*rows)
    scaled_MxKxD = grads_MxKxD * weights_M[:, None, None]
    return _contract("mkd,mke->de", scaled_MxKxD, grads_MxKxD)

  weights = jnp.full(size, 1 / size, flat_D.dtype)
  parts = ggn.microbatches((data, keys), weights, microbatch)
  return ggn.sum_over(part, parts)


def solve(matrix: jax.Array, damping: jax.typing.ArrayLike) -> Operator:
  """v -> (matrix + damping I)⁻¹ v by Cholesky, on parameter-shaped pytrees.

  `damping` is absolute, in the unit of the matrix (mean eigenvalue = trace /
  D). A damped matrix that is not positive definite gives NaN. The result has
  the matrix's dtype. For many dampings decompose once: `spectral`.
  """
  _check_damping(damping)
  damped = matrix + damping * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
  factor = jax.scipy.linalg.cho_factor(damped, lower=True)
  return _on_pytrees(
    lambda v_D: jax.scipy.linalg.cho_solve(factor, v_D), matrix
  )


def eigen(matrix: jax.Array) -> Eigen:
  """Eigenvalues, rounded up to 0 where below it, and eigenvectors."""
  values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
  return Eigen(jnp.maximum(values, 0), vectors)


def spectral(
  decomposed: Eigen, function: Callable[[jax.Array], jax.Array]
) -> Operator:
  """v -> function(C) v, the function acting on the eigenvalues [D].

  The damped inverse is `lambda values: 1 / (values + damping)`.
  """
  values_D, vectors = decomposed
  scale_D = function(values_D)

  def apply(v_D: jax.Array) -> jax.Array:
    return _contract(
      "de,e->d", vectors, scale_D * _contract("de,d->e", vectors, v_D)
    )

  return _on_pytrees(apply, vectors)


def _on_pytrees(
  function: Callable[[jax.Array], jax.Array], matrix: jax.Array
) -> Operator:
  def apply(direction: PyTree) -> PyTree:
    flat_D, unravel = ravel_pytree(
      jax.tree.map(lambda leaf: jnp.asarray(leaf, matrix.dtype), direction)
    )
    if flat_D.shape != matrix.shape[:1]:
      raise ValueError(
        f"a direction of {flat_D.size} numbers for a matrix of shape"
        f" {matrix.shape}; for many directions use jax.vmap."
      )
    return unravel(function(flat_D))

  return apply


def _contract(spec: str, *operands: jax.Array) -> jax.Array:
  return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)


def _check_damping(damping: jax.typing.ArrayLike) -> None:
  if isinstance(damping, int | float) and not damping >= 0:
    raise ValueError(f"damping={damping}: it is 0 or more.")
