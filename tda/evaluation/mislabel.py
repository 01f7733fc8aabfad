"""Finding wrong labels: models trained on them, and how soon they are found.

Training examples are inspected from the most suspect down. The curve is the
fraction of the wrong labels found against the fraction inspected; its area is
½ for a random order and 1 − p/2 for a perfect one, p the fraction that is
wrong.

Two subjects (Zhou et al. 2024, §5.1, at the size of two cores). "full": a
network trained on noisy labels from its initialisation. "lora": a network
trained on the true labels of the first half of the classes, frozen, and its
adapters tuned on noisy labels of the second half.

Notation: N training examples, V validation, K classes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tda import likelihoods, lora, trajectory
from tda.data import datasets, registry
from tda.data.datasets import Arrays, Dataset
from tda.evaluation import settings
from tda.likelihoods import Objective
from tda.models import build as models

Array = jax.Array
ArrayLike = jax.typing.ArrayLike
PyTree = Any

SUBJECTS = ("full", "lora")


@dataclasses.dataclass(frozen=True)
class Setting:
  """What defines a run; the configs in `configs/` say why.

  Dampings are relative to the mean squared entry of each layer's gradient.
  """

  name: str
  dataset: str = "digits"
  subjects: tuple[str, ...] = SUBJECTS
  noise: float = 0.2  # fraction of wrong labels
  train_size: int = 1400  # noisy examples of "full"
  tune_size: int = 660  # noisy examples of "lora", of half of the classes
  pretrain_size: int = 660  # clean examples of the other half
  validation_size: int = 160  # clean
  test_size: int = 160  # clean, for accuracies; of half of the classes fewer
  features: tuple[int, ...] = (128, 128)
  epochs: int = 20
  batch_size: int = 64
  learning_rate: float = 0.03  # of sgd
  momentum: float = 0.9
  weight_decay: float = 1e-3
  rank: int = 4
  tune_epochs: int = 20
  tune_learning_rate: float = 3e-3  # of adam
  methods: tuple[str, ...] = ()
  labels: str = "empirical"
  dampings: tuple[float, ...] = (0.1,)
  damping: float = 0.1  # of the comparison at equal damping
  lissa_steps: int = 50
  fractions: tuple[float, ...] = (0.05, 0.2, 0.4)  # kept by selection
  seeds: int = 10

  def title(self, kind: str) -> str:
    """What a subject is called."""
    made = {"full": "trained", "lora": f"LoRA rank {self.rank}"}[kind]
    return f"{self.dataset}, {made}"


class Draw(NamedTuple):
  """One seed's data."""

  train: Arrays  # {"x": [N, ...], "y": [N]}, noisy
  validation: Arrays
  test: Arrays
  flipped: np.ndarray  # bool [N]
  pretrain: Arrays  # of the other classes, clean; empty for "full"


class Subject(NamedTuple):
  """A model to be trained and attributed, as pure functions.

  Attributes:
    objective: of the parameters that `fit` returns.
    select: patterns of the blocks to attribute to; None: all.
    draw: seed -> Draw, of the same shapes for every seed.
    base: (pretraining data, key) -> what tuning starts from; None for "full".
    fit: (train, weights [N], base, key) -> parameters. Jitted: seeds share
      one compilation.
  """

  objective: Objective
  select: str | None
  draw: Callable[[int], Draw]
  base: Callable[[Arrays, Array], PyTree]
  fit: Callable[..., PyTree]


def from_config(config: Mapping[str, Any]) -> Setting:
  """A setting from a mapping; unknown fields and subjects raise ValueError."""
  setting = settings.from_config(config, Setting)
  others = set(setting.subjects) - set(SUBJECTS)
  if others:
    raise ValueError(
      f"unknown subjects {sorted(others)}; choose of {list(SUBJECTS)}"
    )
  return setting


def subject(setting: Setting, kind: str, *, size: int | None = None) -> Subject:
  """The subject "full" or "lora" of a setting.

  Args:
    setting: the experiment.
    kind: of `SUBJECTS`.
    size: the most examples `fit` keeps; see `trajectory.resized`.
  """
  draw = lambda seed: _draw(setting, kind, seed)
  whole = _dataset(setting, kind, 0)
  model = models.build("mlp", setting.features, whole)
  objective = Objective(
    lambda params, example: model.apply(params, example["x"]),
    likelihoods.categorical(),
    lambda example: example["y"],
  )
  sgd = optax.chain(
    optax.add_decayed_weights(setting.weight_decay),
    optax.sgd(setting.learning_rate, setting.momentum),
  )

  def train(data, weights, key, size=None):
    steps = trajectory.resized(
      len(data["y"]), size, setting.batch_size, setting.epochs
    )
    run = trajectory.trainer(objective.loss, model.init, sgd, data, **steps)
    return run(weights, key)

  if kind == "full":
    fit = jax.jit(lambda data, w, base, key: train(data, w, key, size))
    return Subject(objective, None, draw, lambda data, key: None, fit)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  one = jax.tree.map(lambda x: x[0], whole.train)
  adapt = lora.adapt(objective.outputs, shapes, one, rank=setting.rank)
  tuned = lora.tuned(adapt, objective)

  @jax.jit
  def tune(data, weights, base, key):
    join = lambda adapters: {"base": base, "adapters": adapters}
    run = trajectory.trainer(
      lambda adapters, example: tuned.loss(join(adapters), example),
      adapt.init,
      optax.adam(setting.tune_learning_rate),
      data,
      **trajectory.resized(
        len(data["y"]), size, setting.batch_size, setting.tune_epochs
      ),
    )
    return join(run(weights, key))

  @jax.jit
  def base(data, key):
    return train(data, jnp.ones(len(data["y"])), key)

  return Subject(tuned, lora.ADAPTERS, draw, base, tune)


def curve(suspicion: ArrayLike, flipped: ArrayLike) -> Array:
  """Fraction of the wrong labels among the k most suspect, k = 0 … N.

  Args:
    suspicion: [N], larger is inspected earlier; examples that are equally
      suspect come in random order, of which this is the expectation.
    flipped: [N] bool, whose labels are wrong; one at least.

  Returns:
    [N + 1], from 0 to 1.
  """
  suspicion, flipped = map(jnp.asarray, (suspicion, flipped))
  if suspicion.shape != flipped.shape or suspicion.ndim != 1:
    raise ValueError(
      f"suspicion {suspicion.shape} and flipped {flipped.shape} must be [N]"
    )
  order = jnp.argsort(-suspicion)
  ranked, wrong = -suspicion[order], flipped[order].astype(jnp.float32)
  total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(wrong)])
  first = jnp.searchsorted(ranked, ranked, side="left")
  last = jnp.searchsorted(ranked, ranked, side="right")
  share = (jnp.arange(1, len(ranked) + 1) - first) / (last - first)
  found = total[first] + share * (total[last] - total[first])
  return jnp.concatenate([jnp.zeros(1), found]) / total[-1]


def auc(found: Array | np.ndarray) -> Array:
  """Area under a curve [N + 1] over the fraction inspected, by trapezoids."""
  return jnp.mean((found[1:] + found[:-1]) / 2)


def at(found: Array | np.ndarray, inspected: ArrayLike) -> Array:
  """The fraction found once a fraction of the examples is inspected."""
  place = jnp.linspace(0, 1, len(found))
  return jnp.interp(inspected, place, found)


def _dataset(setting: Setting, kind: str, seed: int) -> Dataset:
  """The noisy task's data, clean; classes counted from 0."""
  whole = registry.load(setting.dataset, seed=seed)
  if kind == "full":
    return whole
  half = whole.num_classes // 2
  return _classes(whole, half, whole.num_classes)


def _classes(whole: Dataset, start: int, stop: int) -> Dataset:
  def keep(data):
    rows = (data["y"] >= start) & (data["y"] < stop)
    return {"x": data["x"][rows], "y": data["y"][rows] - start}

  return whole._replace(
    train=keep(whole.train),
    test=keep(whole.test),
    class_names=whole.class_names[start:stop],
  )


def _draw(setting: Setting, kind: str, seed: int) -> Draw:
  data, pretrain = _dataset(setting, kind, seed), {}
  size = setting.train_size if kind == "full" else setting.tune_size
  if kind == "lora":
    half = data.num_classes
    whole = registry.load(setting.dataset, seed=seed)
    other = _classes(whole, 0, half).train
    pretrain = _first(other, setting.pretrain_size, "pretrain_size")
  clean = _first(data.train, size, "train_size or tune_size")
  noisy = datasets.relabel(data._replace(train=clean), setting.noise, seed)
  split = setting.validation_size
  rest = {k: v[split:] for k, v in data.test.items()}
  return Draw(
    noisy.train,
    _first(data.test, split, "validation_size"),
    _first(rest, min(setting.test_size, len(rest["y"])), "test_size"),
    noisy.train["y"] != clean["y"],
    pretrain,
  )


def _first(data: Arrays, size: int, option: str) -> Arrays:
  size = datasets.checked_size(option, size, len(data["y"]))
  return {k: v[:size] for k, v in data.items()}


def over_seeds(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Mean over the first axis and its standard error; NaN from one seed."""
  x = np.asarray(values)
  spread = x.std(axis=0, ddof=1) if len(x) > 1 else np.full(x.shape[1:], np.nan)
  return x.mean(axis=0), spread / np.sqrt(len(x))
