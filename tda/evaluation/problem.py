"""One experiment's data, model, training and queries, built from its setting.

What the binaries share: the pure functions and arrays that a setting names.
"""

import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from tda import likelihoods, streams, trajectory
from tda.data import registry
from tda.data.datasets import Dataset
from tda.evaluation import training
from tda.evaluation.settings import Setting
from tda.inverse import spectral
from tda.inverse.spectral import Damping
from tda.likelihoods import Likelihood, Objective
from tda.models import build as models
from tda.models.build import Model
from tda.runs import Stage

PyTree = Any
_LIKELIHOODS: Mapping[str, Callable[[], Likelihood]] = MappingProxyType(
  {
    "categorical": likelihoods.categorical,
    "gaussian": likelihoods.gaussian,
    "tokens": likelihoods.token_categorical,
  }
)


class Problem(NamedTuple):
  """A setting's pure functions and arrays.

  Attributes:
    setting: what it was built from.
    dataset: training and test arrays; those of the first stage.
    queries: the Q test examples that are asked about, as the data set has them.
    objective: model and likelihood of one example.
    measurement: m(params, query) -> scalar.
    train: (weights [N], key) -> params.
    init: key -> params.
    stages: the same training for `tda.runs`.
    measure: params -> {"value": [Q], "correct": [Q]}; "correct" is 1 where the
      query is predicted right, of a text every token, and 0 for regression.
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

  @property
  def relevant(self) -> np.ndarray | None:
    """The examples that are known to be right for each query, bool [N, Q]."""
    known = self.dataset.relevant
    return None if known is None else known[:, : len(self.queries["y"])]

  def key_for(self, use: str) -> jax.Array:
    """A key of its own for each use, whatever order they come in."""
    return jax.random.fold_in(self.key, zlib.crc32(use.encode()))

  def run_key(self, member: int = 0) -> jax.Array:
    """The key of a run that is attributed, by its place in the ensemble."""
    return self.key_for("attributed model" + (f" {member}" if member else ""))

  def trained_on(self, size: int) -> trajectory.Train:
    """`train` for runs that keep at most `size` examples, at their cost."""
    return training.trainer(self.init, self.stages, size)

  def weights(self) -> list[jax.Array]:
    """Those of all examples of every stage: 1."""
    return [jnp.ones(streams.rows(stage.data)) for stage in self.stages]

  def damping(self, text: str) -> Damping:
    """A damping by what a setting calls it.

    "training" is 1 / Σ η over the steps of the first stage, with η / (1 − m)
    where there is momentum m: the curvature below which a direction has not
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


def build(setting: Setting, size: int | None = None) -> Problem:
  """Data, model and training of a setting.

  Args:
    setting: the experiment.
    size: the most training examples that `train` keeps, all unless given; see
      `trajectory.trainer`.
  """
  if setting.same_seed and setting.ensemble > 1:
    raise ValueError(
      f"same_seed repeats one run, and ensemble={setting.ensemble} has several:"
      " make it 1"
    )
  dataset = registry.load(
    setting.dataset,
    data_dir=setting.data_dir or None,
    seed=setting.seed,
    train_size=setting.train_size,
    test_size=setting.test_size,
  )
  _check_kind(setting, dataset)
  dataset, second = training.split(setting, dataset)
  model = models.build(setting.model, setting.features, dataset)
  objective = _objective(setting.likelihood, model)
  measurement = _measurement(setting.measurement, objective)
  queries = jax.tree.map(lambda x: x[: setting.num_queries], dataset.test)
  stages = training.stages(setting, objective.loss, dataset.train, second)

  def measure(queries, params):
    outputs = jax.vmap(objective.outputs, (None, 0))(params, queries)
    value = jax.vmap(measurement, (None, 0))(params, queries)
    right = _right(setting.likelihood, outputs, queries)
    return {"value": value, "correct": right.astype(jnp.float32)}

  arrays = jax.tree.map(jnp.asarray, dict(queries))
  key = jax.random.key(setting.seed)
  return Problem(
    setting,
    dataset,
    queries,
    objective,
    measurement,
    training.trainer(model.init, stages, size),
    model.init,
    stages,
    Partial(measure, arrays),
    key,
  )


def _check_kind(setting: Setting, dataset: Dataset) -> None:
  """Texts have words, a likelihood of their own, and no margin."""
  language = dataset.kind == "language"
  if setting.likelihood in _LIKELIHOODS and (
    language != (setting.likelihood == "tokens")
  ):
    raise ValueError(
      f"likelihood={setting.likelihood!r} for {dataset.name}: 'tokens' is that"
      " of texts, and of nothing else"
    )
  if "bm25" in setting.methods and not language:
    raise ValueError(
      f"bm25 compares words, and {dataset.name} has none: leave it out of the"
      " methods"
    )
  if language and setting.measurement != "loss":
    raise ValueError(
      f"measurement={setting.measurement!r} for {dataset.name}: texts are"
      " measured by their 'loss'"
    )


def _objective(name: str, model: Model) -> Objective:
  if name not in _LIKELIHOODS:
    known = [*_LIKELIHOODS]
    raise ValueError(f"unknown likelihood {name!r}; choose of {known}")
  objective = Objective(
    lambda params, example: model.apply(params, example["x"]),
    _LIKELIHOODS[name](),
    lambda example: example["y"],
  )
  if name != "tokens":
    return objective
  return objective._replace(
    target=lambda example: (example["y"], example["mask"]),
    segments=lambda example: example["segments"],
  )


def _right(name: str, outputs: jax.Array, queries: PyTree) -> jax.Array:
  """Whether each query is predicted right [Q]."""
  if name == "gaussian":
    return jnp.zeros(len(outputs), bool)
  right = outputs.argmax(axis=-1) == queries["y"]
  if name == "tokens":
    right = (right | (queries["mask"] == 0)).all(axis=-1)
  return right


def _measurement(name: str, objective: Objective) -> Callable:
  if name == "loss":
    return objective.loss
  if name == "margin":
    return likelihoods.margin(objective)
  raise ValueError(
    f"unknown measurement {name!r}; choose of ['loss', 'margin']"
  )
