"""Attribution in language models: queries in words, scores by document.

    rows = packing.pack(text.encode(texts, tokenizer), length)
    found = blocks.trace(objective.outputs, params, streams.example(rows),
                         select=decoder.SITES["mlp"])
    score = influence.scorer(found, objective, shares="segments")
    scores = score(params, rows, queries, {"ekfac": inverse})
    language.by_document(scores["ekfac"], rows)   # values [D, Q]

A query is a prompt and a completion, and its measurement −log p(completion |
prompt): a positive score says that the completion would be less likely without
the document (Grosse et al. 2023, §3, whose scores are of log p for adding it).

Notation: D documents, Q queries, N rows, P segments of a row, T positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tda.data import packing
from tda.data.packing import Rows
from tda.data.text import Tokenizer
from tda.likelihoods import Objective
from tda.scores import SIMILARITY, Scores

PyTree = Any


def completions(
  pairs: Sequence[tuple[str | Sequence[int], str | Sequence[int]]],
  tokenizer: Tokenizer,
  length: int | None = None,
) -> Rows:
  """Queries [Q, T] of which only the completion is measured.

  Args:
    pairs: a prompt and its completion, each as text or as token ids; a space
      between them belongs to one of the two.
    tokenizer: that of the model.
    length: T; that of the longest pair unless given.

  Raises:
    ValueError: no pairs, or one whose prompt or completion has no tokens, or
      that is longer than `length`, by its place.
  """
  if not pairs:
    raise ValueError("no queries: give a prompt and a completion, or more")
  ids = lambda said: tokenizer.encode(said) if isinstance(said, str) else said
  encoded = [(ids(prompt), ids(answer)) for prompt, answer in pairs]
  if length is None:
    length = max(len(prompt) + len(answer) for prompt, answer in encoded) - 1
  rows = []
  for i, (prompt, answer) in enumerate(encoded):
    try:
      rows.append(packing.completion(prompt, answer, length))
    except ValueError as error:
      raise ValueError(f"query {i}, {pairs[i]!r}: {error}") from error
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def contrastive(objective: Objective) -> Callable[[PyTree, PyTree], jax.Array]:
  """log p(other) − log p(wanted) as a measurement, of a pair of queries.

  Of queries {"wanted": rows, "other": rows}, for example of two completions of
  one prompt: what made the model prefer the first. What they have in common
  cancels.
  """

  def difference(params: PyTree, query: PyTree) -> jax.Array:
    wanted = objective.loss(params, query["wanted"])
    return wanted - objective.loss(params, query["other"])

  return difference


def by_document(
  scores: Scores, rows: Rows, documents: int | None = None
) -> Scores:
  """Scores [D, Q] of documents, from those of the segments of packed rows.

  Args:
    scores: by `influence.scorer` with shares="segments" [N, P, Q], or the
      self-influence of segments [N, P]. Those of a document that was cut into
      pieces are added.
    rows: that were scored.
    documents: D; the largest number in the rows and one unless given. One that
      is in no row has a score of 0.

  Raises:
    ValueError: scores of other rows, or not of segments; or cosines, relative
      scores or self-influence, which do not add up, of documents in pieces.
  """
  count = int(rows["segments"].max())
  if scores.shares != "segments" or scores.values.shape[:2] != (
    len(rows["segments"]),
    count,
  ):
    raise ValueError(
      f"scores of {scores.shares} {scores.values.shape}: of these rows are"
      f" wanted those of segments [{len(rows['segments'])}, {count}, ...]"
    )
  owners = owner(rows, count)
  found = owners[owners >= 0]
  last = int(found.max(initial=-1)) + 1
  documents = last if documents is None else documents
  if documents < last:
    raise ValueError(f"the rows hold document {last - 1}, and D={documents}")
  additive = scores.unit != SIMILARITY and scores.values.ndim > 2
  if not additive and (pieces := cut(rows)):
    raise ValueError(
      f"{scores.method} of {pieces} documents that are cut into pieces: it does"
      " not add up over them. Pack longer rows, or take the pieces as they are"
    )

  def joined(x: np.ndarray) -> np.ndarray:  # [N, ..., P, Q]
    x = np.moveaxis(x, -2, 1)
    total = np.zeros((documents, *x.shape[2:]), x.dtype)
    np.add.at(total, found, x[owners >= 0])
    return total

  if scores.values.ndim == 2:
    values = joined(scores.values[..., None])[..., 0]
    return scores._replace(values=values, shares="rows")
  sites = scores.by_site and {k: joined(x) for k, x in scores.by_site.items()}
  values = joined(scores.values)
  return scores._replace(values=values, by_site=sites, shares="rows")


def cut(rows: Rows) -> int:
  """How many documents are cut into pieces."""
  owners = owner(rows, int(rows["segments"].max()))
  return int((np.bincount(owners[owners >= 0]) > 1).sum())


def owner(rows: Rows, segments: int) -> np.ndarray:
  """Which document each segment of each row is of [N, P]; −1 for none."""
  segment_NxT, document_NxT = rows["segments"], rows["documents"]
  found = np.full((len(segment_NxT), segments), -1)
  row, place = np.nonzero(document_NxT >= 0)
  found[row, segment_NxT[row, place] - 1] = document_NxT[row, place]
  return found
