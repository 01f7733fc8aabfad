"""An MLP of 26,122 parameters on scikit-learn's digits: the default experiment.

Question: how well does each method predict what retraining on a random half of
1,437 pictures of 8 x 8 pixels does to the loss of 100 test pictures, and how
much do the curvature's labels and its damping change that?

  python -m experiments.lds --config=configs/digits_mlp.py
  python -m experiments.counterfactual --config=configs/digits_mlp.py
  (--config=configs/digits_mlp.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(size: str = "full") -> ConfigDict:
  config = defaults.new(
    "digits_mlp",
    dataset="digits",
    features=(128, 128),  # 64-128-128-10, ReLU
    sweep_labels=("empirical", "sampled"),
    sweep_dampings=("0.1 relative", "0.01 relative"),
  )
  return defaults.sized(config, size)
