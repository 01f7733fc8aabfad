"""Methods that look at the whole run, where it converged and where it did not.

Question: influence functions take the model to be at an optimum. What do SOURCE
and TracIn gain when it is far from one? "noisy" is the setting of Bae et al.
2024 for Fashion-MNIST, three epochs on labels of which 30 % are wrong, with
5,000 MNIST digits; "converged" the same digits, as they are, for 20 epochs.

  python -m experiments.lds --config=configs/along.py
  python -m experiments.lds --config=configs/along.py:converged
  (--config=configs/along.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see README.
"""

from ml_collections import ConfigDict

from configs import defaults

SIZES = ("noisy", "converged", "smoke")


def get_config(size: str = "noisy") -> ConfigDict:
  if size not in SIZES:
    raise ValueError(f"unknown size {size!r}; choose from {SIZES}")
  config = defaults.new(
    "along",
    dataset="mnist5k",
    features=(128, 64),  # 784-128-64-10, ReLU
    methods=(
      "gradient_dot",
      "tracin",
      "ekfac",
      "source",
      "fast_source",
      "unrolled",
    ),
    labels="sampled",
    sweep_labels=("sampled",),
    sweep_dampings=("0.1 relative", "training"),
    subsets=100,
    removal_ks=(0, 50, 100, 200),
    removal_queries=10,
    removal_seeds=2,
  )
  if size != "converged":
    config.update(
      label_noise=0.3, epochs=3, learning_rate=0.01, weight_decay=3e-5
    )
  if size == "smoke":
    config = defaults.sized(config, "smoke")
  config.name = f"along_{size}"
  return config
