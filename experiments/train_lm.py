"""A small language model on packed documents.

  python -m experiments.train_lm --config=configs/stdlib_lm.py

Trains a decoder, reports bits per byte on held-out documents, and writes it to
WORKDIR/model as Hugging Face would. A run that was stopped goes on.
"""

import jax
from absl import app, flags
from ml_collections import config_flags

from experiments import language, reports
from tda import meshes
from tda.data import packing
from tda.evaluation.workdir import Workdir
from tda.models import pretrained
from tda.report import losses as loss_figures
from tda.report import tables

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/stdlib_lm.py", "Config file; its fields are flags too."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/train_lm/CONFIG unless given."
)


def main(_) -> None:
  setting = _CONFIG.value
  path = language.begun("train_lm", setting, _WORKDIR.value)
  workdir = Workdir(path, setting.to_dict())

  tokenizer = language.tokenizer(setting)
  texts, others = language.split(setting)
  rows = language.packed(setting, tokenizer, texts, "documents")
  model = language.train(setting, workdir, tokenizer, rows)
  last = model.losses[-max(1, setting.steps // 20) :]
  results = {
    "documents": len(texts),
    "rows": len(rows["x"]),
    "filled": packing.filled(rows),
    "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
    "train_loss": float(last.mean()),
    **language.held_out(setting, model, others),
  }
  for name, value in results.items():
    workdir.record(name, value)
  body = [[name, f"{value:.6g}"] for name, value in results.items()]
  workdir.say(tables.aligned(["result", "value"], body))
  figure = workdir.path / "loss.png"
  loss_figures.curve(figure, model.losses, results["held_out_loss"])
  whole = jax.tree.map(meshes.fetch, model.params)
  pretrained.save(workdir.path / "model", setting.family, model.config, whole)
  reports.write(workdir, __doc__)


if __name__ == "__main__":
  app.run(main)
