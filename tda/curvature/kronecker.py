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
position but padding (`Objective.segments`), and a parameter that is used
several times counts every use, whereas Λ of EK-FAC is of whole per-example
gradients, cross terms included.

Notation: G, O, I as in `tda.factors`.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from tda import factors, taps
from tda import moments as moments_lib
from tda.blocks import Blocks
from tda.curvature.labels import Labels
from tda.moments import Moments

Array = jax.Array


SIDES = ("inputs", "outputs")


class Basis(NamedTuple):
  """Columns are eigenvectors; None stands for the identity.

  With scales they are eigenvectors in scaled coordinates, seen from the plain
  ones, and no longer orthogonal.
  """

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
  return moments_lib.moments(parts, lanes, diagonal=block.kind == "diagonal")


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
  _squares,
  per_example=False,
  linear=lambda block: False,
  footprint=lambda parts, basis: factors.entries(parts),
)
"""Squared per-example gradients in the operand's basis, or as they are."""


Scales = Mapping[str, tuple[Array, Array]]
"""Of inputs [*stack, G, I] and outputs [*stack, G, O], by block."""

Keep = Callable[[str, Any, Callable[[], Any]], Any]
"""(name, arrays like the result, compute) -> the result, perhaps read."""


def eigenbasis(
  moments: Mapping[str, Moments],
  scales: Scales | None = None,
  widest: int | None = None,
  *,
  keep: Keep = lambda name, like, compute: compute(),
  label: str | None = None,
) -> tuple[dict[str, Basis], dict[str, tuple[Array, Array]]]:
  """Eigenvectors of the moments by block, and the eigenvalues of each side.

  Blocks that keep only a diagonal on a side have the identity there. The
  eigenvalues are of the sums in `moments`, clipped at zero, [*stack, G, I] and
  [*stack, G, O]. Given scales s the eigenvectors are q of diag(s) M diag(s),
  and the columns diag(s) q: with them C is that of the coordinates θ / s. A
  side that has the identity is not scaled. Matrices of more than `widest` rows
  are cut along the diagonal into parts of about the same size, whose
  eigenvectors are found one by one: P parts take 1 / P² of the time (Grosse et
  al. 2023, §2.2, lose little by it).

  Each side is found by `keep`, which may have it from before; `label` is that
  of a progress bar over them, and None shows none.

  Raises:
    ValueError: a factor that is not finite, by block and side.
  """
  sides = {
    name: (inputs, outputs) for name, (inputs, outputs, _) in moments.items()
  }
  depth = {name: m.positions.ndim for name, m in moments.items()}
  matrices = {
    (name, side): x
    for name, pair in sides.items()
    for side, x in zip(SIDES, pair, strict=True)
    if x.ndim > depth[name] + 2
  }
  if scales is not None:
    matrices = {k: _scale(x, _scale_of(k, scales)) for k, x in matrices.items()}
  if widest is not None and widest < 1:
    raise ValueError(f"widest={widest} must be 1 or more, or None to cut none")
  found = {}
  for (name, side), x in tqdm.tqdm(
    matrices.items(), desc=label, unit="side", disable=not label
  ):
    like = jax.ShapeDtypeStruct(x.shape[:-1], x.dtype), x
    compute = functools.partial(_decomposed, name, side, x, widest)
    found[name, side] = keep(f"{name} {side}", like, compute)
  if scales is not None:
    found = {
      k: (values, _scale_of(k, scales)[..., None] * vectors)
      for k, (values, vectors) in found.items()
    }
  bases, spectra = {}, {}
  for name, pair in sides.items():
    parts = [
      found.get((name, side), (x, None))
      for side, x in zip(SIDES, pair, strict=True)
    ]
    bases[name] = Basis(parts[0][1], parts[1][1])
    spectra[name] = (parts[0][0], parts[1][0])
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


def _scale_of(key: tuple[str, str], scales: Scales) -> Array:
  name, side = key
  return scales[name][SIDES.index(side)]


def _scale(x: Array, s: Array) -> Array:
  return s[..., :, None] * x * s[..., None, :]


def _decomposed(
  name: str, side: str, x: Array, widest: int | None
) -> tuple[Array, Array]:
  values, vectors, sound = _cut_eigh(x, widest)
  if bool(sound):
    return values, vectors
  return _eigh_on_host(name, side, x)


def _cut_eigh(x: Array, widest: int | None) -> tuple:
  """Values, vectors, and whether all are finite, part by part."""
  width = x.shape[-1]
  count = -(-width // (widest or width))
  if count == 1:
    return _eigh(x)
  ends = [round(width * i / count) for i in range(count + 1)]
  values, vectors, sound = [], jnp.zeros_like(x), jnp.bool_(True)
  for begin, end in itertools.pairwise(ends):
    part = (..., slice(begin, end), slice(begin, end))
    some, columns, fine = _eigh(x[part])
    values.append(some)
    vectors = vectors.at[part].set(columns)
    sound &= fine
  return jnp.concatenate(values, axis=-1), vectors, sound


def _eigh(x: Array) -> tuple:
  """The same of symmetrised matrices.

  One at a time: decompositions side by side in one program, or in programs that
  run at once, can wait for each other's threads for ever on a CPU.
  """
  return jax.block_until_ready(jax.jit(_symmetric)(x))


def _symmetric(x: Array) -> tuple:
  values, vectors = jnp.linalg.eigh((x + x.swapaxes(-1, -2)) / 2)
  sound = jnp.isfinite(values).all() & jnp.isfinite(vectors).all()
  return jnp.maximum(values, 0), vectors, sound


def _eigh_on_host(name: str, side: str, matrices: Array) -> tuple[Array, Array]:
  """What the device's solver gave up on, again in float64 by LAPACK."""
  symmetric = np.asarray(matrices, np.float64)
  symmetric = (symmetric + symmetric.swapaxes(-1, -2)) / 2
  if not np.isfinite(symmetric).all():
    raise ValueError(
      f"the second moment of the {side} of {name!r} is not finite: an "
      "activation or gradient overflowed. Fit in float32, or leave the block "
      "out with `select`"
    )
  try:
    values, vectors = np.linalg.eigh(symmetric)
  except np.linalg.LinAlgError as error:
    raise ValueError(
      f"no eigendecomposition of the {side} of {name!r} was found, in float32 "
      f"or float64: {error}. Leave the block out with `select`"
    ) from error
  dtype = matrices.dtype
  return jnp.asarray(values.clip(0), dtype), jnp.asarray(vectors, dtype)
