"""Methods that look at the whole run, where it converged and where it did not.

Question: influence functions take the model to be at the optimum of one
objective. What do SOURCE, TracIn and exact unrolling gain where it is not?

  noisy          5,000 MNIST digits, 30 % of the labels wrong, three epochs
  converged      the same digits, as they are, for 20 epochs
  rotated        digits for ten epochs, then other digits, turned by 90 degrees,
                 for ten; asked is about digits as they are
  fashion_noisy  Fashion-MNIST as Bae et al. 2024 have it where training stops
                 early: 6,144 pictures, 512-256-128, 30 % wrong labels, 3 epochs
  fashion        the same where it converges, 20 epochs
  parkinsons     regression, 5,280 examples, three layers of 128
  concrete       regression, 896 examples, three layers of 128
  cnn            scikit-learn's digits, two strided convolutions

Each with momentum, and with AdamW as NAME_adamw; one model, and three. What is
removed is half of the data; `few` has 1 % of it removed from repetitions of one
run, noisy digits with a smooth network, and `tenth` 10 %. Exact unrolling costs
as much as hundreds of runs on a CPU, and is left out of the longer ones; LESS,
which projects the Adam step of every example, is left out of Fashion-MNIST.

  python -m experiments.lds --config=configs/along.py:noisy
  python -m experiments.lds --config=configs/along.py:fashion_noisy_adamw \
    --data_dir=FOLDER_OF_IDX_FILES
  (--config=configs/along.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import defaults

NOISE = {"label_noise": 0.3, "epochs": 3, "weight_decay": 3e-5}
DIGITS = {"dataset": "mnist5k", "features": (128, 64)}
FASHION = {
  "dataset": "fashion_mnist",
  "train_size": 6144,
  "features": (512, 256, 128),
}
TABLE = {"likelihood": "gaussian", "features": (128, 128, 128)}
FEW = NOISE | DIGITS | {"learning_rate": 0.01, "model": "mlp_tanh"}
FEW |= {"masked": True, "same_seed": True, "ensemble": 1}
LONG = ("converged", "rotated", "fashion_noisy", "fashion", "parkinsons", "cnn")
SIZES = {
  "noisy": DIGITS | NOISE | {"learning_rate": 0.01},
  "converged": DIGITS,
  "rotated": DIGITS
  | {
    "epochs": 10,
    "second_stage": "rotated",
    "second_size": 2000,
    "second_epochs": 10,
    "learning_rate": 0.01,
  },
  "fashion_noisy": FASHION | NOISE | {"learning_rate": 0.01},
  "fashion": FASHION,
  "parkinsons": TABLE
  | {
    "dataset": "parkinsons",
    "train_size": 5280,
    "batch_size": 32,
    "learning_rate": 0.01,
    "weight_decay": 3e-5,
  },
  "concrete": TABLE
  | {
    "dataset": "concrete",
    "train_size": 896,
    "batch_size": 32,
    "weight_decay": 1e-5,
  },
  "cnn": {"dataset": "digits", "model": "cnn", "features": (8, 16, 32)},
  "few": FEW | {"subset_fraction": 0.99},
  "tenth": FEW | {"subset_fraction": 0.9},
}
SIZES["smoke"] = SIZES["noisy"]


def get_config(size: str = "noisy") -> ConfigDict:
  kind = size.removesuffix("_adamw")
  if kind not in SIZES:
    raise ValueError(
      f"unknown size {size!r}; choose from {tuple(SIZES)}, or one of them with"
      " _adamw"
    )
  config = defaults.new(
    "along",
    methods=(
      "gradient_dot",
      "tracin",
      "trak",
      "trackstar",
      "ekfac",
      "source",
      "fast_source",
      *(() if kind in LONG else ("unrolled",)),
    ),
    labels="sampled",
    sweep_labels=("sampled",),
    sweep_dampings=(
      "0.01 relative",
      "0.1 relative",
      "1 relative",
      "10 relative",
    ),
    subsets=100,
    removal_ks=(0, 50, 100, 200),
    removal_queries=10,
    removal_seeds=2,
    **({"ensemble": 3} | SIZES[kind]),
  )
  if kind == size:
    config.sweep_dampings = (*config.sweep_dampings, "training")
  else:
    config.update(optimizer="adamw", learning_rate=1e-3, weight_decay=1e-2)
    if SIZES[kind].get("dataset") != "fashion_mnist":
      config.methods = (*config.methods, "less")
  if kind == "smoke":
    config = defaults.sized(config, "smoke")
    config.update(ensemble=2, trak_dimension=64)
  config.name = f"along_{size}"
  return config
