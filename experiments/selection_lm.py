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
instead of the one before, which here knows nothing; there are no adapters, and
directions are those of a store, of both sides of every matrix. Each seed is a
stage of --workdir: an interrupted run is taken up, and more seeds may be added.

On two CPU cores shared with other jobs in 56 minutes (315 seconds for the last
of three seeds, when the cores were almost free) it printed, for 1,600
candidates of five kinds cut by the command of the config, 163 k parameters and
one epoch of 320 documents: the loss of the target kind less that after a random
choice (4.431, 4.402 and 4.390 nats per token), ± one standard error over three
seeds and five targets (five of the pairs share a run); and how much of the
choice is of the target kind.

                        5 % chosen         10 %               20 %
  own kind              -.174 ± .011 1.00  -.169 ± .010 1.00  -.163 ± .009 1.00
  BM25                  -.175 ± .010  .96  -.167 ± .010  .92  -.148 ± .010  .80
  LESS                  -.168 ± .010  .96  -.157 ± .010  .90  -.129 ± .009  .72
  gradient cosine       -.169 ± .010  .95  -.156 ± .010  .89  -.124 ± .009  .70
  gradient dot product  -.152 ± .011  .90  -.143 ± .011  .84  -.115 ± .010  .68
  no training           -.003 ± .007        .027 ± .005        .038 ± .004
  all documents         -.209 ± .008       -.180 ± .006       -.168 ± .007

LESS finds the target kind, but words find it as well: its loss less that of
BM25's choice is .008 ± .006, .010 ± .002 and .019 ± .002 over seeds, and
cosines of plain gradients are within .005 of it. All documents, in five times
as many steps, are better still. After LESS's choice the other kinds are .14 to
.09 worse than after a random one.
"""

import functools
import pathlib
import time
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from experiments import language, reports, selection_task
from experiments.selection_task import METHODS, REFERENCES
from tda import records
from tda.data import text
from tda.evaluation import mislabel
from tda.evaluation.workdir import Arrays, Workdir
from tda.models import decoder
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
  by = language.tokenizer(setting)
  draw = functools.partial(selection_task.split, setting, texts, by)
  first = draw(setting.seed)
  said = {k: np.array(x) for k, x in texts.items()}
  fixed = {k: v for k, v in setting.to_dict().items() if k != "seeds"}
  data = records.digest([said, first.train])  # the latter by the tokenizer
  workdir = Workdir(path, fixed | {"data": data})
  config = language.decoder_config(setting, by.vocab)
  tokens = jnp.zeros(1, jnp.int32)
  subject = selection_task.subject(
    setting,
    first,
    decoder.objective(config, "mean"),
    lambda key: decoder.Decoder(config).init(key, tokens)["params"],
  )
  compute = lambda seed: selection_task.compared(
    setting, subject, draw(seed), seed, workdir
  )
  rows = [
    workdir.stage(f"seed_{seed}", functools.partial(compute, seed))
    for seed in range(setting.seed, setting.seed + setting.seeds)
  ]
  show(setting, first.kinds, rows, workdir)
  figure(setting, first.kinds, rows, workdir.path / "selection_lm.png")
  print(f"\n{time.monotonic() - started:.0f} seconds; figure in {path}")
  reports.write(workdir, __doc__)


def of_target(rows: Sequence[Arrays], name: str) -> np.ndarray:
  """Losses of the target kind itself [seeds, F, T]."""
  return np.stack([np.diagonal(row[name], axis1=1, axis2=2) for row in rows])


def gained(
  rows: Sequence[Arrays], name: str, other: str = "random"
) -> np.ndarray:
  """The same less those of another choice."""
  return of_target(rows, name) - of_target(rows, other)


def elsewhere(rows: Sequence[Arrays], name: str) -> np.ndarray:
  """Losses of the mean of the other kinds, less those of a random choice."""
  change = np.stack([row[name] - row["random"] for row in rows])
  return (change.sum(axis=3) - gained(rows, name)) / (change.shape[3] - 1)


def show(
  setting: ConfigDict,
  kinds: Sequence[str],
  rows: Sequence[Arrays],
  workdir: Workdir,
) -> None:
  sizes = [f"{fraction:.0%}" for fraction in setting.fractions]
  every = (*METHODS, *REFERENCES)

  def say(title, header, of, names=every):
    values = {name: of(name) for name in names}
    workdir.say(f"\n{title}\n{table(header, values)}")
    workdir.record(title, {name: x.tolist() for name, x in values.items()})

  def by_size(title, of, names=every):
    flat = lambda name: np.swapaxes(of(name), 1, 2).reshape(-1, len(sizes))
    say(title, sizes, flat, names)

  by_size("loss of the target kind", lambda x: of_target(rows, x))
  by_size("less a random choice's", lambda x: gained(rows, x))
  by_size("less the choice's of BM25", lambda x: gained(rows, x, "bm25"))
  for i, size in enumerate(sizes):
    title = f"less a random choice's, {size} by target"
    say(title, kinds, lambda x, i=i: gained(rows, x)[:, i])
  title = "loss of the other kinds, less a random choice's"
  by_size(title, lambda x: elsewhere(rows, x))
  share = lambda x: np.stack([row[f"share {x}"] for row in rows])
  by_size("share of the target kind in what is chosen", share, METHODS)


def table(header: Sequence[str], values: dict[str, np.ndarray]) -> str:
  """Means over repetitions of values [R, columns], with standard errors."""
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
  def bands(names, i):
    """Means and standard errors by method, of the target i."""
    return {x: mislabel.over_seeds(gained(rows, x)[:, :, i]) for x in names}

  curves.panels(
    path,
    setting.fractions,
    {kind: bands(METHODS, i) for i, kind in enumerate(kinds)},
    xlabel="documents chosen",
    ylabel="loss of the kind, less a random choice's",
    references={
      kind: {display(x): mean for x, (mean, _) in bands(REFERENCES, i).items()}
      for i, kind in enumerate(kinds)
    },
    percent=False,
  )


if __name__ == "__main__":
  app.run(main)
