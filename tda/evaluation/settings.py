"""What defines an experiment."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
  """What defines an experiment; the configs in `configs/` say why.

  Sizes of 0 mean all there is. A damping is written "0.01", in the units of the
  curvature, "0.1 relative" to the mean eigenvalue of each layer, or "training";
  see `Problem.damping`. A `second_stage` trains on after the first, on
  `second_size` of its examples that are taken out of it and then "rotated" or
  "shifted"; what is attributed, and left out, are those of the first.

  `masked` retrainings leave the places of what is left out empty (see
  `tda.trajectory`), and with `same_seed` all of them repeat the run that is
  attributed but for its weights.
  """

  name: str
  dataset: str
  data_dir: str = ""
  train_size: int = 0
  test_size: int = 0
  label_noise: float = 0.0
  likelihood: str = "categorical"
  model: str = "mlp"
  features: tuple[int, ...] = (128, 128)
  optimizer: str = "sgd"
  epochs: int = 20
  batch_size: int = 64
  learning_rate: float = 0.03
  momentum: float = 0.9
  weight_decay: float = 0.0
  second_stage: str = ""
  second_size: int = 0
  second_epochs: int = 0
  num_queries: int = 100
  measurement: str = "loss"
  methods: tuple[str, ...] = ("gradient_dot", "kfac", "ekfac")
  labels: str = "empirical"
  damping: str = "0.1 relative"
  sweep_labels: tuple[str, ...] = ()
  sweep_dampings: tuple[str, ...] = ()
  fit_batch_size: int = 512
  query_batch: int = 128
  solver_iterations: int = 100
  checkpoints: int = 6
  segments: int = 3
  trak_dimension: int = 512
  ensemble: int = 1
  subsets: int = 200
  subset_fraction: float = 0.5
  retrain_seeds: int = 3
  masked: bool = False
  same_seed: bool = False
  removal_ks: tuple[int, ...] = (0, 10, 20, 40)
  removal_queries: int = 20
  removal_seeds: int = 3
  seed: int = 0


def from_config(config: Mapping[str, Any], kind: Any = Setting) -> Any:
  """A setting, or another dataclass of this `kind`, from a mapping.

  Raises:
    ValueError: fields that it does not have.
  """
  names = {field.name for field in dataclasses.fields(kind)}
  unknown = set(config) - names
  if unknown:
    raise ValueError(
      f"unknown settings {sorted(unknown)}; choose of {sorted(names)}"
    )
  values: dict[str, Any] = {
    k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
  }
  return kind(**values)
