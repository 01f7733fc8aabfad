"""Methods on a store: what queries see of its rows.

With f_n the rows, f_q those of the queries and F their Fisher matrix by module
(`tda.store.fisher`), λ the damping,

    dot        f_qᵀ f_n / N
    cosine     f_qᵀ f_n / ‖f_q‖ ‖f_n‖
    logra      f_qᵀ (F + λ)⁻¹ f_n / N                      Choe et al. 2024
    relatif    logra N / √(f_nᵀ (F + λ)⁻¹ f_n)             Barshan et al. 2020
    trackstar  the cosine under (R + λ)⁻¹, R of rows and   Chang et al. 2024
               queries mixed
    trak       f_qᵀ (F_all + λ)⁻¹ f_n / N, all modules     Park et al. 2023
               in one matrix; times ∂ℓ/∂f of the rows, if
               these are gradients of a scalar output f

`dot` and `cosine` of a store of Adam's updates are LESS. All are positive where
leaving the row out raises the measurement.

Notation: N rows, Q queries, F columns.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from tda.inverse import whitening
from tda.store import fisher, layout, reading
from tda.store.disk import Store
from tda.store.search import Lens

METHODS = ("dot", "cosine", "logra", "relatif", "trackstar", "trak")


def lens(
  store: Store,
  asked: np.ndarray,
  method: str = "logra",
  *,
  damping: float = 0.1,
  inverse: str = "eigen",
  mixing: float | None = None,
  slopes: np.ndarray | None = None,
  damaged: bool = False,
) -> Lens:
  """How queries see the rows by one of `METHODS`.

  Args:
    store: whole.
    asked: rows [Q, F] of the queries, as of `logra.ask`.
    method: of `METHODS`.
    damping: λ, relative to the mean eigenvalue of each module, or for "trak" of
      them all.
    inverse: "eigen" or "hyperpower", see `fisher.inverted`; or "diagonal" of
      the diagonals of F alone, which any dimension allows.
    mixing: of "trackstar": the weight of the queries in R; that of
      `whitening.crossing` unless given.
    slopes: [N] of "trak": ∂ℓ/∂f of every row.
    damaged: go by the rows that are left where shards cannot be read.

  Raises:
    ValueError: an unknown method or inverse, a damping that is not positive,
      queries of another width.
  """
  if method not in METHODS:
    raise ValueError(f"unknown method {method!r}; choose of {list(METHODS)}")
  width = layout.width(store.layout)
  if asked.ndim != 2 or asked.shape[1] != width:
    raise ValueError(
      f"queries {asked.shape} of a store of {width} columns: they are rows of"
      " the same projection"
    )
  n = store.rows
  lost: list[str] | None = [] if damaged else None
  if method == "dot":
    return Lens(store, asked / n)
  if method == "cosine":
    return Lens(
      store, _unit(asked, asked), _over(fisher.lengths(store, None, lost))
    )
  if method == "trak":
    joint = fisher.joint_inverse(store, damping, lost)
    return Lens(store, (asked @ joint / n).astype(np.float32), slopes)
  mixes = method == "trackstar"
  if mixes:
    fisher.check_inverse(inverse, damping)  # before the store is read
    second = fisher.second(store, inverse, lost)
    mixed = _mixed(store, second, asked, mixing)
    by = fisher.inverted(mixed, damping, inverse)
  else:
    by = fisher.inverse(store, damping, inverse, lost)
  seen = fisher.applied(by, asked, store.layout)
  if method == "logra":
    return Lens(store, seen / n)
  # Lengths under a mixture are of these queries alone.
  weights = _over(fisher.lengths(store, by, lost, keep=not mixes))
  return Lens(store, _unit(seen, asked) if mixes else seen, weights)


def own(
  store: Store, *, damping: float = 0.1, inverse: str = "eigen"
) -> np.ndarray:
  """Self-influence f_nᵀ (F + λ)⁻¹ f_n / N of every row [N]."""
  by = fisher.inverse(store, damping, inverse)
  return np.square(fisher.lengths(store, by)) / store.rows


def neighbours(
  store: Store, rows: Sequence[int], method: str = "cosine"
) -> Lens:
  """Rows of the store as queries: what is like them."""
  encoded = reading.take(store, rows)
  return lens(store, np.asarray(layout.decode(encoded, store.layout)), method)


def _mixed(
  store: Store,
  second: Mapping[str, np.ndarray],
  asked: np.ndarray,
  mixing: float | None,
) -> dict[str, np.ndarray]:
  """R = λ R_queries + (1 − λ) R_train, as matrices or diagonals."""
  theirs = {}
  for span in store.layout:
    rows = layout.by_module(asked, span)
    spec = "qmd,qmd->md" if second[span.name].ndim == 2 else "qmd,qme->mde"
    theirs[span.name] = np.einsum(spec, rows, rows, optimize=True) / len(asked)
  if mixing is None:
    mixing = whitening.crossing(_spectrum(second), _spectrum(theirs))
  return {k: mixing * theirs[k] + (1 - mixing) * x for k, x in second.items()}


def _spectrum(second: Mapping[str, np.ndarray]) -> np.ndarray:
  each = [
    x if x.ndim == 2 else np.linalg.eigvalsh(x.astype(np.float64))
    for x in second.values()
  ]
  return np.concatenate([x.ravel() for x in each])


def _unit(seen: np.ndarray, asked: np.ndarray) -> np.ndarray:
  """Directions over √(f_qᵀ X f_q), X f_q being what is seen; zeros stay."""
  squares = (seen * asked).sum(axis=1, keepdims=True)
  return seen * _over(np.sqrt(squares.clip(0)))


def _over(x: np.ndarray) -> np.ndarray:
  """1 / x, and 0 where x is."""
  return np.divide(1, x, out=np.zeros_like(x), where=x > 0)
