"""UCI Parkinsons telemonitoring, an MLP of three hidden layers.

Paper: Bae et al. 2024 (SOURCE, arXiv 2405.12186), regression task; 5,280
training examples, width, optimizer and epochs as in its settings. The paper
retrains each of 100 halves 100 times; here fewer. Its list of inputs is not
known: see `tda.data.tables.parkinsons`.

  python -m experiments.lds --config=configs/parkinsons.py \
    --data_dir=FOLDER_OF_parkinsons_updrs.data
  (--config=configs/parkinsons.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(size: str = "full") -> ConfigDict:
  config = defaults.new(
    "parkinsons",
    dataset="parkinsons",
    train_size=5280,
    likelihood="gaussian",
    features=(128, 128, 128),  # 19-128-128-128-1, ReLU
    batch_size=32,
    learning_rate=0.01,
    weight_decay=3e-5,
    subsets=100,
    removal_ks=(0, 50, 100, 200),
    removal_queries=10,
    removal_seeds=2,
  )
  return defaults.sized(config, size)
