"""How much of the signal do projected gradients keep, by rank and kind?

Question: LoGra keeps K numbers for each side of a layer. How well do scores of
stores of several K, along random, sparse and principal directions, predict
retraining, next to EK-FAC and K-FAC, which project nothing?

  python -m experiments.lds --config=configs/projections.py
  (--config=configs/projections.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults

SIZES = ("digits", "smoke")
RANKS = (2, 4, 8, 16, 32)


def get_config(size: str = "digits") -> ConfigDict:
  if size not in SIZES:
    raise ValueError(f"unknown size {size!r}; choose from {SIZES}")
  ranks = RANKS if size == "digits" else RANKS[:1]
  stored = [
    f"logra {kind} {rank}"
    for rank in ranks
    for kind in ("random", "sparse", "principal")
  ]
  config = defaults.new(
    "projections",
    dataset="digits",
    features=(128, 128),  # 64-128-128-10, ReLU
    methods=("gradient_dot", "gradient_cosine", "kfac", "ekfac", *stored),
    labels="empirical",
    sweep_labels=("empirical",),
    sweep_dampings=("0.01 relative", "1 relative"),
  )
  if size == "smoke":
    config = defaults.sized(config, "smoke")
  config.name = f"projections_{size}"
  return config
