"""UCI Concrete compressive strength, an MLP of three hidden layers.

Paper: Bae et al. 2024 (SOURCE, arXiv 2405.12186), regression task; 896
training examples, width, optimizer and epochs as in its settings. The damping
that others derived from the same settings would fit 200 epochs rather than 20;
--config.epochs=200 runs that. The paper retrains each of 100 halves 100 times;
here fewer.

  python -m experiments.lds --config=configs/concrete.py \
    --data_dir=FOLDER_OF_Concrete_Data.csv
  (--config=configs/concrete.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(size: str = "full") -> ConfigDict:
  config = defaults.new(
    "concrete",
    dataset="concrete",
    train_size=896,
    likelihood="gaussian",
    features=(128, 128, 128),  # 8-128-128-128-1, ReLU
    batch_size=32,
    learning_rate=0.03,
    weight_decay=1e-5,
    subsets=100,
    removal_ks=(0, 10, 20, 40, 80),
  )
  return defaults.sized(config, size)
