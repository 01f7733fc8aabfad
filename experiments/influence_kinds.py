"""Kinds of documents, which are the first folders of their names.

Notation: D documents, Q queries.
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


def shares(
  scores: np.ndarray, kinds: Sequence[str], *, net: bool = False
) -> dict[str, np.ndarray]:
  """Sums of a kind's positive scores, relative to all kinds': [Q] of each.

  Args:
    scores: [D, Q]; of a query that has no positive ones shares are 0.
    kinds: of the documents [D].
    net: less the kind's negative scores, which cancel the positive ones where
      documents do not matter and scores are noise.
  """
  positive_DxQ = np.maximum(scores, 0)
  total_Q = positive_DxQ.sum(axis=0)
  total_Q = np.where(total_Q == 0, np.inf, total_Q)
  summed_DxQ = (scores if net else positive_DxQ) / total_Q
  kind_D = np.array(kinds)
  return {
    kind: summed_DxQ[kind_D == kind].sum(axis=0) for kind in sorted({*kinds})
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
  """How much is of the query's own kind [Q], and of the others, by method."""
  same_DxQ = np.array(kinds)[:, None] == np.array(asked)
  k = min(10, len(kinds))
  results = {}
  for name, x in scores.items():
    positive, net = shares(x, kinds), shares(x, kinds, net=True)
    mine = lambda found: np.mean([found[x][q] for q, x in enumerate(asked)])
    whole = np.mean(sum(net.values()))
    best = np.take_along_axis(same_DxQ, retrieval.candidates(x, k), 0)
    results[name] = {
      "positive": float(mine(positive)),
      "net": float(mine(net)),
      "net of others": float(whole - mine(net)),
      f"of first {k}": float(best.mean()),
    }
  workdir.record("own_kind", results)
  body = [
    [display(name), *(f"{x:z.2f}" for x in found.values())]
    for name, found in results.items()
  ]
  header = ["method", *next(iter(results.values()))]
  shown = tables.aligned(header, body, [False, *[True] * 4])
  return (
    "Of the query's own kind: share of positive influence; the same less its"
    f" negative influence; the first {k} documents\n{shown}"
  )
