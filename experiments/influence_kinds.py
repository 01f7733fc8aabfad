"""Kinds of documents, which are the first folders of their names.

Notation: D documents, Q queries, K kinds.
"""

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from tda.data import retrieval
from tda.evaluation.workdir import Workdir
from tda.report import tables
from tda.report.names import display


def of(name: str) -> str:
  """The kind of a document; "" outside of a folder."""
  return name.partition("/")[0] if "/" in name else ""


def drawn(names: Sequence[str], each: int, seed: int) -> list[str]:
  """`each` documents of every kind, the kinds in turn."""
  mixed = np.random.default_rng(seed).permutation(np.array(names))
  groups: dict[str, list[str]] = {of(name): [] for name in sorted(names)}
  for name in mixed.tolist():
    groups[of(name)].append(name)
  for kind, found in groups.items():
    if len(found) <= each:
      raise ValueError(
        f"{each} documents to hold out of each kind, and {kind!r} has"
        f" {len(found)}: give a smaller --config.ask"
      )
  turns = zip(*(found[:each] for found in groups.values()), strict=True)
  return list(itertools.chain.from_iterable(turns))


def halves(whole: str) -> tuple[str, str]:
  """Before and after the end of a word that is nearest to the middle."""
  middle = len(whole) // 2
  ends = [found.start() for found in re.finditer(r"(?<=\S)\s", whole)]
  at = min(ends, key=lambda end: abs(end - middle), default=middle)
  return whole[:at], whole[at:]


def shares(scores: np.ndarray, kinds: Sequence[str]) -> dict[str, np.ndarray]:
  """Share of each query's positive scores [D, Q] by kind [D] of document.

  [Q] of every kind, 0 for a query that has none.
  """
  positive_DxQ = np.maximum(scores, 0)
  total_Q = positive_DxQ.sum(axis=0)
  total_Q[total_Q == 0] = 1
  kind_D = np.array(kinds)
  return {
    kind: positive_DxQ[kind_D == kind].sum(axis=0) / total_Q
    for kind in sorted({*kinds})
  }


def table(
  workdir: Workdir,
  kinds: Sequence[str],
  sizes: Sequence[int],
  labels: Sequence[str],
  scores: np.ndarray,
) -> str:
  """Share of positive influence by kind of document, for each kind of query.

  Args:
    workdir: where the numbers go.
    kinds: of documents [D].
    sizes: of documents [D], for their share of the corpus.
    labels: of queries [Q]; of those with the same one the mean is shown.
    scores: [D, Q].
  """
  whole = shares(np.array(sizes)[:, None], kinds)
  rows = {"share of the corpus": [float(x[0]) for x in whole.values()]}
  found = shares(scores, kinds)
  for label in dict.fromkeys(labels):
    mine_Q = np.array(labels) == label
    rows[label] = [float(x[mine_Q].mean()) for x in found.values()]
  named = {k: dict(zip(found, x, strict=True)) for k, x in rows.items()}
  workdir.record("shares", named)
  body = [[k, *(f"{share:.2f}" for share in x)] for k, x in rows.items()]
  header = ["query", *found]
  shown = tables.aligned(header, body, [False, *[True] * len(found)])
  return f"Share of positive influence by kind of document\n{shown}"


def own(
  workdir: Workdir,
  kinds: Sequence[str],
  asked: Sequence[str],
  scores: Mapping[str, np.ndarray],
) -> str:
  """How much is of the query's own kind [Q], by method."""
  same_DxQ = np.array(kinds)[:, None] == np.array(asked)
  k = min(10, len(kinds))
  body, results = [["all alike", same_DxQ.mean(), same_DxQ.mean()]], {}
  for name, x in scores.items():
    found = shares(x, kinds)
    share = [found[kind][q] for q, kind in enumerate(asked)]
    best = np.take_along_axis(same_DxQ, retrieval.candidates(x, k), 0)
    results[name] = {"share": float(np.mean(share)), "first": best.mean()}
    body.append([display(name), np.mean(share), best.mean()])
  workdir.record("own_kind", results)
  cells = [[name, f"{one:.2f}", f"{two:.2f}"] for name, one, two in body]
  header = ["method", "positive scores", f"first {k}"]
  shown = tables.aligned(header, cells, [False, True, True])
  return f"Of the query's own kind\n{shown}"
