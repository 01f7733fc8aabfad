"""Lexical retrieval: which documents share rare tokens with a query?

A baseline of attribution, and the filter that leaves an influence scan few
documents to score. Documents are arrays [any] of token ids, perhaps empty, and
queries of one or more; a score is a sum over the tokens of the query, where one
that stands twice counts twice,

  score(q, d) = Σ_{t in q} weight(t, d) · IDF(t)
  IDF(t) = log((D - n_t + 1/2) / (n_t + 1/2) + 1),  n_t documents that hold t

and weight(t, d) is 0 where d lacks t. Scores are 0 or more. Cost: one pass over
the documents' tokens, then for each query as many sums as documents hold each
of its tokens; a token that no query holds takes no memory.

Notation: D documents, Q queries, V different tokens of the queries, P pairs of
such a token and a document that holds it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Postings(NamedTuple):
  """Inverted lists: those of token v are at starts[v]:starts[v + 1]."""

  tokens: np.ndarray  # [V], ascending
  starts: np.ndarray  # [V + 1]
  documents: np.ndarray  # [P], which
  counts: np.ndarray  # [P], how often the token stands in it
  lengths: np.ndarray  # [D], tokens of each document


def tfidf(
  documents: Sequence[np.ndarray],
  queries: Sequence[np.ndarray],
  k1: float = 1.5,
) -> np.ndarray:
  """Scores float32 [D, Q] that Grosse et al. (2023) filter a corpus by.

  weight = (k1 + 1) e / (k1 + e) with e = 1 if d holds t, else 0. As they define
  it e is no count, so that the weight is e itself whatever `k1` is.

  `k1` is 0 or more.
  """
  _check(k1, 0)
  postings = _postings(documents, queries)
  exists_P = np.ones(len(postings.documents))
  return _scores(postings, queries, (k1 + 1) * exists_P / (k1 + exists_P))


def bm25(
  documents: Sequence[np.ndarray],
  queries: Sequence[np.ndarray],
  k1: float = 1.2,
  b: float = 0.75,
) -> np.ndarray:
  """Okapi BM25 scores float32 [D, Q] (Robertson and Zaragoza 2009).

  weight = (k1 + 1) f / (k1 (1 - b + b length / mean length) + f), f the count
  of t in d. They have no + 1 in the IDF, which then is below 0 for tokens that
  most documents hold.

  `k1`, 0 or more, says how late the count saturates, at 0 at once; `b` how much
  lengths matter, from 0 to 1.
  """
  _check(k1, b)
  postings = _postings(documents, queries)
  lengths_P = postings.lengths[postings.documents] / postings.lengths.mean()
  scale_P = k1 * (1 - b + b * lengths_P)
  counts_P = postings.counts
  return _scores(postings, queries, (k1 + 1) * counts_P / (scale_P + counts_P))


def candidates(scores: np.ndarray, k: int) -> np.ndarray:
  """Places [k, Q] of the largest `scores` [D, Q], best first, ties by place."""
  scores_DxQ = np.asarray(scores, np.float64)
  if scores_DxQ.ndim != 2 or not np.isfinite(scores_DxQ).all():
    raise ValueError(
      f"scores {scores_DxQ.shape} must be [documents, queries] and finite; for"
      " one query give [documents, 1]"
    )
  if not 1 <= k <= len(scores_DxQ):
    raise ValueError(
      f"the best {k} of {len(scores_DxQ)} documents: ask for 1 or more and at"
      " most for all"
    )
  return np.argsort(-scores_DxQ, axis=0, kind="stable")[:k]


def recall(
  scores: np.ndarray, reference: np.ndarray, k: int, among: int
) -> np.ndarray:
  """What a filter keeps of a full scan, for each query [Q], from 0 to 1.

  The share of the best `k` documents by `reference` [D, Q], as by influence,
  that are of the best `among` by `scores` [D, Q]; at most among / k.
  """
  if np.shape(scores) != np.shape(reference):
    raise ValueError(
      f"scores {np.shape(scores)} and reference {np.shape(reference)} must be"
      " of the same documents and queries, both [documents, queries]"
    )
  kept_DxQ = np.zeros(np.shape(scores), bool)
  np.put_along_axis(kept_DxQ, candidates(scores, among), True, 0)
  return np.take_along_axis(kept_DxQ, candidates(reference, k), 0).mean(0)


def _postings(
  documents: Sequence[np.ndarray], queries: Sequence[np.ndarray]
) -> Postings:
  if not len(documents) or not len(queries):
    raise ValueError(
      f"{len(documents)} documents and {len(queries)} queries: give one or more"
      " of each"
    )
  lengths_D = np.array([len(x) for x in documents])
  empty = [i for i, x in enumerate(queries) if not len(x)]
  if empty:
    raise ValueError(
      f"{len(empty)} of {len(queries)} queries have no tokens, the first at"
      f" {empty[0]}: leave them out, they match nothing"
    )
  tokens_V = np.unique(_joined(queries))
  joined = _joined(documents)
  places = np.flatnonzero(np.isin(joined, tokens_V))
  # Document of a place: an empty one ends where it begins and is passed over.
  owners = np.searchsorted(np.cumsum(lengths_D), places, "right")
  tokens = np.searchsorted(tokens_V, joined[places])
  pairs_P, counts_P = np.unique(
    tokens * len(documents) + owners, return_counts=True
  )
  tokens_P, documents_P = np.divmod(pairs_P, len(documents))
  starts = np.searchsorted(tokens_P, np.arange(len(tokens_V) + 1))
  return Postings(tokens_V, starts, documents_P, counts_P, lengths_D)


def _scores(
  postings: Postings, queries: Sequence[np.ndarray], weights_P: np.ndarray
) -> np.ndarray:
  """Float32 [D, Q] of float64 sums in the order of token ids."""
  size = len(postings.lengths)
  held_V = np.diff(postings.starts)
  idf_V = np.log((size - held_V + 0.5) / (held_V + 0.5) + 1)
  scores_DxQ = np.empty((size, len(queries)), np.float32)
  for q, query in enumerate(queries):
    tokens, times = np.unique(query, return_counts=True)
    places = np.searchsorted(postings.tokens, tokens)
    score_D = np.zeros(size)
    for v, n in zip(places, times, strict=True):
      inside = slice(postings.starts[v], postings.starts[v + 1])
      score_D[postings.documents[inside]] += n * idf_V[v] * weights_P[inside]
    scores_DxQ[:, q] = score_D
  return scores_DxQ


def _joined(lists: Sequence[np.ndarray]) -> np.ndarray:
  """All token ids one after another."""
  arrays = [np.asarray(x) for x in lists if len(x)] or [np.zeros(0, np.int32)]
  for x in arrays:
    if x.ndim != 1 or x.dtype.kind not in "iu":
      raise ValueError(
        f"token ids {x.dtype} {x.shape} must be integers in one dimension;"
        " tda.data.text.encode makes them of text"
      )
  return np.concatenate(arrays)


def _check(k1: float, b: float) -> None:
  if not 0 <= k1 < np.inf or not 0 <= b <= 1:
    raise ValueError(
      f"k1={k1} must be 0 or more and b={b} from 0 to 1: 1.2 and 0.75 are usual"
    )
