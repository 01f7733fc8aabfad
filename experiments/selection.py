"""Is a model better for being trained on what a method chose? Less is kept.

  python -m experiments.selection --config=configs/selection.py

Ranks the training examples of a model by their influence on the mean validation
gradient, keeps 5, 20 and 40 % of them, trains anew on what is kept from the
same start, and compares accuracy and loss on test data with a random choice and
with all of the data. Each seed is a stage of --workdir: an interrupted run is
taken up.

On two shared CPU cores in nine minutes (two runs, the first interrupted) it
printed (digits, ten seeds, test accuracy of LoRA of rank 4; all of the data:
0.930 ± 0.018):

                        5 % kept        20 % kept       40 % kept
  random                0.649 ± 0.028   0.848 ± 0.020   0.883 ± 0.022
  loss                  0.500 ± 0.037   0.720 ± 0.036   0.856 ± 0.028
  EK-FAC                0.463 ± 0.038   0.671 ± 0.035   0.800 ± 0.030
  LiSSA                 0.453 ± 0.039   0.665 ± 0.032   0.858 ± 0.029
  HyperINF              0.414 ± 0.047   0.669 ± 0.028   0.792 ± 0.021
  gradient dot product  0.318 ± 0.049   0.484 ± 0.057   0.577 ± 0.051
  DataInf               0.317 ± 0.046   0.435 ± 0.050   0.563 ± 0.040

No choice by score beats a random one here.
"""

import dataclasses
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from experiments import reports
from tda import streams
from tda.evaluation import mislabel, selection
from tda.evaluation.mislabel import Setting
from tda.evaluation.workdir import Workdir
from tda.report import curves, tables
from tda.report.names import display

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/selection.py", "Config file; its fields are flags too."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/selection/CONFIG unless given."
)
Results = dict[str, np.ndarray]  # "accuracy METHOD" [1 + fractions], ...


def main(_) -> None:
  started = time.monotonic()
  setting = mislabel.from_config(_CONFIG.value.to_dict())
  path = _WORKDIR.value or str(pathlib.Path("workdir/selection", setting.name))
  workdir = Workdir(path, dataclasses.asdict(setting))
  results = {
    kind: selected(setting, kind, workdir) for kind in setting.subjects
  }
  for kind, rows in results.items():
    for measure in ("accuracy", "loss"):
      workdir.say(f"\n{setting.title(kind)}: {measure} on test data")
      workdir.say(table(setting, rows, measure))
  draw(setting, results, workdir.path / "selection.png")
  total = round(time.monotonic() - started, 1)
  print(f"\n{total:.0f} seconds; figure in {workdir.path}")
  reports.write(workdir, __doc__)


def selected(setting: Setting, kind: str, workdir: Workdir) -> list[Results]:
  """For each seed test accuracies and losses by method [fractions], of all the
  data ("full") and of the start ("none")."""
  whole = mislabel.subject(setting, kind)
  run = selection.runner(setting, whole)
  n = setting.train_size if kind == "full" else setting.tune_size
  sizes = {f: selection.count(n, f) for f in setting.fractions}
  fits = {
    f: jax.jit(jax.vmap(fit, (None, 0, None, None)))
    for f, size in sizes.items()
    for fit in (mislabel.subject(setting, kind, size=size).fit,)
  }

  @jax.jit
  def measure(params, data):
    outputs = jax.vmap(whole.objective.outputs, (None, 0))(params, data)
    loss = jax.vmap(whole.objective.loss, (None, 0))(params, data)
    return (outputs.argmax(-1) == data["y"]).mean(), loss.mean()

  def compute(seed):
    label = f"{kind}, seed {seed + 1} of {setting.seeds}"
    done = run(seed, loop=streams.Loop(512, label=label))
    harms = {k.partition("@")[0]: x for k, x in done.ranks.harm.items()}
    found: Results = {}
    columns = []
    for fraction, fit in fits.items():
      weights = [
        selection.keep(jnp.asarray(x), fraction) for x in harms.values()
      ]
      params = fit(done.draw.train, jnp.stack(weights), done.base, done.key)
      columns.append(jax.vmap(measure, (0, None))(params, done.draw.test))
    all_weights = jnp.ones(n)
    params = whole.fit(done.draw.train, all_weights, done.base, done.key)
    full = measure(params, done.draw.test)
    for place, name in enumerate(("accuracy", "loss")):
      parts = np.stack([column[place] for column in columns], axis=1)
      found |= {f"{name} {k}": x for k, x in zip(harms, parts, strict=True)}
      found[f"{name} full"] = np.full(len(fits), full[place])
    return found

  return [
    workdir.stage(f"{kind}_{seed}", functools.partial(compute, seed))
    for seed in range(setting.seeds)
  ]


def table(setting: Setting, rows: list[Results], measure: str) -> str:
  """A row per method, the best at the smallest fraction first."""
  lines = []
  for method in (*setting.methods, "full"):
    mean, error = _over_seeds(rows, f"{measure} {method}")
    pairs = zip(mean, error, strict=True)
    cells = [f"{m:.3f} ± {e:.3f}" for m, e in pairs]
    lines.append((float(mean[0]), [display(method), *cells]))
  header = ["method", *(f"{f:.0%} kept" for f in setting.fractions)]
  lines.sort(reverse=measure == "accuracy", key=lambda line: line[0])
  body = [cells for _, cells in lines]
  return tables.aligned(header, body)


def draw(setting: Setting, results, path: pathlib.Path) -> None:
  panels, references = {}, {}
  for kind, rows in results.items():
    panels[setting.title(kind)] = {
      method: _over_seeds(rows, f"accuracy {method}")
      for method in setting.methods
    }
    mean, _ = _over_seeds(rows, "accuracy full")
    references[setting.title(kind)] = {"all of the data": mean}
  curves.panels(
    path,
    setting.fractions,
    panels,
    xlabel="training examples kept",
    ylabel="test accuracy",
    references=references,
  )


def _over_seeds(
  rows: list[Results], name: str
) -> tuple[np.ndarray, np.ndarray]:
  return mislabel.over_seeds(np.stack([row[name] for row in rows]))


if __name__ == "__main__":
  app.run(main)
