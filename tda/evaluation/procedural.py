"""Do queries of one task draw on the same documents?

The analyses of Ruis et al. (2024, §4 and §5) of scores [D, Q] of documents for
queries that are grouped in tasks, positive where a document made the completion
likelier: what one query says of another, how fast influence falls with rank,
where documents that hold the answer stand, and which kinds are over-represented
among the first. Scores of each query are first divided by its surprisal, so
that they are per nat (§3.2), where magnitudes are compared.

Notation: D documents, Q queries.
"""

from collections.abc import Mapping, Sequence

import numpy as np


def correlations(scores: np.ndarray) -> np.ndarray:
  """Pearson correlation of the scores of every two queries [Q, Q].

  0 for a query whose scores are all the same.
  """
  _check(scores)
  centred_DxQ = scores - scores.mean(axis=0)
  norms_Q = np.linalg.norm(centred_DxQ, axis=0)
  flat_Q = norms_Q <= 1e-12 * np.abs(scores).max(axis=0, initial=0)
  unit_DxQ = centred_DxQ / np.where(flat_Q, np.inf, norms_Q)
  return unit_DxQ.T @ unit_DxQ


def between(
  matrix: np.ndarray, tasks: Sequence[str]
) -> dict[str, dict[str, float]]:
  """Mean of a matrix [Q, Q] over pairs of different queries, by their tasks.

  NaN for a task of one query with itself.
  """
  names, task_Q = list(dict.fromkeys(tasks)), np.array(tasks)
  if matrix.shape != (len(tasks), len(tasks)):
    raise ValueError(
      f"a matrix {matrix.shape} of {len(tasks)} queries: it is [Q, Q]"
    )
  others = ~np.eye(len(tasks), dtype=bool)

  def mean(a, b):
    pairs = np.outer(task_Q == a, task_Q == b) & others
    return float(matrix[pairs].mean()) if pairs.any() else float("nan")

  return {a: {b: mean(a, b) for b in names} for a in names}


def slope(scores: np.ndarray, count: int) -> np.ndarray:
  """Of log influence over log rank of the first `count` documents [Q].

  By least squares; NaN for a query with fewer that are positive. Ruis et al.
  find −.32 to −.36.
  """
  _check(scores)
  if not 2 <= count <= len(scores):
    raise ValueError(
      f"a slope of {count} of {len(scores)} documents: take 2 or more"
    )
  first_nxQ = -np.sort(-scores, axis=0)[:count].astype(np.float64)
  ranks_n = np.log(np.arange(1, count + 1))
  ranks_n -= ranks_n.mean()
  positive_Q = first_nxQ[-1] > 0
  logs_nxQ = np.log(np.where(positive_Q, first_nxQ, 1))
  return np.where(
    positive_Q, ranks_n @ logs_nxQ / np.square(ranks_n).sum(), np.nan
  )


def holds(texts: Sequence[str], answers: Sequence[str | None]) -> np.ndarray:
  """Which documents have a query's answer in their words, bool [D, Q].

  In any case and spacing; a query without an answer is in none.
  """
  plain = lambda text: " ".join(text.lower().split())
  said = [plain(text) for text in texts]
  wanted = [plain(answer) if answer else None for answer in answers]
  found = [[x is not None and x in text for x in wanted] for text in said]
  return np.array(found, bool).reshape(len(texts), len(answers))


def found(scores: np.ndarray, right: np.ndarray, k: int) -> dict[str, float]:
  """Whether documents with the answer are among a query's first k.

  Returns:
    "queries": how many have an answer in any document; "found": the share of
    these with one among the first k; "chance": that share if documents were
    ranked at random.
  """
  _check(scores)
  if scores.shape != right.shape or not 1 <= k <= len(scores):
    raise ValueError(
      f"scores {scores.shape}, documents with the answer {right.shape} and"
      f" k={k}: both are [D, Q], and k from 1 to D"
    )
  asked_Q = np.asarray(right.any(axis=0))
  if not asked_Q.any():
    return {"queries": 0.0, "found": float("nan"), "chance": float("nan")}
  first_kxQ = np.argsort(-scores, axis=0, kind="stable")[:k]
  hit_Q = np.take_along_axis(right, first_kxQ, 0)[:, asked_Q].any(axis=0)
  size, many_Q = len(scores), right.sum(axis=0)[asked_Q]
  # That none of the k is right, drawn without putting back.
  steps_kxQ = np.arange(k)[:, None]
  miss_Q = np.prod(np.clip(1 - many_Q / (size - steps_kxQ), 0, None), axis=0)
  return {
    "queries": float(asked_Q.sum()),
    "found": float(hit_Q.mean()),
    "chance": float(1 - miss_Q.mean()),
  }


def multipliers(
  scores: np.ndarray, kinds: Sequence[str], k: int
) -> Mapping[str, np.ndarray]:
  """How much more of a kind a query's first k hold than the corpus, [Q] each.

  1 where it is as frequent.
  """
  _check(scores)
  if len(kinds) != len(scores) or not 1 <= k <= len(scores):
    raise ValueError(
      f"{len(kinds)} kinds of {len(scores)} documents and k={k}: a kind for"
      " each document, and k from 1 to their number"
    )
  kind_D = np.array(kinds)
  first_kxQ = np.argsort(-scores, axis=0, kind="stable")[:k]
  return {
    kind: (kind_D[first_kxQ] == kind).mean(axis=0) / (kind_D == kind).mean()
    for kind in dict.fromkeys(kinds)
  }


def _check(scores: np.ndarray) -> None:
  if scores.ndim != 2 or not scores.size or not np.isfinite(scores).all():
    raise ValueError(
      f"scores {scores.shape} must be finite [documents, queries], not empty"
    )
