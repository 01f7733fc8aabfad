"""Kronecker-factored curvature: K-FAC, EK-FAC and their diagonal relative.

All three are one thing, an eigenbasis per block and raw eigenvalues in it:

    C ≈ (Q_in ⊗ Q_out) diag(Λ) (Q_in ⊗ Q_out)ᵀ

with C the mean over examples of Σ_k g_k g_kᵀ (see `curvature.labels`). K-FAC
has Λ = eig(A) eig(S) of the second moments of inputs and output gradients,
EK-FAC the mean squared gradient in their eigenbasis (George et al. 2018;
Grosse et al. 2023, §2.2), the diagonal the mean squared gradient as it is.
Damping is not part of a fit.

A is a mean over positions and S a sum over positions per example, so that
their product has the scale of C whatever the sequence length. Both count every
position, and a parameter that is used several times counts every use, whereas
Λ of EK-FAC is of whole per-example gradients, cross terms included.

Notation: G, O, I as in `tda.factors`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda import factors, taps
from tda.blocks import Blocks
from tda.curvature.labels import Labels
from tda.factors import Moments

Array = jax.Array


class Basis(NamedTuple):
  """Columns are eigenvectors; None stands for the identity."""

  inputs: Array | None  # [*stack, G, I, I]
  outputs: Array | None  # [*stack, G, O, O]


class Curvature(NamedTuple):
  """A fitted curvature in block coordinates.

  Attributes:
    basis: by block.
    eigenvalues: by block, raw, [*stack, G, O, I], in units of the mean over
      examples of the squared gradient of the loss.
    method: "kfac", "ekfac" or "diagonal".
    labels: of which gradients it is made.
    examples: on how many it was fitted.
  """

  basis: dict[str, Basis]
  eigenvalues: Blocks
  method: str
  labels: Labels
  examples: int


def _moments(block, parts, lanes, operand):
  del operand
  return factors.moments(parts, lanes, diagonal=block.kind == "diagonal")


MOMENTS = taps.Statistic(
  _moments,
  per_example=False,
  linear=lambda block: block.kind in ("matrix", "lookup"),
)
"""Second moments of each block's inputs and output gradients."""


def _squares(block, parts, lanes, basis):
  del block, lanes
  return factors.squares(factors.rotate(parts, *(basis or (None, None))))


SQUARES = taps.Statistic(
  _squares, per_example=False, linear=lambda block: False
)
"""Squared per-example gradients in the operand's basis, or as they are."""


def eigenbasis(
  moments: Mapping[str, Moments],
) -> tuple[dict[str, Basis], dict[str, tuple[Array, Array]]]:
  """Eigenvectors of the moments by block, and the eigenvalues of each side.

  Blocks that keep only a diagonal on a side have the identity there. The
  eigenvalues are of the sums in `moments`, clipped at zero, [*stack, G, I] and
  [*stack, G, O].

  Raises:
    ValueError: a factor that is not finite, by block and side.
  """
  bases, spectra = {}, {}
  for name, (inputs, outputs, positions) in moments.items():
    values_in, vectors_in = _side(name, "inputs", inputs, positions.ndim)
    values_out, vectors_out = _side(name, "outputs", outputs, positions.ndim)
    bases[name] = Basis(vectors_in, vectors_out)
    spectra[name] = (values_in, values_out)
  return bases, spectra


def kfac_eigenvalues(
  moments: Mapping[str, Moments],
  spectra: Mapping[str, tuple[Array, Array]],
  examples: int,
) -> Blocks:
  """Λ = eig(A) eig(S), [*stack, G, O, I]."""

  def product(name):
    values_in, values_out = spectra[name]
    count = jnp.maximum(moments[name].positions, 1)[..., None, None]
    return (values_out / examples)[..., None] * (values_in / count)[
      ..., None, :
    ]

  return {name: product(name) for name in moments}


def _side(
  name: str, side: str, moment: Array, depth: int
) -> tuple[Array, Array | None]:
  """Eigenvalues and vectors of one side; a diagonal is its own spectrum."""
  if moment.ndim == depth + 2:
    return moment, None
  return _eigh(name, side, moment)


def _eigh(name: str, side: str, matrices: Array) -> tuple[Array, Array]:
  """Batched symmetric eigendecomposition with a fallback on the host.

  The device's solver can return NaN for an ill-conditioned factor; those that
  do are decomposed again in float64 by LAPACK.
  """
  symmetric = (matrices + matrices.swapaxes(-1, -2)) / 2
  if not bool(jnp.isfinite(symmetric).all()):
    raise ValueError(
      f"the second moment of the {side} of {name!r} is not finite: an "
      "activation or gradient overflowed. Fit in float32, or leave the block "
      "out with `select`"
    )
  values, vectors = jnp.linalg.eigh(symmetric)
  if not bool(jnp.isfinite(values).all() & jnp.isfinite(vectors).all()):
    try:
      found = np.linalg.eigh(np.asarray(symmetric, np.float64))
    except np.linalg.LinAlgError as error:
      raise ValueError(
        f"no eigendecomposition of the {side} of {name!r} was found, in "
        f"float32 or float64: {error}. Leave the block out with `select`"
      ) from error
    values = jnp.asarray(found.eigenvalues, symmetric.dtype)
    vectors = jnp.asarray(found.eigenvectors, symmetric.dtype)
  return jnp.maximum(values, 0), vectors
