"""What the binaries on language models share: corpus, rows, model."""

import math
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from tda import blocks, meshes, records, streams
from tda.blocks import Trace
from tda.data import facts, packing, text
from tda.data.facts import Planted
from tda.data.packing import Rows
from tda.data.text import Tokenizer
from tda.evaluation.workdir import Workdir
from tda.models import config as configs
from tda.models import decoder, gguf, pretrained, training
from tda.models.config import DecoderConfig
from tda.models.training import Recipe

PyTree = Any


class Model(NamedTuple):
  """A decoder, and what it is trained on and tested on."""

  config: DecoderConfig
  params: PyTree
  tokenizer: Tokenizer
  losses: np.ndarray  # of training here; empty where it was loaded


def planted(setting: ConfigDict) -> Planted:
  """The made-up facts of a setting."""
  return facts.planted(
    setting.facts,
    setting.seed,
    copies=setting.copies,
    paraphrases=setting.paraphrases,
    reversals=setting.reversals,
    distractors=setting.distractors,
  )


def split(setting: ConfigDict) -> tuple[list[str], list[str]]:
  """Texts to train on, and others."""
  texts = list(text.documents(setting.documents, setting.pattern).values())
  order = np.random.default_rng(setting.seed).permutation(len(texts))
  held = max(1, round(setting.held_out * len(texts)))
  if held >= len(texts):
    raise ValueError(f"{len(texts)} documents are too few to hold some out")
  return [texts[i] for i in order[held:]], [texts[i] for i in order[:held]]


def packed(
  setting: ConfigDict, tokenizer: Tokenizer, texts: Sequence[str], label: str
) -> Rows:
  """Rows of all texts."""
  return packing.pack(
    text.encode(texts, tokenizer, label=label),
    setting.length,
    seed=setting.seed,
    vocab=tokenizer.vocab,
  )


def begun(binary: str, setting: ConfigDict, given: str | None) -> str:
  """Says what a binary runs on, and the folder of its results."""
  logging.set_verbosity(logging.WARNING)  # checkpoints report every step
  path = given or str(pathlib.Path("workdir", binary, setting.name))
  devices = jax.device_count()
  print(f"{devices} {jax.default_backend()} device(s); results in {path}")
  return path


class Corpus(NamedTuple):
  """Texts as tokens, and the model that they are asked of, if it is there."""

  tokenizer: Tokenizer
  rows: Rows
  model: Model | None  # None: to be trained


def corpus(setting: ConfigDict, texts: Sequence[str]) -> Corpus:
  """The given model and its tokenizer, and packed rows of the texts."""
  model = load(setting) if setting.model else None
  by = model.tokenizer if model else tokenizer(setting)
  return Corpus(by, packed(setting, by, texts, "documents"), model)


def workdir(
  path: str, setting: ConfigDict, given: Corpus, free: Collection[str]
) -> Workdir:
  """A folder of one corpus and model; fields that are `free` may change."""
  fixed = {k: v for k, v in setting.to_dict().items() if k not in free}
  weights = "trained here"
  if given.model is not None:
    weights = records.digest(given.model.params)
  return Workdir(
    path, fixed | {"data": records.digest(given.rows), "weights": weights}
  )


def ready(setting: ConfigDict, folder: Workdir, given: Corpus) -> Model:
  """The model, trained on the rows where there is none or it is to be tuned."""
  if given.model is not None and not setting.tune:
    return given.model
  return train(setting, folder, given.tokenizer, given.rows, given.model)


def traced(setting: ConfigDict, model: Model, rows: Rows) -> Trace:
  """The blocks of the setting's sites."""
  return blocks.trace(
    decoder.objective(model.config).outputs,
    model.params,
    streams.example(rows),
    select=decoder.SITES[setting.sites],
  )


def load(setting: ConfigDict) -> Model:
  """The model of a folder that `train_lm` or Hugging Face wrote, or a GGUF."""
  running = {"dtype": jnp.dtype(setting.dtype), "remat": setting.remat}
  if str(setting.model).endswith(".gguf"):
    found = gguf.load(setting.model, **running)
    model = Model(found.config, found.params, found.tokenizer, np.zeros(0))
  else:
    read = pretrained.load(setting.model, **running)
    model = Model(read.config, read.params, tokenizer(setting), np.zeros(0))
  known, vocab = model.tokenizer.vocab, model.config.vocab
  if known > vocab or (setting.tokenizer == "bytes" and known < vocab):
    raise ValueError(
      f"the tokenizer {setting.tokenizer!r} has {known} tokens and the model"
      f" {setting.model} {vocab}: give the model's own as --config.tokenizer"
    )
  if setting.length > model.config.max_length:
    raise ValueError(
      f"--config.length={setting.length} is longer than the context of"
      f" {setting.model}, {model.config.max_length}"
    )
  return model


def tokenizer(setting: ConfigDict) -> Tokenizer:
  """The tokenizer that the setting names."""
  return text.tokenizer(setting.tokenizer, setting.end)


def train(
  setting: ConfigDict,
  workdir: Workdir,
  tokenizer: Tokenizer,
  rows: Rows,
  start: Model | None = None,
) -> Model:
  """A model of the setting's size, or `start`, trained on rows.

  A run that was stopped goes on.
  """
  config = start.config if start else decoder_config(setting, tokenizer.vocab)
  with workdir.timed("train"):
    params, losses = training.train(
      config,
      recipe(setting),
      rows,
      params=start and start.params,
      mesh=mesh(setting),
      directory=workdir.folder("checkpoints"),
      label="train",
    )
  return Model(config, params, tokenizer, losses)


def held_out(
  setting: ConfigDict, model: Model, texts: Sequence[str]
) -> dict[str, float]:
  """Surprisal of texts that were not trained on."""
  rows = packed(setting, model.tokenizer, texts, "held-out documents")
  loop = streams.Loop(setting.batch_size, "held out", mesh(setting))
  total = training.surprisal(model.config, model.params, rows, loop)
  size = sum(len(document.encode()) for document in texts)
  return {
    "held_out_loss": total / int(rows["mask"].sum()),
    "held_out_bits_per_byte": total / math.log(2) / size,
  }


def mesh(setting: ConfigDict) -> jax.sharding.Mesh | None:
  """All devices, or none where there is one."""
  if jax.device_count() == 1:
    return None
  return meshes.mesh(model=setting.model_axis)


def decoder_config(setting: ConfigDict, vocab: int) -> DecoderConfig:
  """The setting's decoder."""
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
  """How the setting trains."""
  return Recipe(
    setting.steps,
    setting.batch_size,
    learning_rate=setting.learning_rate,
    warmup=setting.warmup,
    weight_decay=setting.weight_decay,
    seed=setting.seed,
  )
