"""An MLP on scikit-learn's diabetes set: regression with nothing to download.

Question: how well does each method predict what retraining on a random half of
397 patients does to the squared error of 45 others?

  python -m experiments.lds --config=configs/diabetes.py
  python -m experiments.counterfactual --config=configs/diabetes.py
  (--config=configs/diabetes.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(size: str = "full") -> ConfigDict:
  config = defaults.new(
    "diabetes",
    dataset="diabetes",
    likelihood="gaussian",
    features=(64, 64),  # 10-64-64-1, ReLU: 4,929 parameters
    batch_size=32,
    learning_rate=0.01,
    num_queries=45,  # the whole test set
    removal_ks=(0, 5, 10, 20, 40),
  )
  return defaults.sized(config, size)
