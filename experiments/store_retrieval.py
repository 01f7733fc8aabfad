"""What gradient stores of several libraries find: copies of planted facts.

A decoder as of `own_store.config` is trained on the documents of
`configs/planted_lm.py`, each of which is a row of its own in the stores. Every
library scores them by the methods that it has, with directions of its own, for
the completion of each fact's prompt; and with the directions that this one
drew, which shows whether its scores are the same. Damping is a tenth of the
mean eigenvalue of each layer in all of them. What is asked for by default is
LoGra here and in LogIX and the cosine in bergson, of which TrackStar without
the queries' mixture ranks documents as ℓ-RelatIF does.

With 16 directions, drawn twelve times (MRR of 192 copies among 672 documents, ±
one standard error of the draws):

|         | LoGra       | ℓ-RelatIF   | cosine      | dot         |
| tda     | .857 ± .006 | .870 ± .006 | .792 ± .008 | .603 ± .012 |
| bergson | .844 ± .005 | .860 ± .006 | .798 ± .010 | .625 ± .022 |
| LogIX   | .840 ± .005 | .872 ± .007 |             | .650 ± .013 |

By the same directions all scores correlate by 1.0000000, so that the
differences are those of the draws, and of what each library draws from. The
size of LogIX's entries goes by a layer's number of inputs: in its dot product
the first map of an MLP counts four times as much as the second.
"""

import tempfile
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
DRAWS = 12  # of directions


class Row(NamedTuple):
  """What one library finds by one method."""

  library: str
  method: str
  found: dict[str, list[float]]  # as of `ranking.means`, by draw
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
  folder.mkdir(parents=True, exist_ok=True)

  def scored(make, **options):
    with tempfile.TemporaryDirectory(dir=folder) as path:
      side = make(given, rows, path, batch=BATCH, **options)
      side.build()
      return side.scores(side.ask(queries)), side

  draws, copies = range(1 if smoke else DRAWS), task.copies()
  result = []
  for name, make in {"tda": own_store.Side, **peers}.items():
    several = [scored(make, draw=draw) for draw in draws]
    own = [scores for scores, _ in several]
    same = own[0]
    if name == "tda":
      ours, directions = same, several[0][1].directions()
    else:
      same, _ = scored(make, directions=directions)
    for method in same:
      alike = np.corrcoef(same[method].ravel(), ours[method].ravel())[0, 1]
      each = [ranking.means(x[method], copies) for x in own]
      found = {k: [x[k] for x in each] for k in each[0]}
      result.append(Row(name, method, found, float(alike)))
  return result


def table(rows: list[Row]) -> str:
  """The best first; ± one standard error over the draws."""
  names = list(rows[0].found)
  body = [
    [
      row.library,
      display(row.method),
      *(_mean(row.found[name]) for name in names),
      "" if row.library == "tda" else f"{row.same:.7f}",
    ]
    for row in sorted(rows, key=lambda row: -np.mean(row.found["MRR"]))
  ]
  header = ["library", "method", *names, "correlation with tda"]
  return tables.aligned(header, body, [False] * 2 + [True] * (len(names) + 1))


def _mean(values: list[float]) -> str:
  if len(values) == 1:
    return f"{values[0]:.3f}"
  error = np.std(values, ddof=1) / len(values) ** 0.5
  return f"{np.mean(values):.3f} ± {error:.3f}"
