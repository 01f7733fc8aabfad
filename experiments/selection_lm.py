"""Does a language model learn a kind of text better from what LESS chooses?

  python -m experiments.selection_lm --config=configs/selection_lm.py \
    --config.documents=corpora --config.tokenizer=corpora

A model is warmed up with Adam on a random share of a corpus of several kinds,
which are its folders. At some checkpoints of that run the projected updates
that Adam would make of every document are stored, and their cosines with the
mean gradient of a few documents of one kind, times the learning rate, are
added up: LESS (Xia et al. 2024). The last checkpoint is trained on with the
documents that score highest, for as many steps whatever their number, and
asked for other documents of that kind, and of the other kinds. Each kind is the
target once. Beside LESS choose: cosines and products with plain gradients from
such stores, BM25 by the words of the same few documents, chance, and an oracle
that draws from the target kind alone.

Departures from the paper: the model that is trained on is the warmed-up one
instead of the one before, which here knows nothing; no adapters; directions are
those of a store, of both sides of every matrix.
"""

import functools
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from experiments import influence_kinds, language, reports, selection_task
from experiments.selection_task import METHODS, REFERENCES
from tda import records
from tda.data import text
from tda.evaluation import mislabel
from tda.evaluation.workdir import Arrays, Workdir
from tda.report import curves, tables
from tda.report.names import display

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/selection_lm.py", "Config file; its fields are flags too."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/selection_lm/CONFIG unless given."
)


def main(_) -> None:
  started = time.monotonic()
  setting = _CONFIG.value
  path = language.begun("selection_lm", setting, _WORKDIR.value)
  if not setting.documents:
    raise ValueError("no documents: give --config.documents, a folder of kinds")
  texts = text.documents(setting.documents, setting.pattern)
  data = records.digest({k: np.array(x) for k, x in texts.items()})
  workdir = Workdir(path, setting.to_dict() | {"data": data})
  tokenizer = language.tokenizer(setting)
  draw = functools.partial(selection_task.split, setting, texts, tokenizer)
  subject = selection_task.subject(setting, draw(setting.seed), tokenizer)
  compute = lambda seed: selection_task.compared(
    setting, subject, draw(seed), seed, workdir
  )
  rows = [
    workdir.stage(f"seed_{seed}", functools.partial(compute, seed))
    for seed in range(setting.seed, setting.seed + setting.seeds)
  ]
  kinds = sorted({influence_kinds.of(name) for name in texts})
  show(setting, kinds, rows, workdir)
  figure(setting, kinds, rows, workdir.path / "selection_lm.png")
  print(f"\n{time.monotonic() - started:.0f} seconds; figure in {path}")
  reports.write(workdir, __doc__)


def of_target(rows: Sequence[Arrays], method: str) -> np.ndarray:
  """Losses on the target kind itself [seeds, F, T]."""
  return np.stack([np.diagonal(x[method], axis1=1, axis2=2) for x in rows])


def gained(rows: Sequence[Arrays], method: str) -> np.ndarray:
  """The same less those of a random choice."""
  return of_target(rows, method) - of_target(rows, "random")


def elsewhere(rows: Sequence[Arrays], method: str) -> np.ndarray:
  """What is gained on the mean of the other kinds."""
  change = np.stack([x[method] - x["random"] for x in rows])
  return (change.sum(axis=3) - gained(rows, method)) / (change.shape[3] - 1)


def show(
  setting: ConfigDict,
  kinds: Sequence[str],
  rows: Sequence[Arrays],
  workdir: Workdir,
) -> None:
  every = (*METHODS, *REFERENCES)
  sizes = [f"{fraction:.0%}" for fraction in setting.fractions]
  over = lambda values: values.mean(axis=2)
  smallest = f"at {sizes[0]} by target, less a random choice's"
  shares = {x: np.stack([row[f"share {x}"] for row in rows]) for x in METHODS}
  for title, header, values in (
    (
      "loss of the target kind",
      sizes,
      {x: over(of_target(rows, x)) for x in every},
    ),
    (
      "the same less a random choice's",
      sizes,
      {x: over(gained(rows, x)) for x in every},
    ),
    (smallest, kinds, {x: gained(rows, x)[:, 0] for x in every}),
    (
      "loss of the other kinds less a random choice's",
      sizes,
      {x: over(elsewhere(rows, x)) for x in every},
    ),
    (
      "share of the target kind in what is chosen",
      sizes,
      {x: over(shares[x]) for x in METHODS},
    ),
  ):
    workdir.say(f"\n{title}\n{table(header, values)}")
    workdir.record(title, {k: x.tolist() for k, x in values.items()})


def table(header: Sequence[str], values: dict[str, np.ndarray]) -> str:
  """Means over seeds of values [seeds, columns] with their standard errors."""
  lines = []
  for name, x in sorted(values.items(), key=lambda item: item[1][:, 0].mean()):
    pairs = zip(*mislabel.over_seeds(x), strict=True)
    lines.append([display(name), *(f"{m:z.3f} ± {e:.3f}" for m, e in pairs)])
  right = [False, *[True] * len(header)]
  return tables.aligned(["method", *header], lines, right)


def figure(
  setting: ConfigDict,
  kinds: Sequence[str],
  rows: Sequence[Arrays],
  path: pathlib.Path,
) -> None:
  found = {
    x: mislabel.over_seeds(gained(rows, x)) for x in (*METHODS, *REFERENCES)
  }
  at = lambda name, i: tuple(part[:, i] for part in found[name])
  curves.panels(
    path,
    setting.fractions,
    {kind: {x: at(x, i) for x in METHODS} for i, kind in enumerate(kinds)},
    xlabel="documents chosen",
    ylabel="loss of the kind, less a random choice's",
    references={
      kind: {display(x): at(x, i)[0] for x in REFERENCES}
      for i, kind in enumerate(kinds)
    },
    percent=False,
  )


if __name__ == "__main__":
  app.run(main)
