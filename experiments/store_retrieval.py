"""What gradient stores of several libraries find: copies of planted facts.

A decoder as of `own_store.config` is trained on the documents of
`configs/planted_lm.py`, each of which is a row of its own in the stores. Every
library scores them by the methods that it has, with directions of its own, for
the completion of each fact's prompt; and with the directions that this one
drew, which shows whether its scores are the same. Damping is a tenth of the
mean eigenvalue of each layer in all of them. What is asked for by default is
LoGra here and in LogIX and the cosine in bergson, of which TrackStar without
the queries' mixture ranks documents as ℓ-RelatIF does.

With 16 directions (MRR of 192 copies among 672 documents):

|         | LoGra | ℓ-RelatIF | cosine | dot  |
| tda     | .897  | .851      | .781   | .539 |
| bergson | .838  | .835      | .762   | .636 |
| LogIX   | .828  | .863      |        | .631 |

By the same directions all scores correlate by 1.0000000, so that the
differences are those of one draw of directions each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs import planted_lm
from experiments import influence_page, influence_task, language, own_store
from experiments.own_store import Given
from tda.attribution import language as attribution
from tda.evaluation import ranking
from tda.models import training
from tda.report import tables
from tda.report.names import display

BATCH = 16


class Row(NamedTuple):
  """What one library finds by one method."""

  library: str
  method: str
  found: dict[str, float]  # as of `ranking.means`
  same: float  # correlation of all scores with tda's, by the same directions


def compared(
  peers: Mapping[str, Any], folder: Path, dimension: int, *, smoke: bool
) -> list[Row]:
  """Trains a model, stores its documents in every library, and asks."""
  setting = planted_lm.get_config("smoke" if smoke else "full")
  task = influence_task.asked(setting)
  by = language.tokenizer(setting)
  config = own_store.config(
    by.vocab,
    dimension,
    width=setting.width,
    layers=setting.layers,
    max_length=setting.length,
  )
  packed = language.packed(setting, by, task.texts, "documents")
  params, _ = training.train(config, language.recipe(setting), packed)
  given = Given(config, params, setting.sites, dimension)
  rows, _ = influence_page.alone(task.texts, by, setting.length)
  assert len(rows["x"]) == len(task.texts), "a document is longer than a row"
  queries = attribution.completions(task.pairs, by, setting.length)

  def scored(make, name, **options):
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    side = make(given, rows, path, batch=BATCH, **options)
    side.build()
    return side, side.scores(side.ask(queries))

  ours, scores = scored(own_store.Side, "tda")
  copies = task.copies()
  result = [
    Row("tda", method, ranking.means(x, copies), 1.0)
    for method, x in scores.items()
  ]
  for name, make in peers.items():
    _, own = scored(make, f"{name} own")
    _, same = scored(make, f"{name} same", directions=ours.directions())
    for method, x in own.items():
      alike = np.corrcoef(same[method].ravel(), scores[method].ravel())[0, 1]
      found = ranking.means(x, copies)
      result.append(Row(name, method, found, float(alike)))
  return result


def table(rows: list[Row]) -> str:
  """The best first."""
  names = list(rows[0].found)
  body = [
    [
      row.library,
      display(row.method),
      *(f"{row.found[name]:.3f}" for name in names),
      "" if row.library == "tda" else f"{row.same:.7f}",
    ]
    for row in sorted(rows, key=lambda row: -row.found["MRR"])
  ]
  header = ["library", "method", *names, "correlation with tda"]
  return tables.aligned(header, body, [False] * 2 + [True] * (len(names) + 1))
