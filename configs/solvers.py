"""Every inverse over a grid of dampings, on digits or on 5,000 MNIST digits.

Question: does the exact Gauss-Newton Hessian predict retraining better than
what is fitted to it, and what does that depend on? Dampings are chosen on every
other query and judged on the rest; "training" is one that needs no retraining
to be known.

  python -m experiments.lds --config=configs/solvers.py
  python -m experiments.lds --config=configs/solvers.py:mnist5k
  (--config=configs/solvers.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults

SIZES = ("digits", "mnist5k", "smoke")


def get_config(size: str = "digits") -> ConfigDict:
  if size not in SIZES:
    raise ValueError(f"unknown size {size!r}; choose from {SIZES}")
  config = defaults.new(
    "solvers",
    dataset="digits",
    features=(128, 128),  # 64-128-128-10, ReLU
    methods=(
      "gradient_dot",
      "diagonal",
      "kfac",
      "ekfac",
      "hyperinf",
      "datainf",
      "arnoldi",
      "lissa",
      "astra",
      "cg",
    ),
    labels="exact",
    damping="training",
    sweep_labels=("exact", "empirical"),
    sweep_dampings=(
      "0.1 relative",
      "1 relative",
      "0.001",
      "0.003",
      "0.01",
      "0.03",
      "0.1",
    ),
  )
  if size == "mnist5k":
    config.update(
      dataset="mnist5k",
      features=(128, 64),  # 784-128-64-10, ReLU
      sweep_dampings=("1 relative", "0.003", "0.01", "0.03"),
      subsets=100,
      removal_ks=(0, 50, 100, 200),
      removal_queries=10,
      removal_seeds=2,
    )
  if size == "smoke":
    config = defaults.sized(config, "smoke")
    config.update(sweep_labels=(), sweep_dampings=(), solver_iterations=4)
  config.name = f"solvers_{size}"
  return config
