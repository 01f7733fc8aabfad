"""Small convolutional network of one picture."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

DOWNSAMPLINGS = ("stride", "average", "max")


class CNN(nn.Module):
  """Convolutions that halve the picture, a dense layer, the output layer.

  Takes [H, W, C] and returns [outputs]. Each convolution has a square
  `kernel`, zero padding and an activation; `downsampling` names how it halves
  both sides: its own stride, or average or max pooling after the activation.
  """

  channels: tuple[int, ...] = (16, 32)
  hidden: int = 64
  outputs: int = 10
  kernel: int = 3
  downsampling: str = "stride"
  activation: Callable[[jax.Array], jax.Array] = nn.relu

  def setup(self) -> None:
    if self.downsampling not in DOWNSAMPLINGS:
      raise ValueError(
        f"unknown downsampling {self.downsampling!r}; choose from"
        f" {DOWNSAMPLINGS}"
      )
    stride = 2 if self.downsampling == "stride" else 1
    self.convolutions = [
      nn.Conv(width, (self.kernel, self.kernel), stride)
      for width in self.channels
    ]
    self.dense = nn.Dense(self.hidden)
    self.head = nn.Dense(self.outputs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.head(self.represent(x))

  def represent(self, x: jax.Array) -> jax.Array:
    """The input of the output layer: [hidden]."""
    if x.ndim != 3:
      raise ValueError(
        f"a CNN takes one picture [height, width, channels], not {x.shape}"
      )
    for convolution in self.convolutions:
      x = self._pool(self.activation(convolution(x)))
    return self.activation(self.dense(jnp.ravel(x)))

  def _pool(self, x: jax.Array) -> jax.Array:
    if self.downsampling == "stride":
      return x
    pool = nn.avg_pool if self.downsampling == "average" else nn.max_pool
    return pool(x, (2, 2), strides=(2, 2))
