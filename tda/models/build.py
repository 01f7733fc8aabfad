"""A network for a data set, as pure functions of ONE example."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from tda.data.datasets import Dataset
from tda.models.cnn import CNN
from tda.models.mlp import MLP

PyTree = Any

NAMES = ("mlp", "mlp_tanh", "cnn")


class Model(NamedTuple):
  """What training and attribution need of a network."""

  init: Callable[[jax.Array], PyTree]  # key -> params
  apply: Callable[[PyTree, jax.Array], jax.Array]  # params, x -> outputs [K]
  represent: Callable[[PyTree, jax.Array], jax.Array]  # last hidden layer


def build(name: str, features: Sequence[int], dataset: Dataset) -> Model:
  """The network `name` with the outputs that `dataset` asks for.

  `features` are widths of hidden layers. Of a "cnn" all but the last are
  channels of convolutions with stride 2, and the last is its dense layer.
  """
  x = dataset.train["x"]
  if name not in NAMES:
    raise ValueError(f"unknown model {name!r}; choose from {NAMES}")
  if name == "cnn" and (dataset.image_shape is None or len(features) < 2):
    raise ValueError(
      f"a cnn needs pictures and two or more features, not {dataset.name} of"
      f" shape {x.shape[1:]} with features={tuple(features)}; take an mlp"
    )
  outputs = dataset.num_outputs
  module: MLP | CNN
  if name == "cnn":
    module = CNN(tuple(features[:-1]), features[-1], outputs)
  else:
    module = MLP((*features, outputs), nn.relu if name == "mlp" else jnp.tanh)

  def init(key: jax.Array) -> PyTree:
    return module.init(key, jnp.zeros(x.shape[1:], x.dtype))["params"]

  def apply(params: PyTree, x: jax.Array) -> jax.Array:
    return cast(jax.Array, module.apply({"params": params}, x))

  def represent(params: PyTree, x: jax.Array) -> jax.Array:
    hidden = module.apply({"params": params}, x, method="represent")
    return cast(jax.Array, hidden)

  return Model(init, apply, represent)
