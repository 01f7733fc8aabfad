"""What `influence_lm` puts on the page of its run: documents by token."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import language
from experiments.influence_task import Task
from experiments.language import Model
from tda import streams
from tda.attribution import influence
from tda.blocks import Trace
from tda.data import packing, retrieval, text
from tda.data.packing import Rows
from tda.data.text import Tokenizer
from tda.inverse.spectral import Response
from tda.likelihoods import Objective
from tda.report.page import Document, Ranking, Section

UNIT = (
  "Influence by EK-FAC, in nats: without a document of a positive score the"
  " completion, in bold, would be less likely, and without one of a negative"
  " score more. Its score is the sum of those of its tokens, each of them for"
  " being predicted from what stands before it."
)
END = "⟨end⟩"


class Fitted(NamedTuple):
  """What scores documents."""

  model: Model
  objective: Objective
  found: Trace
  inverse: Response


class Asked(NamedTuple):
  """The first queries, and the documents at the ends of their rankings.

  Notation: D documents, Q queries that are shown, K documents at either end.
  """

  task: Task
  scores: np.ndarray  # [D, Q]
  layers: np.ndarray  # [L, Q], or empty
  ends: np.ndarray  # [2, K, Q]: the highest and the lowest, from the end

  def documents(self) -> np.ndarray:
    """All of them, ascending."""
    return np.unique(self.ends)


def asked(
  setting: ConfigDict, task: Task, scores: np.ndarray, layers: np.ndarray
) -> Asked:
  """As many queries and documents as the setting shows."""
  scores = scores[:, : max(1, setting.shown)]
  k = min(setting.top, max(1, len(scores) // 2))
  ends = [retrieval.candidates(sign * scores, k) for sign in (1, -1)]
  layers = layers[:, : scores.shape[1]]
  return Asked(task, scores, layers, np.stack(ends))


def tokens(
  setting: ConfigDict, fit: Fitted, shown: Asked, packed: tuple[Rows, Rows]
) -> dict[str, np.ndarray]:
  """The scores of all tokens that are predicted in the shown documents.

  Returns:
    {"values" [S, Q], "sizes" [documents]}: those of the documents in turn. They
    add up to the scores of documents among all rows.
  """
  rows, queries = packed
  texts = [shown.task.texts[i] for i in shown.documents()]
  probes, sizes = alone(texts, fit.model.tokenizer, setting.length)
  score = influence.scorer(
    fit.found,
    fit.objective,
    query_batch=setting.query_batch,
    rank=setting.rank or None,
    shares="tokens",
  )
  mesh = language.mesh(setting)
  loop = streams.Loop(setting.batch_size, "tokens", mesh)
  few = jax.tree.map(lambda x: x[: shown.scores.shape[1]], queries)
  only = {"ekfac": fit.inverse}
  found = score(fit.model.params, probes, few, only, loop=loop)["ekfac"]
  scale = len(probes["x"]) / len(rows["x"])  # scores are of a mean over rows
  return {
    "values": scale * found.values[probes["mask"] > 0],
    "sizes": sizes,
  }


def alone(
  texts: Sequence[str], by: Tokenizer, length: int
) -> tuple[Rows, np.ndarray]:
  """Rows of one document each, its pieces in order, and how many are predicted.

  The tokens where a row's mask is 1 are those of the documents in turn.
  """
  encoded = text.encode(texts, by)
  rows = [packing.pack([x], length, seed=None) for x in encoded]
  return (
    {name: np.concatenate([part[name] for part in rows]) for name in rows[0]},
    np.array([len(x) - 1 for x in encoded]),
  )


def section(
  shown: Asked, by: Tokenizer, found: Mapping[str, np.ndarray]
) -> Section:
  """The rankings of the queries."""
  task, documents = shown.task, shown.documents()
  parts = np.split(found["values"], np.cumsum(found["sizes"])[:-1])
  values = dict(zip(documents.tolist(), parts, strict=True))
  words = {
    i: text.pieces([*by.encode(task.texts[i]), by.end], by) for i in values
  }

  def document(i: int, rank: int, q: int) -> Document:
    coloured = scored(words[i], values[i][:, q])
    score = float(shown.scores[i, q])
    return Document(rank, task.names[i], score, tokens=coloured)

  def ranking(q: int, prompt: str, answer: str) -> Ranking:
    highest, lowest = (end.tolist() for end in shown.ends[..., q])
    count = len(shown.scores)
    total = shown.layers[:, q].sum() if shown.layers.size else 0
    return Ranking(
      prompt,
      answer,
      [document(i, k + 1, q) for k, i in enumerate(highest)],
      [document(i, count - k, q) for k, i in enumerate(lowest)],
      (shown.layers[:, q] / total).tolist() if total else (),
    )

  pairs = task.pairs[: shown.scores.shape[1]]
  rankings = [ranking(q, *pair) for q, pair in enumerate(pairs)]
  return Section("Queries", [UNIT, *rankings])


def scored(words: list[str], values: np.ndarray) -> list[tuple[str, float]]:
  """Each word with its score; the first token is not predicted."""
  found, carried = [], 0.0
  for word, value in zip(words, (0.0, *values), strict=True):
    carried += float(value)
    if word:
      found.append((word, carried))
      carried = 0.0
  return [*found, (END, carried)]
