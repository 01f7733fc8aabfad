"""Choosing 5, 20 or 40 % of the training data by a validation gradient.

Question: does a model that is trained on what a method chose do better on test
data than one trained on a random choice, or on everything? A fifth of the
labels are wrong. Subjects, data and methods are those of `configs/mislabel.py`.

  python -m experiments.selection --config=configs/selection.py
  python -m experiments.selection --config=configs/selection.py:mnist5k
  (--config=configs/selection.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/selection.py`.
"""

from ml_collections import ConfigDict

from configs import mislabel


def get_config(size: str = "digits") -> ConfigDict:
  config = mislabel.get_config(size)
  config.subjects = ("full", "lora")
  config.fractions = (0.05, 0.2, 0.4)  # of the training examples, kept
  config.methods = (
    "random",
    "loss",
    "gradient_dot",
    "gradient_cosine",
    "datainf",
    "lissa",
    "hyperinf",
    "ekfac",
  )
  config.dampings = (0.1,)
  if size == "smoke":
    config.subjects = ("full",)
    config.methods = ("random", "gradient_dot", "datainf", "hyperinf")
  return config
