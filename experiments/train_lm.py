"""A small language model on packed documents.

  python -m experiments.train_lm --config=configs/stdlib_lm.py

Trains a decoder, reports bits per byte on held-out documents, and writes it to
WORKDIR/model as Hugging Face would. A run that was stopped goes on.
"""

import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from tda import meshes, streams
from tda.data import packing, text
from tda.data.packing import Rows
from tda.data.text import Tokenizer
from tda.evaluation.workdir import Workdir
from tda.models import config as configs
from tda.models import pretrained, training
from tda.models.config import DecoderConfig
from tda.models.training import Recipe
from tda.report import losses as loss_figures

_CONFIG = config_flags.DEFINE_config_file(
  "config", "configs/stdlib_lm.py", "Config file; its fields are flags too."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where results go; workdir/train_lm/CONFIG unless given."
)


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # checkpoints report every step
  setting = _CONFIG.value
  path = _WORKDIR.value or str(pathlib.Path("workdir/train_lm", setting.name))
  workdir = Workdir(path, setting.to_dict())
  devices = jax.device_count()
  print(f"{devices} {jax.default_backend()} device(s); results in {path}")
  mesh = meshes.mesh(model=setting.model_axis) if devices > 1 else None

  tokenizer = text.tokenizer(setting.tokenizer)
  texts, held_out = split(setting)
  rows = packed(setting, tokenizer, texts, "documents")
  config = decoder_config(setting, tokenizer.vocab)
  with workdir.timed("train"):
    params, losses = training.train(
      config,
      recipe(setting),
      rows,
      mesh=mesh,
      directory=workdir.folder("checkpoints"),
      label="train",
    )
  others = packed(setting, tokenizer, held_out, "held-out documents")
  loop = streams.Loop(setting.batch_size, "held out", mesh)
  total = training.surprisal(config, params, others, loop)
  size = sum(len(document.encode()) for document in held_out)
  results = {
    "documents": len(texts),
    "rows": len(rows["x"]),
    "filled": packing.filled(rows),
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "train_loss": float(losses[-max(1, setting.steps // 20) :].mean()),
    "held_out_loss": total / int(others["mask"].sum()),
    "held_out_bits_per_byte": total / math.log(2) / size,
  }
  for name, value in results.items():
    workdir.record(name, value)
    print(f"{name:24} {value:.6g}")
  figure = workdir.path / "loss.png"
  loss_figures.curve(figure, losses, results["held_out_loss"])
  whole = jax.tree.map(meshes.fetch, params)
  pretrained.save(workdir.path / "model", setting.family, config, whole)


def split(setting: ConfigDict) -> tuple[list[str], list[str]]:
  """Texts to train on, and others."""
  texts = text.documents(setting.documents, setting.pattern)
  order = np.random.default_rng(setting.seed).permutation(len(texts))
  held = max(1, round(setting.held_out * len(texts)))
  if held >= len(texts):
    raise ValueError(f"{len(texts)} documents are too few to hold some out")
  return [texts[i] for i in order[held:]], [texts[i] for i in order[:held]]


def packed(
  setting: ConfigDict, tokenizer: Tokenizer, texts: Sequence[str], label: str
) -> Rows:
  return packing.pack(
    text.encode(texts, tokenizer, label=label),
    setting.length,
    seed=setting.seed,
    vocab=tokenizer.vocab,
  )


def decoder_config(setting: ConfigDict, vocab: int) -> DecoderConfig:
  fields = {
    "width": setting.width,
    "layers": setting.layers,
    "heads": setting.heads,
    "mlp_width": setting.mlp_width,
    "max_length": setting.length,
    "dtype": jnp.dtype(setting.dtype),
    "remat": setting.remat,
  }
  optional = {"kv_heads": setting.kv_heads, "experts": setting.experts}
  fields.update({name: value for name, value in optional.items() if value})
  return configs.like(setting.family, vocab, **fields)


def recipe(setting: ConfigDict) -> Recipe:
  return Recipe(
    setting.steps,
    setting.batch_size,
    learning_rate=setting.learning_rate,
    warmup=setting.warmup,
    weight_decay=setting.weight_decay,
    seed=setting.seed,
  )


if __name__ == "__main__":
  app.run(main)
