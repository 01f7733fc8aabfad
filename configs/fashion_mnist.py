"""An MLP of 567,434 parameters on 6,144 pictures of Fashion-MNIST.

Paper: Bae et al. 2024 (SOURCE, arXiv 2405.12186), Table 2: 6,144 training
pictures, 512-256-128, SGD with momentum 0.9, learning rate 0.03, weight decay
0.001, batches of 64, 20 epochs. Its LDS over 100 halves of 50 runs each: EK-FAC
influence 0.30, SOURCE 0.46 (one model), 0.45 and 0.53 (ensembles). It measures
the margin (--config.measurement=margin); here the loss, and fewer runs.
Its non-converged variant: --config.label_noise=0.3 --config.learning_rate=0.01
--config.weight_decay=3e-5 --config.epochs=3.

  python -m experiments.lds --config=configs/fashion_mnist.py \
    --data_dir=FOLDER_OF_IDX_FILES
  (--config=configs/fashion_mnist.py:smoke for a small run)

Hardware: a GPU, or hours of two CPU cores. Time and numbers: see
`experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(size: str = "full") -> ConfigDict:
  config = defaults.new(
    "fashion_mnist",
    dataset="fashion_mnist",
    train_size=6144,
    features=(512, 256, 128),  # 784-512-256-128-10, ReLU
    epochs=20,
    batch_size=64,
    learning_rate=0.03,
    momentum=0.9,
    weight_decay=1e-3,
    subsets=100,
    removal_ks=(0, 50, 100, 200),
    removal_queries=10,
    removal_seeds=2,
  )
  return defaults.sized(config, size)
