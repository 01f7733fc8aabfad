"""Wrong labels among scikit-learn's digits or 5,000 MNIST digits.

Question: which method finds 20 % flipped labels first, in a network trained on
them and in one whose adapters were tuned on them? Zhou et al. 2024, §5.1, has
RoBERTa-large with LoRA on GLUE; here an MLP that has learnt the digits 0 to 4,
frozen, and adapters of rank 4 on all its matrices, tuned to tell 5 to 9 apart.

  python -m experiments.mislabel --config=configs/mislabel.py
  python -m experiments.mislabel --config=configs/mislabel.py:mnist5k
  (--config=configs/mislabel.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/mislabel.py`.
"""

from ml_collections import ConfigDict

SIZES = ("digits", "mnist5k", "smoke")


def get_config(size: str = "digits") -> ConfigDict:
  if size not in SIZES:
    raise ValueError(f"unknown size {size!r}; choose from {SIZES}")
  config = ConfigDict()
  config.name = size
  config.dataset = "digits"
  config.subjects = ("full", "lora")
  config.noise = 0.2  # fraction of wrong labels
  config.seeds = 10  # of split, flips, initialisation and order

  # Examples of each seed, clean but for the training labels.
  config.train_size = 1400  # of all ten classes, for "full"
  config.tune_size = 660  # of classes 5 to 9, for "lora"
  config.pretrain_size = 660  # of classes 0 to 4
  config.validation_size = 150  # whose mean gradient is the query
  config.test_size = 150  # for accuracies; all that are left if fewer

  # Training: sgd for the network, adam for its adapters.
  config.features = (128, 128)  # widths of the hidden layers
  config.epochs = 20
  config.batch_size = 64
  config.learning_rate = 0.03
  config.momentum = 0.9
  config.weight_decay = 1e-3
  config.rank = 4
  config.tune_epochs = 20
  config.tune_learning_rate = 3e-3

  # Attribution. Dampings are relative to the mean squared gradient entry.
  config.methods = (
    "random",
    "loss",
    "gradient_dot",
    "gradient_cosine",
    "datainf",
    "lissa",
    "hyperinf",
    "kfac",
    "ekfac",
    "self_gradient",
    "self_hyperinf",
    "self_kfac",
    "self_ekfac",
  )
  config.labels = "empirical"
  config.dampings = (0.01, 0.1, 1.0, 10.0)
  config.damping = 0.1  # the paper's
  config.lissa_steps = 50
  if size == "mnist5k":
    config.update(
      dataset="mnist5k",
      train_size=3900,
      tune_size=1900,
      pretrain_size=1900,
      validation_size=400,
      test_size=400,
    )
  if size == "smoke":
    config.update(
      subjects=("lora",),
      train_size=128,
      tune_size=96,
      pretrain_size=96,
      validation_size=32,
      test_size=32,
      features=(16,),
      epochs=4,
      tune_epochs=4,
      dampings=(0.1, 1.0),
      lissa_steps=5,
      seeds=2,
    )
  return config
