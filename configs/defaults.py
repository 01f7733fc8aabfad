"""What every experiment shares unless its config says otherwise.

A config is flat; its fields are those of `tda.evaluation.settings.Setting`, and
every field is also a flag, as --config.epochs=5.
"""

from ml_collections import ConfigDict

SIZES = ("full", "smoke")


def new(name: str, **fields: object) -> ConfigDict:
  """The defaults, with `fields` in place of some of them."""
  config = ConfigDict()
  config.name = name

  # Data: a set's name, and the folder of its files where no package has it.
  config.dataset = ""
  config.data_dir = ""
  config.train_size = 0  # examples; 0: all
  config.test_size = 0  # examples; 0: all
  config.label_noise = 0.0  # fraction of training labels made wrong
  config.likelihood = "categorical"

  # Model: widths of the hidden layers; the outputs follow from the data.
  config.model = "mlp"
  config.features = (128, 128)

  # Training: constant learning rate; weight decay is λ of λ‖θ‖²/2 for sgd.
  config.optimizer = "sgd"
  config.epochs = 20  # passes over the training data
  config.batch_size = 64  # examples
  config.learning_rate = 0.03
  config.momentum = 0.9
  config.weight_decay = 1e-3
  config.second_stage = ""  # "rotated" or "shifted" examples after the first
  config.second_size = 0  # examples, taken out of the first stage
  config.second_epochs = 0

  # Attribution.
  config.num_queries = 100  # the first of the test examples
  config.measurement = "loss"
  config.methods = (
    "random",
    "representation",
    "gradient_dot",
    "gradient_cosine",
    "diagonal",
    "kfac",
    "ekfac",
  )
  config.labels = "empirical"  # of the curvature: the data's own
  config.damping = "0.1 relative"  # to the mean eigenvalue of a layer
  config.sweep_labels = ()  # further rows of the table, for each pair of
  config.sweep_dampings = ()  # labels and damping; "0.01" is absolute
  config.fit_batch_size = 512  # examples, of every pass
  config.query_batch = 128  # queries held at a time
  config.solver_iterations = 100  # the most of cg, astra and lissa
  config.checkpoints = 6  # of each stage, for source, fast_source and tracin
  config.segments = 3  # of each stage, that source cuts them into
  config.trak_dimension = 512  # of its projections
  config.ensemble = 1  # models whose scores are averaged, in rows of their own

  # Retraining: LDS takes subsets x seeds runs.
  config.subsets = 200
  config.subset_fraction = 0.5
  config.retrain_seeds = 3
  config.masked = False  # what is left out keeps its place in the batches
  config.same_seed = False  # every run repeats the attributed one's, but for it

  # Removal curves take methods x sizes x queries x seeds runs.
  config.removal_ks = (0, 20, 40, 80, 160)  # removed examples
  config.removal_queries = 20  # the first of the queries
  config.removal_seeds = 3

  config.seed = 0  # of the split, the order, and everything drawn
  config.update(fields)
  return config


def sized(config: ConfigDict, size: str) -> ConfigDict:
  """The config itself for "full"; for "smoke" one of a few seconds.

  A smoke run shows that everything fits together; its numbers mean nothing.
  """
  if size not in SIZES:
    raise ValueError(f"unknown size {size!r}; choose from {SIZES}")
  if size == "smoke":
    config.update(
      name=f"{config.name}_smoke",
      train_size=256,
      test_size=16,
      epochs=8,
      batch_size=32,
      num_queries=8,
      fit_batch_size=64,
      subsets=8,
      retrain_seeds=2,
      removal_ks=(0, 8),
      removal_queries=4,
      removal_seeds=2,
    )
  return config
