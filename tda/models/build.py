"""A network for a data set, as pure functions of ONE example."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from tda.data.datasets import Dataset
from tda.models import config
from tda.models.cnn import CNN
from tda.models.decoder import Decoder
from tda.models.mlp import MLP

PyTree = Any

NAMES = ("mlp", "mlp_tanh", "cnn", "decoder")
HEAD = 32  # width of an attention head


class Model(NamedTuple):
  """What training and attribution need of a network."""

  init: Callable[[jax.Array], PyTree]  # key -> params
  # params, x -> outputs [K], of tokens [T, K]
  apply: Callable[[PyTree, jax.Array], jax.Array]


def build(name: str, features: Sequence[int], dataset: Dataset) -> Model:
  """The network `name` with the outputs that `dataset` asks for.

  `features` are widths of hidden layers. Of a "cnn" all but the last are
  channels of convolutions with stride 2, and the last is its dense layer. Those
  of a "decoder", in the style of Llama, are equal: one for each of its layers.
  """
  x = dataset.train["x"]
  if name not in NAMES:
    raise ValueError(f"unknown model {name!r}; choose from {NAMES}")
  if name == "cnn" and (dataset.image_shape is None or len(features) < 2):
    raise ValueError(
      f"a cnn needs pictures and two or more features, not {dataset.name} of"
      f" shape {x.shape[1:]} with features={tuple(features)}; take an mlp"
    )
  if (name == "decoder") != (dataset.kind == "language"):
    raise ValueError(
      f"a decoder is for texts, and {dataset.name} is for {dataset.kind}: take"
      f" another model than {name!r}, or another set"
    )
  outputs = dataset.num_outputs
  module: MLP | CNN | Decoder
  if name == "decoder":
    module = _decoder(features, outputs, x.shape[1])
  elif name == "cnn":
    module = CNN(tuple(features[:-1]), features[-1], outputs)
  else:
    module = MLP((*features, outputs), nn.relu if name == "mlp" else jnp.tanh)

  def init(key: jax.Array) -> PyTree:
    return module.init(key, jnp.zeros(x.shape[1:], x.dtype))["params"]

  def apply(params: PyTree, x: jax.Array) -> jax.Array:
    return cast(jax.Array, module.apply({"params": params}, x))

  return Model(init, apply)


def _decoder(features: Sequence[int], vocab: int, length: int) -> Decoder:
  width = features[0] if len({*features}) == 1 else 0
  if width < HEAD or width % HEAD:
    raise ValueError(
      f"a decoder's features are equal multiples of {HEAD}, one for each layer,"
      f" not {tuple(features)}"
    )
  sizes = config.like(
    "llama",
    vocab,
    width=width,
    layers=len(features),
    heads=width // HEAD,
    mlp_width=2 * width,
    max_length=length,
  )
  return Decoder(sizes)
