"""One experiment's data, model, training and queries, built from its settings.

The objects the binaries share: `Setting` is the record of an experiment,
`build` makes the pure functions that it names.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from tda import likelihoods, trajectory
from tda.data import datasets, registry
from tda.data.datasets import Dataset
from tda.inverse import spectral
from tda.inverse.spectral import Damping
from tda.likelihoods import Objective
from tda.models import build as models
from tda.runs import Stage

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Setting:
  """What defines an experiment; the configs in `configs/` say why.

  Sizes of 0 mean all there is. A damping is written "0.01", in the units of the
  curvature, "0.1 relative" to the mean eigenvalue of each layer, or "training";
  see `Problem.damping`.
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
  subsets: int = 200
  subset_fraction: float = 0.5
  retrain_seeds: int = 3
  removal_ks: tuple[int, ...] = (0, 10, 20, 40)
  removal_queries: int = 20
  removal_seeds: int = 3
  seed: int = 0


class Problem(NamedTuple):
  """A setting's pure functions and arrays.

  Attributes:
    setting: what it was built from.
    dataset: training and test arrays.
    queries: {"x", "y"} of the Q test examples that are asked about.
    objective: model and likelihood of one example.
    measurement: m(params, query) -> scalar.
    train: (weights [N], key) -> params.
    init: key -> params.
    stages: the same training for `tda.runs`, with all examples.
    measure: params -> {"value": [Q], "correct": [Q]}; "correct" is 1 where the
      query is predicted right, and 0 for regression.
    key: of everything random; split by the name of its use.
  """

  setting: Setting
  dataset: Dataset
  queries: Mapping[str, np.ndarray]
  objective: Objective
  measurement: Callable[[PyTree, PyTree], jax.Array]
  train: trajectory.Train
  init: trajectory.Init
  stages: tuple[Stage, ...]
  measure: Partial
  key: jax.Array

  def key_for(self, use: str) -> jax.Array:
    """A key of its own for each use, whatever order they come in."""
    return jax.random.fold_in(self.key, zlib.crc32(use.encode()))

  def damping(self, text: str) -> Damping:
    """A damping by what a setting calls it.

    "training" is 1 / Σ η over the steps of the run, with η / (1 − m) where
    there is momentum m: the curvature below which a direction has not
    converged, and nobody has to retrain to know it (Bae et al. 2024).
    """
    if text != "training":
      return spectral.damping(text)
    setting = self.setting
    if setting.optimizer != "sgd":
      raise ValueError(
        f"damping 'training' is for sgd, whose steps are in the units of the "
        f"curvature; those of {setting.optimizer!r} are not: write a number"
      )
    steps = trajectory.steps(
      len(self.dataset.train["y"]), setting.batch_size, setting.epochs
    )
    length = setting.learning_rate / (1 - setting.momentum)
    return spectral.absolute(1 / (steps * length))


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


def build(setting: Setting, size: int | None = None) -> Problem:
  """Data, model and training of a setting.

  Args:
    setting: the experiment.
    size: the most training examples any run keeps; see `trajectory.trainer`.
  """
  dataset = registry.load(
    setting.dataset,
    data_dir=setting.data_dir or None,
    seed=setting.seed,
    train_size=setting.train_size,
    test_size=setting.test_size,
  )
  if setting.label_noise:
    dataset = datasets.relabel(dataset, setting.label_noise, setting.seed)
  model = models.build(setting.model, setting.features, dataset)
  objective = Objective(
    lambda params, example: model.apply(params, example["x"]),
    _likelihood(setting.likelihood),
    lambda example: example["y"],
  )
  measurement = _measurement(setting.measurement, objective)
  queries = jax.tree.map(lambda x: x[: setting.num_queries], dataset.test)
  stage = Stage(
    objective.loss,
    dataset.train,
    _optimizer(setting),
    setting.epochs,
    setting.batch_size,
  )
  train = trajectory.trainer(
    stage.loss,
    model.init,
    stage.optimizer,
    stage.data,
    epochs=stage.epochs,
    batch_size=stage.batch_size,
    size=size,
  )
  categorical = setting.likelihood == "categorical"

  def measure(queries, params):
    outputs = jax.vmap(objective.outputs, (None, 0))(params, queries)
    value = jax.vmap(measurement, (None, 0))(params, queries)
    right = jnp.zeros(len(outputs), bool)
    if categorical:
      right = outputs.argmax(axis=-1) == queries["y"]
    return {"value": value, "correct": right.astype(jnp.float32)}

  arrays = jax.tree.map(jnp.asarray, dict(queries))
  key = jax.random.key(setting.seed)
  return Problem(
    setting,
    dataset,
    queries,
    objective,
    measurement,
    train,
    model.init,
    (stage,),
    Partial(measure, arrays),
    key,
  )


def _likelihood(name: str) -> likelihoods.Likelihood:
  choices = {
    "categorical": likelihoods.categorical,
    "gaussian": likelihoods.gaussian,
  }
  if name not in choices:
    raise ValueError(f"unknown likelihood {name!r}; choose of {[*choices]}")
  return choices[name]()


def _measurement(name: str, objective: Objective) -> Callable:
  if name == "loss":
    return objective.loss
  if name == "margin":
    return likelihoods.margin(objective)
  raise ValueError(
    f"unknown measurement {name!r}; choose of ['loss', 'margin']"
  )


def _optimizer(setting: Setting) -> optax.GradientTransformation:
  if setting.optimizer == "sgd":
    return optax.chain(
      optax.add_decayed_weights(setting.weight_decay),
      optax.sgd(setting.learning_rate, setting.momentum or None),
    )
  if setting.optimizer == "adamw":
    return optax.adamw(setting.learning_rate, weight_decay=setting.weight_decay)
  raise ValueError(
    f"unknown optimizer {setting.optimizer!r}; choose of ['sgd', 'adamw']"
  )
