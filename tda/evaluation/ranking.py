"""How well scores rank documents that are known to be the right ones.

A score [D, Q] is higher for a document that matters more to a query, as that of
a helpful example is where the measurement is a loss (`tda.evaluation.lds`).
What is right is known from elsewhere, as the documents that state a fact
(`tda.data.facts`). Fact tracing reports the mean over queries of the reciprocal
rank, MRR, and recall at 10 (Akyürek et al. 2022; Chang et al. 2024).

Ties are counted as the worst order that is possible: of equal scores, those of
irrelevant documents come first. A constant score thus ranks every relevant
document last.

Notation: D documents, Q queries.
"""

import jax
import numpy as np

Array = jax.Array | np.ndarray


def recall_at(scores: Array, relevant: Array, k: int) -> np.ndarray:
  """Share of the relevant documents among the k best [Q].

  Of min(k, how many are relevant), so that 1 can always be reached. `scores`
  [D, Q], of which -inf is allowed; `relevant` bool [D, Q].
  """
  hits_DxQ = _ranked(scores, relevant)
  if not 1 <= k <= len(hits_DxQ):
    raise ValueError(
      f"k = {k} of {len(hits_DxQ)} documents: take one from 1 to that number"
    )
  return hits_DxQ[:k].sum(0) / np.minimum(k, hits_DxQ.sum(0))


def reciprocal_rank(scores: Array, relevant: Array) -> np.ndarray:
  """1 / rank of the best relevant document [Q]; its mean over queries is MRR.

  `scores` [D, Q] and `relevant` bool [D, Q].
  """
  return 1 / (1 + _ranked(scores, relevant).argmax(0))


def average_precision(scores: Array, relevant: Array) -> np.ndarray:
  """Mean over the relevant documents of the precision at their ranks [Q].

  Precision at a rank: share of relevant documents down to it, itself included.
  `scores` [D, Q] and `relevant` bool [D, Q].
  """
  hits_DxQ = _ranked(scores, relevant)
  ranks_Dx1 = np.arange(1, len(hits_DxQ) + 1)[:, None]
  precision_DxQ = hits_DxQ.cumsum(0) / ranks_Dx1
  return (precision_DxQ * hits_DxQ).sum(0) / hits_DxQ.sum(0)


def means(scores: Array, relevant: Array) -> dict[str, float]:
  """Means over queries by name, recall at the most relevant documents of one.

  `scores` [D, Q] and `relevant` bool [D, Q].
  """
  k = int(np.sum(relevant, axis=0).max())
  return {
    f"recall@{k}": float(recall_at(scores, relevant, k).mean()),
    "MRR": float(reciprocal_rank(scores, relevant).mean()),
    "mean precision": float(average_precision(scores, relevant).mean()),
  }


def _ranked(scores: Array, relevant: Array) -> np.ndarray:
  """Whether the document of each rank is relevant, best first: bool [D, Q]."""
  scores_DxQ = np.asarray(scores, np.float64)
  relevant_DxQ = np.asarray(relevant)
  if scores_DxQ.shape != relevant_DxQ.shape or scores_DxQ.ndim != 2:
    raise ValueError(
      f"scores {scores_DxQ.shape} and relevant {relevant_DxQ.shape} must both"
      " be [documents, queries]: transpose or cut them to one shape"
    )
  if relevant_DxQ.dtype != bool:
    raise ValueError(
      f"relevant must be bool, got {relevant_DxQ.dtype}: compare it, as in"
      " relevance > 0"
    )
  wrong = np.argwhere(np.isnan(scores_DxQ))
  if len(wrong):
    raise ValueError(
      f"{len(wrong)} scores are NaN, the first that of document {wrong[0][0]}"
      f" and query {wrong[0][1]}: leave such documents out, or score them -inf"
    )
  without = np.flatnonzero(~relevant_DxQ.any(0))
  if len(without):
    raise ValueError(
      f"{len(without)} queries have no relevant document, the first of them"
      f" {without[0]}: leave them out"
    )
  order_DxQ = np.lexsort((relevant_DxQ, -scores_DxQ), axis=0)
  return np.take_along_axis(relevant_DxQ, order_DxQ, 0)
