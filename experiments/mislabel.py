"""Which method finds wrong labels first? For every seed: flip, train, rank.

  python -m experiments.mislabel --config=configs/mislabel.py

Trains a network on noisy labels, and tunes adapters of another one, ranks the
training examples by every method and reports how many of the wrong labels are
found by how much inspection. Each seed of each subject is a stage of --workdir:
an interrupted run is taken up.

On two CPU cores, in 107 seconds, the AUC (0.9 is perfect, ± one standard error
over ten seeds) and the fraction found at 20 % inspected, at damping 0.1:

                        LoRA rank 4            trained
  loss                  0.893 ± 0.001  0.917   0.898 ± 0.001  0.953
  self ekfac            0.889 ± 0.001  0.883   0.893 ± 0.001  0.914
  self hyperinf         0.889 ± 0.001  0.884   0.892 ± 0.001  0.908
  self kfac             0.889 ± 0.001  0.883   0.893 ± 0.001  0.913
  self gradient         0.885 ± 0.002  0.862   0.891 ± 0.001  0.897
  EK-FAC                0.844 ± 0.004  0.853   0.847 ± 0.006  0.850
  K-FAC                 0.844 ± 0.005  0.853   0.847 ± 0.006  0.848
  LiSSA                 0.840 ± 0.005  0.871   0.829 ± 0.005  0.843
  HyperINF              0.833 ± 0.006  0.829   0.829 ± 0.007  0.834
  gradient cosine       0.645 ± 0.014  0.324   0.745 ± 0.019  0.510
  DataInf               0.621 ± 0.009  0.555   0.695 ± 0.020  0.651
  gradient dot product  0.610 ± 0.012  0.542   0.679 ± 0.021  0.628
  random                0.497 ± 0.005  0.189   0.495 ± 0.004  0.194

An example's own loss is the best of all here, and needs no gradient.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping

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
  "config", "configs/mislabel.py", "Config file; its fields are flags too."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/mislabel/CONFIG unless given."
)
INSPECTED = np.linspace(0, 1, 101)


def main(_) -> None:
  started = time.monotonic()
  setting = mislabel.from_config(_CONFIG.value.to_dict())
  path = _WORKDIR.value or str(pathlib.Path("workdir/mislabel", setting.name))
  workdir = Workdir(path, dataclasses.asdict(setting))
  results = {kind: ranked(setting, kind, workdir) for kind in setting.subjects}
  for kind, rows in results.items():
    workdir.say(f"\n{setting.title(kind)}; {accuracies(rows)}")
    workdir.say(table(setting, rows))
  draw(setting, results, workdir.path / "mislabel.png")
  total = round(time.monotonic() - started, 1)
  print(f"\n{total:.0f} seconds; figure in {workdir.path}")
  reports.write(workdir, __doc__)


def ranked(
  setting: Setting, kind: str, workdir: Workdir
) -> list[dict[str, np.ndarray]]:
  """For each seed the harm by method [N], "flipped" [N] and accuracies."""
  subject = mislabel.subject(setting, kind)
  run = selection.runner(setting, subject)
  outputs = jax.jit(jax.vmap(subject.objective.outputs, (None, 0)))

  def compute(seed):
    label = f"{kind}, seed {seed + 1} of {setting.seeds}"
    done = run(seed, loop=streams.Loop(512, label=label))
    draw, params, (harm, residual) = done.draw, done.params, done.ranks
    right = lambda d: np.mean(outputs(params, d).argmax(-1) == d["y"])
    return {
      **{f"harm {k}": x for k, x in harm.items()},
      **{f"residual {k}": np.float32(x) for k, x in residual.items()},
      "flipped": draw.flipped,
      "train accuracy": right(draw.train),
      "test accuracy": right(draw.test),
    }

  return [
    workdir.stage(f"{kind}_{seed}", functools.partial(compute, seed))
    for seed in range(setting.seeds)
  ]


def found(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Curves [seeds, N + 1] of every method and damping."""
  flipped = jnp.stack([row["flipped"] for row in rows])
  run = jax.jit(jax.vmap(mislabel.curve))
  names = [k.removeprefix("harm ") for k in rows[0] if k.startswith("harm ")]
  harm = lambda name: jnp.stack([row[f"harm {name}"] for row in rows])
  return {name: np.asarray(run(harm(name), flipped)) for name in names}


def chosen(areas: Mapping[str, np.ndarray], method: str) -> np.ndarray:
  """AUC [seeds] at the damping that is best for the mean of the others."""
  mine = np.stack(
    [x for k, x in areas.items() if k.partition("@")[0] == method]
  )
  others = mine.sum(axis=1, keepdims=True) - mine
  return mine[others.argmax(axis=0), np.arange(mine.shape[1])]


def table(setting: Setting, rows: list[dict[str, np.ndarray]]) -> str:
  """A row per method, best at equal damping first."""
  all_curves = found(rows)
  areas = {
    k: np.asarray(jax.vmap(mislabel.auc)(x)) for k, x in all_curves.items()
  }
  lines = []
  for method in setting.methods:
    name = method if method in areas else f"{method}@{setting.damping:g}"
    early = jax.vmap(lambda c: mislabel.at(c, 0.2))(all_curves[name])
    grid = {k: x for k, x in areas.items() if k.startswith(f"{method}@")}
    best = (
      max(grid, key=lambda k: grid[k].mean()).partition("@")[2] if grid else ""
    )
    picked = _number(chosen(areas, method)) if grid else ""
    known = [row[k] for row in rows if (k := f"residual {name}") in row]
    residual = f"{np.max(known):.1e}" if known else ""
    order = float(areas[name].mean())
    cells = [_number(areas[name]), _number(early), picked, best, residual]
    lines.append((order, [display(method), *cells]))
  header = [
    "method",
    f"AUC, damping {setting.damping:g}",
    "found at 20 %",
    "AUC, damping chosen",
    "best",
    "residual",
  ]
  body = [cells for _, cells in sorted(lines, reverse=True)]
  return tables.aligned(header, body)


def draw(setting: Setting, results, path: pathlib.Path) -> None:
  """Fraction found against fraction inspected, at equal damping."""
  panels, references = {}, {}
  for kind, rows in results.items():
    bands = {}
    for name, lines in found(rows).items():
      method, _, damping = name.partition("@")
      if damping and float(damping) != setting.damping:
        continue
      at = jax.vmap(lambda c: mislabel.at(c, INSPECTED))(lines)
      bands[method] = mislabel.over_seeds(np.asarray(at))
    panels[setting.title(kind)] = bands
    perfect = np.minimum(INSPECTED / setting.noise, 1)
    references[setting.title(kind)] = {"perfect": perfect}
  curves.panels(
    path,
    INSPECTED,
    panels,
    xlabel="training examples inspected",
    ylabel="wrong labels found",
    references=references,
  )


def accuracies(rows: list[dict[str, np.ndarray]]) -> str:
  parts = (
    f"{part} {np.mean([row[f'{part} accuracy'] for row in rows]):.1%}"
    for part in ("train", "test")
  )
  return "accuracy: " + ", ".join(parts)


def _number(x) -> str:
  mean, error = mislabel.over_seeds(np.asarray(x))
  return f"{mean:.3f} ± {error:.3f}"


if __name__ == "__main__":
  app.run(main)
