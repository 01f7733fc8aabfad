"""Removal curves: what happens to a query when its top examples are removed.

  python -m experiments.counterfactual --config=configs/digits_mlp.py

For each query and method the k examples whose removal is predicted to hurt the
most are removed, the model is retrained, and the query's loss and prediction
are compared with those of the full data. Removing at random, and at random
within the query's class, are the controls; where it is known which examples are
right, those are.
"""

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from experiments import launch, reports
from tda.evaluation import problem, removal, stages
from tda.evaluation.problem import Problem
from tda.evaluation.removal import Summary
from tda.evaluation.workdir import Workdir
from tda.report import figures, tables


def main(_) -> None:
  started = time.monotonic()
  setting = launch.setting()
  workdir = launch.workdir("counterfactual", setting)
  count = min(setting.removal_queries, setting.num_queries)
  only = dataclasses.replace(
    setting, num_queries=count, sweep_labels=(), sweep_dampings=()
  )
  task = problem.build(only)
  rows = stages.attributed(task, workdir)
  rankings = {name: row.scores for name, row in rows.items()}
  rankings |= controls(task)
  curves = {
    name: removed(task, name, scores, workdir)
    for name, scores in rankings.items()
  }
  with workdir.timed("figures"):
    figures.removal_curves(
      workdir.path / "removal.png",
      setting.removal_ks,
      {name: summary.change for name, summary in curves.items()},
      {name: s.flipped for name, s in curves.items() if s.flipped},
    )
  workdir.record("removal", {k: _numbers(s) for k, s in curves.items()})
  total = round(time.monotonic() - started, 1)
  workdir.record("seconds", {"total": total})
  workdir.say(tables.removal(curves, measurement=setting.measurement))
  print(f"\n{total:.0f} seconds; figures and metrics.json in {workdir.path}")
  reports.write(workdir, __doc__)


def controls(task: Problem) -> dict[str, np.ndarray]:
  """Rankings that know nothing, the class, or which examples are right."""
  n, queries = len(task.dataset.train["y"]), len(task.queries["y"])
  key = task.key_for("controls")
  found = {"random": removal.random_ranking(key, n, queries)}
  if task.dataset.num_classes:
    found["same class"] = removal.same_class_ranking(
      key, jnp.asarray(task.dataset.train["y"]), jnp.asarray(task.queries["y"])
    )
  if task.relevant is not None:
    found["known"] = jnp.asarray(task.relevant) + found["random"]
  return {name: np.asarray(x) for name, x in found.items()}


def removed(
  task: Problem, name: str, scores: np.ndarray, workdir: Workdir
) -> Summary:
  """Retrains without the top examples of every query."""
  setting = task.setting
  keys = jax.random.split(task.key_for("removal"), setting.removal_seeds)
  if setting.same_seed:
    keys = task.run_key()[None]
  slug = re.sub("[^a-z0-9.]+", "_", name)

  def compute():
    return removal.curve(
      task.train,
      task.measure,
      scores,
      setting.removal_ks,
      keys,
      directory=workdir.folder(f"removal_{slug}_parts"),
      label=f"remove by {name}",
    )

  measured = workdir.stage(f"removal_{slug}", compute)
  counted = task.dataset.kind != "regression"
  right = measured["correct"] if counted else None
  key = task.key_for("bootstrap")
  return removal.summarise(
    measured["value"], setting.removal_ks, key, correct=right
  )


def _numbers(summary: Summary) -> dict:
  parts = {"ks": summary.ks.tolist(), "eligible": summary.eligible}
  for name in ("change", "flipped"):
    interval = getattr(summary, name)
    if interval is not None:
      parts[name] = {k: v.tolist() for k, v in interval._asdict().items()}
  return parts


if __name__ == "__main__":
  app.run(main)
