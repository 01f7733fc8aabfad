"""Linear datamodelling score of every method, under the noise ceiling.

  python -m experiments.lds --config=configs/digits_mlp.py

Trains a model, attributes test queries to its training examples by every
method, retrains it on random subsets, and reports how well each method
predicts what retraining does. A finished stage is read from --workdir, an
interrupted one is taken up.
"""

import re
import time
from collections.abc import Mapping

import jax
import numpy as np
from absl import app

from experiments import launch, reports
from tda.evaluation import lds, problem, ranking, stages
from tda.evaluation.lds import Interval
from tda.evaluation.problem import Problem
from tda.evaluation.stages import Attribution
from tda.evaluation.workdir import Workdir
from tda.report import figures, names, tables

MAIN_FIGURE_QUERIES = 4
BASELINE = "ekfac"


def main(_) -> None:
  started = time.monotonic()
  setting = launch.setting()
  workdir = launch.workdir("lds", setting)
  task = problem.build(setting)
  rows = stages.attributed(task, workdir)
  bank = stages.retrained(task, workdir)

  predicted = {
    name: lds.predictions(row.scores, bank["weights"])
    for name, row in rows.items()
  }
  per_query = {k: lds.lds(bank["value"], x) for k, x in predicted.items()}
  key = task.key_for("bootstrap")
  intervals = {k: lds.bootstrap(x, key) for k, x in per_query.items()}
  # Repetitions of one run differ by nothing but what is left out.
  ceiling = 1.0
  if not setting.same_seed:
    ceiling = float(np.mean(lds.noise_ceiling(bank["value"])))
  with workdir.timed("figures"):
    _draw(task, workdir.path, rows, predicted, bank, intervals, ceiling)
  workdir.record("lds", {k: _numbers(x) for k, x in intervals.items()})
  workdir.record("noise_ceiling", ceiling)
  total = round(time.monotonic() - started, 1)
  workdir.record("seconds", {"total": total})
  table = [_row(k, rows[k], intervals[k]) for k in rows]
  workdir.say(tables.text(table, ceiling=ceiling))
  if task.relevant is not None:
    workdir.say(f"\n{_retrieved(task.relevant, rows, workdir)}")
  if "metasmoothness" in workdir.metrics():
    smoothness = workdir.metrics()["metasmoothness"]
    workdir.say(f"\nmetasmoothness {smoothness:.3f}")
  if setting.sweep_dampings:
    choices = _choices(task, rows, per_query)
    workdir.say(
      "\nDamping chosen on every other query, LDS of the remaining ones"
    )
    chosen = {x.name: lds.bootstrap(x.per_query, key) for x in choices}
    table = [_row(k, rows[k], x) for k, x in chosen.items()]
    workdir.say(tables.text(table, ceiling=ceiling))
    workdir.say(_differences(choices, rows, key))
  print(f"\n{total:.0f} seconds; figures and metrics.json in {workdir.path}")
  reports.write(workdir, __doc__)


def _draw(task: Problem, folder, rows, predicted, bank, intervals, ceiling):
  """LDS bars, predictions of a few queries, and what matters to them."""
  main = {k: _triple(intervals[k]) for k in task.setting.methods}
  figures.lds_bars(folder / "lds.png", main, ceiling=ceiling)
  best = max(main, key=lambda name: main[name][0])
  some = _spread_queries(bank["value"])
  figures.predicted_vs_actual(
    folder / "predicted_vs_actual.png",
    predicted[best][:, some],
    bank["value"].mean(axis=1)[:, some],
    [f"query {i}" for i in some],
    measurement=task.setting.measurement,
  )
  if task.dataset.image_shape is not None:
    names, train = task.dataset.class_names, task.dataset.train
    figures.influential_images(
      folder / "influential_images.png",
      task.queries["x"][some],
      train["x"],
      rows[best].scores[:, some],
      query_labels=[names[y] for y in task.queries["y"][some]],
      train_labels=[names[y] for y in train["y"]],
    )


def _retrieved(
  relevant: np.ndarray, rows: Mapping[str, Attribution], workdir: Workdir
) -> str:
  """How often each method finds the examples that are known to be right."""
  found = {k: ranking.means(row.scores, relevant) for k, row in rows.items()}
  workdir.record("retrieval", found)
  best = sorted(found.items(), key=lambda item: -item[1]["MRR"])
  body = [
    [
      names.display(_method(k)),
      rows[k].damping,
      *map("{:.3f}".format, v.values()),
    ]
    for k, v in best
  ]
  header = ["method", "damping", *next(iter(found.values()))]
  right = [False, False, *[True] * (len(header) - 2)]
  table = tables.aligned(header, body, right)
  return f"Examples that are known to be right, among all\n{table}"


def _choices(
  task: Problem,
  rows: Mapping[str, Attribution],
  per_query: Mapping[str, np.ndarray],
) -> list[lds.Choice]:
  """The best damping of each method and its labels."""
  grids: dict[tuple[str, str, int], dict[str, np.ndarray]] = {}
  for name, row in rows.items():
    group = _method(name), row.labels, row.models
    grids.setdefault(group, {})[name] = per_query[name]
  held_out = np.arange(len(task.queries["y"])) % 2 == 1
  return [lds.choose(grid, held_out) for grid in grids.values()]


def _differences(
  choices: list[lds.Choice], rows: Mapping[str, Attribution], key: jax.Array
) -> str:
  """What each gains over EK-FAC of as many models, paired by query."""
  body, title = [], ""
  for models in sorted({rows[x.name].models for x in choices}):
    same = [x for x in choices if rows[x.name].models == models]
    baselines = [x for x in same if _method(x.name) == BASELINE]
    if not baselines:
      continue
    best = max(baselines, key=lambda choice: choice.validation)
    title = f"LDS less that of EK-FAC with {rows[best.name].labels} labels"
    for choice in same:
      if choice is not best:
        gain = lds.bootstrap(choice.per_query - best.per_query, key)
        mean, low, high = _triple(gain)
        method, labels = _method(choice.name), rows[choice.name].labels
        gained = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        body.append((names.display(method), labels, str(models), gained))
  if not body:
    return ""
  header = ["method", "labels", "models", "gain"]
  return f"\n{title}, paired by query\n{tables.aligned(header, body)}"


def _spread_queries(value: np.ndarray) -> np.ndarray:
  """The queries on which the subsets disagree the most."""
  spread_Q = value.mean(axis=1).std(axis=0)
  return np.argsort(-spread_Q)[:MAIN_FIGURE_QUERIES]


def _triple(interval: Interval) -> tuple[float, float, float]:
  return float(interval.mean), float(interval.low), float(interval.high)


def _numbers(interval: Interval) -> Mapping[str, float]:
  return {k: float(x) for k, x in interval._asdict().items()}


def _row(name: str, row: Attribution, interval: Interval) -> tables.Row:
  return tables.Row(
    _method(name),
    *_triple(interval),
    labels=row.labels,
    damping=row.damping,
    note=row.note,
    models=row.models,
  )


def _method(name: str) -> str:
  return re.split("@|,| of ", name)[0]


if __name__ == "__main__":
  app.run(main)
