"""Pre-norm decoder-only transformer of one sequence of tokens.

One module for the families of GPT-2, GPT-NeoX, Llama and Mixtral;
`tda.models.config` has the choices and `tda.models.pretrained` the weights.

Notation: T positions, L layers, D width, V vocabulary.

The blocks run in one `scan` over parameters stacked [L, ...] under "blocks",
or one after another with parameters under "blocks_0" to "blocks_{L-1}";
`tda.models.layouts` converts.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from tda.likelihoods import Objective, token_categorical
from tda.models.attention import Attention, Places, places
from tda.models.config import DecoderConfig
from tda.models.feedforward import Experts, feed_forward

PyTree = Any
SITES = {
  "mlp": ("*/mlp_*",),
  "linear": ("blocks*/kernel",),
  "all": None,
}
"""Blocks to attribute to, as `select` of `tda.blocks.trace` has them: the MLPs
as in Grosse et al. (2023), every linear map of the blocks, all parameters."""


class Block(nn.Module):
  """Attention and MLP with residuals, as a scan's body: x -> (x, None)."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x_TxD: jax.Array, at: Places) -> tuple[jax.Array, None]:
    config = self.config
    h_TxD = _norm(config, "norm_attention")(x_TxD)
    attended_TxD = x_TxD + Attention(config, name="attention")(h_TxD, at)
    read_TxD = x_TxD if config.parallel else attended_TxD
    h_TxD = _norm(config, "norm_mlp")(read_TxD)
    if config.experts:
      return attended_TxD + Experts(config, name="experts")(h_TxD), None
    return attended_TxD + feed_forward(config, h_TxD), None


class Decoder(nn.Module):
  """Tokens [T] int -> logits [T, V] float32, T at most `max_length`.

  With `segments` [T], runs of equal numbers, each run is a sequence of its own:
  its positions start at 0 and it sees no other run. vmap it over a batch.
  """

  config: DecoderConfig

  @nn.compact
  def __call__(
    self, tokens_T: jax.Array, segments: jax.Array | None = None
  ) -> jax.Array:
    config = self.config
    _check(config, tokens_T, segments)
    embed = nn.Embed(
      config.vocab, config.width, dtype=config.dtype, name="tokens"
    )
    at = places(config, len(tokens_T), segments)
    x_TxD = embed(tokens_T)
    if config.positions == "learned":
      table = nn.Embed(
        config.max_length, config.width, dtype=config.dtype, name="positions"
      )
      x_TxD = x_TxD + table(at.order)
    x_TxD = _norm(config, "norm")(self._blocks(x_TxD, at))
    if config.tie_embeddings:
      table_VxD = embed.embedding.astype(config.dtype)
      return _product(x_TxD, table_VxD, (((1,), (1,)), ((), ())))
    head = nn.Dense(
      config.vocab,
      use_bias=False,
      dtype=config.dtype,
      dot_general=_product,
      name="head",
    )
    return head(x_TxD)

  def _blocks(self, x_TxD: jax.Array, at: Places) -> jax.Array:
    config = self.config
    block: Any = Block
    if config.remat != "none":
      # A scan's body needs no guard against common subexpressions.
      block = nn.remat(
        Block, prevent_cse=not config.scan_layers, policy=_policy(config.remat)
      )
    if config.scan_layers:
      scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.layers,
        unroll=config.scan_unroll,
      )
      return scanned(config, name="blocks")(x_TxD, at)[0]
    for layer in range(config.layers):
      x_TxD = block(config, name=f"blocks_{layer}")(x_TxD, at)[0]
    return x_TxD


def objective(config: DecoderConfig, reduction: str = "sum") -> Objective:
  """Next-token cross entropy of one packed row (see `tda.data.packing`).

  An example has "x", "y" and "mask" [T], and "segments" [T] unless it is one
  segment; `reduction` is that of `tda.likelihoods.token_categorical`.
  """
  module = Decoder(config)

  def outputs(params: PyTree, example: PyTree) -> jax.Array:
    segments = example.get("segments")
    logits = module.apply({"params": params}, example["x"], segments)
    return cast(jax.Array, logits)

  target = lambda example: (example["y"], example["mask"])

  def segments(example: PyTree) -> jax.Array:
    found = example.get("segments")
    return jnp.ones_like(example["x"]) if found is None else found

  return Objective(outputs, token_categorical(reduction), target, segments)


def shapes(config: DecoderConfig) -> PyTree:
  """Shapes and dtypes of a decoder's parameters."""
  tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
  init = Decoder(config).init
  return jax.eval_shape(init, jax.random.key(0), tokens)["params"]


_product = functools.partial(
  jax.lax.dot_general, preferred_element_type=jnp.float32
)


def _norm(config: DecoderConfig, name: str) -> Callable[..., jax.Array]:
  kind: Any = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[config.norm]
  return kind(epsilon=config.norm_eps, dtype=config.dtype, name=name)


def _policy(name: str) -> Callable[..., Any] | None:
  return None if name == "full" else getattr(jax.checkpoint_policies, name)


def _check(
  config: DecoderConfig, tokens_T: jax.Array, segments: jax.Array | None
) -> None:
  if tokens_T.ndim != 1 or len(tokens_T) > config.max_length:
    raise ValueError(
      f"a Decoder takes one sequence of at most {config.max_length} tokens,"
      f" not an array of shape {tokens_T.shape}; vmap it over a batch"
    )
  if segments is not None and segments.shape != tokens_T.shape:
    raise ValueError(
      f"segments of shape {segments.shape} for tokens of {tokens_T.shape}"
    )
