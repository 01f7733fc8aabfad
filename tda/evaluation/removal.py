"""Removal curves: retrain without the examples a query's scores rank highest.

For each query the k examples with the largest scores (positive = leaving the
example out raises the measurement) are removed and the model is retrained. The
more a query's loss rises, and the fewer removals flip its prediction, the
better the ranking (Ilyas et al. 2022; Bae et al. 2024, appendix B.3). Removing
at random, or at random within the query's class, are the controls.

Notation: N examples, Q queries, K removal sizes, R seeds, M masks.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda.evaluation.lds import Array, Interval, bootstrap, finite
from tda.evaluation.retraining import Measure, PyTree, bank
from tda.trajectory import Train


class Summary(NamedTuple):
  ks: np.ndarray  # [K]
  change: Interval  # [K], of the measurement against k = 0, mean over queries
  flipped: Interval | None  # [K], fraction of the eligible queries
  eligible: int  # queries that every seed predicts right at k = 0


def curve(
  train: Train,
  measure: Measure,
  scores: Array,
  ks: Sequence[int],
  keys: jax.Array,
  **options: Any,
) -> PyTree:
  """Each query's measurement [Q, K, R, ...] without its top k examples.

  `measure(params)` returns arrays whose first axis is the Q queries of `scores`
  [N, Q]; of every model only the query it was retrained for is kept. Among
  equal scores the first example goes first.

  `train` serves every k, with a `size` of N or N - min(ks): since `size` does
  not change what is computed, one program is compiled and not K. `bank`
  retrains Q · R models for each k (R for k = 0), and takes the `options`.
  """
  ks = _increasing(ks)
  top_NxQ = _ranking(scores)
  n, queries = top_NxQ.shape
  if ks[-1] >= n:
    raise ValueError(f"cannot remove {ks[-1]} of {n} examples: lower ks")
  masks: list[np.ndarray] = []
  row_QxK = np.zeros((queries, len(ks)), int)  # the mask of query q at size k
  for column, k in enumerate(ks):
    owners = queries if k else 1  # nothing removed: one mask serves all queries
    mask = np.ones((owners, n), np.float32)
    mask[np.arange(owners), top_NxQ[:k, :owners]] = 0
    row_QxK[:, column] = sum(len(m) for m in masks) + np.arange(owners)
    masks.append(mask)
  measured = bank(train, measure, np.concatenate(masks), keys, **options)
  query_Qx1 = np.arange(queries)[:, None]
  return jax.tree.map(lambda x: _own(x, row_QxK, query_Qx1), measured)


def summarise(
  values: Array,
  ks: Sequence[int],
  key: jax.Array,
  *,
  correct: Array | None = None,
  confidence: float = 0.95,
) -> Summary:
  """Mean change and flips against k, with bootstrap intervals over queries.

  `values` [Q, K, R], a measurement of `curve`; `correct` [Q, K, R], 1 where the
  model predicts the query right. A query that every seed predicts right at
  k = 0 has flipped from the first k on at which less than half of the seeds do.
  """
  ks = _increasing(ks)
  values = np.asarray(values, np.float64)
  if ks[0] or values.ndim != 3 or values.shape[1] != len(ks):
    raise ValueError(
      f"values {values.shape} must be [queries, ks, seeds] for ks from 0 on, "
      f"to which changes refer, got {ks}"
    )
  mean_QxK = values.mean(2)
  change_QxK = mean_QxK - mean_QxK[:, :1]
  change = bootstrap(change_QxK, key, confidence=confidence)
  if correct is None:
    return Summary(np.array(ks), change, None, 0)
  share_QxK = np.asarray(correct, np.float64).mean(2)
  eligible = share_QxK[:, 0] == 1
  if not eligible.any():
    raise ValueError(
      "no query is predicted right by every seed before anything is removed: "
      "flips cannot be counted"
    )
  flipped_QxK = np.logical_or.accumulate(share_QxK[eligible] < 0.5, axis=1)
  flipped = bootstrap(flipped_QxK, key, confidence=confidence)
  return Summary(np.array(ks), change, flipped, int(eligible.sum()))


def random_ranking(key: jax.Array, n: int, queries: int) -> jax.Array:
  """Scores [N, Q] that rank at random, for each query anew."""
  return jax.random.uniform(key, (n, queries))


def same_class_ranking(
  key: jax.Array, train_labels: jax.Array, query_labels: jax.Array
) -> jax.Array:
  """Scores [N, Q] that rank a query's class at random before all others."""
  same_NxQ = jnp.equal(train_labels[:, None], query_labels[None])
  return same_NxQ + random_ranking(key, *same_NxQ.shape)


def _own(
  measured: np.ndarray, rows: np.ndarray, queries: np.ndarray
) -> np.ndarray:
  """Of measurements [M, R, Q, ...], each query's at its own masks."""
  if measured.ndim < 3 or measured.shape[2] != len(queries):
    raise ValueError(
      f"measure must return one row for each of {len(queries)} queries, got "
      f"shape {measured.shape[2:]}"
    )
  return measured[rows, :, queries]


def _increasing(ks: Sequence[int]) -> list[int]:
  ks = [int(k) for k in ks]
  if not ks or ks[0] < 0 or any(b <= a for a, b in itertools.pairwise(ks)):
    raise ValueError(f"ks must increase from 0 or more, got {ks}")
  return ks


def _ranking(scores: Array) -> np.ndarray:
  """Examples of each query [N, Q], the largest score first."""
  scores_NxQ = finite(scores, "score", ("example", "query"))
  return np.argsort(-scores_NxQ, axis=0, kind="stable")
