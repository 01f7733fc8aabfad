"""What `query` puts on the page of its run: documents by token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import influence_page, language
from experiments.store_task import Asked, Run
from tda import streams
from tda.attribution import influence, projected
from tda.data import text
from tda.models import decoder
from tda.report.page import Document, Ranking, Section
from tda.store import layout, search
from tda.store.search import Ends, Found, Lens

UNIT = (
  "Scores of projected gradients: without a document of a positive score the"
  " completion, in bold, would be less likely, and without one of a negative"
  " score more. The score of a document is the sum of those of its tokens, each"
  " for being predicted from what stands before it; one that was cut into"
  " pieces is shown whole at the score of each."
)


def section(
  run: Run,
  asked: Asked,
  lens: Lens,
  pairs: Sequence[tuple[str, str]],
  found: Ends,
) -> Section:
  """The rankings of the first queries."""
  count = len(pairs)
  rows = np.concatenate([x.rows[:count] for x in found[:2]], axis=None)
  rows = np.unique(rows[rows >= 0])
  named = lens.store.names
  names = [named[i] for i in rows]
  coloured = _tokens(run, asked, lens, count, rows, names)
  layers = _layers(lens, rows, count)

  def documents(end: Found, q: int, first: int, step: int) -> list[Document]:
    each = zip(end.scores[q].tolist(), end.rows[q], end.names[q], strict=True)
    return [
      Document(first + step * i, name, score, tokens=coloured[row][q])
      for i, (score, row, name) in enumerate(each)
      if row >= 0
    ]

  rankings = [
    Ranking(
      *pair,
      documents(found.top, q, 1, 1),
      documents(found.bottom, q, lens.store.rows, -1),
      layers[q],
    )
    for q, pair in enumerate(pairs)
  ]
  return Section("Queries", [UNIT, *rankings])


def _tokens(
  run: Run,
  asked: Asked,
  lens: Lens,
  count: int,
  rows: np.ndarray,
  names: Sequence[str],
) -> dict[int, list[list[tuple[str, float]]]]:
  """The tokens of each row with their scores, {row: of each query}.

  Of a document that was cut into pieces all rows show the whole of it.
  """
  by, log = run.corpus.tokenizer, asked.log
  known = dict(zip(run.task.names, run.task.texts, strict=True))
  texts = list(dict.fromkeys(names))
  probes, sizes = influence_page.alone(
    [known[name] for name in texts], by, run.setting.length
  )
  seen = layout.split(jnp.asarray(lens.directions[:count]), log.layout)
  fixed = projected.back(seen, log.sides)
  aim, params = decoder.objective(run.model.config), run.model.params
  found = language.traced(run.setting, run.model, run.corpus.rows)
  score = influence.scorer(
    found, aim, measurement=aim.loss, query_batch=count, shares="tokens"
  )
  few = jax.tree.map(lambda x: x[:count], asked.queries)
  loop = streams.Loop(run.setting.batch_size, "tokens")
  only = {"seen": lambda grads: fixed}
  values = score(params, probes, few, only, loop=loop)["seen"].values
  values = values[probes["mask"] > 0] * len(probes["x"])  # not of a mean
  parts = dict(zip(texts, np.split(values, np.cumsum(sizes)[:-1]), strict=True))
  weights = np.ones(lens.store.rows) if lens.weights is None else lens.weights
  result = {}
  for row, name in zip(rows.tolist(), names, strict=True):
    words = text.pieces([*by.encode(known[name]), by.end], by)
    scores = parts[name] * weights[row]
    result[row] = [influence_page.scored(words, x) for x in scores.T]
  return result


def _layers(lens: Lens, rows: np.ndarray, count: int) -> list[list[float]]:
  """Shares of the layers in what the rows' modules score, for each query."""
  modules = search.by_module(lens, rows.tolist())[:, :count]
  depths = [span.stack[0] for span in lens.store.layout if span.stack]
  if not depths:
    return [[] for _ in range(count)]
  total, first = np.zeros((len(rows), count, max(depths))), 0
  for span in lens.store.layout:
    own = modules[..., first : first + span.modules]
    first += span.modules
    if span.stack:
      each = own.reshape(*own.shape[:2], span.stack[0], -1).sum(axis=-1)
      total[..., : span.stack[0]] += each
  shares = np.abs(total).sum(axis=0)
  whole = shares.sum(axis=1, keepdims=True)
  return (shares / np.where(whole > 0, whole, 1)).tolist()
