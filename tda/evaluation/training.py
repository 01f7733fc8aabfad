"""An experiment's training: optimizers, and runs of one or two stages."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from tda import runs, streams, trajectory
from tda.data import datasets
from tda.data.datasets import Arrays, Dataset
from tda.evaluation.settings import Setting
from tda.runs import Stage

PyTree = Any
EPS_ROOT = 1e-8  # inside Adam's square root, which has no derivative at 0


def split(setting: Setting, dataset: Dataset) -> tuple[Dataset, Arrays | None]:
  """What the first stage trains on, relabelled, and the second's examples."""
  second = None
  if setting.second_stage:
    dataset, second = datasets.divide(
      dataset, setting.second_size, setting.second_stage
    )
  if setting.label_noise:
    dataset = datasets.relabel(dataset, setting.label_noise, setting.seed)
  return dataset, second


def stages(
  setting: Setting,
  loss: trajectory.Loss,
  first: Arrays,
  second: Arrays | None,
) -> tuple[Stage, ...]:
  """The run's stages; the optimizer begins anew with the second."""
  parts = [(first, setting.epochs, setting.masked)]
  if second is not None:
    parts.append((second, setting.second_epochs, False))
  return tuple(
    Stage(
      loss,
      data,
      optimizer(setting),
      epochs,
      setting.batch_size,
      masked=masked,
    )
    for data, epochs, masked in parts
  )


def trainer(
  init: trajectory.Init, stages: tuple[Stage, ...], size: int | None = None
) -> trajectory.Train:
  """train(weights [N] of the first stage, key) -> params.

  A `jax.tree_util.Partial` that holds the data. With a `size` below N more
  weights than that give NaN.
  """

  def train(data, weights, key):
    held = [s._replace(data=d) for s, d in zip(stages, data, strict=True)]
    held[0] = held[0]._replace(size=size)
    later = [jnp.ones(streams.rows(d)) for d in data[1:]]
    return runs.trainer(init, held)([weights, *later], key)

  return Partial(train, jax.tree.map(jnp.asarray, [s.data for s in stages]))


def optimizer(setting: Setting) -> optax.GradientTransformation:
  """SGD, whose λ is in the gradient, or AdamW."""
  if setting.optimizer == "sgd":
    return optax.chain(
      optax.add_decayed_weights(setting.weight_decay),
      optax.sgd(setting.learning_rate, setting.momentum or None),
    )
  if setting.optimizer == "adamw":
    return optax.adamw(
      setting.learning_rate,
      eps_root=EPS_ROOT,
      weight_decay=setting.weight_decay,
    )
  raise ValueError(
    f"unknown optimizer {setting.optimizer!r}; choose of ['sgd', 'adamw']"
  )
