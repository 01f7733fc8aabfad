"""Choosing a twentieth to a fifth of a mixed corpus for one kind of text.

Question: a small language model knows a little of five kinds of text and is to
be trained on for one of them, of which a few documents are at hand. Does it
become better at others of that kind on what LESS chooses than on as many
documents that share words with those few, that gradients without Adam choose,
or that are drawn at random?

  python -m experiments.corpora --to=corpora --size=280 --vocab=512 ...
    (its sources: see there)
  python -m experiments.selection_lm --config=configs/selection_lm.py \
    --config.documents=corpora --config.tokenizer=corpora
  (--config=configs/selection_lm.py:smoke for a small run)

Any folder with folders of text does. Gradients and training see the first 129
tokens of each document, and BM25 all of it.

Hardware: two CPU cores. Time and numbers: see `experiments/selection_lm.py`.
"""

from ml_collections import ConfigDict

from configs import stdlib_lm

SIZES = ("full", "smoke")


def get_config(size: str = "full") -> ConfigDict:
  if size not in SIZES:
    raise ValueError(f"unknown size {size!r}; choose from {SIZES}")
  config = stdlib_lm.get_config()
  for name in ("held_out", "weight_decay", "warmup", "steps", "model_axis"):
    del config[name]
  config.update(name="selection_lm", documents="", pattern="*/*.txt")
  config.update(width=64, layers=2, heads=2, kv_heads=0, mlp_width=168)
  config.update(length=128, batch_size=10)

  # Of each folder's documents.
  config.ask = 80  # to hold out
  config.validation = 16  # of these, to choose by; the others are the test
  config.subtasks = 1  # of the validation documents; the best one counts

  # The warm-up, from new parameters: Adam, its rate falling to 0.
  config.share = 0.5  # of the candidates, at random
  config.epochs = 3
  config.learning_rate = 3e-3
  config.checkpoints = 3

  # Projected gradients.
  config.sites = "linear"  # see decoder.SITES
  config.dimension = 16  # of each side of a matrix

  # Training on what is chosen: Adam anew, one epoch of the largest fraction and
  # as many steps of the others.
  config.fractions = (0.05, 0.1, 0.2)
  config.tune_learning_rate = 1e-3

  config.seed = 0  # the first
  config.seeds = 3  # each with its own split and warm-up; more may be added
  if size == "smoke":
    config.update(name="selection_lm_smoke", documents="stdlib")
    config.update(pattern="[ae][sm]*/*.py")  # asyncio and email
    config.update(width=16, mlp_width=32, layers=1, length=32, batch_size=4)
    config.update(ask=6, validation=2, subtasks=2, epochs=2, checkpoints=2)
    config.update(dimension=4, fractions=(0.2, 0.5), seeds=2)
  return config
