"""Causal self-attention of one sequence that may hold several segments.

Notation: T positions, H query heads, G key and value heads, K channels of a
head, R pairs of rotated channels, D width.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tda.models.config import DecoderConfig

PIECES = 4  # that the queries of a sequence are cut in, at most
SHORTEST = 64  # queries of a piece


class Places(NamedTuple):
  """Where the tokens of a sequence stand; the same in every layer."""

  order: jax.Array  # [T] int32, position in the segment
  visible: jax.Array  # [T, T] bool, whether a query (row) sees a key
  cosine: jax.Array  # [T, R] float32
  sine: jax.Array  # [T, R] float32


def places(
  config: DecoderConfig, length: int, segments_T: jax.Array | None
) -> Places:
  """Positions count from 0 in each segment, and no segment sees another.

  A segment is a run of equal numbers; None: the sequence is one segment.
  """
  index_T = jnp.arange(length, dtype=jnp.int32)
  visible_TxT = index_T[:, None] >= index_T[None]
  order_T = index_T
  if segments_T is not None:
    begins_T = segments_T != jnp.roll(segments_T, 1)
    begins_T = begins_T.at[0].set(True)
    start_T = jax.lax.cummax(jnp.where(begins_T, index_T, 0))
    order_T = index_T - start_T
    visible_TxT &= start_T[:, None] == start_T[None]
  exponent_R = jnp.arange(0, config.rotated, 2) / config.rotated
  angle_TxR = order_T[:, None] * config.rotary_base ** -exponent_R[None]
  return Places(order_T, visible_TxT, jnp.cos(angle_TxR), jnp.sin(angle_TxR))


def rotate(x_TxHxK: jax.Array, at: Places) -> jax.Array:
  """Turns channel i of the first half with channel i of the second.

  In float32, on the first 2 R channels; the others pass. (Su et al. 2021,
  eq. 34, with the pairing of GPT-NeoX and of Llama's published weights.)
  """
  pairs = at.cosine.shape[-1]
  x = x_TxHxK.astype(jnp.float32)
  left, right, rest = jnp.split(x, [pairs, 2 * pairs], axis=-1)
  cosine, sine = at.cosine[:, None], at.sine[:, None]
  turned = (left * cosine - right * sine, right * cosine + left * sine, rest)
  return jnp.concatenate(turned, axis=-1).astype(x_TxHxK.dtype)


class Attention(nn.Module):
  """[T, D] -> [T, D], softmax in float32."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x_TxD: jax.Array, at: Places) -> jax.Array:
    config = self.config
    q_TxHxK = self._project("query", config.heads)(x_TxD)
    k_TxGxK = self._project("key", config.groups)(x_TxD)
    v_TxGxK = self._project("value", config.groups)(x_TxD)
    if config.positions == "rotary":
      q_TxHxK, k_TxGxK = rotate(q_TxHxK, at), rotate(k_TxGxK, at)
    share = config.heads // config.groups
    k_TxHxK = jnp.repeat(k_TxGxK, share, axis=1)
    v_TxHxK = jnp.repeat(v_TxGxK, share, axis=1)
    # Heads that lie together are multiplied faster on a CPU.
    q_HxTxK, k_HxTxK, v_HxTxK = (
      x.swapaxes(0, 1) for x in (q_TxHxK, k_TxHxK, v_TxHxK)
    )
    pieces = []
    for begin, end in _pieces(len(x_TxD)):
      mixed = _mixed(
        q_HxTxK[:, begin:end],
        k_HxTxK[:, :end],
        v_HxTxK[:, :end],
        at.visible[begin:end, :end],
      )
      pieces.append(mixed)
    mixed_HxTxK = jnp.concatenate(pieces, axis=1)
    return nn.DenseGeneral(
      x_TxD.shape[-1],
      axis=(-2, -1),
      use_bias=config.output_bias,
      dtype=config.dtype,
      name="output",
    )(mixed_HxTxK.swapaxes(0, 1))

  def _project(self, name: str, heads: int) -> Any:
    return nn.DenseGeneral(
      (heads, self.config.channels),
      use_bias=self.config.qkv_bias,
      dtype=self.config.dtype,
      name=name,
    )


def _mixed(
  q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> jax.Array:
  """[H, Q, K] of queries, and of keys and values that are visible to them."""
  logits_HxQxS = jnp.einsum(
    "hqk,hsk->hqs", q, k, preferred_element_type=jnp.float32
  )
  logits_HxQxS = logits_HxQxS / q.shape[-1] ** 0.5
  logits_HxQxS = jnp.where(visible[None], logits_HxQxS, -jnp.inf)
  weights_HxQxS = nn.softmax(logits_HxQxS).astype(v.dtype)
  return jnp.einsum("hqs,hsk->hqk", weights_HxQxS, v)


def _pieces(length: int) -> list[tuple[int, int]]:
  """Queries that are taken together, with no key after the last of them.

  Four pieces leave 3/8 of the products and of the softmax undone.
  """
  count = max(1, min(PIECES, length // SHORTEST))
  ends = [length * i // count for i in range(count + 1)]
  return list(itertools.pairwise(ends))
