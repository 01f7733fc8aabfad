"""Pre-norm decoder-only transformer of one sequence of tokens.

Notation: T positions, L layers, H heads, K channels of a head, D width,
V vocabulary.

The blocks run in one `scan` over parameters stacked [L, ...] under "blocks",
or one after another with parameters under "blocks_0" to "blocks_{L-1}";
`tda.models.layouts` converts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Activation = Callable[[jax.Array], jax.Array]


class Attention(nn.Module):
  """Causal self-attention, softmax in float32: [T, D] -> [T, D]."""

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_TxD: jax.Array) -> jax.Array:
    length, width = x_TxD.shape
    shape = (self.heads, width // self.heads)
    q_TxHxK, k_TxHxK, v_TxHxK = (
      nn.DenseGeneral(shape, dtype=self.dtype, name=name)(x_TxD)
      for name in ("query", "key", "value")
    )
    logits_HxTxT = jnp.einsum("thk,shk->hts", q_TxHxK, k_TxHxK)
    logits_HxTxT = logits_HxTxT.astype(jnp.float32) / shape[1] ** 0.5
    past_TxT = jnp.tril(jnp.ones((length, length), bool))
    logits_HxTxT = jnp.where(past_TxT[None], logits_HxTxT, -jnp.inf)
    weights_HxTxT = nn.softmax(logits_HxTxT).astype(self.dtype)
    mixed_TxHxK = jnp.einsum("hts,shk->thk", weights_HxTxT, v_TxHxK)
    return nn.DenseGeneral(
      width, axis=(-2, -1), dtype=self.dtype, name="output"
    )(mixed_TxHxK)


class Block(nn.Module):
  """Attention and MLP with residuals, as a scan's body: x -> (x, None)."""

  heads: int
  mlp_ratio: int
  activation: Activation
  dtype: Any

  @nn.compact
  def __call__(self, x_TxD: jax.Array) -> tuple[jax.Array, None]:
    width = x_TxD.shape[-1]
    normed_TxD = nn.LayerNorm(dtype=self.dtype, name="norm_attention")(x_TxD)
    attention = Attention(self.heads, self.dtype, name="attention")
    x_TxD = x_TxD + attention(normed_TxD)
    h = nn.LayerNorm(dtype=self.dtype, name="norm_mlp")(x_TxD)
    h = nn.Dense(self.mlp_ratio * width, dtype=self.dtype, name="mlp_in")(h)
    h = nn.Dense(width, dtype=self.dtype, name="mlp_out")(self.activation(h))
    return x_TxD + h, None


class Decoder(nn.Module):
  """Tokens [T] int -> logits [T, V] float32, T at most `max_length`.

  `remat` is "none", "full" (only the blocks' inputs are kept for the backward
  pass) or the name of a policy in `jax.checkpoint_policies`. Parameters are
  float32; `dtype` is that of activations.
  """

  vocab: int
  width: int = 256
  layers: int = 6
  heads: int = 4
  mlp_ratio: int = 4
  max_length: int = 256
  scan_layers: bool = True
  scan_unroll: int = 1
  remat: str = "none"
  activation: Activation = nn.gelu
  dtype: Any = jnp.float32
  tie_embeddings: bool = False

  @nn.compact
  def __call__(self, tokens_T: jax.Array) -> jax.Array:
    self._check(tokens_T)
    embed = nn.Embed(self.vocab, self.width, dtype=self.dtype, name="tokens")
    positions = nn.Embed(
      self.max_length, self.width, dtype=self.dtype, name="positions"
    )
    x_TxD = embed(tokens_T) + positions(jnp.arange(len(tokens_T)))
    x_TxD = self._blocks(x_TxD)
    x_TxD = nn.LayerNorm(dtype=self.dtype, name="norm")(x_TxD)
    if self.tie_embeddings:
      return embed.attend(x_TxD).astype(jnp.float32)
    head = nn.Dense(self.vocab, False, dtype=self.dtype, name="head")
    return head(x_TxD).astype(jnp.float32)

  def _blocks(self, x_TxD: jax.Array) -> jax.Array:
    block: Any = Block
    if self.remat != "none":
      # A scan's body needs no guard against common subexpressions.
      block = nn.remat(
        Block, prevent_cse=not self.scan_layers, policy=_policy(self.remat)
      )
    options = (self.heads, self.mlp_ratio, self.activation, self.dtype)
    if self.scan_layers:
      scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=self.layers,
        unroll=self.scan_unroll,
      )
      return scanned(*options, name="blocks")(x_TxD)[0]
    for layer in range(self.layers):
      x_TxD = block(*options, name=f"blocks_{layer}")(x_TxD)[0]
    return x_TxD

  def _check(self, tokens_T: jax.Array) -> None:
    if self.width % self.heads:
      raise ValueError(
        f"width={self.width} must be a multiple of heads={self.heads}"
      )
    if tokens_T.ndim != 1 or len(tokens_T) > self.max_length:
      raise ValueError(
        f"a Decoder takes one sequence of at most {self.max_length} tokens,"
        f" not an array of shape {tokens_T.shape}; vmap it over a batch"
      )


def _policy(name: str) -> Callable[..., Any] | None:
  if name == "full":
    return None
  policies = [p for p in dir(jax.checkpoint_policies) if p[0] != "_"]
  if name not in policies:
    raise ValueError(
      f"unknown remat {name!r}; choose from none, full, {', '.join(policies)}"
    )
  return getattr(jax.checkpoint_policies, name)
