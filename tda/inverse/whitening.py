"""Cosines of stored features, whitened by their second moments in modules.

Features that are few enough to be held, such as projected gradients, are
whitened here on the host in float64: f R^(−1/2) with R = λ R_queries + (1 − λ)
R_train of means over examples, block-diagonal (Chang et al. 2024).

Notation: N examples, Q queries, M modules (a group of a layer is one) of D =
S P coordinates, F = M D.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

Features: TypeAlias = Mapping[str, np.ndarray]  # [N, *stack, G, S, P] by block

RANK = 1e-10
"""Eigenvalues below this, relative to the largest, are rounding."""


def cosines(
  features: Features, asked: Features, mixing: float | None, damping: float
) -> np.ndarray:
  """Cosines [N, Q] of f R^(−1/2) over all blocks together; 0 where f is.

  Args:
    features: of training examples, by block.
    asked: of queries.
    mixing: λ; None takes that of `crossing`.
    damping: relative to the mean eigenvalue of R in each module; positive.
  """
  second = {
    name: (_second_moment(features[name]), _second_moment(asked[name]))
    for name in features
  }
  if mixing is None:
    ours, theirs = zip(*second.values(), strict=True)
    mixing = crossing(_eigenvalues(ours), _eigenvalues(theirs))
  products, squares_N, squares_Q = 0.0, 0.0, 0.0
  for name, (ours, theirs) in second.items():
    mixed = mixing * theirs + (1 - mixing) * ours
    root_MxDxD = inverse_root(mixed, damping)
    train_NxF, query_QxF = (
      (_modules(x[name]) @ root_MxDxD).swapaxes(0, 1).reshape(len(x[name]), -1)
      for x in (features, asked)
    )
    products = products + train_NxF @ query_QxF.T
    squares_N = squares_N + np.square(train_NxF).sum(axis=1)
    squares_Q = squares_Q + np.square(query_QxF).sum(axis=1)
  norms_NxQ = np.sqrt(np.multiply.outer(squares_N, squares_Q))
  zeros = np.zeros_like(norms_NxQ)
  cosines = np.divide(products, norms_NxQ, out=zeros, where=norms_NxQ > 0)
  return cosines.astype(np.float32)


def crossing(
  train: np.ndarray, queries: np.ndarray, component: int = 1000
) -> float:
  """λ at which the weighted spectra of R_train and R_queries cross.

  That is λ σ_queries[k] = (1 − λ) σ_train[k] at the k-th largest eigenvalue of
  all modules together, counted from 1, so that the leading components are more
  the queries' than the training data's. Capped at the smaller rank, beyond
  which λ would be 0 or 1.

  Args:
    train: eigenvalues of R_train, of all modules, in any order.
    queries: those of R_queries.
    component: k.

  Raises:
    ValueError: one of them vanishes.
  """
  spectra = [np.sort(np.ravel(x))[::-1] for x in (train, queries)]
  ranks = [int((x > RANK * x[0]).sum()) for x in spectra]
  if min(ranks) < 1 or component < 1:
    raise ValueError(
      f"no crossing at component {component} of spectra of ranks {ranks} (train"
      " and queries): gradients vanish, or the component is below 1. Give"
      " `mixing` a number"
    )
  k = min(component, *ranks) - 1
  return float(spectra[0][k] / (spectra[0][k] + spectra[1][k]))


def _modules(x: np.ndarray) -> np.ndarray:
  """Features [N, *stack, G, S, P] of a block as [M, N, D] in float64."""
  *lead, s, p = x.shape[1:]
  rows = x.reshape(len(x), int(np.prod(lead)), s * p).swapaxes(0, 1)
  return rows.astype(np.float64)


def _second_moment(x: np.ndarray) -> np.ndarray:
  """The mean over examples of f fᵀ, [M, D, D]."""
  rows_MxNxD = _modules(x)
  return rows_MxNxD.swapaxes(1, 2) @ rows_MxNxD / len(x)


def _eigenvalues(blocks: Sequence[np.ndarray]) -> np.ndarray:
  """Of all modules of all blocks."""
  return np.concatenate([np.linalg.eigvalsh(x).ravel() for x in blocks])


def inverse_root(matrices: np.ndarray, damping: float) -> np.ndarray:
  """Columns W with W Wᵀ = (R + δ)⁻¹, [M, D, D]; zero where R is."""
  values_MxD, vectors = np.linalg.eigh(matrices)
  values_MxD = values_MxD.clip(0)
  values_MxD = values_MxD + damping * values_MxD.mean(axis=1, keepdims=True)
  roots = np.zeros_like(values_MxD)
  np.power(values_MxD, -0.5, out=roots, where=values_MxD > 0)
  return vectors * roots[:, None]
