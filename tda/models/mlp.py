"""Multi-layer perceptron of one example."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn


class MLP(nn.Module):
  """Dense layers, `features` outputs each; no activation after the last.

  Takes an example of any shape (a picture is flattened) and returns
  [features[-1]]: K logits, or [1] for a regression on one target.
  """

  features: tuple[int, ...] = (128, 128, 10)
  activation: Callable[[jax.Array], jax.Array] = nn.relu

  def setup(self) -> None:
    if not self.features:
      raise ValueError("features=() leaves the MLP without an output layer")
    self.layers = [nn.Dense(width) for width in self.features]

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.layers[-1](self.represent(x))

  def represent(self, x: jax.Array) -> jax.Array:
    """The input of the last layer: [features[-2]]."""
    x = jnp.ravel(x)
    for layer in self.layers[:-1]:
      x = self.activation(layer(x))
    return x
