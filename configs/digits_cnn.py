"""A small CNN on scikit-learn's digits: convolution sites.

Question: as digits_mlp, for a network of two strided convolutions, a dense
layer and the output layer on 1,437 pictures of 8 x 8 pixels.

  python -m experiments.lds --config=configs/digits_cnn.py
  python -m experiments.counterfactual --config=configs/digits_cnn.py
  (--config=configs/digits_cnn.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(size: str = "full") -> ConfigDict:
  config = defaults.new(
    "digits_cnn",
    dataset="digits",
    model="cnn",
    features=(8, 16, 32),  # channels 8 and 16, dense 32: 3,658 parameters
    removal_ks=(0, 40, 160),
    removal_queries=10,
  )
  return defaults.sized(config, size)
