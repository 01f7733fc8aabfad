"""What the rows of a store say of the curvature, and its inverse.

    F_m = (1 / N) Σ_n f_nm f_nmᵀ

is the empirical Fisher matrix of module m along its directions: second moments,
not centred (Choe et al. 2024, §3.1, whose damping is a tenth of the mean
eigenvalue of each module). The sums over a store and their inverses are kept
beside it; those of the rows that a damaged one still has, which are told in
`lost`, are not.

Notation: N rows, modules m of D coordinates, Q queries; spans as in
`tda.store.layout`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from tda import parts, records
from tda.inverse import hyperpower, whitening
from tda.inverse.iterative import Status
from tda.store import layout, reading
from tda.store.disk import Store
from tda.store.layout import Encoded, Span

Array = jax.Array
Matrices: TypeAlias = Mapping[str, Array]
"""By span [m, D, D]."""
Compute: TypeAlias = Callable[[], dict[str, np.ndarray]]

LARGEST = 2**31
"""Bytes of all matrices together above which they are refused.

An inverse in float64 takes up to seven times those of a block more.
"""
HIGHEST = jax.lax.Precision.HIGHEST
INVERSES = ("eigen", "hyperpower", "diagonal")


def fisher(
  store: Store, lost: list[str] | None = None
) -> dict[str, np.ndarray]:
  """F of every span [m, D, D], float32; read if it was computed before.

  Raises:
    ValueError: matrices of more than 2 GiB.
  """
  _check_size(store.layout)

  compute = lambda: _summed(store, store.layout, lost)
  return _kept(store, "fisher", compute, lost)


def joint(store: Store, lost: list[str] | None = None) -> np.ndarray:
  """F of all modules together [1, F, F].

  Raises:
    ValueError: a matrix of more than 2 GiB.
  """
  one = (Span("all", 0, (), 1, 1, layout.width(store.layout)),)
  _check_size(one)

  compute = lambda: _summed(store, one, lost)
  return _kept(store, "joint", compute, lost)["all"]


def squares(
  store: Store, lost: list[str] | None = None
) -> dict[str, np.ndarray]:
  """The diagonals of F [m, D], which need no matrices."""

  def compute():
    total = np.zeros(layout.width(store.layout), np.float64)
    count = 0
    for block in reading.blocks(store, lost=lost):
      total += _squared(block.rows, store.layout)
      count += block.held
    row = total.astype(np.float32) / max(count, 1)
    return {s.name: layout.by_module(row, s) for s in store.layout}

  return _kept(store, "squares", compute, lost)


def second(
  store: Store, how: str, lost: list[str] | None = None
) -> dict[str, np.ndarray]:
  """F, or its diagonals, which are all that the inverse "diagonal" needs."""
  return squares(store, lost) if how == "diagonal" else fisher(store, lost)


def inverse(
  store: Store,
  damping: float,
  how: str = "eigen",
  lost: list[str] | None = None,
) -> dict[str, np.ndarray]:
  """(F + λ)⁻¹ of every module as of `inverted`; kept beside the store.

  Raises:
    ValueError: as `check_inverse`, before anything is computed; as `fisher` and
      `inverted`.
  """
  check_inverse(how, damping)
  compute = lambda: inverted(second(store, how, lost), damping, how)
  return _kept(store, f"inverse_{how}_{float(damping)}", compute, lost)


def joint_inverse(
  store: Store, damping: float, lost: list[str] | None = None
) -> np.ndarray:
  """(F + λ)⁻¹ of all modules together [F, F], kept as well."""
  check_inverse("eigen", damping)
  compute = lambda: inverted({"all": joint(store, lost)}, damping)
  return _kept(store, f"joint_{float(damping)}", compute, lost)["all"][0]


def check_inverse(how: str, damping: float) -> None:
  """Refuses an unknown inverse, and a damping that is not positive.

  Raises:
    ValueError: one of these.
  """
  if not 0 < damping < np.inf:
    raise ValueError(f"damping={damping}: it is positive, relative to F's mean")
  if how not in INVERSES:
    raise ValueError(f"unknown inverse {how!r}; choose of {list(INVERSES)}")


def inverted(
  matrices: Mapping[str, np.ndarray], damping: float, how: str = "eigen"
) -> dict[str, np.ndarray]:
  """(F + λ)⁻¹ of every module, λ relative to its mean eigenvalue.

  Args:
    matrices: [m, D, D] by span, or their diagonals [m, D].
    damping: relative; positive, since F is singular with fewer rows than D.
    how: "eigen", in float64 on the host, or "hyperpower", by products on the
      device; "diagonal" of diagonals.

  Raises:
    ValueError: as `check_inverse`; diagonals with another `how`, or matrices
      with this one; an iteration that did not converge.
  """
  check_inverse(how, damping)
  found = {}
  for name, x in matrices.items():
    if (x.ndim == 2) != (how == "diagonal"):
      raise ValueError(f"inverse {how!r} of {name!r}, an array of {x.shape}")
    if how == "diagonal":
      level = x + damping * x.mean(axis=1, keepdims=True)
      found[name] = np.divide(1, level, out=np.zeros_like(x), where=level > 0)
    elif how == "eigen":
      root = whitening.inverse_root(x.astype(np.float64), damping)
      found[name] = (root @ root.swapaxes(1, 2)).astype(np.float32)
    else:
      found[name] = _by_products(name, x, damping)
  return found


def applied(
  inverse: Mapping[str, np.ndarray], rows: np.ndarray, spans: Sequence[Span]
) -> np.ndarray:
  """Rows [Q, F] times a matrix or diagonal of each module."""
  parts_QxF = []
  for span in spans:
    own, x = layout.by_module(rows, span), inverse[span.name]
    spec = "qmd,md->qmd" if x.ndim == 2 else "qmd,mde->qme"
    parts_QxF.append(np.einsum(spec, own, x, optimize=True))
  return np.concatenate([x.reshape(len(rows), -1) for x in parts_QxF], axis=1)


def lengths(
  store: Store,
  inverse: Mapping[str, np.ndarray] | None,
  lost: list[str] | None = None,
  *,
  keep: bool = True,
) -> np.ndarray:
  """√(fᵀ (F + λ)⁻¹ f) of every row [N], or its norm without an inverse.

  Kept beside the store by what the inverse is, unless it is one of a single
  question; 0 for rows that are lost.
  """
  name = "norms"
  if inverse is not None:
    name = f"lengths_{records.digest(dict(inverse))[:16]}"

  def compute():
    found = np.zeros(store.rows, np.float32)
    for block in reading.blocks(store, lost=lost):
      squares = np.asarray(_quadratic(block.rows, inverse, store.layout))
      last = block.first + block.held
      found[block.first : last] = squares[: block.held]
    return {"lengths": np.sqrt(found.clip(0))}

  if not keep:
    return compute()["lengths"]
  return _kept(store, name, compute, lost)["lengths"]


def _summed(
  store: Store, spans: tuple[Span, ...], lost: list[str] | None
) -> dict[str, np.ndarray]:
  """Means of f fᵀ over the rows, for spans that may be other than theirs."""
  sums = {x.name: jnp.zeros((x.modules, x.size, x.size)) for x in spans}
  count = 0
  for block in reading.blocks(store, lost=lost):
    added = _added(sums, block.rows, store.layout, spans)
    sums = jax.block_until_ready(added)
    count += block.held
  return {k: np.asarray(x / max(count, 1)) for k, x in sums.items()}


def _check_size(spans: Sequence[Span]) -> None:
  size = sum(4 * span.modules * span.size**2 for span in spans)
  if size > LARGEST:
    raise ValueError(
      f"second moments of {size / 2**30:.3g} GiB: {len(spans)} blocks of up to"
      f" {max(span.size for span in spans)} coordinates are too many for whole"
      " matrices. Project to fewer, or ask for inverse='diagonal'"
    )


def _kept(
  store: Store, name: str, compute: Compute, lost: list[str] | None
) -> dict[str, np.ndarray]:
  """Results of all rows of a store, in a file of theirs."""
  store.check_complete()
  which = records.digest([part.digest for part in store.parts])[:16]
  path = Path(store.path) / "derived" / f"{name}_{which}.npz"
  if path.exists():
    with np.load(path) as found:
      return dict(found)
  arrays = compute()
  if lost:
    return arrays
  path.parent.mkdir(exist_ok=True)
  with parts.replacing(path) as file:
    np.savez(file, allow_pickle=False, **arrays)
  return arrays


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def _added(
  sums: Matrices,
  rows: Encoded,
  kept: tuple[Span, ...],
  spans: tuple[Span, ...],
) -> Matrices:
  decoded = layout.decode(rows, kept)

  def add(span):
    own = layout.by_module(decoded, span)
    products = jnp.einsum("nmd,nme->mde", own, own, precision=HIGHEST)
    return sums[span.name] + products

  return {span.name: add(span) for span in spans}


@functools.partial(jax.jit, static_argnums=1)
def _squared(rows: Encoded, spans: tuple[Span, ...]) -> Array:
  return jnp.square(layout.decode(rows, spans)).sum(axis=0)


@functools.partial(jax.jit, static_argnums=2)
def _quadratic(
  rows: Encoded, inverse: Matrices | None, spans: tuple[Span, ...]
) -> Array:
  decoded = layout.decode(rows, spans)
  if inverse is None:
    return jnp.square(decoded).sum(axis=1)

  def one(span):
    own, x = layout.by_module(decoded, span), inverse[span.name]
    if x.ndim == 2:
      times = own * x[None]
    else:
      times = jnp.einsum("nmd,mde->nme", own, x, precision=HIGHEST)
    return (times * own).sum(axis=(1, 2))

  return sum(one(span) for span in spans)


def _by_products(name: str, x: np.ndarray, damping: float) -> np.ndarray:
  level = damping * np.trace(x, axis1=1, axis2=2) / x.shape[-1]
  level = np.where(level > 0, level, 1)
  damped = x + level[:, None, None] * np.eye(x.shape[-1], dtype=x.dtype)
  found, info = hyperpower.inverse(
    jnp.asarray(damped), floor=jnp.asarray(level)
  )
  failed = np.flatnonzero(np.asarray(info.status) != Status.CONVERGED)
  if len(failed):
    raise ValueError(
      f"the hyperpower iteration of module {failed[0]} of {name!r} ended with"
      f" {Status(int(info.status[failed[0]])).name}: ask for inverse='eigen',"
      " or more damping"
    )
  return np.asarray(found)
